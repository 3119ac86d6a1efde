"""A search shared out to several processes and machines by Ray.

Each worker, an actor of Ray's, holds the model, the curvature and the codes of a run of segments,
which it reads from the folder that every machine sees. It scores them by code and exactly. This
process forms the query's gradient, merges the best by code of each, and says how complete the
answer is. A worker that is lost takes its segments out of the search under way; Ray starts it
again for the next one. Arrays, records and dataclasses go to and fro, never objects of the user's.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from gradindex.cluster import absolute
from gradindex.errors import GradindexError, InputError
from gradindex.influence.exact import Exact, Rescorer
from gradindex.influence.queries import Arrays, Preconditioned
from gradindex.model.loading import quiet_transformers
from gradindex.model.source import ModelSource
from gradindex.modules import Module
from gradindex.progress import duration
from gradindex.storage import layout
from gradindex.version import VERSION
from search.rank.ranking import Ranking, statistic
from search.rank.snapshot import LostError, OpenIndex, Part

PATIENCE = 600.0  # seconds without a sign from a worker that has something to do
RETURN = 60.0  # seconds that searches wait for a lost worker to be back, in all


# ---- in a worker's process


@dataclass(frozen=True)
class Where:
    """Where a worker finds the index and its model, and with which version of gradindex."""

    version: str
    path: Path
    source: ModelSource


@dataclass(frozen=True)
class Rescoring:
    """How sequences are to be rescored; `query` tells preconditioned gradients apart."""

    query: str
    rank: int | None
    modules: list[Module]
    damping: float
    batch_tokens: int
    sizes: bool
    terms: bool


@dataclass(frozen=True)
class Ordering:
    """How sequences are to be ordered by code; `queries` tells query vectors apart."""

    queries: str
    sign: float
    by_norm: bool


class Worker:
    """Some segments of an index, opened at first use; places are those among them alone."""

    def __init__(self, where: Where, part: Part, threads: int):
        self._where, self._part, self._threads = where, part, threads
        self._query = ""
        self._preconditioned = Preconditioned({})
        self._ranked = Ordering("", 1.0, False)
        self._rankings: Sequence[Ranking] = []

    @cached_property
    def index(self) -> OpenIndex:
        where = self._where
        if where.version != VERSION:
            raise GradindexError(f"it has gradindex {VERSION}, who asks has "
                                 f"{where.version}. Install the same everywhere.")
        if not where.path.is_dir():
            raise InputError(f"it finds no folder {where.path}. With --ray the index has to lie "
                             "where every machine sees it by the same path.")
        torch.set_num_threads(self._threads)
        quiet_transformers()
        return OpenIndex(where.path, where.source, part=self._part)

    def load(self) -> None:
        self.index.load()
        gc.collect()
        gc.freeze()  # what stays for good would stop a query for 0.2 s now and then

    def ask(
        self, how: Ordering, queries: np.ndarray, number: int, what: str, *given: Any
    ) -> Any:
        """What the `Ranking` of these places by one of the queries [q, K] answers.

        The codes are scored once for all that is asked of the same queries one after the other.
        """
        if self._ranked != how:
            self._ranked, self._rankings = Ordering("", 1.0, False), []  # free before the next
            self._rankings = self.index.rankings(queries, how.sign, how.by_norm)
            self._ranked = how
        return getattr(self._rankings[number], what)(*given)

    def stored_codes(self, places: np.ndarray) -> np.ndarray:
        return self.index.stored_codes(places.tolist())

    def rescore(
        self, how: Rescoring, arrays: Arrays, places: np.ndarray
    ) -> Iterator[tuple[list[tuple[int, Exact]], int]]:
        """As `OpenIndex.rescore`, with how many batches were halved since the one before."""
        index = self.index
        if self._query != how.query:
            self._preconditioned = Preconditioned.from_arrays(arrays, how.rank, index.model.device)
            self._query = how.query
        by = Rescorer(index.model, how.modules, index.ekfac, how.damping, how.batch_tokens)
        before = 0
        for found in index.rescore(by, self._preconditioned, places.tolist(), how.sizes, how.terms):
            yield found, by.halved - before
            before = by.halved


# ---- in the process that asks


@dataclass(eq=False)
class Handle:
    """A worker as seen from here. It is waited for `until` then, while it is not `ready`."""

    name: str
    segments: tuple[str, ...]
    actor: Any
    until: float
    loading: Any = None
    ready: bool = False
    known: bool = False  # was ready once


class SharedRanking:
    """A Ranking merged from those that the workers have of their own places.

    What crosses the network is each worker's best and a few numbers, but for `scores`.
    """

    def __init__(self, index: "SharedIndex", how: Ordering, sent: Any, number: int):
        self.norms, self.by_norm = index.norms, how.by_norm
        self._index, self._how, self._of = index, how, (how, sent, number)

    def best(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._index.ask_all(
            lambda worker, number: worker.ask.remote(*self._of, "best", count))
        starts = self._index.starts()
        places = np.concatenate([start + own for start, (own, _) in
                                 zip(starts[:-1], found, strict=True)])
        values = np.concatenate([own for _, own in found])
        order = np.lexsort((places, -values))[:count]
        return places[order], values[order]

    def before(self, statistic: np.ndarray, places: np.ndarray) -> np.ndarray:
        starts = self._index.starts()
        found = self._index.ask_all(lambda worker, number: worker.ask.remote(
            *self._of, "before", statistic,
            np.clip(places - starts[number], 0, starts[number + 1] - starts[number])))
        return np.asarray(np.sum(found, axis=0))

    def ranks(self, places: Sequence[int]) -> list[int]:
        wanted = np.asarray(places, dtype=np.int64)
        own = statistic(self.scores_at(places), self.norms[wanted], self._how.sign, self.by_norm)
        ranks: list[int] = (self.before(own, wanted) + 1).tolist()
        return ranks

    def scores_at(self, places: Sequence[int]) -> np.ndarray:
        return self._index.fill(
            np.zeros(len(places), dtype=np.float32), places,
            lambda worker, there: worker.ask.remote(*self._of, "scores_at", there))

    def scores(self) -> np.ndarray:
        return np.concatenate(self._index.ask_all(
            lambda worker, number: worker.ask.remote(*self._of, "scores")))


class SharedIndex(OpenIndex):
    """An index whose segments are shared out to workers of `ray`, as many as `asked` for.

    Without a number there is a worker for each GPU of the cluster, or for each machine if it has
    none. They are started when something is to be scored. Only what `OpenIndex` does with all codes
    is done here, from the same folder: groups, and the surveys of a report.
    Raises like `OpenIndex`, InputError for a model object and for more workers than can be placed,
    GradindexError for workers that don't start, LostError from what needs a worker that is lost.
    """

    def __init__(
        self, ray: Any, asked: int | None, path: Path, source: ModelSource,
        allow_damaged: bool = False,
    ):
        for given, flag in ((source.model, "model"), (source.tokenizer, "tokenizer")):
            if given is not None and not isinstance(given, (str, Path)):
                raise InputError(
                    f"with ray the {flag} can't be an object ({type(given).__name__}): every "
                    "worker reads its own. Save it, and give the folder.")
        super().__init__(path.absolute(), source, allow_damaged)
        self._ray, self._asked = ray, asked
        own = self.source
        self._where = Where(VERSION, self.path, replace(
            own, model=absolute(own.model),
            tokenizer=None if own.tokenizer is None else absolute(own.tokenizer),
            device="cuda" if own.device.startswith("cuda") else own.device))
        self._workers: list[Handle] = []
        self._sent: tuple[Preconditioned, Any] | None = None
        self._queries: tuple[np.ndarray, Any] | None = None  # the same after a loss: scored already
        self.patience, self.back = PATIENCE, RETURN

    def without(self, lost: LostError) -> Self:
        rest = super().without(lost)
        rest._workers = [one for one in self._workers if not lost.segments.issuperset(one.segments)]
        return rest

    # ---- workers

    def load(self) -> None:
        """Start the workers, and read the model and the curvature here while they do there.

        A worker that was lost is waited for, but not for long.
        """
        if not self._workers:
            self._workers = self._start()
        waiting = [worker for worker in self._workers if not worker.ready]
        for worker in waiting:
            if worker.loading is None:  # for the first time, or it failed
                worker.loading, worker.until = self._load(worker), time.monotonic() + self.patience
        _ = self.codes, self.norms
        while waiting:
            left = max(worker.until for worker in waiting) - time.monotonic()
            done, _ = self._ray.wait([worker.loading for worker in waiting], timeout=max(0.0, left))
            if not done:
                break
            for worker in [one for one in waiting if one.loading in done]:
                self._loaded(worker)
                waiting.remove(worker)
        for worker in waiting:
            if not worker.known:
                raise GradindexError(
                    f"{worker.name} hasn't loaded its segments in {duration(self.patience)}. "
                    "`ray status` says whether the cluster has the CPU or GPU that it asks for.")

    def _start(self) -> list[Handle]:
        ray, segments = self._ray, self.contents.segments
        nodes, gpu = self._places()
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        count = min(self._asked or len(nodes), len(segments))
        chosen = [nodes[number % len(nodes)]["NodeID"] for number in range(count)]
        workers = []
        for number, run in enumerate(deal([segment.rows for segment in segments], count)):
            node = nodes[number % len(nodes)]
            threads = max(1, int(node["Resources"].get("CPU", 1)) // chosen.count(chosen[number]))
            names = tuple(segment.name for segment in segments[run])
            actor = ray.remote(Worker).options(
                num_cpus=1, num_gpus=int(gpu), max_restarts=-1,
                scheduling_strategy=strategy(node["NodeID"], soft=True),
            ).remote(self._where, Part(self.contents.manifest, names), threads)
            name = f"worker {number + 1} of {count} on {node['NodeManagerHostname']}"
            workers.append(Handle(name, names, actor, 0.0))
        return workers

    def _places(self) -> tuple[list[dict[str, Any]], bool]:
        """The machines where workers go, in turn, and whether each takes a GPU."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus = ([int(node["Resources"].get(kind, 0)) for node in alive]
                      for kind in ("GPU", "CPU"))
        gpu = self._where.source.device != "cpu" and sum(gpus) > 0
        most = sum(gpus if gpu else cpus)
        if not most or (self._asked or 0) > most:
            raise InputError(f"--ray-workers {self._asked or 1}: the cluster has "
                             f"{most} {'GPUs' if gpu else 'CPUs'}, one for each worker at most.")
        if gpu:
            return [node for node, own in zip(alive, gpus, strict=True) for _ in range(own)], True
        return [node for node, own in zip(alive, cpus, strict=True) if own], False

    def _load(self, worker: Handle) -> Any:
        return worker.actor.load.options(max_task_retries=-1).remote()

    def _loaded(self, worker: Handle) -> None:
        """Note that a worker is there. Raises what kept it from that."""
        loading, worker.loading = worker.loading, None
        try:
            self._ray.get(loading)
        except self._ray.exceptions.RayError as error:
            why = self._reason(worker, error)
            raise GradindexError(f"{worker.name} doesn't start: it {why}.") from None
        worker.ready = worker.known = True

    def _lost(self, gone: Mapping[Handle, str]) -> LostError:
        """What to say of workers that are gone; they are loaded again when Ray has them back."""
        for worker in gone:
            worker.ready, worker.loading = False, self._load(worker)
            worker.until = time.monotonic() + self.back
        return LostError(frozenset(name for worker in gone for name in worker.segments),
                         "; ".join(f"{worker.name} {why}" for worker, why in gone.items()))

    def _hung(self, worker: Handle) -> str:
        """Have a worker started again that gives no sign."""
        self._ray.kill(worker.actor, no_restart=False)
        return f"gave no sign for {duration(self.patience)}"

    def _reason(self, worker: Handle, error: Any) -> str:
        """Why Ray has no answer of a worker. Raises the worker's own error, if that is why."""
        if isinstance(error, self._ray.exceptions.RayTaskError):
            own = error.cause
            if isinstance(own, GradindexError):
                raise type(own)(f"{worker.name}: {own}") from None
            raise own if isinstance(own, Exception) else error from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[-1 if "creation task" in lines[0] else 0]  # where the cause comes last
        return f"is gone ({said[:160]})"

    def _gather(self, asked: Sequence[tuple[Handle, Any]]) -> list[Any]:
        """What workers answer, in order. Raises LostError where some don't."""
        refs = [answer for _, answer in asked]
        _, late = self._ray.wait(refs, num_returns=len(refs), timeout=self.patience)
        found, gone = [], {}
        for worker, answer in asked:
            if answer in late:
                gone[worker] = self._hung(worker)
                continue
            try:
                found.append(self._ray.get(answer))
            except self._ray.exceptions.RayError as error:
                gone[worker] = self._reason(worker, error)
        if gone:
            raise self._lost(gone)
        return found

    def starts(self) -> np.ndarray:
        """The first place of each worker, and N: int64 [workers + 1]."""
        if not self._workers:
            self.load()
        held = np.cumsum([0, *(len(worker.segments) for worker in self._workers)])
        return np.searchsorted(self.contents.places, self.contents.starts)[held]

    def _shares(self, places: Sequence[int]) -> list[tuple[Handle, np.ndarray, np.ndarray]]:
        """Each worker that has some of the places: which of them, and where they are there."""
        starts, wanted = self.starts(), np.asarray(places, dtype=np.int64)
        homes = np.searchsorted(starts, wanted, side="right") - 1
        return [(worker, mine, wanted[mine] - starts[number])
                for number, worker in enumerate(self._workers)
                if len(mine := np.flatnonzero(homes == number))]

    def fill(
        self, empty: np.ndarray, places: Sequence[int], ask: Callable[[Any, np.ndarray], Any]
    ) -> np.ndarray:
        """Fill an array with what each of the places' own worker says of it."""
        shares = self._shares(places)
        found = self._gather([(worker, ask(worker.actor, there)) for worker, _, there in shares])
        for (_, mine, _), own in zip(shares, found, strict=True):
            empty[mine] = own
        return empty

    def ask_all(self, ask: Callable[[Any, int], Any]) -> list[Any]:
        """What every worker says, in the order of their places."""
        return self._gather([(worker, ask(worker.actor, number))
                             for number, worker in enumerate(self._workers)])

    # ---- what is asked of them

    def rankings(self, queries: np.ndarray, sign: float, by_norm: bool) -> Sequence[Ranking]:
        """As of `OpenIndex`. Each worker scores its codes when they are first asked about."""
        if not self._workers:
            self.load()
        away = [worker for worker in self._workers if not worker.ready]
        if away:
            raise LostError(frozenset(name for worker in away for name in worker.segments),
                            "; ".join(f"{worker.name} isn't back yet" for worker in away))
        if self._queries is None or self._queries[0] is not queries:
            self._queries = queries, self._ray.put(queries)
        sent = self._queries[1]
        how = Ordering(sent.hex(), sign, by_norm)
        return [SharedRanking(self, how, sent, number) for number in range(len(queries))]

    def code_scores(self, queries: np.ndarray) -> np.ndarray:
        """As of `OpenIndex`: 4 bytes a sequence and query cross the network."""
        return np.stack([one.scores() for one in self.rankings(queries, 1.0, False)])

    def stored_codes(self, places: Sequence[int]) -> np.ndarray:
        width = layout.code_bytes(self.manifest.code["length"])
        empty = np.zeros((len(places), width), np.uint8)
        return self.fill(empty, places, lambda worker, there: worker.stored_codes.remote(there))

    def rescore(
        self, by: Rescorer, preconditioned: Preconditioned, places: Sequence[int],
        sizes: bool = False, terms: bool = False,
    ) -> Iterator[list[tuple[int, Exact]]]:
        """As of `OpenIndex`: each worker goes through its own places in order, all at once.

        LostError comes last, when the others are through with theirs. Who stops asking stops the
        workers at the end of their batch.
        """
        ray, sent = self._ray, self._send(preconditioned)
        how = Rescoring(sent.hex(), preconditioned.rank, by.modules, by.damping, by.batch_tokens,
                        sizes, terms)
        streams: dict[Any, tuple[Handle, int]] = {}
        for worker, mine, there in self._shares(places):
            stream = worker.actor.rescore.options(num_returns="streaming").remote(how, sent, there)
            streams[stream] = worker, places[mine[0]] - int(there[0])
        silent, gone = dict.fromkeys(streams, 0.0), dict[Handle, str]()
        try:
            while streams:
                begun = time.monotonic()
                left = self.patience - max(silent[stream] for stream in streams)
                ready, _ = ray.wait(list(streams), timeout=max(0.0, left))
                for stream in streams:
                    silent[stream] += time.monotonic() - begun
                for stream in [] if ready else list(streams):
                    if silent[stream] >= self.patience:
                        worker, _ = streams.pop(stream)
                        gone[worker] = self._hung(worker)
                for stream in ready:
                    worker, first = streams.pop(stream)
                    try:
                        found, halved = ray.get(next(stream))
                    except StopIteration:
                        continue
                    except ray.exceptions.RayError as error:
                        gone[worker] = self._reason(worker, error)
                        continue
                    streams[stream], silent[stream] = (worker, first), 0.0  # behind who waits
                    by.halved += halved
                    yield [(first + place, exact) for place, exact in found]
        finally:
            for stream in streams:
                ray.cancel(stream)
        if gone:
            raise self._lost(gone)

    def _send(self, preconditioned: Preconditioned) -> Any:
        """A query's gradients, put where workers can read them, once."""
        if self._sent is None or self._sent[0] is not preconditioned:
            self._sent = preconditioned, self._ray.put(preconditioned.arrays())
        return self._sent[1]


def deal(rows: Sequence[int], count: int) -> list[slice]:
    """Runs of segments for `count` workers, of about as many rows each, none empty."""
    runs, first = [], 0
    for left in range(count, 0, -1):
        goal, end = sum(rows[first:]) / left, first + 1
        while end < len(rows) - left + 1 and sum(rows[first:end]) + rows[end] / 2 <= goal:
            end += 1
        runs.append(slice(first, end if left > 1 else len(rows)))
        first = end
    return runs
