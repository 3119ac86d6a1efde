"""Queries searched together: who is rescored for them, what is exact, what follows from it."""

from collections.abc import Iterator

import numpy as np

from gradindex.codes import score_error
from gradindex.influence import Preconditioned, precondition
from gradindex.records import Record
from gradindex.results import Hit, Recall, Result
from search.controls import Settings
from search.hits import likeness, make_hit, normalized
from search.opened import OpenIndex
from search.recall import estimated_recall
from search.rescore import Exact, Rescorer, rescore
from search.shortlist import Shortlist, best, longer
from search.target import Target, coordinates_of

SMALLEST_SAMPLE = 32  # of the background, before anything is said of the error on a query
ODD_CALIBRATION = 1.5  # c on this query's background, as a factor of the index's: warn beyond it
HOPELESS = 0.5  # a statement below this comes with what would help
GOOD = 0.95  # what a longer shortlist is suggested for


class Journey:
    """Some queries on their way from code scores [q, N] to results."""

    def __init__(
        self, index: OpenIndex, settings: Settings, targets: list[Target],
        preconditioned: Preconditioned, batch_tokens: int,
    ):
        self.index, self.settings, self.targets = index, settings, targets
        self.preconditioned = preconditioned
        self.by = Rescorer(index.model, settings.modules, index.ekfac, settings.damping,
                           batch_tokens)
        self.codes = index.code_scores(np.stack([target.vector for target in targets]))
        self.shortlists = [self._shortlist(number) for number in range(len(targets))]
        self.exact: dict[int, Exact] = {}
        self.records: dict[int, Record] = {}
        self._likeness: dict[int, bytes] = {}
        self.background: list[int] = []
        self._lengths = [settings.first] * len(targets)
        self._c = index.manifest.calibration["c"]

    def _shortlist(self, number: int) -> Shortlist:
        settings, target = self.settings, self.targets[number]
        listed = None
        if settings.candidates != "code":
            listed = best(self.index.tokens.scores(target.query.scored_tokens), settings.first)
        norms = self.index.norms
        error = score_error(self.index.manifest.calibration["c"],
                            float(np.linalg.norm(target.vector)), norms, len(target.vector))
        return Shortlist(
            settings.sign * self.codes[number], error,
            None if settings.normalize == "none" else norms, settings.most, listed,
            by_list=settings.candidates == "tfidf",
        )

    # ---- exact scores

    @property
    def planned(self) -> int:
        """How many sequences are to be exact, as far as is known now."""
        return len({one for shortlist, length in zip(self.shortlists, self._lengths, strict=True)
                    for one in shortlist.ids(length)})

    def rescore(self) -> Iterator[None]:
        """Score the shortlists, longer and longer until each statement is what was asked for.

        Yields after every batch.
        """
        while True:
            wanted = self._wanted()
            if not wanted:
                return
            yield from self._score(wanted)
            if self.settings.recall is None:
                return
            for number in range(len(self.targets)):
                self._grow(number, self.settings.recall)

    def _wanted(self) -> list[int]:
        """Ids not yet exact, those that stand first in any order first."""
        place: dict[int, int] = {}
        for shortlist, length in zip(self.shortlists, self._lengths, strict=True):
            for rank, one in enumerate(shortlist.ids(length)):
                if one not in self.exact:
                    place[one] = min(rank, place.get(one, rank))
        return sorted(place, key=lambda one: (place[one], one))

    def _score(self, ids: list[int]) -> Iterator[None]:
        records = self.index.records(ids)
        self.records.update(zip(ids, records, strict=True))
        self._likeness.update((one.id, likeness(one)) for one in records)
        sizes = self.settings.normalize != "none"
        for found in rescore(self.by, self.preconditioned, records, sizes=sizes):
            self.exact.update((ids[place], one) for place, one in found)
            yield

    def _grow(self, number: int, goal: float) -> None:
        """Lengthen a query's shortlist if its statement is short of the goal and it may grow."""
        if self._lengths[number] < self.settings.most:
            groups, estimate = self._statement(number)
            if estimate < goal:
                expected = self._length_for(number, goal, groups)
                self._lengths[number] = min(
                    self.settings.most, longer(self._lengths[number], expected))

    def score_background(self) -> None:
        """A fixed random sample, for percentiles and for the code's error on each query."""
        ids = self.index.background()
        for _ in self._score([one for one in ids if one not in self.exact]):
            pass
        self.background = ids

    # ---- what follows

    def _statement(self, number: int) -> tuple[list[list[int]], float]:
        """Ids of the rescored that count, best first and equal ones together, and their recall."""
        counted = self.shortlists[number].advance(self.exact, self._lengths[number])
        ranked = sorted(counted, key=lambda one: (-self._value(number, one), one))
        alike: dict[bytes, list[int]] = {}
        for one in ranked:
            alike.setdefault(self._likeness[one], []).append(one)
        # equal sequences differ by rounding only: the first in the index stands for them
        groups = [sorted(group) for group in alike.values()]
        first = [group[0] for group in groups]
        shortlist = self.shortlists[number]
        if shortlist.cutoff is None:
            return groups, 1.0
        signed = self._signed(number, first)
        probabilities = shortlist.probability(first, signed, shortlist.cutoff)
        return groups, estimated_recall(probabilities, self.settings.k)

    def _signed(self, number: int, ids: list[int]) -> np.ndarray:
        return np.array([self.settings.sign * self.exact[one].influence[number] for one in ids])

    def _value(self, number: int, one: int) -> float:
        """What is ranked by, larger first."""
        exact = self.exact[one]
        influence = self.settings.sign * float(exact.influence[number])
        return normalized(influence, exact, self.settings.normalize)

    def _length_for(self, number: int, goal: float, groups: list[list[int]]) -> int:
        first = [group[0] for group in groups]
        return self.shortlists[number].length_for(
            goal, first, self._signed(number, first), self.settings.k)

    def approximate_hits(self, number: int) -> list[Hit]:
        """The best k by code alone."""
        ids = [int(one) for one in best(self.shortlists[number].statistic, self.settings.k)]
        return [self._hit(number, record, None, rank)
                for rank, record in enumerate(self.index.records(ids), 1)]

    def conclude(self, number: int, interrupted: bool, timed_out: bool) -> Result:
        """A query's top k, exact by token and module, and how complete it is."""
        settings, target = self.settings, self.targets[number]
        if not settings.rescore:
            return self._result(number, self.approximate_hits(number), Recall(
                settings.k, None, None, self._c), 0, [
                    "nothing was rescored: influence and order are the code's estimate, and how "
                    "complete the list is isn't known"])
        groups, estimate = self._statement(number)
        shortlist = self.shortlists[number]
        counted = sum(map(len, groups))
        unknown = settings.candidates == "tfidf" and counted < len(self.index.norms)
        recall = Recall(
            settings.k, None if unknown else estimate, None if unknown else shortlist.cutoff,
            self._c, self._error_here(number), settings.recall,
        )
        if recall.estimate is not None and recall.estimate < GOOD and groups:
            recall.shortlist_for_95 = self._length_for(number, GOOD, groups)
        hits = self._hits(number, groups)
        warnings = [*target.query.notes, *self._warnings(number, hits, recall)]
        if self.preconditioned.rank is not None:
            warnings.append(
                f"the query's gradient was reduced to rank {self.preconditioned.rank} a module to "
                "choose these hits; their influence is that of all of it"
            )
        total = len(shortlist.ids(self._lengths[number]))
        if interrupted:
            warnings.append(f"interrupted: {counted} of {total} sequences are exact")
        if timed_out:
            warnings.append(f"--time-limit reached: {counted} of {total} sequences are exact")
        result = self._result(number, hits, recall, counted, warnings)
        result.interrupted = interrupted
        return result

    def _hits(self, number: int, groups: list[list[int]]) -> list[Hit]:
        """The best k groups, scored again by token and module; at full rank, if that wasn't so."""
        settings = self.settings
        low = self.preconditioned.rank is not None
        chosen = groups[: 2 * settings.k if low else settings.k]
        if low:
            again = coordinates_of(self.index, [self.targets[number].query], settings,
                                   self.by.batch_tokens)
            whole = Preconditioned(precondition(self.index.ekfac, again))
        else:
            whole = self.preconditioned.one(number)
        found: dict[int, Exact] = {}
        records = [self.records[group[0]] for group in chosen]
        for part in rescore(self.by, whole, records, sizes=True, terms=True):
            found.update(part)
        truth = self._background_values(number)
        ranked = []
        for place, (group, record) in enumerate(zip(chosen, records, strict=True)):
            value = settings.sign * normalized(
                float(found[place].influence[0]), found[place], settings.normalize)
            hit = self._hit(number, record, found[place],
                            self.shortlists[number].rank(record.id))
            hit.duplicates = group[1:]
            if len(truth):
                hit.percentile = float(np.mean(truth <= settings.sign * value) * 100)
            ranked.append((-value, record.id, hit))
        return [hit for _, _, hit in sorted(ranked, key=lambda one: one[:2])[: settings.k]]

    def _background_values(self, number: int) -> np.ndarray:
        return np.array([self.settings.sign * self._value(number, one)
                         for one in self.background])

    def _error_here(self, number: int) -> float | None:
        """c measured on a query's background sample, or None where that says too little."""
        if not self.background:
            return None
        target, there = self.targets[number], self.background
        unit = score_error(1.0, float(np.linalg.norm(target.vector)), self.index.norms[there],
                           len(target.vector))
        truth = np.array([self.exact[one].influence[number] for one in there])
        real = unit > 0
        if real.sum() < SMALLEST_SAMPLE:
            return None
        error = self.codes[number, there] - truth
        return float(np.sqrt(np.mean((error[real] / unit[real]) ** 2)))

    def _warnings(self, number: int, hits: list[Hit], recall: Recall) -> list[str]:
        sign, warnings = self.settings.sign, []
        wrong = sum(sign * hit.influence <= 0 for hit in hits)
        if wrong:
            warnings.append(
                f"{wrong} of these hits have influence of the other sign: fewer than "
                f"{self.settings.k} sequences of the shortlist are "
                f"{'opponents' if sign < 0 else 'proponents'}"
            )
        if recall.c_here is not None and recall.estimate is not None and \
                not self._c / ODD_CALIBRATION < recall.c_here < self._c * ODD_CALIBRATION:
            warnings.append(
                f"on this query the code's error is {recall.c_here / self._c:.1f} times what the "
                "index was calibrated to, so the recall statement is "
                + ("too hopeful" if recall.c_here > self._c else "too cautious")
                + "; a longer --shortlist helps"
            )
        if recall.shortlist_for_95 is not None and recall.estimate is not None \
                and recall.estimate < HOPELESS:
            length = recall.shortlist_for_95
            total = len(self.index.norms)
            help_ = "only --shortlist all would hold 95% of it" if length >= total else \
                f"--shortlist {_round_up(length, total)} would hold about 95% of it"
            warnings.append(
                "the code's noise hides this answer: the influence of the last hit is "
                f"{self._distinctness(number, hits):.1f} times the noise of a code's score; "
                f"{help_}, or an index with more --bits, or --candidates both"
            )
        return warnings

    def _distinctness(self, number: int, hits: list[Hit]) -> float:
        """The last hit's influence in standard deviations of the code's error."""
        vector = self.targets[number].vector
        error = score_error(self._c, float(np.linalg.norm(vector)),
                            self.index.norms[[hits[-1].id]], len(vector))[0]
        return abs(hits[-1].influence) / error if error > 0 else 0.0

    def _hit(self, number: int, record: Record, exact: Exact | None, rank: int) -> Hit:
        hit = make_hit(
            self.index.model.tokenizer, record, exact, float(self.codes[number, record.id]), rank,
            self.settings.train_sequences, self.settings.modules, self.targets[number].norm)
        hit.tfidf_rank = self.shortlists[number].place_in_list(record.id)
        return hit

    def _result(
        self, number: int, hits: list[Hit], recall: Recall, rescored: int, warnings: list[str]
    ) -> Result:
        settings, facts = self.settings, self.index.manifest
        return Result(
            query=self.targets[number].query, hits=hits, recall=recall,
            sequences=facts.sequences, shortlist=self._lengths[number], rescored=rescored,
            train_sequences=settings.train_sequences,
            train_sequences_given=settings.train_sequences_given,
            layers=sorted({module.layer for module in settings.modules}),
            controls=settings.facts(), seconds={}, warnings=warnings,
            model=self.index.model.source.name, index=self.index.digest,
        )


def _round_up(length: int, total: int) -> str:
    """A length people would type: two digits, upwards."""
    step = 10 ** max(0, len(str(length)) - 2)
    return str(min(total, -(-length // step) * step))
