"""Influence in nats, where that can be said: what log p has room for, and on how many it trained.

I / N_train is a derivative. For a gradient much larger than the curvature knows of, say of a text
that the model never saw, it promises more than there is to gain; then it is no number of nats.
"""

import math

from gradindex.results import Query

LARGEST_LOSS = 12.0  # nats a scored token: chance among 160,000
BEYOND, UNKNOWN = "beyond first order", "nats unknown"  # in the place of a number of nats


def room(query: Query) -> tuple[float, float]:
    """How far log p can rise, and how far it can fall before it means nothing more, in nats.

    A text gains at most its −log p. A loss has no such end; it is taken to be where every scored
    token is at 12 nats, which is chance.

    >>> room(Query([5, 6, 7], [-100, 6, 7], token_log_p=[0.0, -1.5, -2.5]))
    (4.0, 20.0)
    """
    up = down = 0.0
    if query.unit != "nats":  # a reward has no end
        return math.inf, math.inf
    for text in query.texts:
        gain = -text.own_log_p
        loss = max(0.0, LARGEST_LOSS * text.scored - gain)
        if text.weight < 0:  # what this one loses is gained
            gain, loss = loss, gain
        up += abs(text.weight) * gain
        down += abs(text.weight) * loss
    return float(up), float(down)


def within(query: Query, nats: float) -> bool:
    """Whether log p can change by so much; a first-order value that says more says nothing."""
    gain, loss = room(query)
    return -loss <= nats <= gain


def first_order_nats(
    influence: float, query: Query, train_sequences: int, known: bool
) -> tuple[float | None, str | None]:
    """What one more copy adds to log p(completion | prompt) in nats to first order: I / N_train.

    Where there is no such number, None and the words that stand for it: UNKNOWN where it isn't
    `known` that so many sequences trained the model, BEYOND where log p has no room for so much.

    >>> query = Query([5, 6], [-100, 6], token_log_p=[0.0, -3.0])
    >>> first_order_nats(50.0, query, 100, True), first_order_nats(-50.0, query, 100, True)
    ((0.5, None), (-0.5, None))
    >>> first_order_nats(301.0, query, 100, True), first_order_nats(301.0, query, 100, False)
    ((None, 'beyond first order'), (None, 'nats unknown'))
    """
    nats = influence / train_sequences
    return (nats, None) if known and within(query, nats) else (None, in_words(known))


def in_words(known: bool) -> str:
    """What stands where there is no number of nats: one word for all hits of a result."""
    return BEYOND if known else UNKNOWN
