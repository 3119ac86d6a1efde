"""How the page is served: address, names, token, and connections that can't wait for ever."""

import json
import secrets
import socket
import sys
from collections.abc import Iterable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gradindex.errors import InputError
from search.engine import Searcher
from search.serve.guard import HEADERS, Guard
from search.serve.jobs import Jobs
from search.serve.server import application

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORTS = range(8765, 8785)  # tried in order where none was asked for
SHORTEST_TOKEN = 22  # characters, for 128 bits
FEWEST_LETTERS = 8  # different ones; so many random digits or letters have more
SLOWEST_REQUEST = 15.0  # seconds; a connection without a whole request ends before twice this
TURN = 0.0005  # seconds that a thread keeps the interpreter while others wait for it
MOST_CONNECTIONS = 512  # half of the usual limit on open files


def names(host: str, port: int, others: Iterable[str] = ()) -> set[str]:
    """The values of Host by which a server on that address is asked for."""
    own = {"127.0.0.1", "localhost", "[::1]"} if host in LOOPBACK else \
        {"127.0.0.1", "localhost", bracketed(host), socket.gethostname(), socket.getfqdn()}
    if port in (80, 443):  # which browsers leave out
        own |= {f"{name}:{port}" for name in own}
    else:
        own = {f"{name}:{port}" for name in own}
    return own | set(others) | {f"{name}:{port}" for name in others if ":" not in name}


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens. Raises InputError where the address or the port can't be had."""
    problem: OSError | None = None
    for one in PORTS if port is None else [port]:
        try:
            family = socket.getaddrinfo(host, one, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, one), family=family)
        except OSError as error:
            problem = error
    asked = f"ports {PORTS[0]} to {PORTS[-1]}" if port is None else f"--port {port}"
    raise InputError(f"{host}, {asked}: {problem}. Give another --port or --host.")


def token_for(host: str, given: str | None) -> str | None:
    """The token to ask for: none on the loopback, else the given one or a new one.

    Raises InputError for one that can be guessed.
    """
    if given is not None and (len(given) < SHORTEST_TOKEN or len(set(given)) < FEWEST_LETTERS):
        raise InputError(
            f"GRADINDEX_TOKEN has {len(given)} characters, {len(set(given))} different ones; "
            f"expected at least {SHORTEST_TOKEN} random ones, such as `openssl rand -base64 24` "
            "gives.")
    return given if given is not None or host in LOOPBACK else secrets.token_urlsafe(24)


def server(
    searcher: Searcher, hosts: set[str], token: str | None, train_sequences: int | None = None
) -> uvicorn.Server:
    """A server to `run`; `token` is asked of everybody, if it isn't None.

    Python's threads take turns ten times as often from here on, so that a search or a page in the
    making doesn't hold up every other answer.
    """
    sys.setswitchinterval(TURN)
    jobs = Jobs(searcher, train_sequences)
    site = application(searcher, jobs, {"hosts": hosts, "token": token})
    jobs.start()
    return uvicorn.Server(configuration(site))


class Connection(H11Protocol):
    """uvicorn's connection, which by itself waits for ever for a request's head."""

    patience = SLOWEST_REQUEST

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        self._look(None)

    def _look(self, before: Any) -> None:
        """Close where no request has begun, or none has become whole, since the look before."""
        if self.transport.is_closing():
            return
        now = (self.cycle, self.conn.their_state)
        if now == before and now[1] in (h11.IDLE, h11.SEND_BODY):
            self.transport.abort()
        else:
            self.loop.call_later(self.patience, self._look, now)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is not HTTP, with our headers."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps({"error": "That is not a request of HTTP."}).encode()
        for event in (
            h11.Response(status_code=400, headers=[
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()), (b"connection", b"close"), *HEADERS,
            ]), h11.Data(data=body), h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def configuration(site: Guard, connection: type[Connection] = Connection) -> uvicorn.Config:
    """How uvicorn serves the site: it says nothing of itself, and believes no proxy."""
    return uvicorn.Config(
        site, http=connection, log_level="warning", lifespan="off", ws="none", server_header=False,
        date_header=False, timeout_keep_alive=15, access_log=False, proxy_headers=False,
        timeout_graceful_shutdown=2, h11_max_incomplete_event_size=1 << 16)


def bracketed(host: str) -> str:
    """An address as URLs have it."""
    return f"[{host}]" if ":" in host else host
