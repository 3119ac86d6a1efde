"""Who is rescored for a query, in which order, and with what chance each was to be among them.

Sequences are ordered by a statistic of their code: its score, or, when ranking per unit of the
sequence's own gradient, its score / ‖v_m‖. The statistic is the exact influence (divided likewise)
plus Gaussian noise of known size. A TF-IDF list may join: its members are rescored whatever their
code, so each of them was certain to be there.
"""

from collections.abc import Container

import numpy as np

from search.recall import expected_recall, included_error, inclusion_probability


class Shortlist:
    """One query's order of sequences, and how far along it they are rescored.

    scores [N] are code scores times the sign asked for (−1 for opponents), norms [N] the ‖v_m‖;
    the error of a score has sd noise · ‖v_m‖. `by_norm` orders by score / ‖v_m‖. `most` is the
    longest the shortlist may grow. `listed` are the ids of a TF-IDF list, which come on top of the
    shortlist; with `by_list` they alone are taken.
    """

    def __init__(
        self, scores: np.ndarray, norms: np.ndarray, noise: float, by_norm: bool, most: int,
        listed: np.ndarray | None = None, by_list: bool = False,
    ):
        self._norms, self._noise, self._by_norm = norms, noise, by_norm
        self.statistic = scores / self._scale(np.arange(len(scores))) if by_norm else scores
        self._order = best(self.statistic, min(len(scores), most + 1))
        self.listed = np.zeros(0, dtype=np.int64) if listed is None else listed
        self._list_done = False
        self._by_list = by_list
        self.length = 0  # along the order, all of them rescored

    def _scale(self, places: np.ndarray) -> np.ndarray:
        """‖v_m‖, or infinity for a gradient of zero, whose statistic is zero then."""
        norms = self._norms[places]
        return np.where(norms > 0, norms, np.inf)

    def ids(self, length: int) -> list[int]:
        """Who is to be rescored for a shortlist of `length` by code, best first."""
        listed: list[int] = self.listed.tolist()
        return listed if self._by_list else list(
            dict.fromkeys([*self._order[:length].tolist(), *listed]))

    def advance(self, rescored: Container[int], length: int) -> list[int]:
        """Note how far the order is rescored, and return who counts: that far, and the list."""
        if self._by_list:
            return [one for one in self.ids(length) if one in rescored]
        self.length = 0
        while self.length < length and int(self._order[self.length]) in rescored:
            self.length += 1
        listed: list[int] = self.listed.tolist()
        self._list_done = all(one in rescored for one in listed)
        counted = self._order[: self.length].tolist()
        return list(dict.fromkeys([*counted, *listed])) if self._list_done else counted

    @property
    def cutoff(self) -> float | None:
        """τ: the statistic of the first in order that is not rescored, None where all are."""
        if self.length >= len(self.statistic):
            return None
        return float(self.statistic[self._order[self.length]])

    def probability(
        self, ids: list[int], influence: np.ndarray, cutoff: float | None
    ) -> np.ndarray:
        """π of sequences with exact `influence` (times the sign): their chance to be rescored."""
        places = np.asarray(ids, dtype=np.int64)
        pi = inclusion_probability(*self._in_order(places, influence), cutoff)
        if self._list_done:
            pi[np.isin(places, self.listed)] = 1.0
        return pi

    def _in_order(self, places: np.ndarray, influence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact influence and σ_m of some places, in the unit that the order is by."""
        error = self._noise * self._norms[places]
        if not self._by_norm:
            return influence, error
        scale = self._scale(places)
        return influence / scale, error / scale

    def estimates(
        self, scores: np.ndarray, ids: list[int], influence: np.ndarray, sample: list[int],
        of_sample: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """An unbiased estimate of every influence, and the variance of its error: float64 [N].

        `scores` are the codes'; `ids` are those who count, `sample` a random sample, each with
        exact `influence`; all times the sign. An estimate is the code's score; of those that were
        to be rescored whatever their code the influence; of those that their code let in the
        influence plus the mean error of codes let in. See `recall.included_error`.
        """
        estimate, variance = scores.astype(np.float64), (self._noise * self._norms) ** 2
        places = np.asarray(ids, dtype=np.int64)
        mean, left = included_error(*self._in_order(places, influence), self.cutoff)
        if self._list_done:
            certain = np.isin(places, self.listed)
            mean[certain] = left[certain] = 0.0
        estimate[places] = influence + mean * self._noise * self._norms[places]
        variance[places] *= left
        estimate[sample], variance[sample] = of_sample, 0.0
        return estimate, variance

    def length_for(
        self, goal: float, ids: list[int], influence: np.ndarray, k: int
    ) -> int:
        """The shortest length whose expected statement reaches `goal`, judged by what is exact.

        `ids` and `influence` are the rescored, best first. Sequences like those found but missed
        so far are counted through their π (see recall.py).
        """
        falling = -np.sort(-self.statistic)
        now = self.probability(ids, influence, self.cutoff)
        low, high = self.length, len(falling)
        while low + 1 < high:
            middle = (low + high) // 2
            then = self.probability(ids, influence, float(falling[middle]))
            if expected_recall(now, then, k) >= goal:
                high = middle
            else:
                low = middle
        return high

    def place_in_list(self, one: int) -> int | None:
        """Rank in the TF-IDF list, from 1, or None."""
        found = np.flatnonzero(self.listed == one)
        return int(found[0]) + 1 if len(found) else None

    def rank(self, one: int) -> int:
        """Place in the order by code, from 1."""
        value = self.statistic[one]
        return int((self.statistic > value).sum() + (self.statistic[:one] == value).sum()) + 1


def longer(length: int, expected: int) -> int:
    """The next length of a shortlist that is to be longer, judged to need `expected`.

    It grows by at least a quarter, so that statements are few and each is of another list, and at
    most fourfold, since a short list says little of a long one.
    """
    return max(length + length // 4 + 1, min(expected, 4 * length))


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values [n], largest first, equal ones by place."""
    if count >= len(values):
        return np.lexsort((np.arange(len(values)), -values))
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: count - len(above)]
    chosen = np.concatenate([above, equal])
    return chosen[np.lexsort((chosen, -values[chosen]))]
