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
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gradindex import errors
from gradindex.errors import GradindexError, InputError
from gradindex.influence.codes import Codes
from gradindex.model.model_source import ModelSource
from gradindex.progress import Progress
from gradindex.ray_cluster import absolute, connect, load_ray
from gradindex.storage import layout
from gradindex.storage.build_plan import Plan
from gradindex.storage.locks import one_of_writers
from gradindex.storage.os_errors import disk_errors
from indexer.build_request import BuildRequest
from indexer.encode import encode_one
from indexer.fit.folder import FitFolder
from indexer.fit.schedule import read_fitted
from indexer.fit.units import FitUnits
from indexer.prepare import Prepared, load_model, make_codes, prepare_build
from indexer.read import ingest
from indexer.shards import OVER_RAY, BuildStage
from indexer.state import BuildState

TRIES = 4  # of a unit that fails, or to have a worker there
PAUSE = 5.0  # seconds before a unit is tried again, and longer each time: a shared folder lags
WORKER_PATIENCE = 60.0  # seconds: for the lock of a killed worker, and from line to line of waiting


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to join a build: names and numbers alone.

    On a GPU the model of the driver, which calibrates with it in the end, lies beside that of the
    worker to whom Ray gives the same GPU: Ray knows nothing of the driver's.
    """

    index: Path
    source: ModelSource
    plan: Plan

    @classmethod
    def of(cls, request: BuildRequest) -> "WorkerJob":
        """The job of every worker of a build that was asked for here."""
        plan = request.plan
        # workers read no text, so they need no tokenizer; a folder's name must hold anywhere
        source = replace(
            request.source, model=str(absolute(request.source.model)), tokenizer=None,
            device=plan.device,
            also={name: str(absolute(model)) for name, model in request.source.also.items()})
        return cls(request.index.resolve(), source, plan)


@dataclass(frozen=True)
class Receipt:
    """What came of a unit, or of loading: nothing, or an error by the name of its class."""

    error: str = ""
    message: str = ""


class _Worker:
    """Does units of a build, one at a time; shard `number` of those that write to the index."""

    def __init__(self, job: WorkerJob, number: int):
        self._job, self._number = job, number
        self._index = job.index
        self._stack = contextlib.ExitStack()
        self._codes: Codes | None = None
        self._prepared: Prepared
        self._units: FitUnits

    def process(self) -> int:
        """The process's number: it has its place."""
        return os.getpid()

    def load(self) -> Receipt:
        """Join the build and load the model; its errors travel as text."""
        try:
            self._load()
        except GradindexError as error:
            return Receipt(type(error).__name__, str(error))
        return Receipt()

    def _load(self) -> None:
        """Join the build, load the model. Raises GradindexError for what a machine may lack."""
        job = self._job
        state = BuildState.joined(self._index, job.plan) if self._index.is_dir() else None
        if state is None:
            raise InputError(f"it finds no build in {self._index}. With --ray the index has to lie "
                             "where every machine sees it by the same path.")
        self._join()
        device, dtype = job.plan.device, job.plan.dtype
        model, tracked = load_model(job.source, dtype, state, Progress())
        prepared = prepare_build(self._index, model, tracked, state, Progress())
        # another device or dtype would add other numbers to the sums, and nobody would notice
        if (model.device.type, str(model.dtype)) != (device, f"torch.{dtype}"):
            raise GradindexError(
                f"it loaded the model as {model.dtype} on {model.device}; expected what the build "
                f"began with, {dtype} on {device}. Give all machines the same versions of "
                "gradindex, torch and transformers.")
        self._prepared = prepared
        folder = FitFolder(self._index / layout.CURVATURE_PARTIAL, prepared.tracked,
                           prepared.settings, first=False)
        self._units = FitUnits(model, prepared.run.records, folder, Progress())

    def _join(self) -> None:
        """Take the number's lock, which a worker of a killed driver may hold for a moment yet."""
        deadline = time.monotonic() + WORKER_PATIENCE
        while True:
            try:
                self._stack.enter_context(one_of_writers(self._index, self._number, OVER_RAY))
                return
            except GradindexError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def do(self, stage: BuildStage, unit: int, pause: float) -> Receipt:
        """Do a unit, `pause` seconds from now; its errors travel as text."""
        time.sleep(pause)  # here and not at the driver, which goes on meanwhile
        try:
            with disk_errors(self._index):
                self._do(stage, unit)
        except GradindexError as error:
            return Receipt(type(error).__name__, str(error))
        return Receipt()

    def _do(self, stage: BuildStage, unit: int) -> None:
        prepared = self._prepared
        if stage.name != "encode":
            self._units.do(stage, unit)
        elif unit in ingest.unsealed(prepared.run):
            segment = prepared.run.segments[unit]
            _, seal_it = encode_one(prepared.model, self._drawn_codes(), prepared.run, segment,
                                    prepared.settings.batch_tokens, Progress())
            seal_it()

    def _drawn_codes(self) -> Codes:
        """The codes, drawn when the first segment comes: the fit is over by then."""
        if self._codes is None:
            self._units.forget()  # its sums and eigenvectors, and the codes, needn't fit together
            prepared = self._prepared
            blocks = prepared.settings.covariance_blocks
            ekfac, _ = read_fitted(prepared.model, prepared.tracked, blocks, self._index,
                                   Progress(), prepared.allowance)
            fitted = [module for module in prepared.tracked if module.name in ekfac]
            state = BuildState.joined(self._index, self._job.plan)
            assert state is not None  # and the driver has settled the bits by now
            self._codes = make_codes(fitted, ekfac, self._job.plan, state.bits, state.recipe)
        return self._codes


@dataclass(eq=False)
class _WorkerHandle:
    """A worker as the driver sees it; `placed` is answered once it has its place.

    `predecessors` are how many workers before it could not start.
    """

    actor: Any
    placed: Any
    predecessors: int


class BuildWorkers:
    """The driver's share of a build: it hands all units out. The end of its context ends workers.

    `address` is "local", "auto" or host:port, `count` how many workers [as many as there is room
    for]. Entering it raises InputError where there is no Ray, or no cluster.
    """

    first, of = True, 1

    def __init__(self, address: str, count: int | None, job: WorkerJob, progress: Progress):
        self._address, self._count = address, count
        self._job, self._progress = job, progress
        self._ray = load_ray()
        self._connected_here = not self._ray.is_initialized()
        self._numbers = 0  # given: a worker never waits for the lock of one that it replaces
        self._living: list[_WorkerHandle] = []
        self._starting: dict[Any, _WorkerHandle] = {}  # by what tells that the model is there
        self._under_way: dict[Any, tuple[_WorkerHandle, int]] = {}  # with the unit, by its receipt
        self._idle: list[_WorkerHandle] = []

    def __enter__(self) -> "BuildWorkers":
        connect(self._address)
        state = BuildState.joined(Path(self._job.index), self._job.plan)
        assert state is not None
        gpu = self._job.plan.device == "cuda"
        self._remote = self._ray.remote(_Worker).options(
            num_gpus=int(gpu), num_cpus=1 if gpu else state.threads)
        self._count = self._count or _room_for_workers(self._ray, gpu, state.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in list(self._living):
            self._end(worker)
        if self._connected_here:  # else the connection is the user's
            self._ray.shutdown()

    def takes(self, unit: int) -> bool:
        """No unit is the driver's."""
        return False

    def complete(self, stage: BuildStage, missing: Callable[[], list[int]]) -> None:
        """Hand out what is missing until nothing is.

        At most one unit a worker is under way. Raises the error that a unit ended with, and
        GradindexError for one that failed again and again.
        """
        units = missing()
        if not units:
            return
        while len(self._living) < (self._count or 1):
            self._start(predecessors=0)
        self._progress.start(str(stage), len(units), "units")
        failures: Counter[int] = Counter()
        last_line = time.monotonic()
        while units:
            self._hand_out(stage, units, failures)
            # whichever comes first: a receipt, a worker that is there, or the time for a line
            ready, _ = self._ray.wait([*self._under_way, *self._starting], timeout=WORKER_PATIENCE)
            for reference in ready:
                if reference in self._starting:
                    self._started(reference)
                else:
                    self._ended(reference, stage, failures)
            nobody_works = not self._under_way and not self._idle
            if nobody_works and time.monotonic() - last_line > WORKER_PATIENCE:
                last_line = time.monotonic()
                self._progress.say(self._waiting())
            units = missing()
        # a unit can be there before its receipt: what was done for nothing is waited for by nobody
        self._idle += [worker for worker, _ in self._under_way.values()]
        self._under_way.clear()
        self._progress.finish()

    def _hand_out(self, stage: BuildStage, units: list[int], failures: Counter[int]) -> None:
        """A unit to each idle worker, as long as there are units that nobody has."""
        under_way = {unit for _, unit in self._under_way.values()}
        for unit in units:
            if unit not in under_way and self._idle:
                worker = self._idle.pop()
                receipt = worker.actor.do.remote(stage, unit, PAUSE * failures[unit])
                self._under_way[receipt] = worker, unit

    def _start(self, predecessors: int) -> None:
        self._numbers += 1
        actor = self._remote.remote(self._job, self._numbers)
        worker = _WorkerHandle(actor, actor.process.remote(), predecessors)
        self._living.append(worker)
        self._starting[actor.load.remote()] = worker

    def _end(self, worker: _WorkerHandle) -> None:
        self._living.remove(worker)
        self._ray.kill(worker.actor)

    def _started(self, reference: Any) -> None:
        """See whether a worker could load the model; else another takes its place."""
        worker = self._starting.pop(reference)
        why, alive = self._came_of(reference, worker)
        if why is None:
            self._idle.append(worker)
            return
        if alive:
            self._end(worker)
        if worker.predecessors + 1 == TRIES:
            raise GradindexError(f"{TRIES} workers, one after the other, could not start; the last "
                                 f"one: {why}.")
        self._progress.say(f"a worker could not start ({why}); another takes its place")
        self._start(worker.predecessors + 1)

    def _ended(self, reference: Any, stage: BuildStage, failures: Counter[int]) -> None:
        """See what came of a unit; if its worker died, another takes its place."""
        worker, unit = self._under_way.pop(reference)
        why, alive = self._came_of(reference, worker)
        if alive:
            self._idle.append(worker)
        else:
            self._start(predecessors=0)
        if why is None:
            self._progress.update(1)
            return
        failures[unit] += 1
        if failures[unit] == TRIES:
            raise GradindexError(
                f"unit {unit} of {stage} failed {TRIES} times: {why}. "
                + ("" if alive else "Out of memory? Use --max-memory or smaller --batch-tokens. ")
                + "What is done stays done: run the same command again to go on.")
        self._progress.say(f"unit {unit} of {stage} failed: {why}; it is tried again")

    def _came_of(self, reference: Any, worker: _WorkerHandle) -> tuple[str | None, bool]:
        """Why a worker failed in a way that may not last [None], and whether it is still alive.

        Raises the worker's own error.
        """
        kinds = self._ray.exceptions
        try:
            receipt: Receipt = self._ray.get(reference)
        except kinds.RayTaskError as error:
            if not isinstance(error.cause, OSError):
                raise GradindexError(
                    f"a worker failed in a way that gradindex doesn't foresee: {_last_line(error)}"
                ) from error
            return f"{type(error.cause).__name__}: {error.cause}", True
        except kinds.RayError as error:
            if "creation task" in str(error):  # Ray's own words: it has no class for that
                raise GradindexError(f"a worker could not start: {_last_line(error)}") from None
            # one that Ray can't reach may live, and must not do its unit beside who takes it over
            self._end(worker)
            return f"a worker died ({_last_line(error)})", False
        if receipt.error:
            kind = getattr(errors, receipt.error, GradindexError)
            raise kind(f"a worker says: {receipt.message}")
        return None, True

    def _waiting(self) -> str:
        """What is said of workers that are not ready yet."""
        placed = [worker.placed for worker in self._starting.values()]
        loading = len(self._ray.wait(placed, num_returns=len(placed), timeout=0)[0])
        parts = []
        if loading:
            parts.append(f"{loading} of {len(placed)} load the model")
        if loading < len(placed):
            parts.append(f"{len(placed) - loading} of {len(placed)} have no process yet (ray "
                         "status says whether the cluster has room)")
        return f"waiting for workers: {', '.join(parts)}"


def _room_for_workers(ray: Any, gpu: bool, threads: int) -> int:
    """How many workers the cluster has room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(node.get("GPU", 0)) if gpu else int(node.get("CPU", 0) // threads)
               for node in nodes)
    return max(1, room)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:300]
