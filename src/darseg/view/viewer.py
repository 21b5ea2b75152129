"""A local page to look through the unlabeled images of a run, and to mark bad ones.

The server listens only at 127.0.0.1 and writes one file, the run's `bad_images.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn

from darseg.errors import RunError, printable
from darseg.run.browse import LabeledRound, open_round
from darseg.run.data_digest import sources
from darseg.view.app import viewer_app
from darseg.view.connections import WAITING, BoundedProtocol, log_in_one_line
from darseg.view.guard import ADDRESS, draw_token

PORT = 8765
PORTS_TRIED = 20  # from PORT on, if the user asks for no port


def view_run(
    run: Path | str,
    round_index: int | None = None,
    port: int | None = None,
    *,
    open_browser: bool = False,
    pictures: bool = False,
    plain: bool = False,
    say: Callable[[str], object] = print,
    overrides: Sequence[str] = (),
) -> None:
    """Serve the page of a run at 127.0.0.1 until Ctrl-C.

    Args:
        run: the run folder.
        round_index: the round whose pseudo labels are shown; default: the last round that has some.
        port: 0 means any free port; default: 8765, or the next free one.
        open_browser: also open the page in the browser.
        pictures: show images even if they are not those that the run began with.
        plain: show the result's network as it was trained, also if its decisions are aligned.
        say: called with lines that say what is read, and last with the one that contains the address.
        overrides: "data.root=PATH", if the run's data were moved.

    Raises:
        RunError: there are no pseudo labels, or the port is in use.
    """
    round_ = open_round(run, round_index, overrides)
    if pictures:
        round_ = replace(round_, stranger="")
    token = draw_token()
    server = server_of(round_, token, plain)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ctrl_c(lambda: setattr(server, "should_exit", True)))
        sock = stack.enter_context(listen(port))
        url = f"http://{ADDRESS}:{sock.getsockname()[1]}/?token={token}"
        count = len(round_.samples)
        say(printable(sources(round_.run.root, round_.recipe.data.root, round_.samples)))
        if round_.stranger:
            say(printable(f"warning: {round_.stranger}"))
        say(f"{count} unlabeled images, pseudo labels of round {round_.index}: {url}  (Ctrl-C to stop)")
        if open_browser:
            page = stack.enter_context(_leading_to(url))
            webbrowser.open(page.as_uri())  # the socket already listens, so the browser waits
        server.run([sock])


@contextlib.contextmanager
def _leading_to(url: str) -> Generator[Path, None, None]:
    """A page that leads to an address and that only this user can read; it is there within the block.

    The browser is started with its path, because every user of the machine can list the arguments of processes.
    """
    with tempfile.TemporaryDirectory(prefix="darseg_view_") as folder:  # with mode 0700
        page = Path(folder) / "open.html"
        with open(
            page, "x", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)
        ) as file:
            file.write(
                '<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">'
                f'<meta http-equiv="refresh" content="0; url={url}"><a href="{url}">darseg view</a>\n'
            )
        yield page


@contextlib.contextmanager
def _ctrl_c(end: Callable[[], object]) -> Generator[None, None, None]:
    """Call `end` at Ctrl-C, even before uvicorn handles signals. Only the main thread can receive them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: end())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Server(uvicorn.Server):
    """A server whose event loop reports errors in one line."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(log_in_one_line)
        await super().startup(sockets)


def server_of(round_: LabeledRound, token: str, plain: bool = False) -> uvicorn.Server:
    """The server of a round's page, to be run with a socket; see `viewer_app`."""
    config = uvicorn.Config(
        viewer_app(round_, token, plain),
        log_level="error",
        access_log=False,
        server_header=False,
        ws="none",
        http=BoundedProtocol,
        backlog=WAITING,
        timeout_graceful_shutdown=1,
    )
    return _Server(config)


def listen(port: int | None) -> socket.socket:
    """A socket that listens at 127.0.0.1. port: as in `view_run`. Raises RunError if no port is free."""
    ports = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    for number in ports:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((ADDRESS, number))
            sock.listen(WAITING)
        except OSError as error:
            sock.close()
            if port is not None:
                raise RunError(
                    f"Port {port} of {ADDRESS} cannot be used ({error.strerror or error}). Choose another with --port, "
                    "or any free one with --port 0."
                ) from error
            continue
        return sock
    raise RunError(
        f"Ports {ports[0]} to {ports[-1]} of {ADDRESS} are all in use. Choose another with --port, or any free one with "
        "--port 0."
    )
