"""Queries made ready: the gradient of each, preconditioned, as a code's vector and in full."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradindex.errors import InputError
from gradindex.gradients import Splits, in_batches, make_batch
from gradindex.influence import (
    Gradients,
    Preconditioned,
    precondition,
    query_coordinates,
    query_norms,
)
from gradindex.model import UNSCORED
from gradindex.results import Query
from search.controls import Settings
from search.opened import OpenIndex

LARGEST_STACK = 1 << 31  # bytes of preconditioned gradients kept in full
LOW_RANK = 32  # what they are reduced to beyond that (Grosse et al. 2023, §3.2.2)
AT_ONCE = 1 << 27  # entries of gradients formed together


@dataclass
class Target:
    """A query and, for the modules and the damping asked for, v_q [K] and ‖q̃‖."""

    query: Query
    vector: np.ndarray
    norm: float


def fits_in_full(index: OpenIndex, settings: Settings) -> int:
    """How many queries' preconditioned gradients are kept in full, at least one."""
    return max(1, LARGEST_STACK // (_entries(settings) * index.model.accumulate.itemsize))


def make_targets(
    index: OpenIndex, queries: list[Query], settings: Settings, batch_tokens: int
) -> tuple[list[Target], Preconditioned]:
    """Every query's target, and their preconditioned gradients, of low rank where that is needed.

    Raises InputError for a gradient that isn't finite.
    """
    targets, parts = [], []
    rank = rank_for(index, len(queries), settings)
    for some in _groups(queries, settings):
        coordinates = coordinates_of(index, some, settings, batch_tokens)
        vectors = index.codes.query_vectors(coordinates).float().cpu().numpy()
        norms = query_norms(index.ekfac, coordinates, settings.damping).tolist()
        for query, vector, norm in zip(some, vectors, norms, strict=True):
            if not np.isfinite(vector).all():
                raise InputError("the query's gradient is not finite. Try an index with "
                                 "--dtype float32.")
            targets.append(Target(query, vector, norm))
        parts.append(Preconditioned(precondition(index.ekfac, coordinates), rank))
    return targets, Preconditioned.join(parts) if len(parts) > 1 else parts[0]


def rank_for(index: OpenIndex, queries: int, settings: Settings) -> int | None:
    """The rank asked for; without one, None (all) where the gradients fit, else 32."""
    if settings.rank is not None:
        return settings.rank
    return None if queries <= fits_in_full(index, settings) else LOW_RANK


def coordinates_of(
    index: OpenIndex, queries: list[Query], settings: Settings, batch_tokens: int
) -> Gradients:
    """C_u [q, o, i] of each query, the weighted sum over its texts; sets their token_log_p."""
    texts = [(place, text) for place, query in enumerate(queries) for text in query.texts]
    total: Gradients = {
        module.name: index.ekfac[module.name].eigenvalues.new_zeros(len(queries), *module.shape)
        for module in settings.modules
    }
    def run(rows: list[int]) -> tuple[Gradients, Tensor]:
        batch = make_batch([
            (np.array(text.tokens, np.int32), np.array(text.labels) != UNSCORED)
            for _, text in (texts[row] for row in rows)
        ], index.model.device)
        with torch.no_grad():
            return query_coordinates(
                index.model, settings.modules, index.ekfac, batch, settings.damping)

    lengths, most = [len(text.tokens) for _, text in texts], max(1, AT_ONCE // _entries(settings))
    for rows, (coordinates, log_p) in in_batches(lengths, batch_tokens, Splits(), run, most):
        members = [texts[row] for row in rows]
        for (_, text), own in zip(members, log_p.tolist(), strict=True):
            # log p of token t stands at position t − 1, where it is predicted
            text.token_log_p = [0.0, *own[: len(text.tokens) - 1]]
        places = torch.tensor([place for place, _ in members], device=index.model.device)
        for name, c in coordinates.items():
            weights = c.new_tensor([text.weight for _, text in members])
            total[name].index_add_(0, places, c * weights[:, None, None])
    return total


def _groups(queries: list[Query], settings: Settings) -> Iterator[list[Query]]:
    """Queries whose gradients are formed together."""
    size = max(1, AT_ONCE // _entries(settings))
    for first in range(0, len(queries), size):
        yield queries[first : first + size]


def _entries(settings: Settings) -> int:
    return sum(module.shape[0] * module.shape[1] for module in settings.modules)
