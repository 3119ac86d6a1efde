"""The way from a request to its job, which the pages and the API share."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.exceptions import HTTPException

from gradindex.errors import InputError
from gradindex.results import UNSCORED
from search.ask.make_query import make_query
from search.ask.question import Question
from search.ask.settings import Settings, settle
from search.ask.task_query import EXAMPLES, check_task
from search.engine import Searcher
from search.serve.jobs import Jobs, SearchJob
from search.serve.request import SearchRequest
from search.show import html

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Reception:
    """Checks requests, hands them to `jobs`, and does beside the event loop what takes a while."""

    def __init__(self, searcher: Searcher, jobs: Jobs):
        self.searcher, self.jobs = searcher, jobs
        self._thread = ThreadPoolExecutor(1, "page")

    async def aside(
        self, function: Callable[Arguments, Answer], *given: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Answer:
        """What a function returns that would hold up other requests.

        One after another in one thread: each further one would make the server wait longer for its
        turn.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, partial(function, *given, **named))

    async def submit(self, request: SearchRequest) -> SearchJob:
        """The job of a search, after what can be checked at once. Raises InputError, BusyError."""
        return self.jobs.submit(request, await self.aside(self._check, request))

    def _check(self, request: SearchRequest) -> Settings:
        """What the search's controls mean here. Raises InputError for what can't be."""
        if request.compare and self.task != "causal":
            raise InputError("compare sets two completions side by side; an index of the task "
                             f"{self.task} has none. Ask with {EXAMPLES[self.task]}.")
        if request.compare and (request.versus or not request.rescore):
            raise InputError("a comparison is of two completions, scored exactly: it can't go with "
                             "--versus or --no-rescore.")
        # N_train is the server's to say, and checked with the rest
        controls = replace(request.controls(), train_sequences=self.jobs.train_sequences)
        settings = settle(controls, self.searcher.manifest)
        for question in request.questions():
            check_task(self.task, question)
            if self.task == "causal":
                question.check()
            if not _of_model(question, self.task):
                make_query(self.searcher.snapshot, question)
        return settings

    @property
    def task(self) -> str:
        """What the index's model was trained for."""
        return self.searcher.manifest.task.name

    def tokens_of(self, request: SearchRequest) -> list[tuple[str, bool]]:
        """The completion's tokens, and which are scored; none where it can't be tokenised."""
        if not request.completion:
            return []
        # twice: what is scored of the whole completion, and which of that the user chose
        question = Question(request.prompt, request.completion)
        try:
            whole = make_query(self.searcher.snapshot, question)
            chosen = make_query(self.searcher.snapshot,
                                replace(question, score_on=request.score_on or None))
        except InputError:
            return []
        return [(piece, label != UNSCORED) for (piece, scored, _), label in
                zip(html.query(whole), chosen.labels, strict=True) if scored]

    def job(self, name: str) -> SearchJob:
        """A job by its id. Raises HTTPException where it is not kept any more, or never was."""
        job = self.jobs.get(name)
        if job is None:
            raise HTTPException(404, "There is no such result any more. Search again.")
        return job


def _of_model(question: Question, task: str) -> bool:
    """Whether the model has to say a part of the question: a continuation, or its own label.

    That takes a while, and so is left to the worker.
    """
    if task == "causal":
        return question.completion is None
    return task == "classification" and question.text is not None and question.label is None


def changes_of(job: SearchJob) -> tuple[asyncio.Event, Callable[[], None]]:
    """An event that is set at every change of a job, and what ends that."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:  # in the worker's thread
        loop.call_soon_threadsafe(changed.set)

    job.wake.add(wake)
    return changed, lambda: job.wake.discard(wake)


def retry_after(status: int) -> dict[str, str] | None:
    """The header that says when to ask again, where that is worth it."""
    return {"Retry-After": "5"} if status == 503 else None
