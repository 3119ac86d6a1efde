"""A build on a Ray cluster: the driver goes through the stages, workers do their units.

A worker is an actor that holds the model. What it makes lies in the index's folder, which every
node must see; through Ray go the job, as names and numbers, numbers of units, and small receipts.
A unit whose worker died goes to another: each is committed by a rename, so twice does no harm.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gradindex import errors
from gradindex.cluster import connect, load_ray
from gradindex.codes import Codes
from gradindex.errors import GradindexError
from gradindex.locks import one_of_writers
from gradindex.model import ModelSource
from gradindex.progress import Progress
from indexer import build, ingest
from indexer.distribute import Shard, Stage
from indexer.fit import Fit, fitted
from indexer.state import State

TRIES = 4  # of a unit whose worker dies
PATIENCE = 60.0  # seconds: for the lock of a worker that was killed, and until it is said that none
# can start


@dataclass(frozen=True)
class Job:
    """What a worker needs to join a build: names and numbers alone."""

    index: str
    model: str
    trust_remote_code: bool
    allow_pickle: bool
    device: str
    dtype: str
    plan: dict[str, Any]
    max_memory: int | None

    @classmethod
    def of(cls, asked: "build.Asked") -> "Job":
        source = asked.source
        return cls(str(asked.index.resolve()), str(source.model), source.trust_remote_code,
                   source.allow_pickle, asked.device, asked.dtype, asked.plan, asked.max_memory)


@dataclass(frozen=True)
class Receipt:
    """What came of a unit: nothing, or an error by the name of its class."""

    error: str = ""
    message: str = ""


class _Worker:
    """Does units of a build, one at a time; shard `number` of those that write to the index."""

    def __init__(self, job: Job, number: int):
        self._stack = contextlib.ExitStack()
        self._index = Path(job.index)
        self._join(number)
        state = State.joined(self._index, job.plan)
        assert state is not None  # the driver saw to it
        self._plan = state.plan
        source = ModelSource(job.model, None, job.trust_remote_code, job.allow_pickle)
        self._about = build.prepare(self._index, source, job.device, job.dtype, state,
                                    job.max_memory, Progress())
        about = self._about
        self._fit = Fit(about.model, about.tracked,
                        about.run.records, about.settings, self._index / "curvature.partial",
                        Progress(), 0, Shard(1, 2))
        self._codes: Codes | None = None

    def _join(self, number: int) -> None:
        """Take the number's lock, which a worker that was killed may hold for a moment yet."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._stack.enter_context(one_of_writers(self._index, number))
                return
            except GradindexError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def process(self) -> int:
        """The process's number, once the model is there."""
        return os.getpid()

    def do(self, stage: Stage, unit: int) -> Receipt:
        """Do a unit; its errors travel as text."""
        try:
            if stage.name != "encode":
                self._fit.do(stage, unit)
            elif unit in ingest.unsealed(self._about.run):
                segment = self._about.run.segments[unit]
                ingest.encode_one(self._about.model, self._made_codes(), self._about.run, segment,
                                  self._plan["batch_tokens"], Progress())
        except GradindexError as error:
            return Receipt(type(error).__name__, str(error))
        return Receipt()

    def _made_codes(self) -> Codes:
        if self._codes is None:
            about = self._about
            ekfac, _ = fitted(about.model, about.tracked, about.settings.covariance_blocks,
                              self._index, Progress(), about.allowance)
            kept = [module for module in about.tracked if module.name in ekfac]
            self._codes = build.make_codes(kept, ekfac, self._plan)
        return self._codes


class Crew:
    """The driver's share of a build: to hand out all units. A context: its end ends the workers.

    `address` is "local", "auto" or host:port. Raises InputError where no cluster is there.
    """

    first, of = True, 1

    def __init__(self, address: str, count: int | None, job: Job, progress: Progress):
        self._job, self._progress = job, progress
        self._own = not load_ray().is_initialized()
        self._ray = connect(address)
        state = State.joined(Path(job.index), job.plan)
        assert state is not None
        gpu = job.plan["device"] == "cuda"
        self._remote: Any = self._ray.remote(_Worker).options(
            num_gpus=int(gpu), num_cpus=1 if gpu else state.threads)
        self._count = count or _room(self._ray, gpu, state.threads)
        self._starting: dict[Any, tuple[Any, int]] = {}  # what tells that it is ready: who
        self._idle: list[tuple[Any, int]] = []
        self._failed: Counter[int] = Counter()  # starts, by number

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker, _ in (*self._idle, *self._starting.values()):
            self._ray.kill(worker)
        if self._own:
            self._ray.shutdown()

    def takes(self, unit: int) -> bool:
        """No unit is the driver's."""
        return False

    def wait(self, stage: Stage, missing: Callable[[], list[int]]) -> None:
        """Hand out what is missing until nothing is.

        At most one unit a worker is under way. Raises the error that a unit ended with, and
        GradindexError for one whose workers died again and again.
        """
        left = missing()
        if not left:
            return
        self._hire()
        self._progress.start(str(stage), len(left), "units")
        under_way: dict[Any, tuple[tuple[Any, int], int]] = {}
        deaths: Counter[int] = Counter()
        said = time.monotonic()
        while left:
            given = {unit for _, unit in under_way.values()}
            for unit in left:
                if unit not in given and self._idle:
                    who = self._idle.pop()
                    under_way[who[0].do.remote(stage, unit)] = who, unit
            ready, _ = self._ray.wait([*under_way, *self._starting], num_returns=1,
                                      timeout=PATIENCE)
            for reference in ready:
                if reference in self._starting:
                    self._started(reference)
                    continue
                who, unit = under_way.pop(reference)
                if self._came_of(reference, who):
                    self._progress.update(1)
                else:
                    deaths[unit] += 1
                    self._mourn(stage, unit, deaths[unit])
            if not under_way and not self._idle and time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                self._progress.say("waiting for a worker: the cluster has no room for one (ray "
                                   "status says what it has)")
            left = missing()
        self._idle += [who for who, _ in under_way.values()]
        self._progress.finish()

    def _hire(self) -> None:
        while len(self._idle) + len(self._starting) < self._count:
            taken = {number for _, number in (*self._idle, *self._starting.values())}
            number = next(n for n in range(1, self._count + 1) if n not in taken)
            self._start(number)

    def _start(self, number: int) -> None:
        worker = self._remote.remote(self._job, number)
        self._starting[worker.process.remote()] = worker, number

    def _started(self, reference: Any) -> None:
        who = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._failed[who[1]] += 1
            if "creation task" in str(error) or self._failed[who[1]] == TRIES:
                raise GradindexError(f"a worker could not start: {_last_line(error)}") from None
            self._progress.say("a worker died while it started; another takes its place")
            self._start(who[1])
            return
        self._idle.append(who)

    def _came_of(self, reference: Any, who: tuple[Any, int]) -> bool:
        """Whether a unit was done; if its worker died, another takes its place."""
        try:
            receipt: Receipt = self._ray.get(reference)
        except self._ray.exceptions.RayActorError:
            self._start(who[1])
            return False
        self._idle.append(who)
        if receipt.error:
            raise getattr(errors, receipt.error, GradindexError)(receipt.message)
        return True

    def _mourn(self, stage: Stage, unit: int, deaths: int) -> None:
        self._progress.say(f"a worker died on unit {unit} of {stage}; another takes it over")
        if deaths == TRIES:
            raise GradindexError(
                f"{TRIES} workers died, one after the other, on unit {unit} of {stage}: out of "
                "memory? Use --max-memory or smaller --batch-tokens; what is done stays done."
            )


def _room(ray: Any, gpu: bool, threads: int) -> int:
    """How many workers the cluster has room for."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(one.get("GPU", 0)) if gpu else int(one.get("CPU", 0) // threads)
               for one in alive)
    return max(1, room)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:300]
