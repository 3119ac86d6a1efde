"""How far a group's total influence is from that of as many sequences of the index, and how surely.

The excess of a group is its total less what as many sequences have on average,

    E = Σ_m (share_m − f) Î_m,    f = Σ_m share_m / N,

with share 0 for the sequences of others. A large group has a large total whatever it is; its excess
is 0 but for chance where its sequences are like the others. How large chance makes it is

    SE² = s² Σ_own (share_m − f)² + r² Σ_others f² + the code's variance of E

s² is the spread of influence between the group's sequences, r² that between the others. For shares
of 1, s² = r² and no code this is n (1 − n/N) s², the variance of a sum drawn without replacement.
In the code's part errors are summed as they are: those of like sequences are alike, and much of
what all have in common takes itself away in E.

A few sequences don't tell their spread, and influence has heavy tails: with one of its far members
in it a group of five would lead by the spread of the whole index, and one without by its own. So
both are drawn towards the spread w² of the index without its tails (its outermost twentieth put at
their border), which counts as PRIOR sequences more:

    s² = (PRIOR w² + Σ_own (Î_m − mean of own)² − the code's part of that) / (PRIOR + n − 1)

That part is Σ_own σ_m² (1 − the group's `spread` / n), σ_m² being the variance of Î_m's error: what
errors have in common moves all alike, and spreads nothing. Of w² the code has the same share as of
the index's variance. Where all is exact only the spread of influence is left.

Of groups made at random |E| is beyond 2 SE about one time in twenty, whether of 5, 20 or 500, and
whether influence is Gaussian or as t with two degrees of freedom (`tests/rank/test_excess.py`).
Where influence has one long tail alone, groups of tens that miss it are beyond it more often.
"""

import numpy as np

from search.rank.grouping import Grouping

PRIOR = 8.0  # sequences. With 4, one group of five in twelve is beyond 2 SE; 16 hide their own
TAIL = 0.025  # of each side, put at its border
NOTHING = 1e-7  # of the largest influence: an error as small is the root of what rounding leaves


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

    # 1) the spread between sequences, of the group's and of the others, without the code's part
    others = total - count
    sums, squares = grouping.total(away, power=0), grouping.total(away**2, power=0)
    code, code_of_all = grouping.total(variance, power=0), float(variance.sum())
    alike = grouping.whole_spread / total  # of all sequences, so of any other large part of them
    index = float((away**2).sum())
    prior = _typical(estimate) * max(0.0, 1 - (1 - alike) * code_of_all / index) if index else 0.0
    own = _spread(prior, sums, squares, count, code, grouping.spread / np.maximum(count, 1))
    rest = _spread(
        prior, away.sum() - sums, index - squares, others, np.maximum(code_of_all - code, 0.0),
        np.maximum(alike, 1 / np.maximum(others, 1)))

    # 2) how much of it is in E, and the code's error of E
    error = np.sqrt(own * grouping.excess_of_squares(np.ones(total), others=False)
                    + rest * f**2 * others
                    + grouping.excess_spread * grouping.excess_of_squares(variance))
    real = error > NOTHING * np.abs(estimate).max()
    return excess, error, np.divide(excess, error, out=np.zeros(len(error)), where=real)


def _spread(
    prior: float, sums: np.ndarray, squares: np.ndarray, count: np.ndarray, code: np.ndarray,
    alike: np.ndarray,
) -> np.ndarray:
    """s² [G] of `count` sequences from Σ Î and Σ Î², drawn towards `prior`; 0 at least.

    `code` is Σ σ_m², `alike` the part of it that moves all of them alike.
    """
    around = squares - sums**2 / np.maximum(count, 1) - code * np.maximum(1 - alike, 0.0)
    return np.asarray(np.maximum(PRIOR * prior + around, 0.0) / (PRIOR + count - 1))


def _typical(estimate: np.ndarray) -> float:
    """w²: the variance of the index's estimates without their tails."""
    within = np.clip(estimate, *np.quantile(estimate, (TAIL, 1 - TAIL)))
    # nearly all may be alike, as where most gradients are zero; then the tails are all there is
    return float(within.var() or estimate.var())
