"""Searches waiting for, on and behind one worker thread, so that a server can show them under way.

One search runs at a time: it has the model, and all threads. Asking for the same search twice gives
the same job; finished ones are kept until there are too many. A job whose watchers have all left is
given up.
"""

import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from gradindex.errors import GradindexError, InputError
from gradindex.results import Comparison, Result
from search.asked import Asked
from search.cards import upper_tail
from search.engine import Searcher, Stage
from search.tail import Tail, fit_tail

QUEUE = 16  # jobs that may wait
KEPT = 48  # finished jobs
FORGOTTEN = 60.0  # seconds without a watcher, after which a job is given up
_LOG = logging.getLogger("gradindex")


class BusyError(GradindexError):
    """The queue is full."""


@dataclass
class Job:
    """A search and where it stands. `state` goes from waiting to running to done or failed.

    `changes` counts what happened; `wake` are called, from the worker's thread, at every change.
    """

    id: str
    asked: Asked
    state: str = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    provisional: Result | None = None
    found: dict[int, float] = field(default_factory=dict)
    result: Result | Comparison | None = None
    tail: Tail | None = None  # of the result's exact scores
    error: str = ""
    error_status: int = 0
    stopping: bool = False
    seen: float = field(default_factory=time.monotonic)
    watchers: int = 0
    changes: int = 0
    wake: set[Callable[[], None]] = field(default_factory=set)

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")

    @property
    def forgotten(self) -> bool:
        return not self.watchers and time.monotonic() - self.seen > FORGOTTEN


class Jobs:
    """The queue, its worker, and the jobs by id. Made and asked from one thread (the server's)."""

    def __init__(self, searcher: Searcher, train_sequences: int | None = None):
        self.searcher, self._train_sequences = searcher, train_sequences
        self.ready = threading.Event()  # the model and the codes are loaded
        self._waiting: queue.Queue[Job] = queue.Queue(QUEUE)
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._guard = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="search", daemon=True)

    def start(self) -> None:
        self._worker.start()

    @property
    def alive(self) -> bool:
        return self._worker.is_alive()

    @property
    def queued(self) -> int:
        return self._waiting.qsize()

    def ask(self, asked: Asked) -> Job:
        """The job of a search, new or not. Raises BusyError where too many wait."""
        name = asked.id(self.searcher.index.digest)
        with self._guard:
            job = self._jobs.get(name)
            if job is not None and job.error_status < 500:
                self._jobs.move_to_end(name)
                job.seen = time.monotonic()
                return job
            job = Job(name, asked)
            try:
                self._waiting.put_nowait(job)
            except queue.Full:
                raise BusyError(f"{QUEUE} searches wait already.") from None
            self._jobs[name] = job
            ended = [one for one, other in self._jobs.items() if other.ended]
            for one in ended[: max(0, len(ended) - KEPT)]:
                del self._jobs[one]
            return job

    def get(self, name: str) -> Job | None:
        with self._guard:
            job = self._jobs.get(name)
            if job is not None:
                job.seen = time.monotonic()
            return job

    # ---- the worker

    def _work(self) -> None:
        while True:
            try:
                self.searcher.index.load()
                break
            except Exception:
                _LOG.exception("the model or the index can't be loaded; trying again")
                time.sleep(10)
        self.ready.set()
        while True:
            job = self._waiting.get()
            if job.forgotten:
                self._drop(job)
                continue
            job.state = "running"
            self._changed(job)
            try:
                self._run(job)
            except _ForgottenError:
                self._drop(job)
            except InputError as error:
                self._fail(job, str(error), 422)
            except Exception as error:
                number = secrets.token_hex(4)
                _LOG.exception("error %s in a search", number)
                own = str(error) if isinstance(error, MemoryError) else type(error).__name__
                self._fail(job, f"the search failed ({own}); the server's log has it under "
                                f"{number}.", 500)

    def _run(self, job: Job) -> None:
        asked = job.asked
        controls = replace(asked.controls(), train_sequences=self._train_sequences)
        queries = [self.searcher.make_query(**one) for one in asked.queries()]
        stages = self.searcher.stages(queries, controls, conclude_early=True)
        results: list[Result] = []
        started = 0.0
        for stage in _until_stopped(stages, job):
            if job.forgotten:
                stages.close()  # type: ignore[attr-defined]
                raise _ForgottenError
            if stage.name == "approximate":
                started = time.monotonic()
            job.stage, job.done, job.total = stage.name, stage.done, stage.total
            if stage.provisional is not None:
                job.provisional = stage.provisional
            if stage.name == "exact" and stage.done:
                spent = time.monotonic() - started
                job.seconds_left = spent / stage.done * (stage.total - stage.done)
            job.found.update(stage.found)
            if stage.result is not None:
                results.append(stage.result)
            self._changed(job)
        job.result = results[0] if not asked.compare else \
            self.searcher.compared(results, queries, controls)
        if isinstance(job.result, Result):
            job.tail = fit_tail(upper_tail(job.result))
        job.state, job.provisional = "done", None
        job.found.clear()
        self._changed(job)

    def _drop(self, job: Job) -> None:
        self._fail(job, "nobody waited for this search any more, so it was given up.", 503)
        with self._guard:
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]

    def _fail(self, job: Job, error: str, status: int) -> None:
        job.state, job.error, job.error_status = "failed", error, status
        job.provisional = None
        self._changed(job)

    def _changed(self, job: Job) -> None:
        job.changes += 1
        for wake in list(job.wake):
            wake()


class _ForgottenError(Exception):
    pass


def _until_stopped(stages: Any, job: Job) -> Generator[Stage, None, None]:
    """The stages; where the job is to stop, the search concludes from what is exact by then."""
    stopped = False
    while True:
        try:
            if job.stopping and not stopped and job.stage == "exact":
                stopped = True
                yield stages.throw(KeyboardInterrupt())
            else:
                yield next(stages)
        except StopIteration:
            return
