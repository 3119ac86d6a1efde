"""Scored sequences → hits: their text, terms by token and layer."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from gradindex.influence.exact import Exact
from gradindex.model import tokenise
from gradindex.modules import Module
from gradindex.results import Hit
from gradindex.storage.records import Record


def make_hit(
    tokenizer: Any | None, record: Record, exact: Exact | None, code_score: float, code_rank: int,
    train_sequences: int, modules: list[Module], query_norm: float,
) -> Hit:
    """A hit of one query; approximate where `exact` is None.

    `code_rank` is −1 where it was named; `query_norm` is ‖q̃‖, `modules` those that count.
    """
    first = record.parts[0]
    tokens = tokenise.pieces(tokenizer, record.tokens.tolist())
    influence = code_score if exact is None else float(exact.influence[0])
    hit = Hit(
        id=record.id, influence=influence, nats=influence / train_sequences,
        exact=exact is not None, code_score=code_score, code_rank=code_rank, text="".join(tokens),
        source=first.source, row=first.row, document=first.document, start=first.start,
        end=first.end, user_id=first.user_id, fields=first.fields,
        parts=[asdict(part) for part in record.parts], tokens=tokens,
        token_ids=record.tokens.tolist(),
    )
    if exact is None:
        return hit
    if exact.self_influence is not None:  # sizes of gradients are formed only where asked for
        hit = replace(
            hit, self_influence=exact.self_influence,
            cosine=normalized(influence, exact, "cosine") / query_norm if query_norm else 0.0,
            relatif=normalized(influence, exact, "relatif"),
        )
    return hit if exact.terms is None else _with_terms(hit, exact.terms, modules)


def _with_terms(hit: Hit, terms: np.ndarray, modules: list[Module]) -> Hit:
    layers = sorted({module.layer for module in modules})
    wide = terms.astype(np.float64)
    by_layer = np.zeros((len(wide), len(layers)))
    for place, module in enumerate(modules):
        by_layer[:, layers.index(module.layer)] += wide[:, place]
    return replace(
        hit, token_influence=wide.sum(1).tolist(), layer_influence=by_layer.sum(0).tolist(),
        module_influence={
            module.name: float(value) for module, value in zip(modules, wide.sum(0), strict=True)
        },
        kind_influence={kind: float(sum(wide[:, place].sum() for place in places))
                        for kind, places in _by_kind(modules).items()},
        token_layer_influence=by_layer.tolist(),
    )


def _by_kind(modules: list[Module]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for place, module in enumerate(modules):
        kinds.setdefault(module.kind, []).append(place)
    return kinds


def normalized(influence: float, exact: Exact, normalize: str) -> float:
    """What is ranked by: influence, influence / ‖m̃‖ or influence / ‖(G+λ)⁻¹ ∇m‖.

    The second is the cosine but for ‖q̃‖, which is the same for all. 0 for a gradient of zero.
    """
    if normalize == "none":
        return influence
    squared = exact.self_influence if normalize == "cosine" else exact.squared_step
    assert squared is not None
    return influence / squared**0.5 if squared > 0 else 0.0
