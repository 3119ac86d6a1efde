"""Exact influence of named sequences: their gradients are computed again and scored in full."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradindex.influence.curvature import Ekfac
from gradindex.influence.gradients import Splits, in_batches
from gradindex.influence.queries import Influences, Preconditioned, Sizes, Terms, collect
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.storage.records import Record

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128  # sequences; batches are of like lengths within a chunk


@dataclass
class Rescorer:
    """How gradients are formed: the model, the modules that count, λ's factor, tokens a batch.

    `halved` counts the batches that were halved because memory ran out.
    """

    model: LanguageModel
    modules: list[Module]
    ekfac: Ekfac
    damping: float
    batch_tokens: int
    halved: int = 0


@dataclass
class Exact:
    """One sequence, scored: influence [q] on each query, and the sizes of its gradient if asked.

    `terms` [t, u] by token and module, for a single query and if asked; `by_module` [q, u] if
    asked.
    """

    influence: np.ndarray
    self_influence: float | None = None
    squared_step: float | None = None
    terms: np.ndarray | None = None
    by_module: np.ndarray | None = None


def chunk_ends(count: int) -> list[int]:
    """Where the chunks of `count` sequences end: small ones first, so that something is exact soon.

    Whenever a chunk is finished, a prefix of the sequences is exact.
    """
    ends, size = [0], SMALLEST_CHUNK
    while ends[-1] < count:
        ends.append(min(count, ends[-1] + size))
        size = min(LARGEST_CHUNK, 2 * size)
    return ends[1:]


def rescore(
    by: Rescorer, preconditioned: Preconditioned, sequences: Sequence[Record],
    sizes: bool = False, terms: bool = False, by_module: bool = False,
) -> Iterator[list[tuple[int, Exact]]]:
    """Yield, batch by batch, (place in `sequences`, score); chunks in order."""
    first = 0
    for end in chunk_ends(len(sequences)):
        chunk = sequences[first:end]

        def run(rows: list[int], chunk: Sequence[Record] = chunk) -> list[Exact]:
            return _score_batch(by, preconditioned, [chunk[row] for row in rows], sizes, terms,
                                by_module)

        lengths, splits = [len(record.tokens) for record in chunk], Splits()
        for rows, found in in_batches(lengths, by.batch_tokens, splits, run):
            yield [(first + row, one) for row, one in zip(rows, found, strict=True)]
        by.halved += len(splits.made)
        first = end


def joined(parts: Sequence[Exact]) -> Exact:
    """One sequence's score from those by parts of the modules, in order; with terms and sizes."""
    return Exact(
        np.sum([part.influence for part in parts], axis=0),
        sum(part.self_influence or 0.0 for part in parts),
        sum(part.squared_step or 0.0 for part in parts),
        np.concatenate([part.terms for part in parts if part.terms is not None], axis=1),
    )


def _score_batch(
    by: Rescorer, preconditioned: Preconditioned, members: list[Record], sizes: bool, terms: bool,
    by_module: bool,
) -> list[Exact]:
    batch = by.model.batch(members)
    own = Sizes(by.ekfac, by.damping, len(members))
    extra = [own] if sizes else []
    if terms:
        parts = Terms(preconditioned, batch)
        collect(by.model, by.modules, batch, parts, *extra)
        stacked = parts.stacked(by.modules).cpu().numpy()
        found = [
            Exact(each[: len(m.tokens)].sum(keepdims=True, dtype=np.float64)[0],
                  terms=each[: len(m.tokens)].copy())
            for m, each in zip(members, stacked, strict=True)
        ]
    else:
        influences = Influences(preconditioned, len(members))
        collect(by.model, by.modules, batch, influences, *extra)
        found = [Exact(column) for column in influences.total.numpy().T]
        if by_module:
            shares = influences.stacked(by.modules).transpose(0, 1).numpy()
            for one, share in zip(found, shares, strict=True):
                one.by_module = share
    if sizes:
        for one, size, step in zip(found, own.self_influence.tolist(), own.squared_step.tolist(),
                                   strict=True):
            one.self_influence, one.squared_step = size, step
    return found
