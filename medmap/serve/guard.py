"""Who may ask: this machine's browser, from this page, with the key that the address on the terminal holds.

A server on 127.0.0.1 is within reach of every page that the browser has open. A name that is made to point here (DNS
rebinding) is known by its Host, a request from another page by its Origin and by the cookie that SameSite keeps back.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY_BYTES = 2**16
"""Of every request that brings no file."""

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' data: blob:; "
    "img-src 'self' data: blob:; worker-src blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer: nothing from elsewhere is loaded, nobody frames the page, no image of a patient stays in a cache."""


class Guard:
    """Lets requests through to an ASGI app, or answers them with a sentence.

    port: of this server; key: what the page's address brings as ?key=, and then a cookie
    """

    def __init__(self, app: App, port: int, key: str) -> None:
        self._app, self._key = app, key
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._origins = {f"http://{host}" for host in self._hosts}
        self._cookie = f"medmap-{port}"  # cookies do not know ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close"})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def sealed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(sealed, *refusal)
        elif scope["path"] == "/" and self._same(self._asked(scope)):
            cookie = f"{self._cookie}={self._key}; HttpOnly; SameSite=Strict; Path=/"
            await _answer(sealed, 303, "", [(b"location", b"/"), (b"set-cookie", cookie.encode())])
        else:
            await self._app(scope, receive, sealed)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and sentence for a request that is not let through."""
        if headers.get("host", "") not in self._hosts:
            return 421, "this server answers only to 127.0.0.1; open the address that medmap serve printed"
        writes = scope["method"] not in ("GET", "HEAD")
        if writes and headers.get("origin") not in self._origins:
            return 403, "a request from another page; open the address that medmap serve printed"
        if not self._same(self._shown(headers)) and not (scope["path"] == "/" and self._same(self._asked(scope))):
            return 403, "no key, or one of an earlier start; open the address that medmap serve printed, with its key"
        if writes and not scope["path"].endswith("/files"):
            length = headers.get("content-length", "")
            if not length.isascii() or not length.isdigit() or int(length) > MOST_BODY_BYTES:
                return 413, f"a request of this kind has a length, of at most {MOST_BODY_BYTES} bytes"
        return None

    def _asked(self, scope: Scope) -> str:
        return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0]

    def _shown(self, headers: dict[str, str]) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _same(self, key: str) -> bool:
        return secrets.compare_digest(key.encode(), self._key.encode())


async def _answer(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = text.encode()
    plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*plain, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
