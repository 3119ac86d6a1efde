"""A search over Ray, in a worker's process: some segments, scored by code and exactly.

Arrays, records and dataclasses come and go, never objects of the user's. What is sent once for a
query carries a name, by which a worker knows that it has it already.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradindex.errors import GradindexError, InputError
from gradindex.influence.exact import Exact, Rescorer
from gradindex.influence.preconditioned import Arrays, Preconditioned
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.modules import Module
from gradindex.version import VERSION
from search.rank.ranking import Ranking
from search.rank.snapshot import SegmentSubset, Snapshot


@dataclass(frozen=True)
class Whereabouts:
    """Where a worker finds the index and its model, and with which version of gradindex."""

    version: str
    path: Path
    source: ModelSource


@dataclass(frozen=True)
class Rescoring:
    """How sequences are to be rescored; `gradients` tells preconditioned gradients apart."""

    gradients: str
    rank: int | None
    modules: list[Module]
    damping: float
    batch_tokens: int
    sizes: bool
    terms: bool


@dataclass(frozen=True)
class Ordering:
    """How sequences are to be ordered by code; `vectors` tells query vectors apart."""

    vectors: str
    sign: float
    by_norm: bool


class Worker:
    """Some segments of an index, opened at first use; places are those among them alone."""

    def __init__(self, where: Whereabouts, subset: SegmentSubset, threads: int):
        self._where, self._subset, self._threads = where, subset, threads
        self._gradients = ""
        self._preconditioned = Preconditioned({})
        self._ranked = Ordering("", 1.0, False)
        self._rankings: Sequence[Ranking] = []

    @cached_property
    def snapshot(self) -> Snapshot:
        """The segments, opened. Raises what a user has to mend: GradindexError, InputError."""
        # what is sent to and fro could mean something else to another version, and not fail
        where = self._where
        if where.version != VERSION:
            raise GradindexError(f"it has gradindex {VERSION}, who asks has "
                                 f"{where.version}. Install the same everywhere.")
        if not where.path.is_dir():
            raise InputError(f"it finds no folder {where.path}. With --ray the index has to lie "
                             "where every machine sees it by the same path.")
        torch.set_num_threads(self._threads)  # Ray would leave one, whatever the machine has
        quiet_transformers()
        return Snapshot(where.path, where.source, subset=self._subset)

    def load(self) -> None:
        """Read the model, the curvature and the codes now."""
        self.snapshot.load()
        gc.collect()
        gc.freeze()  # what stays for good would stop a query for 0.2 s now and then

    def ask(
        self, how: Ordering, vectors: np.ndarray, number: int, what: str, *given: Any
    ) -> Any:
        """What the `Ranking` of these places by one of the queries [q, K] answers.

        The codes are scored once for all that is asked of the same queries one after the other.
        """
        if self._ranked != how:
            self._ranked, self._rankings = Ordering("", 1.0, False), []  # free before the next
            self._rankings = self.snapshot.rankings(vectors, how.sign, how.by_norm)
            self._ranked = how
        return getattr(self._rankings[number], what)(*given)

    def stored_codes(self, places: np.ndarray) -> np.ndarray:
        """As `Snapshot.stored_codes`."""
        return self.snapshot.stored_codes(places.tolist())

    def rescore(
        self, how: Rescoring, arrays: Arrays, places: np.ndarray
    ) -> Iterator[tuple[list[tuple[int, Exact]], int]]:
        """As `Snapshot.rescore`, with how many batches were halved since the one before."""
        snapshot = self.snapshot
        # sent once for a query, they come with every call; the name tells whether they are new
        if self._gradients != how.gradients:
            self._preconditioned = Preconditioned.from_arrays(
                arrays, how.rank, snapshot.model.device)
            self._gradients = how.gradients
        by = Rescorer(snapshot.model, how.modules, snapshot.ekfac, how.damping, how.batch_tokens)
        before = 0
        for batch in snapshot.rescore(
                by, self._preconditioned, places.tolist(), how.sizes, how.terms):
            yield batch, by.halved - before
            before = by.halved
