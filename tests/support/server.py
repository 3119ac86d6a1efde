"""The server in a thread of this process.

`Running.ask` holds for every answer of every test that the security headers are there, and that no
error tells of the machine.
"""

import http.client
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlencode

import starlette
import torch
import transformers
import uvicorn

import gradindex
from gradindex.results import Result
from search.engine import Searcher
from search.serve import guard, jobs, listening, server
from search.serve.connections import Connection, configuration
from search.serve.guard import host_names
from support.waiting import HANG, until

JSON = {"Content-Type": "application/json"}
QUERY = {"prompt": "The apple number 3 grows by", "completion": " the garden."}
OWN = {"Sec-Fetch-Site": "none"}  # typed into the address bar
PAGE = "/search?" + urlencode(QUERY)
ROUTES = ("/", PAGE, "/map/0/0", "/download/0.json", "/static/style.css", "/static/nothing",
          "/healthz", "/api/schema", "/api/result/0", "/api/result/0/events", "/api/sequence/0",
          "/nothing")
TOKEN = "3c0Vt2mQy8HkZrWn5pLxAe"
VERSIONS = "|".join(re.escape(one) for one in (
    gradindex.__version__, uvicorn.__version__, starlette.__version__, torch.__version__,
    transformers.__version__, ".".join(map(str, sys.version_info[:3])), "uvicorn", "starlette"))
LEAK = re.compile(rf"(?<![\w/<])/(?:home|tmp|root|usr|var|work|opt|etc|private)/|Traceback|File \""
                  rf"|site-packages|\.py\b|0x[0-9a-f]{{6}}|(?<![\w.])(?:{VERSIONS})(?![\w.])")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


class Unhurried(Connection):
    """For clients on a busy machine."""

    patience = HANG


class Running:
    """A server in a thread, on a free port of the loopback. Without `work` no search begins."""

    def __init__(
        self, searcher: Searcher, token: str | None = None, work: bool = True,
        slowest_body: float = HANG, connection: type[Connection] = Unhurried,
        **settings: Any,
    ):
        listener = listening.listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.jobs = jobs.Jobs(searcher, **settings)
        hosts = host_names("127.0.0.1", self.port)
        site = server.application(searcher, self.jobs, hosts, token, slowest_body)
        self.server = uvicorn.Server(configuration(site, connection))
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        if work:
            self.jobs.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None,
        host: str | None = None,
    ) -> Answer:
        """One request on its own connection; a `body` that isn't bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {**JSON, **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{self.port}'}",
                 *(f"{name}: {value}" for name, value in (headers or {}).items())]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        return self.raw("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")
                        + (body or b""), method)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG)

    def raw(self, request: bytes, method: str = "GET") -> Answer:
        """The answer to bytes sent as they are."""
        with self.connect() as connection:
            connection.sendall(request)
            return self.read(connection, method)

    def read(self, connection: socket.socket, method: str = "GET") -> Answer:
        """The answer on a connection, checked for what holds of every answer."""
        found = http.client.HTTPResponse(connection, method=method)
        found.begin()
        answer = Answer(found.status, {name.lower(): value for name, value in found.getheaders()},
                        found.read())
        for name, value in guard.HEADERS:
            assert answer.headers[name.decode()] == value.decode()
        assert "server" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control")]
        if answer.status >= 400:
            shown = answer.text.replace('/static/page.js', "")
            assert not LEAK.search(shown), shown
        return answer

    def search(self, body: dict[str, Any]) -> Any:
        """A search's result, once it is there."""
        started = self.ask("POST", "/api/search", body=body)
        assert started.status == 202, started.text
        return self.wait(started.json["id"]).json

    def wait(self, job: str) -> Answer:
        """The answer of a job that ended."""
        def ended() -> Answer | None:
            found = self.ask("GET", f"/api/result/{job}")
            return None if found.status == 202 else found

        return cast(Answer, until(ended))

    def events(self, job: str) -> Iterator[tuple[str, Any]]:
        """The server-sent events of a job until its end."""
        with self.connect() as connection:
            connection.sendall(f"GET /api/result/{job}/events HTTP/1.1\r\nHost: 127.0.0.1:"
                               f"{self.port}\r\nConnection: close\r\n\r\n".encode())
            found = http.client.HTTPResponse(connection)
            found.begin()
            assert found.getheader("content-type", "").startswith("text/event-stream")
            name = ""
            for line in found:
                if line.startswith(b"event: "):
                    name = line[7:-1].decode()
                elif line.startswith(b"data: "):
                    yield name, json.loads(line[6:])


def same(found: Any, expected: Result) -> None:
    """A result's JSON is that of another, but for the seconds it took."""
    other = json.loads(expected.to_json())
    for one in (found, other):
        assert set(one.pop("seconds")) >= {"gradient", "scan"}
    assert found == other
