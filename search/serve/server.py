"""`gradindex view`: a local page to search in, and the JSON API behind it.

Server-rendered: the page works without JavaScript, which only follows a search under way and
filters its hits. Training text may be anything, and so may who asks: every request passes `Guard`.
"""

import asyncio
import copy
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, quote

import pydantic
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from gradindex.errors import GradindexError, InputError
from gradindex.model import tokenise
from gradindex.results import Comparison, Result
from gradindex.storage.manifest import model_name
from gradindex.terminal import visible
from search.ask.controls import CONTROLS
from search.ask.make_query import make_query
from search.ask.question import Question
from search.ask.settings import Settings, settle
from search.engine import Searcher
from search.serve.guard import Guard
from search.serve.jobs import BusyError, Job, Jobs
from search.serve.request import Asked
from search.serve.schema import openapi
from search.show import html, plots, wording
from search.show.forms import render_form
from search.study.tail import Tail, upper_tail

EXAMPLES = 3
HEARTBEAT = 10.0  # seconds between signs of life to who follows a search
QUICK = 0.4  # seconds that a page waits, for a search that is over at once
TYPES = {"json": "application/json", "csv": "text/csv; charset=utf-8",
         "parquet": "application/vnd.apache.parquet", "html": "text/html; charset=utf-8"}
STATIC = {"style.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8",
          "icon.svg": "image/svg+xml"}
_LOG = logging.getLogger("gradindex")


class Site:
    """The routes. `jobs` runs the searches; what is said of the index is read once."""

    def __init__(self, searcher: Searcher, jobs: Jobs, shared: bool):
        self.searcher, self.jobs = searcher, jobs
        self._thread = ThreadPoolExecutor(1, "page")
        index = searcher.index
        name = "/".join(index.path.resolve().parts[-2:])
        self.about = {
            "name": name, "path": name if shared else str(index.path), "sequences": len(searcher),
            "model": model_name(searcher.manifest), "train_sequences": jobs.train_sequences,
            "damping": f"{searcher.manifest.damping:g}",
            "fields": ["document", "source", *searcher.manifest.plan.keep_fields],
            "warning": "" if index.coverage.whole else str(index.coverage),
        }
        self.examples = self._examples()
        self.static = {name: html.asset(name).encode() for name in STATIC} | {
            "style.css": html.style().encode()}

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page), Route("/search", self.page),
            Route("/map/{job}/{hit}", self.map),
            Route("/download/{name}", self.download), Route("/static/{name}", self.asset),
            Route("/healthz", self.health), Route("/api/schema", self.schema),
            Route("/api/search", self.search, methods=["POST"]),
            Route("/api/tokens", self.tokens, methods=["POST"]),
            Route("/api/result/{job}", self.result),
            Route("/api/result/{job}/events", self.events),
            Route("/api/result/{job}/stop", self.stop, methods=["POST"]),
            Route("/api/sequence/{id}", self.sequence),
        ]

    def _examples(self) -> list[Asked]:
        """A few queries from the training text: the first half of a sequence and what follows."""
        if self.searcher.index.tokenizer is None:
            return []
        found = []
        for record in self.searcher.index.records(self.searcher.index.background()[:12]):
            pieces = tokenise.pieces(self.searcher.index.tokenizer, record.tokens.tolist())
            middle = len(pieces) // 2
            prompt = "".join(pieces[max(0, middle - 16) : middle])
            completion = "".join(pieces[middle : middle + 6])
            if prompt.strip() and completion.strip() and \
                    tokenise.UNDECODED not in prompt + completion:
                found.append(Asked(prompt=prompt, completion=completion))
        return found[:EXAMPLES]

    async def _aside(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """What a function returns that would hold up other requests; they run one after another,
        for each further thread would make the server wait longer for its turn."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, partial(function, *given, **named))

    # ---- pages

    async def page(self, request: Request) -> Response:
        """The form; with a query, its search as far as it is."""
        asked, error, status, job, held = Asked(), "", 200, None, False
        try:
            fields = parse_qsl(request.url.query, keep_blank_values=True)
            asked = _from_form(fields)
            if any(name in ("score", "scored_of") for name, _ in fields):
                return RedirectResponse(asked.url(), 303)  # an address fit to be shared
            if asked.prompt or asked.completion:
                held = not request.state.trusted
                if not held:
                    job = self._shown(asked, fields) or await self._asked(asked)
                    await _wait(job, QUICK)
        except InputError as problem:
            error, status = str(problem), 422
        except BusyError as problem:
            error, status = str(problem), 503
        if job is not None and job.state == "failed":
            status = job.error_status
        # a copy, for the worker goes on while the page is filled
        content = await self._aside(self._page, asked, copy.copy(job), error, held)
        return HTMLResponse(content, status, _retry(status))

    def _shown(self, asked: Asked, fields: list[tuple[str, str]]) -> Job | None:
        """The job that a page shows already and names, though others wouldn't get it: stopped."""
        job = self.jobs.get(next((value for name, value in fields if name == "job"), ""))
        return job if job is not None and job.asked == asked else None

    def _page(self, asked: Asked, job: Job | None, error: str, held: bool) -> str:
        return html.fill("search.html", **self._content(asked, job), asked=asked, error=error,
                         job=job, held=held, tokens=self._tokens_of(asked), controls=CONTROLS)

    async def _asked(self, asked: Asked) -> Job:
        """The job of a search, after what can be checked at once. Raises InputError, BusyError."""
        return self.jobs.ask(asked, await self._aside(self._check, asked))

    def _check(self, asked: Asked) -> Settings:
        """What the search's controls mean here. Raises InputError for what can't be."""
        if asked.compare and (asked.versus or not asked.rescore):
            raise InputError("a comparison is of two completions, scored exactly: it can't go with "
                             "versus or rescore=false.")
        controls = replace(asked.controls(), train_sequences=self.jobs.train_sequences)
        settings = settle(controls, self.searcher.manifest)
        for question in asked.questions():
            if question.completion is not None:  # a continuation needs the model: later
                make_query(self.searcher.index, question)
        return settings

    def _tokens_of(self, asked: Asked) -> list[tuple[str, bool]]:
        """The completion's tokens, and which are scored."""
        if not asked.completion:
            return []
        try:
            question = Question(asked.prompt, asked.completion)
            whole = make_query(self.searcher.index, question)
            chosen = make_query(self.searcher.index,
                                replace(question, score_on=asked.score_on or None))
        except InputError:
            return []
        return [(piece, label != -100) for (piece, scored, _), label in
                zip(html.query(whole), chosen.labels, strict=True) if scored]

    def _content(self, asked: Asked, job: Job | None) -> dict[str, Any]:
        """What a search page shows of a job."""
        found = None if job is None else \
            job.provisional if job.result is None else job.result
        content: dict[str, Any] = {
            "about": self.about, "examples": self.examples, "result": None, "comparison": None,
            "advanced": bool(asked.given().keys()
                             - {"prompt", "completion", "score_on", "opponents", "k"}),
            "scale": 1.0, "tail": None, "scatter": None, "pairs": [],
        }
        if isinstance(found, Comparison):
            content["comparison"] = found
            content["scale"] = wording.strongest([hit for one in found.results for hit in one])
            content["pairs"] = pairs = found.pairs()
            content["scatter"] = Markup(plots.scatter(
                [a for _, a, _ in pairs], [b for _, _, b in pairs],
                "Influence on A and on B", "on A", "on B"))
        elif isinstance(found, Result):
            content["result"], content["scale"] = found, wording.strongest(found.hits)
            content["tail"] = None if job is None else _tail(found, job.tail)
        return content

    async def map(self, request: Request) -> Response:
        """A hit's token × layer map."""
        job = self._job(request)
        result, number = job.result, _number(request.path_params["hit"])
        hit = None if not isinstance(result, Result) else next(
            (one for one in result if one.id == number), None)
        if hit is None or not hit.token_layer_influence:
            raise HTTPException(404, "There is no such map. Search again, and open it from there.")
        return HTMLResponse(await self._aside(
            html.fill, "map.html", hit=hit, result=result, about=self.about,
            back=job.asked.url() + f"#hit={hit.id}"))

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, "There is no such file.")
        return Response(self.static[name], media_type=STATIC[name])

    async def download(self, request: Request) -> Response:
        """A finished result as a file."""
        name, _, form = request.path_params["name"].partition(".")
        job = self.jobs.get(name)
        if form not in TYPES or job is None or job.result is None:
            raise HTTPException(404, "There is no such result any more. Search again.")
        result = job.result
        if isinstance(result, Comparison):
            if form != "json":
                raise HTTPException(404, "A comparison can be downloaded as JSON only.")
            content = (await self._aside(result.to_json)).encode()
        else:
            content = await self._aside(render_form, result, form)
        return Response(content, media_type=TYPES[form], headers={
            "Content-Disposition": f'attachment; filename="gradindex-{quote(name)}.{form}"'})

    # ---- the API

    async def health(self, request: Request) -> Response:
        """Whether searches are answered; `ready` once the model is loaded."""
        problem = self.jobs.problem
        status = 503 if problem else 200
        return JSONResponse({
            "status": "failed" if problem else "ok", "error": problem, "queued": self.jobs.queued,
            "ready": self.jobs.ready.is_set() and not problem}, status, _retry(status))

    async def schema(self, request: Request) -> Response:
        return JSONResponse(openapi())

    async def search(self, request: Request) -> Response:
        """Start a search; its result is at the URL of the answer."""
        asked = Asked.model_validate(await _body(request), strict=True)
        if not asked.prompt and not asked.completion:
            raise InputError("give a prompt, a completion, or both.")
        job = await self._asked(asked)
        return JSONResponse(_state(job), status_code=202)

    async def tokens(self, request: Request) -> Response:
        """A completion's tokens after a prompt."""
        body = await _body(request)
        if body.keys() - {"prompt", "completion"}:
            raise InputError("expected prompt and completion, and nothing else.")
        asked = Asked.model_validate(body, strict=True)
        found = await self._aside(self._tokens_of, asked)
        return JSONResponse({"tokens": [piece for piece, _ in found]})

    async def result(self, request: Request) -> Response:
        """The result, or how far it is."""
        job = self._job(request)
        if job.state == "failed":
            return _problem(job.error_status, job.error)
        if job.result is None:
            return JSONResponse(_state(job), status_code=202)
        content = await self._aside(job.result.to_json)
        return Response(content, media_type="application/json")

    async def stop(self, request: Request) -> Response:
        """Conclude from what is exact by now."""
        await _body(request)
        job = self._job(request)
        job.stopping = True
        return JSONResponse(_state(job), status_code=202)

    async def events(self, request: Request) -> Response:
        """The stages as server-sent events: `stage` as often as something changed, then `end`."""
        job = self._job(request)
        return StreamingResponse(_follow(job), media_type="text/event-stream",
                                 headers={"X-Accel-Buffering": "no"})

    async def sequence(self, request: Request) -> Response:
        """A sequence of the index: its text, tokens and where it comes from."""
        given = request.path_params["id"]
        number = _number(given)
        try:
            place, = self.searcher.known([-1 if number is None else number])
        except InputError as error:
            raise HTTPException(404, str(error) if number is not None else
                                f"no sequence has the id {given!r:.40}.") from None
        return JSONResponse(await self._aside(self._sequence, place))

    def _sequence(self, place: int) -> dict[str, Any]:
        record, = self.searcher.index.records([place])
        pieces = tokenise.pieces(self.searcher.index.tokenizer, record.tokens.tolist())
        return {
            "id": record.id, "text": "".join(pieces), "tokens": pieces,
            "token_ids": record.tokens.tolist(), "scored": record.scored.tolist(),
            "parts": [asdict(part) for part in record.parts],
            "duplicates": self.searcher.index.copies(place),
        }

    def _job(self, request: Request) -> Job:
        job = self.jobs.get(request.path_params["job"])
        if job is None:
            raise HTTPException(404, "There is no such result any more. Search again.")
        return job


def _tail(result: Result, tail: Tail | None) -> dict[str, Any] | None:
    """The plot of a result's exact scores, and what it shows."""
    values = upper_tail(result)
    if len(values) < 2:
        return None
    law = None if tail is None else plots.Law(tail.x_min, tail.alpha, tail.points / tail.total)
    side, label = ("negative", "−influence") if result.opponents else ("positive", "influence")
    said = (f"The {len(values):,} exact scores that are {side}, of the {result.rescored:,} "
            "sequences that were rescored; no approximate score is in it.")
    if tail is not None:
        verdict = "is ruled out" if tail.rejected else "is not ruled out"
        said += (f" The line is a power law fitted by maximum likelihood to the largest "
                 f"{tail.points:,}: density exponent α = {tail.alpha:.2f} ± {tail.error:.2f} from "
                 f"{plots.short(tail.x_min)} on; it {verdict} (p = {tail.p:.2f}).")
    return {"svg": Markup(plots.tail(values, law, f"Tail of the exact {side} scores", label)),
            "said": said}


def _from_form(fields: list[tuple[str, str]]) -> Asked:
    """A search from a URL's fields. Raises InputError."""
    content: dict[str, Any] = {}
    scores = [value for name, value in fields if name == "score"]
    scored_of = next((value for name, value in fields if name == "scored_of"), None)
    for name, value in fields:
        # browsers send a text area's lines with \r\n
        value = value.replace("\r\n", "\n")
        if value and name not in ("score", "scored_of", "job"):
            number = _number(value) if name == "shortlist" else None
            content[name] = value if number is None else number
    if scored_of is not None and scored_of.replace("\r\n", "\n") == content.get("completion"):
        content["score_on"] = ",".join(scores)
    try:
        asked = Asked.model_validate(content)
    except pydantic.ValidationError as error:
        raise InputError(_first(error)) from None
    if scored_of is not None and content.get("score_on") == "" and "completion" in content:
        raise InputError("no token is chosen to score; choose at least one.")
    return asked


def _number(text: str) -> int | None:
    """A whole number of 64 bits, or None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _first(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"])) or "the request"
    return visible(f"{where}: {first['msg']}"[:300])


def _state(job: Job) -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "stage": job.stage, "done": job.done,
            "total": job.total, "url": job.asked.url(), "result": f"/api/result/{job.id}",
            "events": f"/api/result/{job.id}/events"}


async def _body(request: Request) -> dict[str, Any]:
    """A request's JSON object. Raises HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "Send Content-Type: application/json.")
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not JSON.") from None
    if not isinstance(content, dict):
        raise HTTPException(422, "The body is no JSON object.")
    return content


async def _wait(job: Job, seconds: float) -> None:
    """Until the job ended or has hits to show, or so long."""
    changed, forget = _listen(job)
    try:
        async with asyncio.timeout(seconds):
            while not (job.ended or job.provisional is not None):
                await changed.wait()
                changed.clear()
    except TimeoutError:
        pass
    finally:
        forget()


def _listen(job: Job) -> tuple[asyncio.Event, Callable[[], None]]:
    """An event that the worker's changes set, and what ends that."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(changed.set)

    job.wake.add(wake)
    return changed, lambda: job.wake.discard(wake)


async def _follow(job: Job) -> AsyncIterator[bytes]:
    changed, forget = _listen(job)
    job.watchers += 1
    sent = 0
    try:
        yield b"retry: 2000\n\n"
        while True:
            ended, found = job.ended, job.found[sent:]
            sent += len(found)
            content = {
                "state": job.state, "stage": job.stage, "step": job.step, "done": job.done,
                "total": job.total,
                "found": dict(found), "hits": job.provisional is not None,
                "seconds_left": job.seconds_left}
            yield f"event: stage\ndata: {json.dumps(content)}\n\n".encode()
            if ended:
                yield b"event: end\ndata: {}\n\n"
                return
            try:
                async with asyncio.timeout(HEARTBEAT):
                    await changed.wait()
                changed.clear()
                await asyncio.sleep(0.05)  # changes that come together are told together
            except TimeoutError:
                yield b": still here\n\n"
    finally:
        job.watchers -= 1
        job.seen = time.monotonic()
        forget()


def _retry(status: int) -> dict[str, str] | None:
    return {"Retry-After": "5"} if status == 503 else None


def _problem(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, _retry(status))


def application(searcher: Searcher, jobs: Jobs, guard: dict[str, Any]) -> Guard:
    """The ASGI application: the site behind its guard."""
    site = Site(searcher, jobs, shared=guard["token"] is not None)

    async def failed(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        if isinstance(error, HTTPException):
            status, message = error.status_code, str(error.detail)
        elif isinstance(error, pydantic.ValidationError):
            status, message = 422, _first(error)
        elif isinstance(error, InputError):
            status, message = 422, str(error)
        elif isinstance(error, BusyError):
            status, message = 503, str(error)
        elif isinstance(error, ClientDisconnect):
            status, message = 400, "The request ended early."
        else:
            number = secrets.token_hex(4)
            _LOG.error("error %s at %s", number, visible(path), exc_info=error)
            status, message = 500, f"Something failed; the server's log has it under {number}."
        if path.startswith(("/api/", "/healthz")):
            answer: Response = _problem(status, message)
        else:  # `version` is told to nobody who makes errors
            answer = HTMLResponse(html.fill("problem.html", about=site.about, error=message,
                                            version=""), status, _retry(status))
        for name, value in (getattr(error, "headers", None) or {}).items():
            answer.headers[name] = value
        return answer

    kinds: tuple[Any, ...] = (HTTPException, pydantic.ValidationError, GradindexError,
                              ClientDisconnect, Exception)
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        kind: failed for kind in kinds}
    app = Starlette(routes=site.routes(), exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, **guard)
