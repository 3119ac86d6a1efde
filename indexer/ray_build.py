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
from gradindex.cluster import absolute, connect, load_ray
from gradindex.errors import GradindexError, InputError
from gradindex.influence.codes import Codes
from gradindex.model.source import ModelSource
from gradindex.progress import Progress
from gradindex.storage.files import disk_errors
from gradindex.storage.locks import one_of_writers
from gradindex.storage.plan import Plan
from indexer.build_request import BuildRequest
from indexer.fit.folder import FitFolder
from indexer.fit.schedule import read_fitted
from indexer.fit.units import FitUnits
from indexer.prepare import Prepared, make_codes, prepare
from indexer.read import ingest
from indexer.shards import OVER_RAY, Stage
from indexer.state import BuildState

TRIES = 4  # of a unit that fails, or to have a worker there
PAUSE = 5.0  # seconds before a unit is tried again, and longer each time: a shared folder lags
PATIENCE = 60.0  # seconds: for the lock of a worker that was killed, and until it is said again
# whom the build waits for


@dataclass(frozen=True)
class Job:
    """What a worker needs to join a build: names and numbers alone.

    On a GPU the model of the driver, which calibrates with it in the end, lies beside that of the
    worker to whom Ray gives the same GPU: Ray knows nothing of the driver's.
    """

    index: Path
    source: ModelSource
    plan: Plan

    @classmethod
    def of(cls, request: BuildRequest) -> "Job":
        plan = request.plan
        source = replace(request.source, model=str(absolute(request.source.model)), tokenizer=None,
                         device=plan.device)
        return cls(request.index.resolve(), source, plan)


@dataclass(frozen=True)
class Receipt:
    """What came of a unit, or of loading: nothing, or an error by the name of its class."""

    error: str = ""
    message: str = ""


class _Worker:
    """Does units of a build, one at a time; shard `number` of those that write to the index."""

    def __init__(self, job: Job, number: int):
        self._job, self._number = job, number
        self._index = job.index
        self._stack = contextlib.ExitStack()
        self._codes: Codes | None = None
        self._about: Prepared
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
        job = self._job
        state = BuildState.joined(self._index, job.plan) if self._index.is_dir() else None
        if state is None:
            raise InputError(f"it finds no build in {self._index}. With --ray the index has to lie "
                             "where every machine sees it by the same path.")
        self._join()
        device, dtype = job.plan.device, job.plan.dtype
        about = prepare(self._index, job.source, dtype, state, Progress())
        found = about.model
        if (found.device.type, str(found.dtype)) != (device, f"torch.{dtype}"):
            raise GradindexError(
                f"it loaded the model as {found.dtype} on {found.device}; expected what the build "
                f"began with, {dtype} on {device}. Give all machines the same versions of "
                "gradindex, torch and transformers.")
        self._about = about
        folder = FitFolder(self._index / "curvature.partial", about.tracked, about.settings,
                           first=False)
        self._units = FitUnits(found, about.run.records, folder, Progress())

    def _join(self) -> None:
        """Take the number's lock, which a worker of a killed driver may hold for a moment yet."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._stack.enter_context(one_of_writers(self._index, self._number, OVER_RAY))
                return
            except GradindexError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def do(self, stage: Stage, unit: int, pause: float) -> Receipt:
        """Do a unit, `pause` seconds from now; its errors travel as text."""
        time.sleep(pause)
        try:
            with disk_errors(self._index):
                self._do(stage, unit)
        except GradindexError as error:
            return Receipt(type(error).__name__, str(error))
        return Receipt()

    def _do(self, stage: Stage, unit: int) -> None:
        about = self._about
        if stage.name != "encode":
            self._units.do(stage, unit)
        elif unit in ingest.unsealed(about.run):
            ingest.encode_one(about.model, self._made_codes(), about.run, about.run.segments[unit],
                              self._job.plan.batch_tokens, Progress())

    def _made_codes(self) -> Codes:
        if self._codes is None:
            self._units.forget()
            about = self._about
            ekfac, _ = read_fitted(about.model, about.tracked, about.settings.covariance_blocks,
                                   self._index, Progress(), about.allowance)
            kept = [module for module in about.tracked if module.name in ekfac]
            self._codes = make_codes(kept, ekfac, self._job.plan)
        return self._codes


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it; `placed` is answered once it has its place.

    `failed` workers before it could not start.
    """

    actor: Any
    placed: Any
    failed: int


class Crew:
    """The driver's share of a build: to hand out all units. A context: its end ends the workers.

    `address` is "local", "auto" or host:port, `count` how many workers [as many as there is room
    for]. Entering it raises InputError where there is no Ray, or no cluster.
    """

    first, of = True, 1

    def __init__(self, address: str, count: int | None, job: Job, progress: Progress):
        self._address, self._count = address, count
        self._job, self._progress = job, progress
        self._ray = load_ray()
        self._own = not self._ray.is_initialized()
        self._numbers = 0  # given: a worker never waits for the lock of one that it replaces
        self._hands: list[_Hand] = []  # all that live
        self._starting: dict[Any, _Hand] = {}  # by what tells that the model is there
        self._under_way: dict[Any, tuple[_Hand, int]] = {}  # with the unit, by its receipt
        self._idle: list[_Hand] = []

    def __enter__(self) -> "Crew":
        connect(self._address)
        state = BuildState.joined(Path(self._job.index), self._job.plan)
        assert state is not None
        gpu = self._job.plan.device == "cuda"
        self._remote = self._ray.remote(_Worker).options(
            num_gpus=int(gpu), num_cpus=1 if gpu else state.threads)
        self._count = self._count or _room(self._ray, gpu, state.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hand in list(self._hands):
            self._end(hand)
        if self._own:
            self._ray.shutdown()

    def takes(self, unit: int) -> bool:
        """No unit is the driver's."""
        return False

    def wait(self, stage: Stage, missing: Callable[[], list[int]]) -> None:
        """Hand out what is missing until nothing is.

        At most one unit a worker is under way. Raises the error that a unit ended with, and
        GradindexError for one that failed again and again.
        """
        left = missing()
        if not left:
            return
        while len(self._hands) < (self._count or 1):
            self._start(failed=0)
        self._progress.start(str(stage), len(left), "units")
        failures: Counter[int] = Counter()
        said = time.monotonic()
        while left:
            self._hand_out(stage, left, failures)
            ready, _ = self._ray.wait([*self._under_way, *self._starting], timeout=PATIENCE)
            for reference in ready:
                if reference in self._starting:
                    self._started(reference)
                else:
                    self._ended(reference, stage, failures)
            if not self._under_way and not self._idle and time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                self._progress.say(self._waiting())
            left = missing()
        self._idle += [hand for hand, _ in self._under_way.values()]  # with what others did too
        self._under_way.clear()
        self._progress.finish()

    def _hand_out(self, stage: Stage, left: list[int], failures: Counter[int]) -> None:
        given = {unit for _, unit in self._under_way.values()}
        for unit in left:
            if unit not in given and self._idle:
                hand = self._idle.pop()
                receipt = hand.actor.do.remote(stage, unit, PAUSE * failures[unit])
                self._under_way[receipt] = hand, unit

    def _start(self, failed: int) -> None:
        self._numbers += 1
        actor = self._remote.remote(self._job, self._numbers)
        hand = _Hand(actor, actor.process.remote(), failed)
        self._hands.append(hand)
        self._starting[actor.load.remote()] = hand

    def _end(self, hand: _Hand) -> None:
        self._hands.remove(hand)
        self._ray.kill(hand.actor)

    def _started(self, reference: Any) -> None:
        hand = self._starting.pop(reference)
        why, there = self._came_of(reference, hand)
        if why is None:
            self._idle.append(hand)
            return
        if there:
            self._end(hand)
        if hand.failed + 1 == TRIES:
            raise GradindexError(f"{TRIES} workers, one after the other, could not start; the last "
                                 f"one: {why}.")
        self._progress.say(f"a worker could not start ({why}); another takes its place")
        self._start(hand.failed + 1)

    def _ended(self, reference: Any, stage: Stage, failures: Counter[int]) -> None:
        """See what came of a unit; if its worker died, another takes its place."""
        hand, unit = self._under_way.pop(reference)
        why, there = self._came_of(reference, hand)
        if there:
            self._idle.append(hand)
        else:
            self._start(failed=0)
        if why is None:
            self._progress.update(1)
            return
        failures[unit] += 1
        if failures[unit] == TRIES:
            raise GradindexError(
                f"unit {unit} of {stage} failed {TRIES} times: {why}. "
                + ("" if there else "Out of memory? Use --max-memory or smaller --batch-tokens. ")
                + "What is done stays done: run the same command again to go on.")
        self._progress.say(f"unit {unit} of {stage} failed: {why}; it is tried again")

    def _came_of(self, reference: Any, hand: _Hand) -> tuple[str | None, bool]:
        """Why a worker failed in a way that may not last [None], and whether it is still there.

        Raises the worker's own error.
        """
        known = self._ray.exceptions
        try:
            receipt: Receipt = self._ray.get(reference)
        except known.RayTaskError as error:
            if not isinstance(error.cause, OSError):
                raise GradindexError(
                    f"a worker failed in a way that gradindex doesn't foresee: {_last_line(error)}"
                ) from error
            return f"{type(error.cause).__name__}: {error.cause}", True
        except known.RayError as error:
            if "creation task" in str(error):
                raise GradindexError(f"a worker could not start: {_last_line(error)}") from None
            # one that Ray can't reach may live, and must not do its unit beside who takes it over
            self._end(hand)
            return f"a worker died ({_last_line(error)})", False
        if receipt.error:
            known_here = getattr(errors, receipt.error, GradindexError)
            raise known_here(f"a worker says: {receipt.message}")
        return None, True

    def _waiting(self) -> str:
        """What to say of workers that are not there."""
        placed = [hand.placed for hand in self._starting.values()]
        loading = len(self._ray.wait(placed, num_returns=len(placed), timeout=0)[0])
        said = []
        if loading:
            said.append(f"{loading} of {len(placed)} load the model")
        if loading < len(placed):
            said.append(f"{len(placed) - loading} of {len(placed)} have no process yet (ray status "
                        "says whether the cluster has room)")
        return f"waiting for workers: {', '.join(said)}"


def _room(ray: Any, gpu: bool, threads: int) -> int:
    """How many workers the cluster has room for."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(one.get("GPU", 0)) if gpu else int(one.get("CPU", 0) // threads)
               for one in alive)
    return max(1, room)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:300]
