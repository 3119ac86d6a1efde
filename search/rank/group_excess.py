"""How far a group's total influence is from that of as many sequences of the index, and how surely.

The excess of a group is its total less what as many sequences have on average,

    E = Σ_m (share_m − f) Î_m,    f = Σ_m share_m / N,

with share 0 for the sequences of others. A large group has a large total whatever it is; its excess
is 0 but for chance where its sequences are like the others. How large chance makes it is

    SE² = s² Σ_own (share_m − f)² + r² Σ_others f² − the code's part of that + its variance of E

s² is the spread of influence between the group's sequences, r² that between the others. The Î that
they are estimated from differ by the code's errors, of variance σ_m², as well. Those are taken off
again, though never more than there is, and put in as what they are in sum: errors of like sequences
are alike, and in E much of what all have in common takes itself away. In the spread of n sequences
they are Σ σ_m² (n − the group's `spread`) / (n − 1): what they have in common moves all alike, and
spreads nothing. Where all is exact only the spread of influence is left. For shares of 1, s² = r²
and no code this is n (1 − n/N) s², the variance of a sum drawn without replacement.

A few sequences don't tell their spread, and influence has heavy tails: with one of its far members
in it a group of five would lead by the spread of the whole index, and one without by its own. So
both are drawn towards the spread w² of the index without its tails (its outermost twentieth put at
their border), which counts as PRIOR sequences more:

    s² = (PRIOR w² + Σ_own (Î_m − mean of own)²) / (PRIOR + n − 1)

Of groups made at random |E| is beyond 2 SE about one time in twenty, whether of 5, 20 or 500, and
whether influence is Gaussian or as t with two degrees of freedom (`tests/rank/test_excess.py`).
Where influence has one long tail alone, groups of tens that miss it are beyond it more often.
"""

import numpy as np

from search.rank.grouping import Grouping

PRIOR = 8.0  # sequences. With 4, one group of five in twelve is beyond 2 SE; 16 hide their own
TAIL = 0.025  # of each side, put at its border
NOTHING = 1e-12  # of the largest influence: an error as small is one of rounding


def excess_of(
    grouping: Grouping, estimate: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, its standard error, and the one over the other, of every group: float64 [G] each.

    `estimate` [N] are the Î_m and `variance` [N] the σ_m². The quotient is 0 where there is no
    error: such a group is the whole index, or all sequences are alike.

    Of eight sequences the first four have 1 more than the others each:

    >>> grouping = Grouping(["high", "low"], np.repeat([0, 1], 4), np.arange(8), np.ones(8),
    ...                     np.ones(2), np.ones(2), 1.0)
    >>> estimate = np.array([3.0, 2, 2, 1, 2, 1, 1, 0])
    >>> [part.round(2).tolist() for part in excess_of(grouping, estimate, np.zeros(8))]
    [[2.0, -2.0], [1.13, 1.13], [1.77, -1.77]]
    """
    total, count = len(estimate), np.bincount(grouping.group, minlength=len(grouping.values))
    away = estimate - estimate.mean()
    f = grouping.parts(total)
    excess = grouping.total(away)

    # 1) the spread between sequences, of the group's and of the others
    sums, squares = grouping.total(away, power=0), grouping.total(away**2, power=0)
    prior = PRIOR * _typical(estimate)
    own = (prior + _around(sums, squares, count)) / (PRIOR + count - 1)
    rest = (prior + _around(away.sum() - sums, (away**2).sum() - squares, total - count)) / (
        PRIOR + total - count - 1)
    spread = own * grouping.excess_of_squares(np.ones(total), others=False) + \
        rest * f**2 * (total - count)

    # 2) the code's error: its part of that spread, and what it is in E
    of_own = grouping.excess_of_squares(variance, others=False)
    of_all = grouping.excess_of_squares(variance)
    in_rest = max(0.0, total - grouping.whole_spread) / max(1, total - 1)
    in_own = (PRIOR * in_rest + np.maximum(count - grouping.spread, 0.0)) / (PRIOR + count - 1)
    spread -= in_own * of_own + in_rest * (of_all - of_own)
    error = np.sqrt(np.maximum(spread, 0.0) + grouping.excess_spread * of_all)
    real = error > NOTHING * np.abs(estimate).max()
    return excess, error, np.divide(excess, error, out=np.zeros(len(error)), where=real)


def _around(sums: np.ndarray, squares: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Σ (x − their mean)², from Σ x, Σ x² and how many they are."""
    return np.asarray(np.maximum(squares - sums**2 / np.maximum(count, 1), 0.0))


def _typical(estimate: np.ndarray) -> float:
    """w²: the variance of the index's estimates without their tails."""
    within = np.clip(estimate, *np.quantile(estimate, (TAIL, 1 - TAIL)))
    # nearly all may be alike, as where most gradients are zero; then the tails are all there is
    return float(within.var() or estimate.var())
