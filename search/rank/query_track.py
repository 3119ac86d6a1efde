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
from search.rank.recall import AS_EXPECTED
from search.rank.shortlist import LIST_SHARE, Shortlist, Statement, longer
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

    `length` is how long its shortlist is to be by now, `deadline` when it is to end on the clock of
    `time.monotonic`, None before it began. `timed_out` says that the time limit ended it early,
    `heard` that the random sample counts in its statement.
    """

    def __init__(self, common: Common, number: int, gradient: QueryGradient, shortlist: Shortlist):
        self.common, self.number, self.gradient = common, number, gradient
        self.shortlist = shortlist
        self.length = common.settings.first
        self.deadline: float | None = None
        self.timed_out = self.heard = False

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
        """Lengthen the shortlist if its statement isn't sure of the goal and it may grow."""
        goal, most = self.common.settings.recall, self.common.settings.most
        if goal is None or self.length == most:
            return
        groups, made = self.statement()
        # the lower bound, and not the estimate: the first that happens to be high enough is so by
        # luck, too
        if made.lower < goal:
            expected = self.length_for(goal, groups, made)
            self.length = min(most, longer(self.length, expected))

    def statement(self) -> tuple[list[list[int]], Statement]:
        """Places of the rescored that count, best first, equal ones together, and their recall.

        The shortlist is advanced to what is exact by now.
        """
        common, settings = self.common, self.common.settings
        counted = self.advance()
        ranked = sorted(counted, key=lambda place: (-self.value(place), place))
        alike: dict[int, list[int]] = {}
        for place in ranked:
            alike.setdefault(int(common.snapshot.contents.first_equal[place]), []).append(place)
        # equal sequences differ by rounding only: the first in the index stands for them
        groups = [sorted(group) for group in alike.values()]
        first = [group[0] for group in groups]
        # of all that there is nothing can be missing, whatever the codes say
        if len(counted) == len(common.snapshot):
            return groups, Statement(1.0, 0.0, np.ones(len(first)), AS_EXPECTED)
        # not whenever it is there: an answer must not depend on the queries before it
        sample = common.random_sample if self.heard else []
        return groups, self.shortlist.statement(
            first, self.signed(first), settings.k, sample, self.signed(sample))

    def advance(self) -> list[int]:
        """Note how far the shortlist is exact by now, and return the places that count."""
        return self.shortlist.advance(self.common.exact, self.length)

    def length_for(self, goal: float, groups: list[list[int]], made: Statement) -> int:
        """How long the shortlist would have to be for a statement of `goal`, as far as is known.

        `groups` and the statement `made` are those of now.
        """
        first = [group[0] for group in groups]
        return self.shortlist.length_for(goal, first, self.signed(first), self.common.settings.k,
                                         made)

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
    # Of a shortlist of each length a part is by the list, whatever the codes say of it: who is on
    # it is certain, however the shortlist came to its length.
    listed, by_list = None, settings.candidates == "tfidf"
    if settings.candidates != "code":
        scores = snapshot.tables.tokens.scores(gradient.query.scored_tokens)
        listed = best(scores, settings.most if by_list else settings.most // LIST_SHARE)
    return Shortlist(ranking, code_noise(snapshot, gradient), settings.most, listed, by_list)
