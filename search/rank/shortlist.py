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

    Five sequences, of which two are shortlisted by code and one by its words:

    >>> from search.rank.ranking import CodeRanking
    >>> ranking = CodeRanking(np.array([1.0, 9.0, 5.0, 7.0, 2.0]), np.ones(5))
    >>> shortlist = Shortlist(ranking, 2.0, most=4, tfidf_list=np.array([4]))
    >>> shortlist.places(2)
    [1, 3, 4]

    Once they are rescored, the best code left out is that of place 2, with a score of 5. A sequence
    of influence 7 had a chance of 84 % to come in, but for the one that was listed:

    >>> shortlist.advance({1, 3, 4}, 2), shortlist.cutoff
    ([1, 3, 4], 5.0)
    >>> shortlist.probability([3, 4], np.array([7.0, 7.0]), shortlist.cutoff).round(2).tolist()
    [0.84, 1.0]
    """

    def __init__(
        self, ranking: Ranking, noise: float, most: int, tfidf_list: np.ndarray | None = None,
        by_list: bool = False,
    ):
        self.ranking, self._noise = ranking, noise
        self._total = len(ranking.norms)
        # one more than may be rescored: its statistic is the cut-off of the longest shortlist
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
        """Note how far the order is rescored, and return who counts: that far, and the list.

        A list that is not all rescored doesn't count yet. Its members that are would be there for
        no reason that has a chance, having been taken by time and not by code.
        """
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
        """π [n] of n places with exact `influence` [n] (times the sign): their chance to come in.
        """
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
        # σ_m is a multiple of ‖v_m‖, so that all errors are alike in this unit
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

        Of three codes that err by 2, the first was let in by the cut-off 5, and the last is of the
        sample:

        >>> from search.rank.ranking import CodeRanking
        >>> scores = np.array([6.0, 5.0, 1.0])
        >>> shortlist = Shortlist(CodeRanking(scores, np.ones(3)), 2.0, most=1)
        >>> counted = shortlist.advance({0}, 1)
        >>> estimate, variance = shortlist.estimates(scores, counted, np.array([5.0]), [2],
        ...                                          np.array([0.5]))
        >>> estimate.round(2).tolist(), variance.round(2).tolist()
        ([6.6, 5.0, 0.5], [2.55, 4.0, 0.0])
        """
        estimate, variance = scores.astype(np.float64), (self._noise * self.ranking.norms) ** 2
        places = np.asarray(counted, dtype=np.int64)
        mean, remaining = included_error(*self._in_order(places, influence), self.cutoff)
        if self._list_done:
            certain = np.isin(places, self.tfidf_list)
            mean[certain] = remaining[certain] = 0.0
        estimate[places] = influence + mean * self._noise * self.ranking.norms[places]
        variance[places] *= remaining
        # last: who is of both was to be rescored whatever its code
        estimate[sample], variance[sample] = of_sample, 0.0
        return estimate, variance

    def length_for(
        self, goal: float, places: list[int], influence: np.ndarray, k: int
    ) -> int:
        """The shortest length whose expected statement reaches `goal`, judged by what is exact.

        `places` and `influence` [n] are the rescored, best first. Sequences like those found but
        missed so far are counted through their π (see recall.py).
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
        # where even certainty for those like the found isn't enough, all have to be rescored
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
        ranks = {place: rank for rank, place in enumerate(self._order.tolist(), 1)}
        # members of a TF-IDF list may lie anywhere in the order, of which only the top is here
        deeper = [place for place in places if place not in ranks]
        if deeper:
            ranks.update(zip(deeper, self.ranking.ranks(deeper), strict=True))
        return [ranks[place] for place in places]


def longer(length: int, expected: int) -> int:
    """The next length of a shortlist that is to be longer, judged to need `expected`.

    It grows by at least a quarter, so that statements are few and each is of another list, and at
    most fourfold, since a short list says little of a long one.

    >>> longer(100, 110), longer(100, 300), longer(100, 5000)
    (126, 300, 400)
    """
    return max(length + length // 4 + 1, min(expected, 4 * length))
