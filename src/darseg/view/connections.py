"""Connections to the viewer: limited in number, and closed if their request does not arrive."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from darseg.view.guard import in_one_line

MOST = 24  # connections at a time; a browser opens 6
PATIENCE = 5.0  # seconds within which a whole request must arrive
WAITING = 8  # connections that the system keeps until they are accepted

_log = logging.getLogger("uvicorn.error")


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with limits on time and number; on its own it has none of either."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > MOST:
            idle = [connection for connection in self.connections if not _is_busy(connection)]
            longest = min(idle, key=_since, default=self)
            longest.transport.abort()
            self.connections.discard(longest)  # the system closes it a moment later

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if _is_busy(self):
            self._stop_waiting()
        elif self._timer is None and self.timeout_keep_alive_task is None:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not _is_busy(self) and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._wait()  # the next request has begun and is not whole yet

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        """Give the client time for its request, however few bytes it sends in between."""
        self._stop_waiting()
        self._timer = self.loop.call_later(PATIENCE, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _is_busy(connection: Any) -> bool:
    """Whether a whole request is being answered."""
    cycle = connection.cycle
    return cycle is not None and not cycle.response_complete and not cycle.more_body


def _since(connection: Any) -> float:
    """When an idle connection gives up: the one that has waited longest comes first."""
    timer = connection._timer or connection.timeout_keep_alive_task
    return timer.when() if timer else 0.0


def log_in_one_line(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's handler of errors that nothing caught: a line instead of a traceback."""
    error = context.get("exception")
    _log.error("%s%s", context.get("message"), f" ({in_one_line(error)})" if error else "")
