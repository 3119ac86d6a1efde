"""`gradindex view`: a local page to search in, and the JSON API behind it.

Training text may be anything, and so may who asks: every request passes `Guard`, and no answer to
an error tells of the machine.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable

import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from gradindex.errors import GradindexError, InputError
from gradindex.terminal import visible
from search.engine import Searcher
from search.serve.api import Api, problem_json
from search.serve.guard import SLOWEST_BODY, Guard
from search.serve.jobs import BusyError, Jobs
from search.serve.pages import Pages
from search.serve.reception import Reception, retry_after
from search.serve.request import first_problem
from search.show import html

_LOG = logging.getLogger("gradindex")


def application(
    searcher: Searcher, jobs: Jobs, hosts: set[str], token: str | None = None,
    slowest_body: float = SLOWEST_BODY,
) -> Guard:
    """The ASGI application: pages and API behind their guard, which the last three are for."""
    reception = Reception(searcher, jobs)
    pages, api = Pages(reception, shared=token is not None), Api(reception)

    async def failed(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        status, message = _status_of(error, path)
        if path.startswith(("/api/", "/healthz")):
            answer: Response = problem_json(status, message)
        else:  # `version` is told to nobody who makes errors
            answer = HTMLResponse(html.fill("problem.html", about=pages.about, error=message,
                                            version=""), status, retry_after(status))
        # of Starlette's own errors: which methods are allowed, say
        for name, value in (getattr(error, "headers", None) or {}).items():
            answer.headers[name] = value
        return answer

    # Exception too, or Starlette would answer it by itself, with a traceback where it may
    kinds: tuple[type[Exception], ...] = (
        HTTPException, pydantic.ValidationError, GradindexError, ClientDisconnect, Exception)
    handlers: dict[int | type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        kind: failed for kind in kinds}
    app = Starlette(routes=[*pages.routes(), *api.routes()], exception_handlers=handlers)
    app.router.redirect_slashes = False  # which would answer with an address made of Host
    return Guard(app, hosts, token, slowest_body)


def _status_of(error: Exception, path: str) -> tuple[int, str]:
    """The status and the message that an error is answered with; what isn't expected is logged."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, pydantic.ValidationError):
        return 422, first_problem(error)
    if isinstance(error, InputError):
        return 422, str(error)
    if isinstance(error, BusyError):
        return 503, str(error)
    if isinstance(error, ClientDisconnect):
        return 400, "The request ended early."
    number = secrets.token_hex(4)
    _LOG.error("error %s at %s", number, visible(path), exc_info=error)
    return 500, f"Something failed; the server's log has it under {number}."
