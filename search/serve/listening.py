"""Where the page is served: a socket, and the server on it."""

import socket
import sys

import uvicorn

from gradindex.errors import InputError
from search.engine import Searcher
from search.serve.connections import configuration
from search.serve.jobs import Jobs
from search.serve.server import application

PORTS = range(8765, 8785)  # tried in order where none was asked for
TURN = 0.0005  # seconds that a thread keeps the interpreter while others wait for it


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens. Raises InputError where the address or the port can't be had."""
    # the first free one, so that a second page doesn't need a --port
    problem: OSError | None = None
    for number in PORTS if port is None else [port]:
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, number), family=family)
        except OSError as error:
            problem = error
    ports = f"ports {PORTS[0]} to {PORTS[-1]}" if port is None else f"--port {port}"
    raise InputError(f"{host}, {ports}: {problem}. Give another --port or --host.")


def make_server(
    searcher: Searcher, hosts: set[str], token: str | None, train_sequences: int | None = None
) -> uvicorn.Server:
    """A server to `run`; `token` is asked of everybody, if it isn't None.

    Python's threads take turns ten times as often from here on, so that a search or a page in the
    making doesn't hold up every other answer.
    """
    sys.setswitchinterval(TURN)  # for the whole process: there is no other way
    jobs = Jobs(searcher, train_sequences)
    site = application(searcher, jobs, hosts, token)
    jobs.start()
    return uvicorn.Server(configuration(site))
