"""What every request passes before a route sees it: who may ask, from where, and how much.

- Host must be one of the server's own names and ports: another name that leads here is DNS
  rebinding. Origin, where a browser sends one, must be one of the same.
- Off the loopback a token is asked for, as the password of HTTP Basic or as Bearer.
- Another site's page can't make a browser use the API (Sec-Fetch-Site), and a search page that is
  opened from another site waits for a click (`trusted`).
- Bodies are cut off while they come in: by size and by time.
"""

import asyncio
import base64
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from gradindex.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_TOKEN = 22  # characters, for 128 bits
FEWEST_LETTERS = 8  # different ones; so many random digits or letters have more
LARGEST_BODY = 1 << 19  # bytes
SLOWEST_BODY = 10.0  # seconds
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
          "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
          "require-trusted-types-for 'script'; trusted-types 'none'")
HEADERS = [(name.encode(), value.encode()) for name, value in {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin", "cache-control": "no-store",
}.items()]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def token_for(host: str, token: str | None) -> str | None:
    """The token to ask for: none on the loopback, else the given one or a new one.

    Raises InputError for one that can be guessed.
    """
    if token is not None and (len(token) < SHORTEST_TOKEN or len(set(token)) < FEWEST_LETTERS):
        raise InputError(
            f"GRADINDEX_TOKEN has {len(token)} characters, {len(set(token))} different ones; "
            f"expected at least {SHORTEST_TOKEN} random ones, such as `openssl rand -base64 24` "
            "gives.")
    return token if token is not None or host in LOOPBACK else secrets.token_urlsafe(24)


def host_names(host: str, port: int, extra: Iterable[str] = ()) -> set[str]:
    """The values of Host by which a server on that address is asked for; `extra` are further names.
    """
    names = {"127.0.0.1", "localhost", "[::1]"} if host in LOOPBACK else \
        {"127.0.0.1", "localhost", bracketed(host), socket.gethostname(), socket.getfqdn()}
    with_port = {f"{name}:{port}" for name in names}
    if port in (80, 443):  # which browsers leave out
        with_port |= names
    return with_port | set(extra) | {f"{name}:{port}" for name in extra if ":" not in name}


def bracketed(host: str) -> str:
    """An address as URLs have it."""
    return f"[{host}]" if ":" in host else host


class Guard:
    """An ASGI application that lets requests through to another.

    `hosts` are the values of Host that are this server; `token`, where it isn't None, must come
    with every request, and a body within `slowest_body` seconds.
    """

    def __init__(
        self, app: Any, hosts: set[str], token: str | None = None,
        slowest_body: float = SLOWEST_BODY,
    ):
        self.app, self.token, self.slowest_body = app, token, slowest_body
        self.hosts = {host.lower() for host in hosts}
        self.origins = {f"{scheme}://{host}" for host in self.hosts for scheme in ("http", "https")}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        # the server's own, at its start and its end: nobody outside can send it
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSocket here
            await send({"type": "websocket.close", "code": 1008})
            return
        refused = self._refused(scope)
        if refused is not None:
            await _answer(send, *refused)
            return
        scope.setdefault("state", {})["trusted"] = self._trusted(scope)

        # on every answer, errors of Starlette's own among them
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self.app(scope, _Body(receive, self.slowest_body), guarded)

    def _refused(self, scope: Message) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        # before anything else: under a name that isn't ours a browser takes us for another site
        hosts = _all(scope, b"host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 403, "This server does not go by that name (Host). Use the address that it " \
                "printed, or start it with `gradindex view --name NAME:PORT`.", []
        origins = _all(scope, b"origin")
        if len(origins) > 1 or (origins and origins[0].lower() not in self.origins):
            return 403, "Requests from other sites are refused (Origin).", []
        # a link from elsewhere may lead to a page, which then waits for a click; not to the API
        api = scope["path"].startswith("/api/") or scope["method"] not in ("GET", "HEAD")
        if api and not _same(_all(scope, b"sec-fetch-site")):
            return 403, "Requests from other sites are refused (Sec-Fetch-Site).", []
        if self.token is not None and not self._knows(scope):
            return 401, "A token is needed: the password that the server printed.", [
                (b"www-authenticate", b'Basic realm="gradindex", charset="UTF-8"')]
        # what is told at once to be too long needn't be read; what lies about it is cut off later
        length = _all(scope, b"content-length")
        if length and not (length[0].isascii() and length[0].isdigit()
                           and int(length[0][:20]) <= LARGEST_BODY):
            return 413, f"A body may have {LARGEST_BODY:,} bytes.", []
        return None

    def _knows(self, scope: Message) -> bool:
        assert self.token is not None
        for header in _all(scope, b"authorization"):
            kind, _, value = header.partition(" ")
            if kind.lower() == "basic":
                try:
                    value = base64.b64decode(value, validate=True).decode().partition(":")[2]
                except ValueError:
                    continue
            elif kind.lower() != "bearer":
                continue
            # in the same time for every wrong token: how long it takes must not tell what is right
            if secrets.compare_digest(value.encode(), self.token.encode()):
                return True
        return False

    def _trusted(self, scope: Message) -> bool:
        """Whether this page was asked for by one of its own, or typed in."""
        # older browsers send no Sec-Fetch-Site, but the address of the page a link stood on
        site, referer = _all(scope, b"sec-fetch-site"), _all(scope, b"referer")
        if site:
            return _same(site)
        return bool(referer) and any(
            referer[0].lower().startswith(origin + "/") for origin in self.origins)


def _all(scope: Message, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _same(sites: list[str]) -> bool:
    """Whether Sec-Fetch-Site, where it is sent, says a page of ours or the address bar."""
    return all(site in ("same-origin", "none") for site in sites)


class _Body:
    """`receive` of a request; raises HTTPException once its body is too long or too slow."""

    def __init__(self, receive: Receive, seconds: float):
        self._receive, self._size = receive, 0
        self._until = asyncio.get_running_loop().time() + seconds
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()  # waits for the client to leave
        # one deadline for all of it: a limit on each piece would let a drip go on for ever
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "The body did not come in time.",
                                {"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > LARGEST_BODY:
                raise HTTPException(413, f"A body may have {LARGEST_BODY:,} bytes.")
        return message


async def _answer(
    send: Send, status: int, message: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps({"error": message}).encode()
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        *HEADERS, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
