"""Scored sequences → hits: their text, terms by token and layer."""

from dataclasses import asdict, replace

import numpy as np

from gradindex.first_order import first_order_nats
from gradindex.influence.exact import Exact
from gradindex.model import tokenise
from gradindex.modules import Module
from gradindex.results import Hit
from gradindex.storage.records import Record
from search.ask.settings import Settings
from search.rank.query_gradient import QueryGradient
from search.rank.snapshot import Snapshot


def make_hit(
    snapshot: Snapshot, settings: Settings, gradient: QueryGradient, place: int, record: Record,
    exact: Exact | None, code_score: float, code_rank: int,
) -> Hit:
    """A hit of one query, with what its wording and its copies say of it.

    It is the sequence at `place`, whose `record` it is; approximate where `exact` is None.
    Influence above 0 is a proponent's. `code_rank` is −1 where it was named.
    """
    # a packed sequence says where it begins; `parts` have all of its documents
    first = record.parts[0]
    token_ids = record.tokens.tolist()
    tokens = tokenise.pieces(snapshot.tokenizer, token_ids)
    asked = [token for text in gradient.query.texts for token in text.tokens]
    influence = code_score if exact is None else float(exact.influence[0])
    nats, no_nats = first_order_nats(
        influence, gradient.query, settings.train_sequences, settings.train_sequences_given)
    hit = Hit(
        id=record.id, influence=influence, nats=nats, no_nats=no_nats,
        exact=exact is not None, code_score=code_score, code_rank=code_rank, text="".join(tokens),
        source=first.source, row=first.row, document=first.document, start=first.start,
        end=first.end, user_id=first.user_id, fields=first.fields,
        parts=[asdict(part) for part in record.parts], tokens=tokens,
        token_ids=token_ids, duplicates=snapshot.copies(place),
        lexical=snapshot.tables.wording.overlap(asked, token_ids), border=record.border,
        label=None if record.label is None else snapshot.manifest.plan.labels[record.label],
        log_p=None if exact is None else exact.log_p,
    )
    if record.border is not None:
        first_text, second_text = tokenise.two_texts(tokens, record.border)
        hit = replace(hit, chosen=first_text, rejected=second_text) \
            if snapshot.manifest.task.of_pairs else replace(hit, text_b=second_text)
    if exact is None:
        return hit
    # sizes of gradients are formed where asked for alone; a difference of models has none
    if exact.self_influence is not None and min(settings.members.values()) > 0:
        hit = replace(
            hit, self_influence=exact.self_influence,
            cosine=normalized(influence, exact, "cosine") / gradient.norm if gradient.norm else 0.0,
            relatif=normalized(influence, exact, "relatif"),
        )
    return hit if exact.terms is None else _with_terms(hit, exact.terms, settings.modules)


def _with_terms(hit: Hit, terms: np.ndarray, modules: list[Module]) -> Hit:
    """The hit with terms [t, u] of tokens and modules, and their sums."""
    layers = sorted({module.layer for module in modules})
    # summed in float64, so that layers, tokens and modules give the same total to rounding
    wide = terms.astype(np.float64)
    by_layer = np.zeros((len(wide), len(layers)))
    for column, module in enumerate(modules):
        by_layer[:, layers.index(module.layer)] += wide[:, column]
    return replace(
        hit, token_influence=wide.sum(1).tolist(), layer_influence=by_layer.sum(0).tolist(),
        module_influence={
            module.name: float(value) for module, value in zip(modules, wide.sum(0), strict=True)
        },
        kind_influence=_summed(wide, [module.kind for module in modules]),
        member_influence=_summed(wide, [module.member for module in modules]),
        token_layer_influence=by_layer.tolist(),
    )


def _summed(terms: np.ndarray, names: list[str]) -> dict[str, float]:
    """Terms [t, u] summed over the modules of each name."""
    totals = dict.fromkeys(names, 0.0)
    for name, value in zip(names, terms.sum(0).tolist(), strict=True):
        totals[name] += value
    return totals


def normalized(influence: float, exact: Exact, normalize: str) -> float:
    """What is ranked by: influence, influence / ‖m̃‖ or influence / ‖(G+λ)⁻¹ ∇m‖.

    The second is the cosine but for ‖q̃‖, which is the same for all. 0 for a gradient of zero.

    >>> exact = Exact(np.array([6.0]), self_influence=4.0, squared_step=9.0)
    >>> [normalized(6.0, exact, by) for by in ("none", "cosine", "relatif")]
    [6.0, 3.0, 2.0]
    """
    if normalize == "none":
        return influence
    squared = exact.self_influence if normalize == "cosine" else exact.squared_step
    assert squared is not None
    return influence / squared**0.5 if squared > 0 else 0.0
