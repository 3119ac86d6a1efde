"""What a hit's first-order nats come to: a step of its own length, and what is measured after it.

For a hit with gradient g, p = (Ĝ+λ)⁻¹ g by EK-FAC. The step that one more copy brings about along p
is (α/N) p with α = gᵀp / pᵀ(G+λ)p, G the Gauss–Newton matrix of the training loss a sequence: the
minimum along p of the proximal Bregman objective (Grosse et al. 2023, eq. 7; Bae et al. 2022),
whose whole minimum may lie elsewhere. Of G there are the hit's own part, 1/N of it, and that of all
others, estimated from the index's random sample; so α has a standard error. The weights are moved
by that very step, log p of the query is measured, and they are put back.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from gradindex.errors import InputError
from gradindex.influence.preconditioned import (
    Gradients,
    precondition,
    query_coordinates,
    query_square,
)
from gradindex.influence.split_batches import plan_batches
from gradindex.influence.steps import Movable
from gradindex.modules import LAST
from gradindex.results import Check, Hit, Query, Result
from gradindex.storage.records import Record
from search.ask.settings import Settings
from search.rank.named import place_of
from search.rank.query_gradient import as_row
from search.rank.ray_search import SharedSnapshot
from search.rank.snapshot import Snapshot

FIRST_STEP = 1e-3  # nats a sequence that the first trial step moves, by EK-FAC's curvature
# nats a prediction that a step moves whose curvature is measured: by few tokens most of it, which
# soon leave the second order
AIM, MOST = 2e-4, 5e-4
TRIES = 5  # of its length
ROUGH = 0.25  # of α: a larger standard error is pointed out
FAR = 0.5  # of what a step was to change: more than so much beside it is pointed out
PASSES = 3  # forward passes that the curvature of a batch takes


def check_hits(
    snapshot: Snapshot, result: Result, settings: Settings, count: int, batch_tokens: int,
    follow: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Check the first `count` hits of a result, in place (`Hit.check`); `follow(done, total)` sees
    how many sequences went through.

    A KeyboardInterrupt ends it: what is checked stays. Raises InputError where steps can't be taken
    or mean nothing.
    """
    refuse(snapshot, settings, count)
    movable = Movable(snapshot.model, settings.modules)
    checker = _Checker(snapshot, movable, settings, batch_tokens, result.query)
    hits = result.hits[:count]
    each = checker.passes
    for number, hit in enumerate(hits):
        try:
            hit.check = checker.check(hit, partial(_told, follow, number * each, len(hits) * each))
        except KeyboardInterrupt:
            result.warnings.append(f"interrupted: {number} of {len(hits)} hits are checked")
            result.interrupted = True
            return


def _told(follow: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    follow(before + done, total)


def refuse(snapshot: Snapshot, settings: Settings, count: int) -> None:
    """Raise InputError where hits can't be checked."""
    if count < 1:
        raise InputError(f"--check {count}: expected how many hits to check, 1 or more.")
    if isinstance(snapshot, SharedSnapshot):
        raise InputError("--check moves the weights of the model in this process: it can't go with "
                         "--ray.")
    if not settings.train_sequences_given:
        raise InputError("--check asks what one more copy changes, and N_train isn't known. Give "
                         "--train-sequences.")
    if not settings.rescore:
        raise InputError("--check goes by exact scores: it can't go with --no-rescore.")
    if settings.members != {LAST: 1.0}:
        raise InputError("--check moves one model, and this search asks "
                         f"{', '.join(settings.members)}. Ask the model itself: --members {LAST}.")


class _Checker:
    """Steps of one query's hits."""

    def __init__(
        self, snapshot: Snapshot, movable: Movable, settings: Settings, batch_tokens: int,
        query: Query,
    ):
        self._snapshot, self._movable, self._settings = snapshot, movable, settings
        self._query = query
        records = snapshot.records(snapshot.random_sample())
        plan = plan_batches(snapshot.model.lengths(records), batch_tokens)
        self._sample = [[records[row] for row in rows] for rows in plan]
        self._length = 0.0  # of the step by which the last sample was measured

    @property
    def passes(self) -> int:
        """Passes of sequences that one hit takes, about."""
        return PASSES * (1 + sum(map(len, self._sample)))

    def check(self, hit: Hit, done: Callable[[int], None]) -> Check:
        """The step of one hit, and what it changes."""
        snapshot, settings, model = self._snapshot, self._settings, self._snapshot.model
        [record] = snapshot.records([place_of(snapshot, hit.id)])
        p, along, damping = self._direction(record)
        n = settings.train_sequences
        with model.one_at_a_time:
            own = self._measured(p, [record], (FIRST_STEP / along) ** 0.5)[0]
            done(PASSES)
            others, passed = list[float](), PASSES
            for records in self._sample:
                rest = [one for one in records if one.id != record.id]
                others += self._measured(p, rest, self._length).tolist() if rest else []
                passed += PASSES * len(records)
                done(passed)
            curvature = (own + (n - 1) * float(np.mean(others))) / n + damping
            error = (n - 1) / n * float(np.std(others, ddof=1)) / len(others) ** 0.5
            scale = along / curvature
            before, own_before = self._said(record)
            with self._movable.moved(p, scale / n):
                after, own_after = self._said(record)
        check = Check(scale, scale * error / curvature, scale * hit.influence / n, after - before,
                      own_after - own_before)
        return replace(check, wrong=_wrong(check))

    def _direction(self, record: Record) -> tuple[Gradients, float, float]:
        """p [o, i] by module, gᵀp and pᵀλp."""
        snapshot, damping = self._snapshot, self._settings.damping
        with torch.no_grad():
            c, _ = query_coordinates(snapshot.model, self._settings.modules, snapshot.ekfac,
                                     snapshot.model.batch([record]), damping)
        along = sum(float(query_square(snapshot.ekfac[name], part, damping, 1.0))
                    for name, part in c.items())
        held = sum(damping * float(snapshot.ekfac[name].eigenvalues.mean()) *
                   float(part.square().sum()) for name, part in c.items())
        p = {name: part[0] for name, part in precondition(snapshot.ekfac, c).items()}
        return p, along, held

    def _measured(self, p: Gradients, records: list[Record], length: float) -> np.ndarray:
        """pᵀ G_i p of some sequences, by a step of such a length that they move neither too little,
        which rounding would drown, nor so far that it isn't of second order: float64 [n].
        """
        model = self._snapshot.model
        batch = model.batch(records)
        counted = np.array([model.objective.predictions(record) for record in records])
        for _ in range(TRIES):
            found = self._movable.curvature_along(p, length, batch)
            moved = float(np.max(found / np.maximum(counted, 1))) * length**2
            self._length = length
            if not moved > 0 or AIM / 10 <= moved <= MOST:
                break
            length *= min(100.0, (AIM / moved) ** 0.5)
        return found

    def _said(self, record: Record) -> tuple[float, float]:
        """log p of the query, and of the hit itself, as the weights are now."""
        model = self._snapshot.model
        said = 0.0
        for text in self._query.texts:  # −1 times a versus's
            said += text.weight * float(self._movable.log_p(model.batch([as_row(text)]))[0])
        return said, float(self._movable.log_p(model.batch([record]))[0])


def _wrong(check: Check) -> list[str]:
    """What of a step is not as it was to be, in words."""
    wrong = []
    if check.scale_error > ROUGH * check.scale:
        wrong.append("its length is rough")
    if abs(check.measured - check.nats) > FAR * abs(check.nats):
        wrong.append("it isn't of first order")
    if check.own <= 0:
        wrong.append("its own text loses by it")
    return wrong
