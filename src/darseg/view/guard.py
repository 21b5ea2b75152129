"""Which requests the viewer answers, and what every answer allows a browser to do."""

from __future__ import annotations

import logging
import secrets
from urllib.parse import parse_qs

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
SCHEME = "token "
"""Begins the Authorization header of requests that have the token there instead of in the address."""

_log = logging.getLogger("uvicorn.error")


def draw_token() -> str:
    """A new secret that every request must hold, because other users of the machine reach the server.

    It stands in the address that is printed. It is no cookie: browsers send those of 127.0.0.1 to the servers of all
    users, whatever their port.
    """
    return secrets.token_urlsafe(24)


class Guard:
    """ASGI middleware that refuses requests without token, under other host names, and by other pages.

    A foreign page could make its own name resolve to 127.0.0.1 (DNS rebinding). Then the browser sends that name as Host.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

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

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await (self._answer(scope) or self.app)(scope, receive, send_with_headers)
        except (
            Exception
        ) as error:  # a fault of the viewer, which the app has answered: one line, no traceback
            _log.error(
                "%s %s failed: %s", scope["method"], ascii(scope["path"])[1:-1][:200], in_one_line(error)
            )

    def _answer(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that the viewer itself does not get to see; None if it does."""
        reason = refusal(scope)
        if reason is None and not secrets.compare_digest(_token(scope).encode(), self.token.encode()):
            reason = (
                "This address has no valid token. Open the whole address that darseg view printed when it was started; "
                "every start has a new token."
            )
        return None if reason is None else PlainTextResponse(reason, 403)


def in_one_line(error: Exception) -> str:
    """An error's type and message without line breaks and control characters."""
    return f"{type(error).__name__}: {error}"[:300].encode("unicode_escape").decode("ascii")


def _token(scope: Scope) -> str:
    """The token that a request has, in its Authorization header or in its address; empty if it has none."""
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        if name == b"authorization" and text.lower().startswith(SCHEME):
            return text[len(SCHEME) :].strip()
    try:
        query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=50)
    except ValueError:
        return ""
    return query.get("token", [""])[0]


def refusal(scope: Scope) -> str | None:
    """Why a request is refused, whatever its token; None if it is not."""
    headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
    hosts = [value for name, value in headers if name == b"host"]
    name, _, port = hosts[0].partition(":") if len(hosts) == 1 else ("", "", "")
    if name not in (ADDRESS, "localhost") or not (port.isdecimal() or not port):
        return f"This server answers only at http://{ADDRESS} and http://localhost."
    fetched = dict(headers)
    if fetched.get(b"sec-fetch-site") in ("cross-site", "same-site") and not _is_followed_link(
        scope, fetched
    ):
        return "Only this server's own page may request anything here."
    origins = [value for name, value in headers if name == b"origin"]
    if scope["method"] not in ("GET", "HEAD") and origins != [f"http://{hosts[0]}"]:
        return "Only this server's own page may change anything here."
    return None


def _is_followed_link(scope: Scope, headers: dict[bytes, str]) -> bool:
    """Whether the reader has followed a link to the page, as from the output of a notebook."""
    return (
        scope["method"] == "GET"
        and scope["path"] == "/"
        and headers.get(b"sec-fetch-mode") == "navigate"
        and headers.get(b"sec-fetch-dest") == "document"
    )
