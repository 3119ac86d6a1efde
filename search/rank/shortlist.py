"""Who is rescored for a query, in which order, and with what chance each was to be among them.

The statistic of a code (see ranking.py) is the exact influence, divided like it, plus Gaussian
noise of known size. A TF-IDF list may join: its members are rescored whatever their code, so each
of them was certain to be there.
"""

from collections.abc import Container

import numpy as np

from search.rank.ranking import Ranking, unit
from search.rank.recall import expected_recall, included_error, inclusion_probability

CERTAIN = 40.0  # standard deviations of a code's error above a cut-off: π is 1
HALVINGS = 100  # of where a cut-off may lie: no two scores are closer


class Shortlist:
    """How far along one query's order of sequences they are rescored.

    The error of a code's score has sd noise · ‖v_m‖. `most` is the longest the shortlist may grow:
    of the order, no more is fetched. `tfidf_list` are the places of a TF-IDF list, which come on
    top of the shortlist; with `by_list` they alone are taken.
    """

    def __init__(
        self, ranking: Ranking, noise: float, most: int, tfidf_list: np.ndarray | None = None,
        by_list: bool = False,
    ):
        self.ranking, self._noise = ranking, noise
        self._total = len(ranking.norms)
        self._order, self._statistic = ranking.best(min(self._total, most + 1))
        self.tfidf_list = np.zeros(0, dtype=np.int64) if tfidf_list is None else tfidf_list
        self._list_done = False
        self._by_list = by_list
        self.length = 0  # along the order, all of them rescored

    def places(self, length: int) -> list[int]:
        """Who is to be rescored for a shortlist of `length` by code, best first."""
        listed: list[int] = self.tfidf_list.tolist()
        return listed if self._by_list else list(
            dict.fromkeys([*self._order[:length].tolist(), *listed]))

    def advance(self, rescored: Container[int], length: int) -> list[int]:
        """Note how far the order is rescored, and return who counts: that far, and the list."""
        if self._by_list:
            return [place for place in self.places(length) if place in rescored]
        self.length = 0
        while self.length < length and int(self._order[self.length]) in rescored:
            self.length += 1
        listed: list[int] = self.tfidf_list.tolist()
        self._list_done = all(place in rescored for place in listed)
        counted = self._order[: self.length].tolist()
        return list(dict.fromkeys([*counted, *listed])) if self._list_done else counted

    @property
    def cutoff(self) -> float | None:
        """τ: the statistic of the first in order that is not rescored, None where all are."""
        return None if self.length >= self._total else float(self._statistic[self.length])

    def probability(
        self, places: list[int], influence: np.ndarray, cutoff: float | None
    ) -> np.ndarray:
        """π of places with exact `influence` (times the sign): their chance to be rescored."""
        chosen = np.asarray(places, dtype=np.int64)
        pi = inclusion_probability(*self._in_order(chosen, influence), cutoff)
        if self._list_done:
            pi[np.isin(chosen, self.tfidf_list)] = 1.0
        return pi

    def _in_order(self, places: np.ndarray, influence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact influence and σ_m of some places, in the unit that the order is by."""
        norms = self.ranking.norms[places]
        error = self._noise * norms
        if not self.ranking.by_norm:
            return influence, error
        return influence / unit(norms), error / unit(norms)

    def estimates(
        self, scores: np.ndarray, counted: list[int], influence: np.ndarray, sample: list[int],
        of_sample: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """An unbiased estimate of every influence, and the variance of its error: float64 [N].

        `scores` [N] are the codes'; `counted` are the places that count, `sample` those of a random
        sample, each with exact `influence`; all times the sign. An estimate is the code's score; of
        those that were to be rescored whatever their code the influence; of those that their code
        let in the influence plus the mean error of codes let in. See `recall.included_error`.
        """
        estimate, variance = scores.astype(np.float64), (self._noise * self.ranking.norms) ** 2
        places = np.asarray(counted, dtype=np.int64)
        mean, remaining = included_error(*self._in_order(places, influence), self.cutoff)
        if self._list_done:
            certain = np.isin(places, self.tfidf_list)
            mean[certain] = remaining[certain] = 0.0
        estimate[places] = influence + mean * self._noise * self.ranking.norms[places]
        variance[places] *= remaining
        estimate[sample], variance[sample] = of_sample, 0.0
        return estimate, variance

    def length_for(
        self, goal: float, places: list[int], influence: np.ndarray, k: int
    ) -> int:
        """The shortest length whose expected statement reaches `goal`, judged by what is exact.

        `places` and `influence` are the rescored, best first. Sequences like those found but missed
        so far are counted through their π (see recall.py).
        """
        cutoff = self.cutoff
        if cutoff is None:
            return self._total
        now = self.probability(places, influence, cutoff)

        def reached(other: float) -> bool:
            then = self.probability(places, influence, other)
            return expected_recall(now, then, k) >= goal

        if reached(cutoff):
            return min(self.length + 1, self._total)
        values, error = self._in_order(np.asarray(places, dtype=np.int64), influence)
        certain = np.min(values - CERTAIN * error, initial=cutoff)
        low, high = float(np.nextafter(certain, -np.inf)), cutoff
        if not reached(low):
            return self._total
        # bisection over the cut-off and not the length: it needs no scores of what isn't fetched
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(middle) else (low, middle)
        [above] = self.ranking.before(np.array([low]), np.array([0]))
        return min(max(int(above), self.length + 1), self._total)

    def rank_in_list(self, place: int) -> int | None:
        """Rank of a place in the TF-IDF list, from 1, or None."""
        at = np.flatnonzero(self.tfidf_list == place)
        return int(at[0]) + 1 if len(at) else None

    def ranks(self, places: list[int]) -> list[int]:
        """Where places are in the order by code, from 1."""
        known = {place: rank for rank, place in enumerate(self._order.tolist(), 1)}
        deeper = [place for place in places if place not in known]
        if deeper:
            known.update(zip(deeper, self.ranking.ranks(deeper), strict=True))
        return [known[place] for place in places]


def longer(length: int, expected: int) -> int:
    """The next length of a shortlist that is to be longer, judged to need `expected`.

    It grows by at least a quarter, so that statements are few and each is of another list, and at
    most fourfold, since a short list says little of a long one.
    """
    return max(length + length // 4 + 1, min(expected, 4 * length))
