"""Which requests the viewer answers, and what every answer allows a browser to do."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADDRESS = "127.0.0.1"

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware that refuses requests under another host name and changes by other pages.

    A foreign page could make its own name resolve to 127.0.0.1 (DNS rebinding). Then the browser sends that name as Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                extra = HEADERS | ({} if b"cache-control" in present else {"cache-control": "no-store"})
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in extra.items()),
                ]
            await send(message)

        reason = refusal(scope) if scope["type"] == "http" else None
        app = self.app if reason is None else PlainTextResponse(reason, 403)
        await app(scope, receive, send_with_headers)


def refusal(scope: Scope) -> str | None:
    """Why a request is refused; None if it is not."""
    headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
    hosts = [value for name, value in headers if name == b"host"]
    name, _, port = hosts[0].partition(":") if len(hosts) == 1 else ("", "", "")
    if name not in (ADDRESS, "localhost") or not (port.isdecimal() or not port):
        return f"This server answers only at http://{ADDRESS} and http://localhost."
    origins = [value for name, value in headers if name == b"origin"]
    if scope["method"] not in ("GET", "HEAD") and origins != [f"http://{hosts[0]}"]:
        return "Only this server's own page may change anything here."
    return None
