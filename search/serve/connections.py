"""Connections that can't wait for ever, and how uvicorn serves them."""

import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from search.serve.guard import HEADERS, Guard

SLOWEST_REQUEST = 15.0  # seconds; a connection without a whole request ends before twice this
MOST_CONNECTIONS = 512  # half of the usual limit on open files


class Connection(H11Protocol):
    """uvicorn's connection, which by itself waits for ever for a request's head."""

    patience = SLOWEST_REQUEST

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)  # which counts it
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        self._look(None)

    def _look(self, before: Any) -> None:
        """Close where no request has begun, or none has become whole, since the look before."""
        if self.transport.is_closing():
            return
        # the request under way, and how far HTTP's own states have come with what the client sends
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
