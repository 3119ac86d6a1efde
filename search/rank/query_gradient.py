"""The gradients of queries, preconditioned: each as a code's vector, and in full or of low rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradindex.errors import InputError
from gradindex.influence.exact import Exact, Rescorer, joined
from gradindex.influence.preconditioned import (
    Gradients,
    Preconditioned,
    precondition,
    prepare,
    query_coordinates,
)
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.memory import LOW_RANK
from gradindex.modules import Module
from gradindex.objective.batch import Text
from gradindex.results import UNSCORED, Query
from search.ask.controls import LARGEST_IN_FULL
from search.ask.settings import Settings
from search.rank.snapshot import Snapshot

AT_ONCE = 1 << 27  # entries of gradients formed together


@dataclass
class QueryGradient:
    """A query and, for the modules and the damping asked for, v_q [K] and ‖q̃‖.

    Of a difference of models (a weight below 0) the norm is without meaning, and used nowhere.
    """

    query: Query
    vector: np.ndarray
    norm: float


def fits_in_full(snapshot: Snapshot, settings: Settings) -> int:
    """How many queries' preconditioned gradients are kept in full.

    One at least, unless memory is bounded.
    """
    room = snapshot.allowance.part(1 / 4, LARGEST_IN_FULL)
    count = room // (_entries(settings.modules) * snapshot.model.accumulate.itemsize)
    # without a bound a single query is kept whole whatever it takes: that is what was asked for
    return count if snapshot.allowance.bytes is not None else max(1, count)


def form_gradients(
    snapshot: Snapshot, queries: list[Query], settings: Settings, batch_tokens: int
) -> tuple[list[QueryGradient], Preconditioned]:
    """Every query's gradient as a vector, and all of them preconditioned, of low rank where needed.

    Where nothing is to be rescored none is preconditioned, which takes longer than the rest.
    Raises InputError for a gradient that isn't finite.
    """
    gradients, parts = [], []
    rank = rank_for(snapshot, len(queries), settings)
    for group in _groups(snapshot, queries, settings.modules):
        vectors, squares = snapshot.codes.empty(len(group)), snapshot.codes.empty(len(group))[:, 0]
        preconditioned = Preconditioned({}, rank)
        # a pass for each part of the modules, where memory doesn't hold a whole gradient
        for modules in together(snapshot, settings.modules):
            coordinates = coordinates_of(snapshot, group, modules, settings.damping, batch_tokens)
            prepare(snapshot.codes, snapshot.ekfac, modules, coordinates, settings.damping, vectors,
                    squares, preconditioned if settings.rescore else None)
        for query, vector, norm in zip(group, vectors.float().cpu().numpy(),
                                       squares.clamp(min=0).sqrt().tolist(), strict=True):
            # told here, for every score would be NaN, and no comparison with it true
            if not np.isfinite(vector).all():
                raise InputError("the query's gradient is not finite. Try an index with "
                                 "--dtype float32.")
            gradients.append(QueryGradient(query, vector, norm))
        parts.append(preconditioned)
    several = settings.rescore and len(parts) > 1
    return gradients, Preconditioned.join(parts) if several else parts[0]


def rescore_in_full(
    snapshot: Snapshot, by: Rescorer, query: Query, places: list[int]
) -> dict[int, Exact]:
    """Scores of some places on one query at full rank, by place, with terms and sizes.

    Where memory doesn't hold the query's gradient, in one pass for each part of the modules.
    """
    scores: dict[int, list[Exact]] = {place: [] for place in places}
    for modules in together(snapshot, by.modules):
        # the gradient again: what was kept of it for the search was of low rank
        coordinates = coordinates_of(snapshot, [query], modules, by.damping, by.batch_tokens)
        whole = Preconditioned(precondition(snapshot.ekfac, coordinates))
        partial = replace(by, modules=modules, halved=0)
        for batch in snapshot.rescore(partial, whole, places, sizes=True, terms=True):
            for place, exact in batch:
                scores[place].append(exact)
        by.halved += partial.halved
    return {place: joined(parts) for place, parts in scores.items()}


def rank_for(snapshot: Snapshot, count: int, settings: Settings) -> int | None:
    """The rank that was asked for; without one, None (full) where the gradients fit, else 32."""
    if settings.rank is not None:
        return settings.rank
    return None if count <= fits_in_full(snapshot, settings) else LOW_RANK


def together(snapshot: Snapshot, modules: list[Module]) -> Iterator[list[Module]]:
    """Runs of modules; the gradients of one query for a run fit in memory together."""
    held: list[Module] = []
    room, used = _room(snapshot), 0
    for module in modules:
        entries = _entries([module])
        # one at least: a module that is too large by itself is for memory to refuse
        if held and used + entries > room:
            yield held
            held, used = [], 0
        held.append(module)
        used += entries
    yield held


def coordinates_of(
    snapshot: Snapshot, queries: list[Query], modules: list[Module], damping: float,
    batch_tokens: int,
) -> Gradients:
    """C_u [q, o, i] of each query, the weighted sum over its texts; sets their token_log_p."""
    total: Gradients = {
        module.name: torch.zeros(len(queries), *module.shape, dtype=snapshot.model.accumulate,
                                 device=snapshot.model.device_of(module))
        for module in modules
    }

    texts: list[tuple[int, Query]]

    def run(rows: list[int]) -> tuple[Gradients, Tensor]:
        batch = snapshot.model.batch([as_row(text) for _, text in (texts[row] for row in rows)])
        with torch.no_grad():
            return query_coordinates(
                snapshot.model, modules, snapshot.ekfac, batch, damping)

    most = _at_once(snapshot, modules)
    every = [(number, text) for number, query in enumerate(queries) for text in query.texts]
    # a batch has pairs, or answers by themselves
    for paired in (False, True):
        texts = [one for one in every if (one[1].border is not None) == paired]
        lengths = snapshot.model.lengths([as_row(text) for _, text in texts])
        for rows, (coordinates, log_p) in in_batches(lengths, batch_tokens, Splits(), run, most):
            members = [texts[row] for row in rows]
            for (_, text), terms in zip(members, log_p.tolist(), strict=True):
                if snapshot.manifest.task.name == "causal":
                    text.token_log_p = by_token(terms, len(text.tokens))
                else:
                    [text.row_log_p] = terms
            numbers = torch.tensor([number for number, _ in members], device=snapshot.model.device)
            # a query's texts may be in several batches: each adds its part, −1 times a versus's
            for name, c in coordinates.items():
                weights = c.new_tensor([text.weight for _, text in members])
                total[name].index_add_(0, numbers.to(c.device), c * weights[:, None, None])
    return total


def as_row(text: Query) -> Text:
    """A text of a query as an objective reads it."""
    return Text(np.array(text.tokens, np.int32), np.array(text.labels) != UNSCORED, text.border,
                text.label, text.offset)


def by_token(log_p: Sequence[float], count: int) -> list[float]:
    """log p of each of a text's `count` tokens in nats, from that of each position.

    >>> by_token([-1.5, -0.5, 0.0], count=3)  # a position predicts the next one
    [0.0, -1.5, -0.5]
    """
    return [0.0, *log_p[: count - 1]]


def _groups(
    snapshot: Snapshot, queries: list[Query], modules: list[Module]
) -> Iterator[list[Query]]:
    """The queries, so many at a time as have their gradients formed together."""
    size = _at_once(snapshot, modules)
    for first in range(0, len(queries), size):
        yield queries[first : first + size]


def _at_once(snapshot: Snapshot, modules: list[Module]) -> int:
    return max(1, _room(snapshot) // _entries(modules))


def _room(snapshot: Snapshot) -> int:
    """Entries of gradients held together while they are formed; without a bound, one query's."""
    width = snapshot.model.accumulate.itemsize
    # without a bound no pass is made twice: a whole gradient is held, however large
    if snapshot.allowance.bytes is None:
        return max(AT_ONCE, _entries(snapshot.manifest.modules))
    return snapshot.allowance.part(1 / 8, AT_ONCE * width) // width


def _entries(modules: list[Module]) -> int:
    return sum(module.size for module in modules)
