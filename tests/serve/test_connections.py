"""Connections that send nothing, too many of them, and what is not HTTP."""

import contextlib
import http.client
import socket
from collections.abc import Callable
from typing import Any

import pytest

from search.serve import connections
from support.server import QUERY, Running, Unhurried
from support.waiting import until


def test_connections_that_send_no_request_are_closed(start: Callable[..., Running]) -> None:
    class Watched(Unhurried):
        looks = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            latest.append(self)

        def _look(self, before: Any) -> None:
            super()._look(before)
            self.looks += 1

    latest: list[Watched] = []

    def hurry() -> None:
        """From now on the latest connection is looked at every 0.2 s."""
        latest[-1].patience = 0.2
        latest[-1].loop.call_soon_threadsafe(latest[-1]._look, None)

    running = start(work=False, connection=Watched)
    for sent in (b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"\x16\x03\x01\x02"):
        latest.clear()
        with running.connect() as connection:
            connection.sendall(sent)
            until(lambda: latest)
            hurry()
            while connection_open(connection):
                pass
    # an answered request doesn't buy more time for a body that never comes
    with running.connect() as connection:
        connection.sendall(f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n"
                           "Content-Length: 1000\r\n\r\n".encode())
        assert running.read(connection, "POST").status == 405
        hurry()
        while connection_open(connection):
            pass
    # a stream that is followed is not a connection without a request
    job = running.ask("POST", "/api/search", body=QUERY).json["id"]
    followed = running.events(job)
    assert next(followed)[1]["state"] == "waiting"
    hurry()
    until(lambda: latest[-1].looks > 5)
    running.jobs.start()
    assert [name for name, _ in followed][-1] == "end"


def test_only_so_many_connections_are_held(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 10)
    running = start(work=False)
    with contextlib.ExitStack() as held:
        for _ in range(10):
            held.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        with running.connect() as one_more:
            assert not connection_open(one_more)

    def answered() -> bool:
        try:
            return running.ask("GET", "/healthz").status == 200
        except (ConnectionError, http.client.BadStatusLine):  # the others aren't gone yet
            return False

    until(answered)


def connection_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1 << 16) != b""
    except ConnectionResetError:
        return False


def test_what_is_not_http_is_refused_with_our_headers(running: Running) -> None:
    host = f"Host: 127.0.0.1:{running.port}\r\n"
    for request in (
        "nonsense\r\n\r\n", "GET /\r\n\r\n", f"GET / HTTP/x\r\n{host}\r\n",
        f"GET / HTTP/1.1\r\n{host} folded\r\n: x\r\n\r\n", f"GET  / HTTP/1.1\r\n{host}\r\n",
        f"GET /\xe9 HTTP/1.1\r\n{host}\r\n", f"GET / HTTP/1.1\r\n{host}X: \x00\r\n\r\n",
        f"POST / HTTP/1.1\r\n{host}Transfer-Encoding: gzip\r\n\r\n",
    ):
        answer = running.raw(request.encode("latin-1"))
        assert answer.status in (400, 405) and list(answer.json) == ["error"], request[:50]
    for endless in (f"GET / HTTP/1.1\r\n{host}X: ", "GET /"):
        with contextlib.suppress(ConnectionError):  # the answer may be lost to what was still sent
            assert running.raw(endless.encode() + b"x" * 1_000_000).status == 400
    upgrade = f"GET /healthz HTTP/1.1\r\n{host}Connection: Upgrade, close\r\n" \
              "Upgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" \
              "Sec-WebSocket-Version: 13\r\n\r\n"
    assert running.raw(upgrade.encode()).status == 200  # plain HTTP: there is no WebSocket
