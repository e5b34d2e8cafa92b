"""Who may ask: only the browser that was given the token, from this machine, with requests of moderate size.

Every request passes here before anything looks at it:
  Host      a name that stands for this machine; so no other name that was made to point here (DNS rebinding)
  Origin    that of the studio, and required of whatever changes something
  token     once in the opened address, then in a cookie that other sites cannot make a browser send
  body      at most `MOST` bytes
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

__all__ = ["MOST", "Guard"]

MOST = 2_000_000
"""Bytes of a form; a recipe has at most one million."""
_FIELDS = 5_000

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer: no script but the studio's own files runs, whatever a page shows."""

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware; hands the read body on as scope['state']['form'], name -> values."""

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app, self.token, self.cookie = app, token, f"weightsmith-{port}"
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there is no other conversation to have
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is None and "token" in (query := dict(parse_qsl(scope["query_string"].decode("latin-1")))):
            await self._welcome(scope, query, send)
            return
        if refused is None and not self._known(headers.get("cookie", "")):
            refused = 403, "Open the address that weightsmith studio printed: it holds the token."
        body = b""
        if refused is None and scope["method"] == "POST":
            body_or_none = await _body(headers, receive)
            if body_or_none is None:
                refused = 413, f"The form is larger than {MOST:,} bytes."
            else:
                body = body_or_none
        if refused is not None:
            await _answer(send, *refused)
            return
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_FIELDS)
        except ValueError:  # not UTF-8, or too many fields
            await _answer(send, 400, "The form cannot be read.")
            return
        form: dict[str, list[str]] = {}
        for name, value in pairs:
            form.setdefault(name, []).append(value)
        scope.setdefault("state", {})["form"] = form
        await self.app(scope, receive, _with_headers(send))

    def _refused(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if host not in self.hosts:
            return 421, "This is not a name of the studio; open the address that it printed."
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "The request comes from another site."
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "Only GET and POST are answered."
        if scope["method"] == "POST" and origin is None:
            return 403, "A request that changes something has to say where it comes from (Origin)."
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "The request comes from another site."
        return None

    def _known(self, cookies: str) -> bool:
        try:
            found = SimpleCookie(cookies).get(self.cookie)
        except CookieError:
            return False
        return found is not None and secrets.compare_digest(found.value.encode(), self.token.encode())

    async def _welcome(self, scope: Mapping[str, Any], query: Mapping[str, str], send: Send) -> None:
        """Take the token out of the address into a cookie."""
        if not secrets.compare_digest(query["token"].encode(), self.token.encode()):
            await _answer(send, 403, "This token is not that of the running studio; open the address that it printed.")
            return
        rest = urlencode([(name, value) for name, value in query.items() if name != "token"])
        path = "/" + str(scope["path"]).lstrip("/")  # '//elsewhere' would be another site
        place = path.encode("ascii", "replace").decode() + (f"?{rest}" if rest else "")
        cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        await _answer(send, 303, "", {"location": place, "set-cookie": cookie})


async def _body(headers: Mapping[str, str], receive: Receive) -> bytes | None:
    """The body of a request; None if it is too large, of which no more is read than that."""
    announced = headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > MOST:
        return None
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > MOST:
            return None
        if not message.get("more_body", False):
            return body


async def _answer(send: Send, status: int, text: str, more: Mapping[str, str] | None = None) -> None:
    headers = {**_HEADERS, "content-type": "text/plain; charset=utf-8", **(more or {})}
    listed = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": text.encode()})


def _with_headers(send: Send) -> Send:
    async def sending(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            more = [(n.encode(), v.encode()) for n, v in _HEADERS.items() if n.encode() not in own]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sending
