"""One query on its way from code scores to a result: its shortlist, and what is known of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gradindex.influence.codes import score_error
from gradindex.influence.exact import Exact, Rescorer
from gradindex.influence.preconditioned import Preconditioned
from gradindex.results import Query
from search.ask.settings import Settings
from search.rank.hits import normalized
from search.rank.query_gradient import QueryGradient
from search.rank.ranking import Ranking, best
from search.rank.recall import estimated_recall
from search.rank.shortlist import Shortlist, longer
from search.rank.snapshot import Snapshot


@dataclass
class Common:
    """What the queries of a session share; only the session changes it.

    `exact` are the scores so far, by place. `random_sample` are the places of the snapshot's
    random sample, empty until all of them are exact.
    """

    snapshot: Snapshot
    settings: Settings
    by: Rescorer
    preconditioned: Preconditioned
    exact: dict[int, Exact] = field(default_factory=dict)
    random_sample: list[int] = field(default_factory=list)


class Track:
    """One query of a session, the `number`-th: who is rescored for it, and what that says.

    `length` is how long its shortlist is to be by now. `timed_out` says that the time limit ended
    it early.
    """

    def __init__(self, common: Common, number: int, gradient: QueryGradient, shortlist: Shortlist):
        self.common, self.number, self.gradient = common, number, gradient
        self.shortlist = shortlist
        self.length = common.settings.first
        self.timed_out = False

    @property
    def query(self) -> Query:
        """What is asked."""
        return self.gradient.query

    @property
    def ranking(self) -> Ranking:
        """What the codes say of every sequence."""
        return self.shortlist.ranking

    @property
    def noise(self) -> float:
        """The sd of the error of the query's code scores, for ‖v_m‖ = 1."""
        return code_noise(self.common.snapshot, self.gradient)

    # ---- how far it is

    def missing(self) -> list[int]:
        """The places of its shortlist that are not exact yet, best first."""
        return [place for place in self.shortlist.places(self.length)
                if place not in self.common.exact]

    def lengthen(self) -> None:
        """Lengthen the shortlist if its statement is short of the goal and it may grow."""
        goal, most = self.common.settings.recall, self.common.settings.most
        if goal is None or self.length == most:
            return
        groups, estimate = self.statement()
        if estimate < goal:
            self.length = min(most, longer(self.length, self.length_for(goal, groups)))

    def statement(self) -> tuple[list[list[int]], float]:
        """Places of the rescored that count, best first, equal ones together, and their recall.

        The shortlist is advanced to what is exact by now.
        """
        snapshot, settings = self.common.snapshot, self.common.settings
        counted = self.advance()
        ranked = sorted(counted, key=lambda place: (-self.value(place), place))
        alike: dict[int, list[int]] = {}
        for place in ranked:
            alike.setdefault(int(snapshot.contents.first_equal[place]), []).append(place)
        # equal sequences differ by rounding only: the first in the index stands for them
        groups = [sorted(group) for group in alike.values()]
        # of all that there is nothing can be missing, whatever the codes say
        if len(counted) == len(snapshot):
            return groups, 1.0
        first = [group[0] for group in groups]
        pi = self.shortlist.probability(first, self.signed(first), self.shortlist.cutoff)
        return groups, estimated_recall(pi, settings.k)

    def advance(self) -> list[int]:
        """Note how far the shortlist is exact by now, and return the places that count."""
        return self.shortlist.advance(self.common.exact, self.length)

    def length_for(self, goal: float, groups: list[list[int]]) -> int:
        """How long the shortlist would have to be for a statement of `goal`, as far as is known."""
        first = [group[0] for group in groups]
        return self.shortlist.length_for(goal, first, self.signed(first), self.common.settings.k)

    # ---- what is known of a place

    def influence(self, places: Iterable[int]) -> list[float]:
        """The exact influence of places that were rescored."""
        return [float(self.common.exact[place].influence[self.number]) for place in places]

    def signed(self, places: Iterable[int]) -> np.ndarray:
        """The same, larger where it is more of what is looked for: float64 [places]."""
        return self.common.settings.sign * np.array(self.influence(places))

    def value(self, place: int) -> float:
        """What a place that was rescored is ranked by, larger first."""
        exact, settings = self.common.exact[place], self.common.settings
        influence = settings.sign * float(exact.influence[self.number])
        return normalized(influence, exact, settings.normalize)


def code_noise(snapshot: Snapshot, gradient: QueryGradient) -> float:
    """The sd of the error of a query's code scores, for ‖v_m‖ = 1."""
    c, vector = snapshot.manifest.calibration["c"], gradient.vector
    return float(score_error(c, float(np.linalg.norm(vector)), np.ones(1), len(vector))[0])


def make_shortlist(
    snapshot: Snapshot, settings: Settings, gradient: QueryGradient, ranking: Ranking
) -> Shortlist:
    """Who is rescored for a query, with a TF-IDF list where one is asked for."""
    # it doesn't grow with the shortlist: who is on it must have been certain from the start
    tfidf_list = None
    if settings.candidates != "code":
        scores = snapshot.tables.tokens.scores(gradient.query.scored_tokens)
        tfidf_list = best(scores, settings.first)
    return Shortlist(ranking, code_noise(snapshot, gradient), settings.most, tfidf_list,
                     by_list=settings.candidates == "tfidf")
