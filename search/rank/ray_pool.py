"""A search over Ray, in the process that asks: workers started, loaded, waited for and lost.

Ray starts a lost worker again by itself. Here it is only noted who is away, and for how long it is
waited for; who is away takes its segments out of the search under way.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gradindex.errors import GradindexError, InputError
from gradindex.progress import duration
from gradindex.storage.contents import Contents
from search.rank.coverage import LostError
from search.rank.ray_worker import Whereabouts, Worker
from search.rank.snapshot import SegmentSubset

WORKER_PATIENCE = 600.0  # seconds without a sign from a worker that has something to do
RETURN = 60.0  # seconds that searches wait for a lost worker to be back, in all


@dataclass(eq=False)
class WorkerHandle:
    """A worker as seen from here. It is waited for `until` then, while it is not `ready`."""

    name: str
    segments: tuple[str, ...]
    actor: Any
    until: float
    loading: Any = None
    ready: bool = False
    loaded_once: bool = False


class WorkerPool:
    """The workers that an index's segments are shared out to: `count` many, or one a GPU or node.

    `workers` are in the order of their segments; there are none before `begin`.
    """

    def __init__(self, ray: Any, count: int | None, where: Whereabouts):
        self.ray, self._count, self._where = ray, count, where
        self.workers: list[WorkerHandle] = []
        self.patience, self.back = WORKER_PATIENCE, RETURN

    def without(self, lost: LostError) -> Self:
        """The same workers but for those whose segments are all lost."""
        rest = copy.copy(self)
        rest.workers = [worker for worker in self.workers
                        if not lost.segments.issuperset(worker.segments)]
        return rest

    # ---- they come

    def begin(self, contents: Contents) -> None:
        """Start the workers where there are none, and let those load that haven't."""
        # not when the index is opened: it may only be looked at
        if not self.workers:
            self.workers = self._start(contents)
        for worker in self.workers:
            if not worker.ready and worker.loading is None:  # for the first time, or it failed
                worker.loading, worker.until = self._load(worker), time.monotonic() + self.patience

    def wait(self) -> None:
        """Wait for those that load. A worker that was lost is waited for, but not for long.

        Raises what keeps a worker from loading.
        """
        waiting = [worker for worker in self.workers if not worker.ready]
        # those that are loaded are noted as they come, for one that fails must be told at once
        while waiting:
            seconds = max(worker.until for worker in waiting) - time.monotonic()
            done, _ = self.ray.wait([worker.loading for worker in waiting],
                                    timeout=max(0.0, seconds))
            if not done:
                break
            for worker in [worker for worker in waiting if worker.loading in done]:
                self._loaded(worker)
                waiting.remove(worker)
        for worker in waiting:
            # one that was there once is away: the search does without its segments
            if not worker.loaded_once:
                raise GradindexError(
                    f"{worker.name} hasn't loaded its segments in {duration(self.patience)}. "
                    "`ray status` says whether the cluster has the CPU or GPU that it asks for.")

    def _start(self, contents: Contents) -> list[WorkerHandle]:
        """Actors for runs of segments, on nodes in turn; their threads share a node's CPUs."""
        ray, segments = self.ray, contents.segments
        nodes, gpu = self._nodes()
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        count = min(self._count or len(nodes), len(segments))
        chosen = [nodes[number % len(nodes)]["NodeID"] for number in range(count)]
        workers = []
        for number, run in enumerate(deal([segment.rows for segment in segments], count)):
            node = nodes[number % len(nodes)]
            threads = max(1, int(node["Resources"].get("CPU", 1)) // chosen.count(chosen[number]))
            names = tuple(segment.name for segment in segments[run])
            # soft: where a node is gone for good, Ray starts its workers on another
            actor = ray.remote(Worker).options(
                num_cpus=1, num_gpus=int(gpu), max_restarts=-1,
                scheduling_strategy=strategy(node["NodeID"], soft=True),
            ).remote(self._where, SegmentSubset(contents.manifest, names), threads)
            name = f"worker {number + 1} of {count} on {node['NodeManagerHostname']}"
            workers.append(WorkerHandle(name, names, actor, 0.0))
        return workers

    def _nodes(self) -> tuple[list[dict[str, Any]], bool]:
        """The machines where workers go, in turn, and whether each takes a GPU."""
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        gpus, cpus = ([int(node["Resources"].get(kind, 0)) for node in alive]
                      for kind in ("GPU", "CPU"))
        gpu = self._where.source.device != "cpu" and sum(gpus) > 0
        most = sum(gpus if gpu else cpus)
        if not most or (self._count or 0) > most:
            raise InputError(f"--ray-workers {self._count or 1}: the cluster has "
                             f"{most} {'GPUs' if gpu else 'CPUs'}, one for each worker at most.")
        if gpu:
            return [node for node, count in zip(alive, gpus, strict=True)
                    for _ in range(count)], True
        return [node for node, count in zip(alive, cpus, strict=True) if count], False

    def _load(self, worker: WorkerHandle) -> Any:
        return worker.actor.load.options(max_task_retries=-1).remote()

    def _loaded(self, worker: WorkerHandle) -> None:
        """Note that a worker is there. Raises what kept it from that."""
        loading, worker.loading = worker.loading, None
        try:
            self.ray.get(loading)
        except self.ray.exceptions.RayError as error:
            why = self.reason(worker, error)
            raise GradindexError(f"{worker.name} doesn't start: it {why}.") from None
        worker.ready = worker.loaded_once = True

    # ---- they answer, or are lost

    def gather(self, answers: Sequence[tuple[WorkerHandle, Any]]) -> list[Any]:
        """What workers answer, in order. Raises LostError where some don't."""
        # all together, or one that hangs would hide what happened to the others
        refs = [ref for _, ref in answers]
        _, late = self.ray.wait(refs, num_returns=len(refs), timeout=self.patience)
        values, gone = [], {}
        for worker, ref in answers:
            if ref in late:
                gone[worker] = self.hung(worker)
                continue
            try:
                values.append(self.ray.get(ref))
            except self.ray.exceptions.RayError as error:
                gone[worker] = self.reason(worker, error)
        if gone:
            raise self.lost(gone)
        return values

    def away(self) -> LostError | None:
        """What to say of workers that are not back yet, if there are some."""
        missing = [worker for worker in self.workers if not worker.ready]
        return _lost_error({worker: "isn't back yet" for worker in missing}) if missing else None

    def lost(self, gone: Mapping[WorkerHandle, str]) -> LostError:
        """What to say of workers that are gone; they are loaded again when Ray has them back."""
        for worker in gone:
            worker.ready, worker.loading = False, self._load(worker)
            worker.until = time.monotonic() + self.back
        return _lost_error(gone)

    def hung(self, worker: WorkerHandle) -> str:
        """Have a worker started again that gives no sign, and say that of it."""
        self.ray.kill(worker.actor, no_restart=False)
        return f"gave no sign for {duration(self.patience)}"

    def reason(self, worker: WorkerHandle, error: Any) -> str:
        """Why Ray has no answer of a worker. Raises the worker's own error, if that is why."""
        if isinstance(error, self.ray.exceptions.RayTaskError):
            cause = error.cause
            if isinstance(cause, GradindexError):
                raise type(cause)(f"{worker.name}: {cause}") from None
            raise cause if isinstance(cause, Exception) else error from None
        # what Ray says of a death is a page; its first line says the most
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first_words = lines[-1 if "creation task" in lines[0] else 0]  # where the cause comes last
        return f"is gone ({first_words[:160]})"


def _lost_error(gone: Mapping[WorkerHandle, str]) -> LostError:
    return LostError(frozenset(name for worker in gone for name in worker.segments),
                     "; ".join(f"{worker.name} {why}" for worker, why in gone.items()))


def deal(rows: Sequence[int], count: int) -> list[slice]:
    """Runs of segments for `count` workers, of about as many rows each, none empty."""
    runs, first = [], 0
    for left in range(count, 0, -1):
        goal, end = sum(rows[first:]) / left, first + 1
        # a segment is taken while more than half of it still belongs to this worker's share
        while end < len(rows) - left + 1 and sum(rows[first:end]) + rows[end] / 2 <= goal:
            end += 1
        runs.append(slice(first, end if left > 1 else len(rows)))
        first = end
    return runs
