"""Scored sequences → hits: their text, terms by token and layer, and equal ones folded."""

import hashlib
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from gradindex import text
from gradindex.manifest import Manifest
from gradindex.records import Record
from gradindex.results import Hit
from search.rescore import Scored


def make_hit(
    manifest: Manifest, tokenizer: Any | None, record: Record, scored: Scored | None,
    code_score: float, rank: int, n_train: int,
) -> Hit:
    """A hit; approximate where `scored` is None. `rank` is by code, −1 where it was named."""
    first = record.parts[0]
    tokens = text.pieces(tokenizer, record.ids.tolist())
    influence = code_score if scored is None else scored.influence
    hit = Hit(
        id=record.id, influence=influence, nats=influence / n_train, exact=scored is not None,
        code_score=code_score, code_rank=rank, text="".join(tokens), source=first.source,
        row=first.row, document=first.document, start=first.start, end=first.end,
        user_id=first.user_id, fields=first.fields, parts=[asdict(part) for part in record.parts],
        tokens=tokens, token_ids=record.ids.tolist(),
    )
    if scored is None or scored.terms is None:
        return hit
    modules, layers = manifest.tracked, manifest.layers
    terms = scored.terms.astype(np.float64)
    by_layer = np.zeros((len(terms), len(layers)))
    for place, module in enumerate(modules):
        by_layer[:, layers.index(module.layer)] += terms[:, place]
    return replace(
        hit, token_influence=terms.sum(1).tolist(), layer_influence=by_layer.sum(0).tolist(),
        module_influence={
            module.name: float(value) for module, value in zip(modules, terms.sum(0), strict=True)
        },
        token_layer_influence=by_layer.tolist(),
    )


def forget_terms(held: dict[int, Scored], sign: float, most: int) -> None:
    """Let the terms of all but the best `most` go: a long shortlist must fit in memory.

    `held` are the sequences that still have theirs, by place; it shrinks now and then.
    """
    if len(held) > 2 * most:
        for place in sorted(held, key=lambda place: -sign * held[place].influence)[most:]:
            held.pop(place).terms = None


def fold_duplicates(ranked: list[int], sequences: list[Record]) -> list[list[int]]:
    """Places in `sequences` grouped by equal tokens and mask, groups in order of their first."""
    groups: dict[bytes, list[int]] = {}
    for place in ranked:
        record = sequences[place]
        key = hashlib.sha256(record.ids.tobytes() + record.scored.tobytes()).digest()
        groups.setdefault(key, []).append(place)
    return list(groups.values())


