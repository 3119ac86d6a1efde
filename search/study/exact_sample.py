"""Exact influence of a random sample of sequences, and of each query's best by code.

Of the sample a continuous law can be fitted, and sums over it stand for sums over all; the best by
code are there because few sequences carry most of the influence, and a sample would miss them.
"""

from dataclasses import dataclass

import numpy as np

from gradindex import draws
from gradindex.draws import Stream
from gradindex.errors import InputError
from gradindex.influence.exact import Rescorer, rescore
from gradindex.influence.preconditioned import Preconditioned
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.results import Query
from search.ask.task_query import query_of_row
from search.rank.query_gradient import QueryGradient
from search.rank.ranking import best
from search.rank.snapshot import Snapshot
from search.study.tail import Tail, fit_tail, half, half_interval
from search.study.texts import RECORDS_HELD

TOP_BY_CODE = 100  # sequences that are scored exactly for each query besides the sample


@dataclass
class QuerySurvey:
    """A query and its exact scores.

    `origin` is the id of the sequence that the query was made of, if it was. `sequences` is how
    many there are but for that one and its equals; `values` [n] are the influence of the random
    sample's, equal ones once. `half` of the sequences carry half of the positive influence,
    `interval` where that is an estimate. `absolute` and `proponents` [groups] are sums of |I| over
    the sample, and of I over the top by code with I > 0, by `Survey.groups`.
    """

    query: Query
    origin: int | None
    sequences: int
    values: np.ndarray
    tail: Tail | None
    half: int
    interval: tuple[int, int] | None
    absolute: np.ndarray
    proponents: np.ndarray


def own_queries(snapshot: Snapshot, count: int) -> tuple[list[Query], list[int]]:
    """Some of the index's different sequences as queries, and their places; the same every time.

    Raises InputError where no sequence has a later half to ask about.
    """
    places = np.unique(snapshot.contents.first_equal)
    random = draws.generator(Stream.REPORT_QUERIES, snapshot.manifest.code["seed"])
    places = random.permutation(places)
    queries: list[Query] = []
    chosen: list[int] = []
    # some sequences have no later half: so many are looked at that there are enough queries
    for first in range(0, len(places), count):
        next_places = places[first : first + count].tolist()
        for place, record in zip(next_places, snapshot.records(next_places), strict=True):
            asked = snapshot.objective.as_query(record)
            if snapshot.objective.predictions(asked) and len(queries) < count:
                queries.append(query_of_row(snapshot, record))
                chosen.append(place)
        if len(queries) == count:
            break
    if not queries:
        raise InputError("no sequence of the index has two tokens to score: there is nothing to "
                         "ask about. Give --queries FILE.")
    return queries, chosen


class ExactSample:
    """Exact influence [q, places] of a random `sample` and of each query's top by code.

    `origins` are the places that queries were made of, None where it was none; `code_scores`
    [q, N] are those of all. `size` sequences are drawn, or all.
    """

    def __init__(
        self, snapshot: Snapshot, origins: list[int | None], code_scores: np.ndarray,
        size: int | None,
    ):
        self.snapshot, self.origins, self.code_scores = snapshot, origins, code_scores
        total, queries = len(snapshot), len(origins)
        size = total if size is None else min(size, total)
        random = draws.generator(Stream.REPORT_SAMPLE, snapshot.manifest.code["seed"])
        self.sample = np.arange(total) if size == total else \
            np.sort(random.choice(total, size, replace=False))
        self.allowed = np.ones((queries, total), dtype=bool)  # all but a query's own sequences
        for number, place in enumerate(origins):
            if place is not None:
                self.allowed[number, snapshot.contents.equal_to(place)] = False
        # scored besides the sample, for the few that carry half of the influence are among them
        self.top = [self._best(number, TOP_BY_CODE) for number in range(queries)]
        self.places = np.unique(np.concatenate([self.sample, *self.top]))
        self.influence = np.zeros((queries, len(self.places)))
        modules = snapshot.manifest.modules
        self.groups = list(dict.fromkeys((module.layer, module.kind) for module in modules))
        self._group = _indicator(modules, self.groups)
        self._absolute = np.zeros((queries, len(self.groups)))
        self._proponents = np.zeros((queries, len(self.groups)))

    def _best(self, number: int, count: int) -> np.ndarray:
        """A query's best places by code, its own left out."""
        places = np.flatnonzero(self.allowed[number])
        scores = self.code_scores[number, places]
        chosen: np.ndarray = places[best(scores, min(count, len(places)))]
        return chosen

    def fill(self, by: Rescorer, preconditioned: Preconditioned, progress: Progress) -> None:
        """Score the sequences on every query, a batch at a time."""
        allowed = self.allowed[:, self.places]
        drawn = np.isin(self.places, self.sample) & allowed
        high = np.array([np.isin(self.places, top) for top in self.top])
        progress.start("exact", len(self.places), "sequences")
        done = 0
        for first in range(0, len(self.places), RECORDS_HELD):
            records = self.snapshot.records(self.places[first : first + RECORDS_HELD].tolist())
            for batch in rescore(by, preconditioned, records, by_module=True):
                columns = [first + number for number, _ in batch]
                by_module = [score.by_module for _, score in batch if score.by_module is not None]
                groups = np.stack(by_module) @ self._group  # [b, q, g]
                influence = np.stack([score.influence for _, score in batch], axis=1)  # [q, b]
                self.influence[:, columns] = influence
                # shares are summed as they come: all by module would be q times an index's codes
                self._absolute += np.einsum("bqg,qb->qg", np.abs(groups), drawn[:, columns])
                self._proponents += np.einsum(
                    "bqg,qb->qg", groups, high[:, columns] & (influence > 0))
                done += len(batch)
                progress.update(len(batch))
                if progress.measured:
                    progress.say_expected(progress.seconds_each() * (len(self.places) - done))
        progress.finish()

    def survey_of(self, number: int, gradient: QueryGradient) -> QuerySurvey:
        """What the exact scores say of one query, the `number`-th."""
        allowed, origin = self.allowed[number], self.origins[number]
        certain = np.isin(self.places, self.top[number])
        drawn = np.isin(self.places, self.sample) & allowed[self.places]
        values = self.influence[number]
        # equal sequences count once where a continuous law is fitted
        chosen = np.flatnonzero(drawn)
        first = self.snapshot.contents.first_equal[self.places[chosen]]
        different = values[chosen[np.unique(first, return_index=True)[1]]]
        sequences = int(allowed.sum())
        interval, weights = None, np.ones(len(values))
        if len(self.sample) < len(self.snapshot):
            # all of the top by code is known; the others stand for those that weren't drawn
            rest = int((drawn & ~certain).sum())
            weights[~certain] = (sequences - len(self.top[number])) / max(1, rest)
            counted = drawn | certain
            interval = half_interval(values[counted], weights[counted], certain[counted])
        else:
            counted = drawn
        return QuerySurvey(
            query=gradient.query,
            origin=None if origin is None else int(self.snapshot.contents.ids[origin]),
            sequences=sequences, values=different, tail=fit_tail(different),
            half=half(values[counted], weights[counted]), interval=interval,
            absolute=self._absolute[number], proponents=self._proponents[number],
        )


def _indicator(modules: list[Module], groups: list[tuple[int, str]]) -> np.ndarray:
    """Which module belongs to which group: float64 [u, groups]."""
    belongs = np.zeros((len(modules), len(groups)))
    for number, module in enumerate(modules):
        belongs[number, groups.index((module.layer, module.kind))] = 1.0
    return belongs
