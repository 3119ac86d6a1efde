"""A search shared out to several processes and machines by Ray.

Each worker (`ray_worker.py`), an actor of Ray's, holds the model, the curvature and the codes of a
run of segments, which it reads from the folder that every machine sees. It scores them by code and
exactly. This process forms the query's gradient, merges the best by code of each, and says how
complete the answer is. A worker that is lost takes its segments out of the search under way; Ray
starts it again for the next one (`ray_pool.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from gradindex.errors import InputError
from gradindex.influence.exact import Exact, Rescorer
from gradindex.influence.preconditioned import Preconditioned
from gradindex.model.model_source import ModelSource
from gradindex.ray_cluster import absolute
from gradindex.storage import layout
from gradindex.storage.contents import homes
from gradindex.version import VERSION
from search.rank.coverage import LostError
from search.rank.ranking import Ranking, statistic
from search.rank.ray_pool import WorkerHandle, WorkerPool
from search.rank.ray_worker import Ordering, Rescoring, Whereabouts
from search.rank.snapshot import Snapshot


class SharedRanking:
    """A Ranking merged from those that the workers have of their own places.

    What crosses the network is each worker's best and a few numbers, but for `scores`.
    """

    def __init__(self, snapshot: "SharedSnapshot", how: Ordering, sent: Any, number: int):
        self.norms, self.sign, self.by_norm = snapshot.norms, how.sign, how.by_norm
        self._snapshot, self._of = snapshot, (how, sent, number)

    def best(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        bests = self._snapshot.ask_all(
            lambda worker, number: worker.ask.remote(*self._of, "best", count))
        starts = self._snapshot.starts()
        places = np.concatenate([start + inside for start, (inside, _) in
                                 zip(starts[:-1], bests, strict=True)])
        values = np.concatenate([values for _, values in bests])
        # by place where values are equal, as in one process: answers must not depend on workers
        order = np.lexsort((places, -values))[:count]
        return places[order], values[order]

    def before(self, statistic: np.ndarray, places: np.ndarray) -> np.ndarray:
        starts = self._snapshot.starts()
        # to a worker a place of another's is before all of its own, or after them
        counts = self._snapshot.ask_all(lambda worker, number: worker.ask.remote(
            *self._of, "before", statistic,
            np.clip(places - starts[number], 0, starts[number + 1] - starts[number])))
        return np.asarray(np.sum(counts, axis=0))

    def ranks(self, places: Sequence[int]) -> list[int]:
        chosen = np.asarray(places, dtype=np.int64)
        values = statistic(self.scores_at(places), self.norms[chosen], self.sign,
                           self.by_norm)
        ranks: list[int] = (self.before(values, chosen) + 1).tolist()
        return ranks

    def scores_at(self, places: Sequence[int]) -> np.ndarray:
        return self._snapshot.fill(
            np.zeros(len(places), dtype=np.float32), places,
            lambda worker, inside: worker.ask.remote(*self._of, "scores_at", inside))

    def scores(self) -> np.ndarray:
        return np.concatenate(self._snapshot.ask_all(
            lambda worker, number: worker.ask.remote(*self._of, "scores")))


class SharedSnapshot(Snapshot):
    """A snapshot whose segments are shared out to workers of `ray`, so many.

    Without a number there is a worker for each GPU of the cluster, or for each machine if it has
    none. They are started when something is to be scored. Only what `Snapshot` does with all codes
    is done here, from the same folder: groups, and the surveys of a report.
    Raises like `Snapshot`, InputError for a model object and for more workers than can be placed,
    GradindexError for workers that don't start, LostError from what needs a worker that is lost.
    """

    def __init__(
        self, ray: Any, workers: int | None, path: Path, source: ModelSource,
        allow_damaged: bool = False,
    ):
        for value, flag in ((source.model, "model"), (source.tokenizer, "tokenizer"),
                            *((model, f"model {name}") for name, model in source.also.items())):
            if value is not None and not isinstance(value, (str, Path)):
                raise InputError(
                    f"with ray the {flag} can't be an object ({type(value).__name__}): every "
                    "worker reads its own. Save it, and give the folder.")
        super().__init__(path.absolute(), source, allow_damaged)
        remote = replace(
            self.source, model=absolute(self.source.model),
            also={name: absolute(model) for name, model in self.source.also.items()},
            tokenizer=None if self.source.tokenizer is None else absolute(self.source.tokenizer),
            # which GPU it is on a worker's machine is Ray's to say
            device="cuda" if self.source.device.startswith("cuda") else self.source.device)
        self.pool = WorkerPool(ray, workers, Whereabouts(VERSION, self.path, remote))
        self._sent: tuple[Preconditioned, Any] | None = None
        self._vectors: tuple[np.ndarray, Any] | None = None  # the same after a loss: scored already

    def without(self, lost: LostError) -> Self:
        """As of `Snapshot`, with the workers that are left."""
        rest = super().without(lost)
        rest.pool = self.pool.without(lost)
        return rest

    def load(self) -> None:
        """Start the workers, and read the model and the curvature here while they do there."""
        self.pool.begin(self.contents)
        _ = self.codes, self.norms
        self.pool.wait()

    # ---- whose places are whose

    def starts(self) -> np.ndarray:
        """The first place of each worker, and N: int64 [workers + 1]."""
        if not self.pool.workers:
            self.load()
        # workers have runs of segments, in order: what one has begins where another's ends
        held = np.cumsum([0, *(len(worker.segments) for worker in self.pool.workers)])
        return np.asarray(np.searchsorted(self.contents.places, self.contents.starts)[held])

    def _shares(
        self, places: Sequence[int]
    ) -> list[tuple[WorkerHandle, np.ndarray, np.ndarray]]:
        """Each worker that has some of the places: which of them, and where they are there."""
        starts, chosen = self.starts(), np.asarray(places, dtype=np.int64)
        numbers, inside = homes(starts, chosen)
        return [(worker, mine, inside[mine]) for number, worker in enumerate(self.pool.workers)
                if len(mine := np.flatnonzero(numbers == number))]

    def fill(
        self, empty: np.ndarray, places: Sequence[int], ask: Callable[[Any, np.ndarray], Any]
    ) -> np.ndarray:
        """Fill an array with what each of the places' own worker says of it."""
        shares = self._shares(places)
        answers = self.pool.gather([(worker, ask(worker.actor, inside))
                                    for worker, _, inside in shares])
        for (_, mine, _), answer in zip(shares, answers, strict=True):
            empty[mine] = answer
        return empty

    def ask_all(self, ask: Callable[[Any, int], Any]) -> list[Any]:
        """What every worker says, in the order of their places."""
        return self.pool.gather([(worker, ask(worker.actor, number))
                                 for number, worker in enumerate(self.pool.workers)])

    # ---- what is asked of them

    def rankings(self, vectors: np.ndarray, sign: float, by_norm: bool) -> Sequence[Ranking]:
        """As of `Snapshot`. Each worker scores its codes when they are first asked about."""
        if not self.pool.workers:
            self.load()
        away = self.pool.away()
        if away is not None:
            raise away
        if self._vectors is None or self._vectors[0] is not vectors:
            self._vectors = vectors, self.pool.ray.put(vectors)
        sent = self._vectors[1]
        how = Ordering(sent.hex(), sign, by_norm)
        return [SharedRanking(self, how, sent, number) for number in range(len(vectors))]

    def code_scores(self, vectors: np.ndarray) -> np.ndarray:
        """As of `Snapshot`: 4 bytes a sequence and query cross the network."""
        return np.stack([ranking.scores() for ranking in self.rankings(vectors, 1.0, False)])

    def stored_codes(self, places: Sequence[int]) -> np.ndarray:
        """As of `Snapshot`: each worker sends those of its own places."""
        width = layout.code_bytes(self.manifest.code["length"])
        empty = np.zeros((len(places), width), np.uint8)
        return self.fill(empty, places, lambda worker, inside: worker.stored_codes.remote(inside))

    def rescore(
        self, by: Rescorer, preconditioned: Preconditioned, places: Sequence[int],
        sizes: bool = False, terms: bool = False,
    ) -> Iterator[list[tuple[int, Exact]]]:
        """As of `Snapshot`: each worker goes through its own places in order, all at once.

        LostError comes last, when the others are through with theirs. Who stops asking stops the
        workers at the end of their batch.
        """
        ray, sent = self.pool.ray, self._send(preconditioned)
        how = Rescoring(sent.hex(), preconditioned.rank, by.modules, by.damping, by.batch_tokens,
                        sizes, terms)
        # of each worker's answers: who it is, and which place its first one is here
        streams: dict[Any, tuple[WorkerHandle, int]] = {}
        for worker, mine, inside in self._shares(places):
            stream = worker.actor.rescore.options(num_returns="streaming").remote(how, sent, inside)
            streams[stream] = worker, places[mine[0]] - int(inside[0])
        silent, gone = dict.fromkeys(streams, 0.0), dict[WorkerHandle, str]()
        try:
            while streams:
                begun = time.monotonic()
                seconds = self.pool.patience - max(silent[stream] for stream in streams)
                ready, _ = ray.wait(list(streams), timeout=max(0.0, seconds))
                # only the time that was waited counts: whoever reads the batches may take long
                for stream in streams:
                    silent[stream] += time.monotonic() - begun
                for stream in [] if ready else list(streams):
                    if silent[stream] >= self.pool.patience:
                        worker, _ = streams.pop(stream)
                        gone[worker] = self.pool.hung(worker)
                for stream in ready:
                    worker, first = streams.pop(stream)
                    try:
                        batch, halved = ray.get(next(stream))
                    except StopIteration:
                        continue
                    except ray.exceptions.RayError as error:
                        gone[worker] = self.pool.reason(worker, error)
                        continue
                    streams[stream], silent[stream] = (worker, first), 0.0  # behind who waits
                    by.halved += halved
                    yield [(first + place, exact) for place, exact in batch]
        finally:
            for stream in streams:
                ray.cancel(stream)
        if gone:
            raise self.pool.lost(gone)

    def _send(self, preconditioned: Preconditioned) -> Any:
        """A query's gradients, put where workers can read them, once."""
        # the very object: to compare gradients would take longer than to send them
        if self._sent is None or self._sent[0] is not preconditioned:
            self._sent = preconditioned, self.pool.ray.put(preconditioned.arrays())
        return self._sent[1]
