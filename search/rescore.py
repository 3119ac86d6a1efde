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

CHUNK = 128  # sequences: batches are made of like lengths within a chunk


@dataclass
class Scored:
    """A sequence's exact influence, and its terms [t, u] by token and tracked module."""

    influence: float
    terms: np.ndarray


def rescore(
    model: LanguageModel, modules: list[Module], preconditioned: Gradients,
    sequences: Sequence[Record], batch_tokens: int,
) -> Iterator[list[tuple[int, Scored]]]:
    """Yield, batch by batch, (position in `sequences`, score); chunks in order."""
    for first in range(0, len(sequences), CHUNK):
        chunk = sequences[first : first + CHUNK]
        for rows in plan_batches([len(record.ids) for record in chunk], batch_tokens):
            members = [chunk[row] for row in rows]
            batch = make_batch([(m.ids, m.scored) for m in members], model.device)
            terms = score(model, modules, preconditioned, batch).cpu().numpy()
            found = []
            for row, member, own in zip(rows, members, terms, strict=True):
                own = own[: len(member.ids)].copy()
                found.append((first + row, Scored(float(own.sum(dtype=np.float64)), own)))
            yield found
