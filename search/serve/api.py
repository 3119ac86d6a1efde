"""The JSON API: searches, their stages and results, sequences, health."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gradindex.errors import InputError
from gradindex.model import tokenise
from search.ask.naming import as_arguments
from search.ask.task_query import EXAMPLES
from search.serve.jobs import SearchJob
from search.serve.openapi import openapi
from search.serve.reception import Reception, changes_of, retry_after
from search.serve.request import SearchRequest, whole_number

HEARTBEAT = 10.0  # seconds between signs of life to who follows a search


class Api:
    """What programs are answered."""

    def __init__(self, reception: Reception):
        self.reception = reception

    def routes(self) -> list[Route]:
        """The paths that programs ask, with what answers them."""
        return [
            Route("/healthz", self.health), Route("/api/schema", self.schema),
            Route("/api/search", self.search, methods=["POST"]),
            Route("/api/tokens", self.tokens, methods=["POST"]),
            Route("/api/result/{job}", self.result),
            Route("/api/result/{job}/events", self.events),
            Route("/api/result/{job}/stop", self.stop, methods=["POST"]),
            Route("/api/sequence/{id}", self.sequence),
        ]

    async def health(self, request: Request) -> Response:
        """Whether searches are answered; `ready` once the model is loaded."""
        jobs = self.reception.jobs
        problem = jobs.problem
        status = 503 if problem else 200
        return JSONResponse({
            "status": "failed" if problem else "ok", "error": problem, "queued": jobs.queued,
            "ready": jobs.ready.is_set() and not problem}, status, retry_after(status))

    async def schema(self, request: Request) -> Response:
        """The description of all this."""
        return JSONResponse(openapi())

    async def search(self, request: Request) -> Response:
        """Start a search; its result is at the URL of the answer."""
        search = SearchRequest.model_validate(await _body(request), strict=True)
        if not search.asks:
            raise InputError(f"give a query: {EXAMPLES[self.reception.task]}.")
        job = await self.reception.submit(search)
        return JSONResponse(_state(job), status_code=202)

    async def tokens(self, request: Request) -> Response:
        """A completion's tokens after a prompt."""
        body = await _body(request)
        if body.keys() - {"prompt", "completion"}:
            raise InputError("expected prompt and completion, and nothing else.")
        search = SearchRequest.model_validate(body, strict=True)
        if self.reception.task != "causal":
            raise InputError("tokens are those of a completion; an index of the task "
                             f"{self.reception.task} has none.")
        tokens = await self.reception.aside(self.reception.tokens_of, search)
        return JSONResponse({"tokens": [piece for piece, _ in tokens]})

    async def result(self, request: Request) -> Response:
        """The result, or how far it is."""
        job = self._job(request)
        if job.state == "failed":
            return problem_json(job.error_status, job.error)
        if job.result is None:
            return JSONResponse(_state(job), status_code=202)
        content = await self.reception.aside(job.result.to_json)
        return Response(content, media_type="application/json")

    async def stop(self, request: Request) -> Response:
        """Conclude from what is exact by now."""
        await _body(request)  # which other sites can't send
        job = self._job(request)
        job.stopping = True
        return JSONResponse(_state(job), status_code=202)

    async def events(self, request: Request) -> Response:
        """The stages as server-sent events: `stage` as often as something changed, then `end`."""
        return StreamingResponse(_follow(self._job(request)), media_type="text/event-stream",
                                 headers={"X-Accel-Buffering": "no"})

    async def sequence(self, request: Request) -> Response:
        """A sequence of the index: its text, tokens and where it comes from."""
        given = request.path_params["id"]
        number = whole_number(given)
        try:
            place, = self.reception.searcher.known([-1 if number is None else number])
        except InputError as error:
            raise HTTPException(404, str(error) if number is not None else
                                f"no sequence has the id {given!r:.40}.") from None
        return JSONResponse(await self.reception.aside(self._sequence, place))

    def _sequence(self, place: int) -> dict[str, Any]:
        snapshot = self.reception.searcher.snapshot
        record, = snapshot.records([place])
        pieces = tokenise.pieces(snapshot.tokenizer, record.tokens.tolist())
        return {
            "id": record.id, "text": "".join(pieces), "tokens": pieces,
            "token_ids": record.tokens.tolist(), "scored": record.scored.tolist(),
            "parts": [asdict(part) for part in record.parts],
            "duplicates": snapshot.copies(place), "border": record.border,
            "label": None if record.label is None else snapshot.manifest.plan.labels[record.label],
        }

    def _job(self, request: Request) -> SearchJob:
        return self.reception.job(request.path_params["job"])


def problem_json(status: int, message: str) -> JSONResponse:
    """The answer to what went wrong."""
    # of a request alone: what else goes wrong is advice to who started the server
    said = as_arguments(message) if status == 422 else message
    return JSONResponse({"error": said}, status, retry_after(status))


def _state(job: SearchJob) -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "stage": job.stage, "done": job.done,
            "total": job.total, "url": job.request.url(), "result": f"/api/result/{job.id}",
            "events": f"/api/result/{job.id}/events"}


async def _body(request: Request) -> dict[str, Any]:
    """A request's JSON object. Raises HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # a form on another site can send any body, but not of this type
    if kind != "application/json":
        raise HTTPException(415, "Send Content-Type: application/json.")
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not JSON.") from None
    if not isinstance(content, dict):
        raise HTTPException(422, "The body is no JSON object.")
    return content


async def _follow(job: SearchJob) -> AsyncIterator[bytes]:
    """A job's changes as server-sent events; whoever follows it is one of its watchers."""
    changed, forget = changes_of(job)
    job.watchers += 1
    sent = 0
    try:
        yield b"retry: 2000\n\n"
        while True:
            # read before what is sent: what changes meanwhile wakes the next turn
            ended, scores = job.ended, job.scores[sent:]
            sent += len(scores)
            content = {
                "state": job.state, "stage": job.stage, "step": job.step, "done": job.done,
                "total": job.total,
                "found": dict(scores), "hits": job.provisional is not None,
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
        job.seen = time.monotonic()  # from here on it may be forgotten
        forget()
