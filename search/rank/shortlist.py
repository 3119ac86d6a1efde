"""Who is rescored for a query, in which order, and with what chance each was to be among them.

The statistic of a code (see ranking.py) is the exact influence, divided like it, plus Gaussian
noise of known size. A TF-IDF list may have a part of a shortlist: the members of that part are
rescored whatever their code, so each of them was certain to be there.
"""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from search.rank.ranking import Ranking, unit
from search.rank.recall import (
    AS_EXPECTED,
    CodeError,
    estimated_recall,
    expected_recall,
    fit_error,
    included_error,
    inclusion_probability,
    margin,
)

# One in so many of a shortlist is there for its words. On the demo's index a quarter of 500 brought
# .979 of the true top 10 of short completions where codes alone had .950; of 50, half cost .016:
# benchmarks/results/stopping.md
LIST_SHARE = 5
CERTAIN = 40.0  # standard deviations of a code's error above a cut-off: π is 1
SMALLEST_STEP = 16  # sequences that a shortlist grows by
HALVINGS = 100  # of where a cut-off may lie: no two scores are closer


@dataclass(frozen=True)
class Statement:
    """How much of the true top k is found: an estimate, and its standard error.

    `probabilities` are the π that it was made from, `own` how the query's codes err.
    """

    estimate: float
    error: float
    probabilities: np.ndarray
    own: CodeError

    @property
    def lower(self) -> float:
        """What it is at least: one standard error below the estimate."""
        return self.estimate - self.error


class Shortlist:
    """How far along one query's order of sequences they are rescored.

    The error of a code's score has sd noise · ‖v_m‖. `most` is the longest the shortlist may grow:
    of the order, no more is fetched. `listed` are places in the order of a TF-IDF list: a shortlist
    of n has the first n / 5 of them, and the best by code besides; with `by_list` all n are of the
    list. Without a list all are by code.

    Five sequences, of which four are shortlisted by code and one by its words:

    >>> from search.rank.ranking import CodeRanking
    >>> ranking = CodeRanking(np.array([1.0, 9.0, 5.0, 7.0, 2.0, 3.0, 0.0]), np.ones(7))
    >>> shortlist = Shortlist(ranking, 2.0, most=5, listed=np.array([6]))
    >>> shortlist.places(5)
    [1, 3, 2, 5, 6]

    Once they are rescored, the best code left out is that of place 4, with a score of 2. A sequence
    of influence 4 had a chance of 84 % to come in, but for the one that was listed:

    >>> shortlist.advance({1, 3, 2, 5, 6}, 5), shortlist.cutoff
    ([1, 3, 2, 5, 6], 2.0)
    >>> shortlist.probability([3, 6], np.array([4.0, 4.0]), shortlist.cutoff).round(2).tolist()
    [0.84, 1.0]
    """

    def __init__(
        self, ranking: Ranking, noise: float, most: int, listed: np.ndarray | None = None,
        by_list: bool = False,
    ):
        self.ranking, self._noise = ranking, noise
        self._total = len(ranking.norms)
        # one more than may be rescored: its statistic is the cut-off of the longest shortlist
        self._order, self._statistic = ranking.best(min(self._total, most + 1))
        self._list = np.zeros(0, dtype=np.int64) if listed is None else listed
        self._by_list = by_list
        self.length = 0  # along the order, all of them rescored
        self._listed = 0  # along the list

    def _shares(self, length: int) -> tuple[int, int]:
        """How far a shortlist of `length` goes along the order, and how far along the list."""
        if self._by_list:
            return 0, length
        listed = length // LIST_SHARE if len(self._list) else 0
        by_words = set(self._list[:listed].tolist())
        along, left = 0, length - len(by_words)
        # past those that the list has anyway, so that `length` are rescored in all
        while along < len(self._order) and (left or int(self._order[along]) in by_words):
            left -= int(self._order[along]) not in by_words
            along += 1
        return along, listed

    def places(self, length: int) -> list[int]:
        """Who is to be rescored for a shortlist of `length`: best first by code, then by words."""
        along, listed = self._shares(length)
        return list(dict.fromkeys([*self._order[:along].tolist(), *self._list[:listed].tolist()]))

    def advance(self, rescored: Container[int], length: int) -> list[int]:
        """Note how far the order is rescored, and return who counts: that far, and the list.

        A list that is not all rescored counts as far as it did before. Its other members that are
        would be there for no reason that has a chance, having been taken by time and not by code.
        """
        if self._by_list:
            return [place for place in self.places(length) if place in rescored]
        along, listed = self._shares(length)
        self.length = 0
        while self.length < along and int(self._order[self.length]) in rescored:
            self.length += 1
        if all(place in rescored for place in self._list[:listed].tolist()):
            self._listed = listed
        return list(dict.fromkeys([*self._order[: self.length].tolist(), *self._certain.tolist()]))

    @property
    def _certain(self) -> np.ndarray:
        """The places that were to be rescored whatever their code."""
        return self._list[: self._listed]

    @property
    def cutoff(self) -> float | None:
        """τ: the statistic of the first in order that is not rescored, None where all are."""
        return None if self.length >= self._total else float(self._statistic[self.length])

    def statement(
        self, places: list[int], influence: np.ndarray, k: int, sample: list[int],
        of_sample: np.ndarray,
    ) -> Statement:
        """How much of the true top k is among `places` [n], which count, best first.

        `influence` [n] is their exact influence, `of_sample` that of the places of a random sample;
        all times the sign.
        """
        own = self._own_error(places, influence, sample, of_sample)
        pi = self.probability(places, influence, self.cutoff, own)
        return Statement(*estimated_recall(pi, k), pi, own)

    def _own_error(
        self, places: list[int], influence: np.ndarray, sample: list[int], of_sample: np.ndarray
    ) -> CodeError:
        """How the query's codes err, from all that is exact; arguments as of `statement`."""
        cutoff = self.cutoff
        if cutoff is None:
            return AS_EXPECTED
        chosen = np.asarray(places, dtype=np.int64)
        # by code alone: what is of the list came in for its words, and is like no sample
        let_in = (self.ranking.norms[chosen] * self._noise > 0) & ~np.isin(
            chosen, [*self._certain.tolist(), *sample])
        chosen, exact = chosen[let_in], influence[let_in]
        values, error = self._in_order(chosen, exact)
        others = np.asarray(sample, dtype=np.int64)
        real = self.ranking.norms[others] * self._noise > 0
        others, exact_others = others[real], of_sample[real]

        def errors(some: np.ndarray, truth: np.ndarray) -> np.ndarray:
            scores = self.ranking.sign * self.ranking.scores_at(some.tolist()).astype(np.float64)
            return np.asarray((scores - truth) / (self._noise * self.ranking.norms[some]))

        return fit_error(margin(values, error, cutoff), errors(chosen, exact),
                         errors(others, exact_others))

    def probability(
        self, places: list[int], influence: np.ndarray, cutoff: float | None,
        own: CodeError = AS_EXPECTED,
    ) -> np.ndarray:
        """π [n] of n places with exact `influence` [n] (times the sign): their chance to come in.
        """
        chosen = np.asarray(places, dtype=np.int64)
        pi = inclusion_probability(*self._in_order(chosen, influence), cutoff, own)
        pi[np.isin(chosen, self._certain)] = 1.0
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
        estimate = scores.astype(np.float64)
        variance = (self._noise * self.ranking.norms.astype(np.float64)) ** 2
        places = np.asarray(counted, dtype=np.int64)
        mean, remaining = included_error(*self._in_order(places, influence), self.cutoff)
        certain = np.isin(places, self._certain)
        mean[certain] = remaining[certain] = 0.0
        estimate[places] = influence + mean * self._noise * self.ranking.norms[places]
        variance[places] *= remaining
        # last: who is of both was to be rescored whatever its code
        estimate[sample], variance[sample] = of_sample, 0.0
        return estimate, variance

    def length_for(
        self, goal: float, places: list[int], influence: np.ndarray, k: int, made: Statement
    ) -> int:
        """The shortest length whose expected statement reaches `goal`, judged by what is exact.

        `places` and `influence` [n] are the rescored, best first, of which the statement was
        `made`. Sequences like those found but missed so far are counted through their π (see
        recall.py). What a longer list would find is unknown, and not counted.
        """
        cutoff = self.cutoff
        if cutoff is None:
            return self._total

        def reached(other: float) -> bool:
            then = self.probability(places, influence, other, made.own)
            return expected_recall(made.probabilities, then, k) >= goal

        if reached(cutoff):
            return self._whole(self.length + 1)
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
        return self._whole(max(int(above), self.length + 1))

    def _whole(self, by_code: int) -> int:
        """The length of a shortlist that has so many by code."""
        length = by_code * LIST_SHARE // (LIST_SHARE - 1) if len(self._list) else by_code
        return min(length, self._total)

    def rank_in_list(self, place: int) -> int | None:
        """Rank of a place in the TF-IDF list, from 1, or None."""
        at = np.flatnonzero(self._list == place)
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

    It grows by at least a quarter, and by a batch or two, so that statements are few and each is of
    another list; and at most twofold: a short list says little of a long one, and what is rescored
    beyond the last that was needed is rescored in vain.

    >>> longer(40, 41), longer(100, 110), longer(100, 150), longer(100, 5000)
    (56, 125, 150, 200)
    """
    return max(length + max(SMALLEST_STEP, length // 4), min(expected, 2 * length))
