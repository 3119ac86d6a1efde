"""Exact influence of named sequences: their gradients are computed again and scored in full.

Batches come best first, so that what is finished at any moment is a prefix of the shortlist.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradindex.gradients import make_batch, plan_batches
from gradindex.influence import Gradients, score
from gradindex.model import LanguageModel, Module
from gradindex.records import Record

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128  # sequences; batches are of like lengths within a chunk


@dataclass
class Scored:
    """A sequence's exact influence, and its terms [t, u] by token and tracked module.

    The terms are None where they were let go, for memory.
    """

    influence: float
    terms: np.ndarray | None


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
    model: LanguageModel, modules: list[Module], preconditioned: Gradients,
    sequences: Sequence[Record], batch_tokens: int,
) -> Iterator[list[tuple[int, Scored]]]:
    """Yield, batch by batch, (position in `sequences`, score); chunks in order."""
    first = 0
    for end in chunk_ends(len(sequences)):
        chunk = sequences[first:end]
        for rows in plan_batches([len(record.ids) for record in chunk], batch_tokens):
            members = [chunk[row] for row in rows]
            batch = make_batch([(m.ids, m.scored) for m in members], model.device)
            terms = score(model, modules, preconditioned, batch).cpu().numpy()
            found = []
            for row, member, own in zip(rows, members, terms, strict=True):
                own = own[: len(member.ids)].copy()
                found.append((first + row, Scored(float(own.sum(dtype=np.float64)), own)))
            yield found
        first = end
