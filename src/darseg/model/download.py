"""Weight files from the network, kept in a cache folder and checked before anything reads them."""

from __future__ import annotations

import hashlib
import http.client
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from darseg.data.files import check_regular, open_file, remove_leftovers, write_whole_with
from darseg.errors import WeightsError

CHUNK = 1 << 20
"""Bytes read at a time from the disk."""

TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""

LONGEST = 7200.0
"""Seconds that a download may take."""

LARGEST = 8 << 30
"""Bytes of a download at most."""

LONGEST_NAME = 60
"""Characters of an address that name its file in the cache: at most 240 bytes."""

SHORTEST_DIGEST = 16
"""Hex digits, unless over https: a file with 8 given digits can be made in minutes."""

NETWORK_ERRORS = (
    urllib.error.URLError,  # includes HTTPError, and files that are missing at file:// addresses
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    ValueError,  # not an address
)


def fetch(url: str, sha256: str, cache_dir: Path) -> Path:
    """The file behind `url`, downloaded to `cache_dir` unless it is there with the digest `sha256`.

    Several processes may fetch the same file at once.

    Args:
        sha256: the digest or its beginning: torchvision's file names hold the first 8 digits.

    Raises WeightsError if it cannot be downloaded or has another digest (then nothing is kept), StorageError if it cannot
    be written.
    """
    digest = sha256.lower()
    target = cache_dir / f"{digest[:12]}-{_name_of(url)}"  # files of one name at two addresses do not collide
    if target.is_file() and _file_digest(target).startswith(digest):
        return target
    if len(digest) < SHORTEST_DIGEST and not url.lower().startswith("https:"):
        raise WeightsError(
            f"{url}: the sha256 has {len(digest)} hex digits, and without https at least {SHORTEST_DIGEST} are needed. "
            "Give more digits, or an https address."
        )
    remove_leftovers(cache_dir)
    write_whole_with(target, lambda aside: _download(url, aside, digest))
    return target


def _download(url: str, out: Path, digest: str) -> None:
    """Write what is behind `url` to `out`. Raises WeightsError, or OSError if it cannot be written."""
    try:
        if urllib.parse.urlsplit(url).scheme == "file":
            check_regular(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers={"User-Agent": "darseg"}), timeout=TIMEOUT
        )
    except (*NETWORK_ERRORS, OSError) as error:
        raise _unreachable(url, error) from error
    with response, open(out, "wb") as file:
        if len(digest) < SHORTEST_DIGEST and not response.geturl().lower().startswith("https:"):
            raise WeightsError(
                f"{url} leads to {response.geturl()}, which is not https. Give at least {SHORTEST_DIGEST} hex digits "
                "of the sha256."
            )
        stated = response.headers.get("Content-Length", "")
        size = int(stated) if stated.isdecimal() and len(stated) < 20 else None
        if size is not None and size > LARGEST:
            raise _too_large(url, f"{size:,} bytes")
        actual = hashlib.sha256()
        for block in _blocks(url, response, size):
            actual.update(block)
            file.write(block)
    if not actual.hexdigest().startswith(digest):
        raise WeightsError(
            f'{url} does not have the expected sha256: invalid hash value (expected "{digest}", got '
            f'"{actual.hexdigest()}"). The download was cut short, or the file has changed. Nothing was kept; try again, '
            "or check the address and the digest."
        )


def _blocks(url: str, response: Any, size: int | None) -> Iterator[bytes]:
    """What a server sends, with its progress on a terminal. size: as it says. Raises WeightsError."""
    began, received = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(_name_of(url), total=size)
        while True:
            try:
                block = response.read1(
                    CHUNK
                )  # what has arrived, so that a server that sends little by little is noticed
            except NETWORK_ERRORS as error:
                raise _unreachable(url, error) from error
            if not block:
                return
            received += len(block)
            if received > LARGEST:
                raise _too_large(url, f"more than {LARGEST:,} bytes")
            if (seconds := time.monotonic() - began) > LONGEST:
                raise WeightsError(
                    f"{url} has sent {received:,} bytes in {seconds:,.0f} s; a download may take {LONGEST:,.0f} s. "
                    "Download the file elsewhere and give its path."
                )
            progress.update(task, completed=received)
            yield block


def _name_of(url: str) -> str:
    """The name of the file at an address, as any file system and terminal takes it."""
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "weights"
    return re.sub(r"[^\w.+ -]", "_", name)[-LONGEST_NAME:]


def _unreachable(url: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"Cannot download {url}: {error}. Check the address and the connection, or download the file elsewhere and "
        "give its path."
    )


def _too_large(url: str, size: str) -> WeightsError:
    return WeightsError(
        f"{url} has {size}; {LARGEST:,} are the most that darseg downloads. Check the address, or download the file "
        "elsewhere and give its path."
    )


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
