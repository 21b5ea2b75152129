"""`python -m darseg` and the `darseg` command."""

from __future__ import annotations

import signal

import darseg


def main() -> None:
    """Run the command line; Ctrl-C is quiet from the first import (see __init__.py) to the end."""
    from darseg.cli import main as run

    if signal.getsignal(signal.SIGINT) is not darseg._leave:
        run()
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    finally:
        signal.signal(signal.SIGINT, darseg._leave)


if __name__ == "__main__":
    main()
