"""Weight files from the network, kept in a cache folder and checked before anything reads them."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator
from pathlib import Path

import torch

from darseg.data.files import storage_error
from darseg.errors import WeightsError

CHUNK = 1 << 20
"""Bytes read at a time from the disk."""

TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""

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
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "weights"
    target = cache_dir / f"{digest[:12]}-{name}"  # files of one name at two addresses do not collide
    if target.is_file() and _file_digest(target).startswith(digest):
        return target
    try:
        urllib.request.Request(url)  # torch leaves an empty file behind if this raises ValueError
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(TIMEOUT):
            # Writes to a file of its own, checks the digest, then renames.
            torch.hub.download_url_to_file(url, str(target), hash_prefix=digest, progress=sys.stderr.isatty())
    except NETWORK_ERRORS as error:
        raise WeightsError(
            f"Cannot download {url}: {error}. Check the address and the connection, or download the file elsewhere and "
            "give its path."
        ) from error
    except OSError as error:
        raise storage_error(error, target) from error
    except RuntimeError as error:
        raise WeightsError(
            f"{url} does not have the expected sha256: {error}. The download was cut short, or the file has changed. "
            "Nothing was kept; try again, or check the address and the digest."
        ) from error
    return target


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Generator[None, None, None]:
    """New connections give up after so long; torch's download takes no time limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
