"""Searches waiting for, on and behind one worker thread, so that a server can show them under way.

One search runs at a time: it has the model, and all threads. Asking for the same search twice gives
the same job; finished ones are kept until there are too many. A job whose watchers have all left is
given up. While the model can't be loaded, and once the worker has ended, jobs fail at once and say
why.
"""

import contextlib
import gc
import logging
import queue
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from gradindex.errors import GradindexError, InputError
from gradindex.results import Comparison, Result
from search.ask.make_query import make_query
from search.ask.settings import Settings
from search.engine import Searcher, SearchStage
from search.serve.request import SearchRequest
from search.study.tail import Tail, fit_tail, upper_tail

QUEUE = 16  # jobs that may wait
KEPT = 48  # finished jobs
KEPT_VALUES = 10_000_000  # influences by token and layer in all of them together: 320 MB
FORGOTTEN = 60.0  # seconds without a watcher, after which a job is given up
RETRY = 10.0  # seconds between attempts at loading the model
ENDED = "searches are not answered any more: the server has to be started again."
_LOG = logging.getLogger("gradindex")


class BusyError(GradindexError):
    """No further search can be taken on: the queue is full, or nobody works on it any more."""


@dataclass
class SearchJob:
    """A search and where it stands; `settings` are what its controls mean here.

    `state` goes from waiting to running to done or failed. `scores` are the exact influences so
    far, as (id, influence). `wake` are called, from the worker's thread, at every change.
    """

    id: str
    request: SearchRequest
    settings: Settings
    state: str = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    provisional: Result | None = None
    scores: list[tuple[int, float]] = field(default_factory=list)
    result: Result | Comparison | None = None
    tail: Tail | None = None  # of the result's exact scores
    error: str = ""
    error_status: int = 0
    stopping: bool = False
    seen: float = field(default_factory=time.monotonic)
    watchers: int = 0
    wake: set[Callable[[], None]] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether who asks for the same search may have this job: it wasn't stopped."""
        # a query that can't be scored stays so; a failure of ours may not happen again
        return self.error_status < 500 and not self.stopping and not (
            isinstance(self.result, Result) and self.result.interrupted)

    @property
    def step(self) -> int:
        """How many of the stages gradient, shortlist and exact are past."""
        return 3 if self.ended else {"": 0, "gradient": 1}.get(self.stage, 2)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in ("done", "failed")

    @property
    def values(self) -> int:
        """How many influences by token and layer the result holds."""
        results = self.result.results if isinstance(self.result, Comparison) else \
            [self.result] if self.result is not None else []
        return sum(len(hit.tokens) * (1 + len(hit.layer_influence))
                   for result in results for hit in result)


class Jobs:
    """The queue, its worker, and the jobs by id. Made and asked from one thread (the server's).

    A job without a watcher for `forgotten` seconds is given up; loading that failed is tried again
    after `retry` seconds. `problem` says why no search is answered now, if so.
    """

    def __init__(
        self, searcher: Searcher, train_sequences: int | None = None,
        forgotten: float = FORGOTTEN, retry: float = RETRY,
    ):
        self.searcher, self.train_sequences = searcher, train_sequences
        self._forgotten, self._retry = forgotten, retry
        self.ready = threading.Event()  # the model and the codes are loaded
        self.problem = ""
        self._over = False  # the worker has ended
        self._waiting: queue.Queue[SearchJob] = queue.Queue(QUEUE)
        self._jobs: OrderedDict[str, SearchJob] = OrderedDict()
        self._guard = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="search", daemon=True)

    def start(self) -> None:
        """Start the worker, which loads the model and then answers one job after the other."""
        self._worker.start()

    @property
    def queued(self) -> int:
        """How many searches wait."""
        return self._waiting.qsize()

    def submit(self, request: SearchRequest, settings: Settings) -> SearchJob:
        """The job of a search, new or not. Raises BusyError where none can be taken on."""
        name = request.id(self.searcher.snapshot.digest)
        with self._guard:
            job = self._jobs.get(name)
            if job is not None and job.whole:
                self._jobs.move_to_end(name)
                job.seen = time.monotonic()
                return job
            if self._over:
                raise BusyError(ENDED)
            job = SearchJob(name, request, settings)
            # refused at once: a longer queue would only hide how late an answer would come
            try:
                self._waiting.put_nowait(job)
            except queue.Full:
                raise BusyError(f"{QUEUE} searches wait already.") from None
            self._jobs[name] = job
            self._jobs.move_to_end(name)
            return job

    def get(self, name: str) -> SearchJob | None:
        """The job of an id, which is now the last to be forgotten; None where none is kept."""
        with self._guard:
            job = self._jobs.get(name)
            if job is not None:
                self._jobs.move_to_end(name)
                job.seen = time.monotonic()
            return job

    # ---- the worker

    def _work(self) -> None:
        # SystemExit and the like end the thread, and must leave nobody waiting either
        try:
            self._load()
            while True:
                self._answer(self._waiting.get())
        finally:  # nobody is left waiting
            with self._guard:
                self._over, self.problem = True, ENDED
                unfinished = [job for job in self._jobs.values() if not job.ended]
            for job in unfinished:
                self._fail(job, ENDED, 503)

    def _load(self) -> None:
        """Load the model and the codes, trying again and again; meanwhile searches fail."""
        while True:
            try:
                self.searcher.snapshot.load()
                gc.collect()
                gc.freeze()  # what stays for good would stop every thread for 0.3 s now and then
                self.problem = ""
                self.ready.set()
                return
            except Exception as error:
                why = self._without_folders(str(error)) if isinstance(error, GradindexError) \
                    else f"{type(error).__name__}; the server's log says more."
                if why != self.problem:
                    _LOG.exception("the model or the index can't be loaded; trying again")
                self.problem = why
            # searches that come meanwhile are told why at once: waiting would look like working
            until = time.monotonic() + self._retry
            with contextlib.suppress(queue.Empty):
                while (remaining := until - time.monotonic()) > 0:
                    self._fail(self._waiting.get(timeout=remaining),
                               f"the model or the index can't be loaded: {self.problem}", 503)

    def _without_folders(self, message: str) -> str:
        """An error without where on this machine its files are."""
        # what lies in the index is named from the index on, anything else by its file name alone
        message = message.replace(f"{self.searcher.snapshot.path.absolute().parent}/", "")
        return re.sub(r"(?<![\w.:/])/(?:[^/\s'\"]+/)+", "", message)

    def _answer(self, job: SearchJob) -> None:
        if self._is_forgotten(job):
            self._drop(job)
            return
        job.state = "running"
        self._changed(job)
        try:
            self._run(job)
        except _ForgottenError:
            self._drop(job)
        except InputError as error:
            self._fail(job, str(error), 422)
        except Exception as error:
            # messages of Python's own may quote data or paths: strangers get a number to ask about
            number = secrets.token_hex(4)
            _LOG.exception("error %s in a search", number)
            reason = str(error) if isinstance(error, MemoryError) else type(error).__name__
            self._fail(job, f"the search failed ({reason}); the server's log has it under "
                            f"{number}.", 500)

    def _run(self, job: SearchJob) -> None:
        queries = [make_query(self.searcher.snapshot, question)
                   for question in job.request.questions()]
        stages = self.searcher.stages(queries, job.settings, conclude_early=True)
        results: list[Result] = []
        started = 0.0
        # between stages the worker looks up: who left, who wants to stop, who is to be told
        for stage in _until_stopped(stages, job):
            if self._is_forgotten(job):  # nobody reads it any more, and others wait
                stages.close()
                raise _ForgottenError
            if stage.name == "approximate":
                started = time.monotonic()
            job.stage, job.done, job.total = stage.name, stage.done, stage.total
            if stage.provisional is not None:
                job.provisional = stage.provisional
            if stage.name == "exact" and stage.done:
                spent = time.monotonic() - started
                job.seconds_left = spent / stage.done * (stage.total - stage.done)
            job.scores.extend(stage.influence.items())
            if stage.result is not None:
                results.append(stage.result)
            self._changed(job)
        result = results[0] if not job.request.compare else \
            self.searcher.compared(results, queries, job.settings)
        if isinstance(result, Result):
            job.tail = fit_tail(upper_tail(result))
        job.result = result
        self._end(job, "done")

    def _is_forgotten(self, job: SearchJob) -> bool:
        return not job.watchers and time.monotonic() - job.seen > self._forgotten

    def _drop(self, job: SearchJob) -> None:
        self._fail(job, "nobody waited for this search any more, so it was given up.", 503)
        with self._guard:
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]

    def _fail(self, job: SearchJob, error: str, status: int) -> None:
        job.error, job.error_status = error, status
        self._end(job, "failed")

    def _end(self, job: SearchJob, state: str) -> None:
        job.state, job.provisional, job.scores = state, None, []
        self._changed(job)
        with self._guard:
            ended = [one for one in self._jobs.values() if one.ended]
            values = sum(one.values for one in ended)
            # the oldest go first; one that was looked at lately is among the young
            while len(ended) > KEPT or (values > KEPT_VALUES and len(ended) > 1):
                values -= ended[0].values
                del self._jobs[ended.pop(0).id]

    def _changed(self, job: SearchJob) -> None:
        # a copy: watchers come and go in the server's thread
        for wake in list(job.wake):
            wake()


class _ForgottenError(Exception):
    pass


def _until_stopped(
    stages: Generator[SearchStage, None, None], job: SearchJob
) -> Iterator[SearchStage]:
    """The stages; where the job is to stop, each query concludes from what is exact by then."""
    while True:
        try:
            if job.stopping and job.stage == "exact":
                yield stages.throw(KeyboardInterrupt())
            else:
                yield next(stages)
        except StopIteration:
            return
