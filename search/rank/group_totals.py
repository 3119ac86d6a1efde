"""Influence by document, source or kept field: each group's total over the whole index.

A total is Σ_m share_m · Î_m over every live sequence, share_m being the share of the sequence's
tokens that belongs to the group (1 unless documents are packed). Î_m is the code's score, which has
no bias, but for the rescored: what is known of them replaces it without making the total biased.
A sequence that was to be rescored whatever its code (the random sample, a TF-IDF list) counts with
its exact influence I. One that its code let into the shortlist counts with I + E[error | it was
let in]: putting in I alone would take off the codes that erred upwards and leave those that erred
downwards. That is the conditional expectation of the code's score (Rao & Blackwell), so the total
stays unbiased and its variance can only fall.

Groups come in order of how far they are from what as many sequences have on average, in standard
errors of that (`group_excess.py`): a total alone is large where a group is.
"""

from collections.abc import Callable

import numpy as np

from gradindex.results import FEW_IN_GROUP, UNSURE, Group
from search.rank.group_excess import excess_of
from search.rank.grouping import Grouping

GROUPS_KEPT = 100  # kept in a result, besides those with a hit


def total_groups(
    grouping: Grouping, estimate: np.ndarray, variance: np.ndarray, sign: float,
    hits: dict[int, int], nats: Callable[[float], tuple[float | None, str | None]],
) -> tuple[list[Group], Group]:
    """The groups of a result, those with a hit and the GROUPS_KEPT first, and the whole index.

    `estimate` and `variance` [N] are those of `Shortlist.estimates`, times the sign; `hits` are the
    places of the result's hits by id, in order; `nats` is what an influence is in nats, or the
    words for none.
    """
    totals = sign * grouping.total(estimate)
    errors = np.sqrt(grouping.spread * grouping.total(variance, power=2))
    sequences = np.bincount(grouping.group, minlength=len(totals))
    excess, excess_error, z = excess_of(grouping, estimate, variance)
    hits_of: dict[int, list[int]] = {}
    for hit, place in hits.items():
        for group in grouping.group[grouping.place == place].tolist():
            hits_of.setdefault(group, []).append(hit)
    # what a few sequences come to says more of each of them than of their group
    order = np.lexsort((-z, sequences < FEW_IN_GROUP)).tolist()
    groups = [
        Group(grouping.values[number], int(sequences[number]), hits_of.get(number, []),
              float(totals[number]), float(errors[number]), *nats(float(totals[number])),
              excess=sign * float(excess[number]), excess_error=float(excess_error[number]),
              z=sign * float(z[number]), unsure=bool(abs(z[number]) < UNSURE))
        for rank, number in enumerate(order) if rank < GROUPS_KEPT or number in hits_of
    ]
    whole = sign * float(estimate.sum())
    return groups, Group(None, len(estimate), list(hits), whole,
                         float(np.sqrt(grouping.whole_spread * variance.sum())),
                         *nats(whole))
