"""The order of an index's sequences by what their codes say of one query.

Sequences are ordered by a statistic of their code: its score, or, when ranking per unit of the
sequence's own gradient, its score / ‖v_m‖; either times −1 for opponents.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Ranking(Protocol):
    """One query's order of N places, equal ones by place; `norms` [N] are the ‖v_m‖.

    `sign` is −1 for opponents; with `by_norm` the order is by score / ‖v_m‖.

    Whatever has all code scores here, or only some of them elsewhere, is asked through this.
    """

    norms: np.ndarray
    sign: float
    by_norm: bool

    def best(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` places, in order, and the statistic of each."""

    def before(self, statistic: np.ndarray, places: np.ndarray) -> np.ndarray:
        """How many come before a sequence of this statistic [n] at this place [n]: int64 [n]."""

    def ranks(self, places: Sequence[int]) -> list[int]:
        """Where places are in the order, from 1."""

    def scores_at(self, places: Sequence[int]) -> np.ndarray:
        """The code scores of some places, without the sign: float32 [places]."""

    def scores(self) -> np.ndarray:
        """The code score of every place, without the sign: float32 [N]."""


class CodeRanking:
    """A Ranking from the code score [N] of every place.

    >>> scores, norms = np.array([1.0, 4.0, 2.0, 4.0]), np.array([1.0, 8.0, 1.0, 2.0])
    >>> places, values = CodeRanking(scores, norms).best(3)
    >>> places.tolist(), values.tolist()
    ([1, 3, 2], [4.0, 4.0, 2.0])

    Per unit of gradient the second, whose gradient is long, falls to the end:

    >>> ranking = CodeRanking(scores, norms, by_norm=True)
    >>> ranking.best(4)[0].tolist(), ranking.ranks([1, 3])
    ([2, 3, 0, 1], [4, 2])

    Opponents begin with the lowest score:

    >>> CodeRanking(scores, norms, sign=-1.0).best(1)[0].tolist()
    [0]
    """

    def __init__(
        self, scores: np.ndarray, norms: np.ndarray, sign: float = 1.0, by_norm: bool = False
    ):
        self.norms, self.sign, self.by_norm, self._scores = norms, sign, by_norm, scores
        self._statistic = statistic(scores, norms, sign, by_norm)

    # each as of `Ranking`

    def best(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        places = best(self._statistic, count)
        return places, self._statistic[places]

    def before(self, statistic: np.ndarray, places: np.ndarray) -> np.ndarray:
        # arrays of one value: a scalar would be rounded to float32 by NumPy 1
        values = statistic.reshape(-1, 1)
        return np.array([
            (self._statistic > value).sum() + (self._statistic[:place] == value).sum()
            for value, place in zip(values, places, strict=True)], dtype=np.int64)

    def ranks(self, places: Sequence[int]) -> list[int]:
        chosen = np.asarray(places, dtype=np.int64)
        ranks: list[int] = (self.before(self._statistic[chosen], chosen) + 1).tolist()
        return ranks

    def scores_at(self, places: Sequence[int]) -> np.ndarray:
        return self._scores[np.asarray(places, dtype=np.int64)]

    def scores(self) -> np.ndarray:
        return self._scores


def statistic(
    scores: np.ndarray, norms: np.ndarray, sign: float, by_norm: bool
) -> np.ndarray:
    """What is ordered by, largest first, of code scores [n] and the ‖v_m‖ [n] beside them.

    >>> statistic(np.array([3.0, -3.0]), np.array([2.0, 0.0]), 1.0, True).tolist()
    [1.5, -0.0]
    """
    signed = scores if sign > 0 else -scores
    return signed / unit(norms) if by_norm else signed


def unit(norms: np.ndarray) -> np.ndarray:
    """‖v_m‖ [n], or infinity for a gradient of zero, whose statistic is zero then."""
    return np.where(norms > 0, norms, np.inf)


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values [n], largest first, equal ones by place.

    >>> best(np.array([2.0, 5.0, 3.0, 5.0]), 3).tolist()
    [1, 3, 2]
    """
    if not count:
        return np.zeros(0, dtype=np.int64)
    if count >= len(values):
        return np.lexsort((np.arange(len(values)), -values))
    # a partition takes time N where a sort takes N log N, and N is an index
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: count - len(above)]
    chosen = np.concatenate([above, equal])
    return chosen[np.lexsort((chosen, -values[chosen]))]
