"""Queries searched together: who is rescored for them, what is exact, what follows from it."""

import time
from collections.abc import Iterable, Iterator

import numpy as np

from gradindex.influence.codes import score_error
from gradindex.influence.exact import Exact, Rescorer
from gradindex.influence.queries import Preconditioned
from gradindex.results import Group, Hit, Recall, Result
from gradindex.storage.manifest import model_name
from gradindex.storage.records import Record
from search.ask.settings import Settings, bounded
from search.rank.generic_rate import add_rates
from search.rank.groups import total_groups
from search.rank.hits import make_hit, normalized
from search.rank.likeness import fold_near
from search.rank.query_gradient import Target, rescore_in_full
from search.rank.ranking import Ranking, best
from search.rank.recall import estimated_recall
from search.rank.shortlist import Shortlist, longer
from search.rank.snapshot import LostError, OpenIndex

SMALLEST_SAMPLE = 32  # of the background, before anything is said of the error on a query
ODD_CALIBRATION = 1.5  # c on this query's background, as a factor of the index's: warn beyond it
HOPELESS = 0.5  # a statement below this comes with what would help
GOOD = 0.95  # what a longer shortlist is suggested for


class Journey:
    """Some queries on their way from code scores to results.

    They are rescored one after the other, each sequence once for all of them. Sequences are known
    by their place among the N that are searched; only hits have ids.
    """

    def __init__(
        self, index: OpenIndex, settings: Settings, targets: list[Target],
        preconditioned: Preconditioned, batch_tokens: int,
    ):
        self.targets, self.preconditioned = targets, preconditioned
        self.by = Rescorer(index.model, settings.modules, index.ekfac, settings.damping,
                           batch_tokens)
        self.index, self.settings = index, settings
        self.exact: dict[int, Exact] = {}
        self.timed_out = False  # the query that is rescored now
        self._background: list[int] = []
        self._lengths = [settings.first] * len(targets)
        self._vectors = np.stack([target.vector for target in targets])
        try:
            self.shortlists = self._make_shortlists(index, settings)
            self._plan()
        except LostError as lost:
            self._go_on_without(lost)

    def _make_shortlists(self, index: OpenIndex, settings: Settings) -> list[Shortlist]:
        rankings = index.rankings(self._vectors, settings.sign, settings.normalize != "none")
        return [self._shortlist(index, settings, *one) for one in enumerate(rankings)]

    def _plan(self) -> None:
        self._planned = {*self.exact, *(
            one for shortlist, length in zip(self.shortlists, self._lengths, strict=True)
            if self.settings.rescore for one in shortlist.ids(length))}

    def _go_on_without(self, lost: LostError) -> None:
        """Leave segments out that can't be reached any more, which moves the others up.

        What is exact of those stays. Nothing changes until all is known of them, which may take a
        while and be interrupted. Raises LostError where nothing is left.
        """
        before, index = self.index, self.index.without(lost)
        while True:
            settings = bounded(self.settings, len(index))
            try:
                shortlists = self._make_shortlists(index, settings)
                break
            except LostError as more:
                index = index.without(more)
        kept = np.flatnonzero(np.isin(before.contents.ids, index.contents.ids))
        places = dict(zip(kept.tolist(), range(len(kept)), strict=True))
        self.index, self.settings, self.shortlists = index, settings, shortlists
        self.exact = {places[one]: found for one, found in self.exact.items() if one in places}
        self._background = [places[one] for one in self._background if one in places]
        self._lengths = [min(length, len(kept)) for length in self._lengths]
        self._plan()

    @property
    def planned(self) -> int:
        """How many sequences are to be exact, as far as is known now."""
        return len(self._planned)

    def noise(self, number: int) -> float:
        """The sd of the error of a query's code scores, for ‖v_m‖ = 1."""
        vector = self.targets[number].vector
        c = self.index.manifest.calibration["c"]
        return float(score_error(c, float(np.linalg.norm(vector)), np.ones(1), len(vector))[0])

    def _shortlist(
        self, index: OpenIndex, settings: Settings, number: int, ranking: Ranking
    ) -> Shortlist:
        listed = None
        if settings.candidates != "code":
            tokens = self.targets[number].query.scored_tokens
            listed = best(index.tokens.scores(tokens), settings.first)
        return Shortlist(ranking, self.noise(number), settings.most, listed,
                         by_list=settings.candidates == "tfidf")

    def ranking(self, number: int) -> Ranking:
        """What the codes say of every sequence for a query."""
        return self.shortlists[number].ranking

    # ---- exact scores

    def rescore(self, number: int) -> Iterator[list[int]]:
        """Score a query's shortlist, longer and longer until its statement is what was asked for.

        Yields the places of every batch. Ends early, `timed_out`, when the time limit is over.
        """
        self.timed_out = False
        deadline = time.monotonic() + self.settings.time_limit
        while wanted := self._wanted(number):
            for places in self._score(wanted):
                yield places
                if time.monotonic() > deadline and wanted[-1] not in self.exact:
                    self.timed_out = True
                    return
            while not self.unfinished(number):  # or else some were lost, and others moved up
                try:
                    self._grow(number)
                    break
                except LostError as lost:
                    self._go_on_without(lost)
            if time.monotonic() > deadline and self._wanted(number):
                self.timed_out = True
                return

    def unfinished(self, number: int) -> bool:
        """Whether a query's shortlist still holds sequences that are not exact."""
        return bool(self._wanted(number))

    def _wanted(self, number: int) -> list[int]:
        """A query's places that are not yet exact, best first."""
        ids = self.shortlists[number].ids(self._lengths[number])
        return [one for one in ids if one not in self.exact]

    def _score(self, places: list[int]) -> Iterator[list[int]]:
        """Score places; what is lost on the way is left out in the end, which moves the others."""
        sizes = self.settings.normalize != "none"
        try:
            for found in self.index.rescore(self.by, self.preconditioned, places, sizes=sizes):
                self.exact.update(found)
                yield [place for place, _ in found]
        except LostError as lost:
            self._go_on_without(lost)

    def _grow(self, number: int) -> None:
        """Lengthen a query's shortlist if its statement is short of the goal and it may grow."""
        goal, most = self.settings.recall, self.settings.most
        if goal is None or self._lengths[number] == most:
            return
        groups, estimate = self._statement(number)
        if estimate < goal:
            expected = self._length_for(number, goal, groups)
            self._lengths[number] = min(most, longer(self._lengths[number], expected))
            self._planned |= set(self._wanted(number))

    def score_background(self) -> None:
        """A fixed random sample, for percentiles and for the code's error on each query; once."""
        if not self._background:
            while missing := [one for one in self.index.background() if one not in self.exact]:
                for _ in self._score(missing):
                    pass
            self._background = self.index.background()
            self._planned |= set(self._background)

    # ---- what follows

    def _statement(self, number: int) -> tuple[list[list[int]], float]:
        """Places of the rescored that count, best first, equal ones together, and their recall."""
        counted = self.shortlists[number].advance(self.exact, self._lengths[number])
        ranked = sorted(counted, key=lambda one: (-self._value(number, one), one))
        alike: dict[int, list[int]] = {}
        for one in ranked:
            alike.setdefault(int(self.index.contents.first_equal[one]), []).append(one)
        # equal sequences differ by rounding only: the first in the index stands for them
        groups = [sorted(group) for group in alike.values()]
        if len(counted) == len(self.index.norms):
            return groups, 1.0
        first = [group[0] for group in groups]
        shortlist = self.shortlists[number]
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
        first, count = self.index.contents.first_equal, self.settings.k
        while True:
            places, _ = self.ranking(number).best(count)
            own = places[first[places] == places]  # equal sequences are one hit
            if len(own) >= self.settings.k or count >= len(first):
                break
            count *= 2
        places = own[: self.settings.k].tolist()
        scores = self.ranking(number).scores_at(places).tolist()
        hits = [self._hit(number, place, record, None, rank, score)
                for rank, (place, record, score) in enumerate(
                    zip(places, self.index.records(places), scores, strict=True), 1)]
        add_rates(self.index, hits)
        return fold_near(hits)

    def provisional(self, number: int) -> Result:
        """The best k by code alone, of which nothing is known yet."""
        while True:
            try:
                return self._provisional(number)
            except LostError as lost:
                self._go_on_without(lost)

    def _provisional(self, number: int) -> Result:
        unknown = Recall(self.settings.k, None, None, self.index.manifest.calibration["c"])
        result = self._result(
            number, self.approximate_hits(number), unknown, 0, self._about(number))
        result.controls["rescore"] = False
        return result

    def _about(self, number: int) -> list[str]:
        """What to know before any score: what is not searched, how the query was read."""
        missing = [str(self.index.coverage)] if not self.index.coverage.whole else []
        return missing + [note for text in self.targets[number].query.texts for note in text.notes]

    def conclude(self, number: int, interrupted: bool) -> Result:
        """A query's top k, exact by token and module, and how complete it is."""
        while True:
            try:
                return self._conclude(number, interrupted)
            except LostError as lost:
                self._go_on_without(lost)
            if self.settings.rescore and not (interrupted or self.timed_out):
                for _ in self.rescore(number):  # who moved up
                    pass

    def _conclude(self, number: int, interrupted: bool) -> Result:
        settings, c = self.settings, self.index.manifest.calibration["c"]
        if not settings.rescore:
            return self._provisional(number)
        warnings = self._about(number)
        groups, estimate = self._statement(number)
        counted = sum(map(len, groups))
        complete = counted == len(self.index.norms)
        by_words = settings.candidates == "tfidf" and not complete
        recall = Recall(
            settings.k, None if by_words else estimate,
            None if by_words or complete else self.shortlists[number].cutoff, c,
            self._error_here(number), settings.recall,
        )
        if recall.estimate is not None and recall.estimate < GOOD and groups:
            recall.shortlist_for_95 = self._length_for(number, GOOD, groups)
        hits = self._hits(number, groups)
        warnings += self._warnings(number, hits, recall, interrupted or self.timed_out)
        total = len(self.shortlists[number].ids(self._lengths[number]))
        if interrupted or self.timed_out:
            why = "interrupted" if interrupted else "--time-limit reached"
            warnings.append(f"{why}: {counted} of {total} sequences are exact")
        result = self._result(number, hits, recall, counted, warnings)
        result.interrupted, result.timed_out = interrupted, self.timed_out
        first = [group[0] for group in groups]
        result.exact_influence = sorted(self.influence(number, first),
                                        reverse=settings.sign > 0)
        result.sample_influence = self.influence(number, self._background)
        return result

    def influence(self, number: int, places: Iterable[int]) -> list[float]:
        """The exact influence of places that were rescored."""
        return [float(self.exact[one].influence[number]) for one in places]

    def _hits(self, number: int, groups: list[list[int]]) -> list[Hit]:
        """The best k groups, scored again by token and module; at full rank, if that wasn't so."""
        settings = self.settings
        low = self.preconditioned.rank is not None
        chosen = groups[: 2 * settings.k if low else settings.k]
        places = [group[0] for group in chosen]
        if low:
            found = rescore_in_full(self.index, self.by, self.targets[number].query, places)
        else:
            found = {place: exact for part in self.index.rescore(
                self.by, self.preconditioned.one(number), places, sizes=True, terms=True)
                for place, exact in part}
        # equal sequences differ by rounding, which must not rank a copy above its original
        same = {int(self.index.contents.first_equal[group[0]]): group[0] for group in chosen}
        sample = np.array([
            self._value(number, same.get(int(self.index.contents.first_equal[one]), one))
            for one in self._background])
        ranked = []
        ranks = self.shortlists[number].ranks(places)
        scores = self.ranking(number).scores_at(places).tolist()
        for place, record, rank, score in zip(places, self.index.records(places), ranks, scores,
                                              strict=True):
            exact = found[place]
            value = settings.sign * normalized(
                float(exact.influence[0]), exact, settings.normalize)
            hit = self._hit(number, place, record, exact, rank, score)
            if len(sample):
                hit.percentile = float(np.mean(sample <= self._value(number, place)) * 100)
            ranked.append((-value, record.id, hit))
        hits = [hit for _, _, hit in sorted(ranked, key=lambda one: one[:2])[: settings.k]]
        add_rates(self.index, hits)
        return fold_near(hits)

    def _error_here(self, number: int) -> float | None:
        """c measured on a query's background sample, or None where that says too little."""
        there = self._background
        error = self.noise(number) * self.index.norms[there]
        real = error > 0
        if real.sum() < SMALLEST_SAMPLE:
            return None
        truth = np.array([self.exact[one].influence[number] for one in there])
        z = (self.ranking(number).scores_at(there) - truth)[real] / error[real]
        return self.index.manifest.calibration["c"] * float(np.sqrt(np.mean(z**2)))

    def _warnings(
        self, number: int, hits: list[Hit], recall: Recall, unfinished: bool
    ) -> list[str]:
        sign, warnings = self.settings.sign, []
        if self.by.halved:
            warnings.append(
                f"memory ran out on {self.by.halved} batches, which were halved; smaller "
                "--batch-tokens avoid that"
            )
        wrong = sum(sign * hit.influence <= 0 for hit in hits)
        if wrong:
            warnings.append(
                f"{wrong} of these hits have influence of the other sign: fewer than "
                f"{self.settings.k} sequences of the shortlist are "
                f"{'opponents' if sign < 0 else 'proponents'}"
            )
        low = self.preconditioned.rank is not None  # whose own error would be taken for the code's
        odd = recall.c_here is not None and recall.cutoff is not None and not low and not (
            recall.c / ODD_CALIBRATION < recall.c_here < recall.c * ODD_CALIBRATION)
        if odd and recall.c_here is not None:
            warnings.append(
                f"on this query the code's error is {recall.c_here / recall.c:.1f} times what the "
                "index was calibrated to, so the recall statement is "
                + ("too hopeful" if recall.c_here > recall.c else "too cautious")
                + "; a longer --shortlist helps"
            )
        if recall.estimate is not None and recall.estimate < HOPELESS and hits and not unfinished:
            warnings.append(self._what_would_help(number, hits[-1], recall.shortlist_for_95))
        if low:
            warnings.append(
                "these hits were chosen, and the recall statement made, with the query's gradient "
                f"reduced to rank {self.preconditioned.rank} a module; their influence is that of "
                "all of it"
            )
        return warnings

    def _what_would_help(self, number: int, last: Hit, length: int | None) -> str:
        """Said of a search whose answer drowns in the code's noise."""
        total = len(self.index.norms)
        place = self.index.contents.place_of(last.id)
        assert place is not None
        error = self.noise(number) * self.index.norms[place]
        means = ["only --shortlist all would hold 95% of it" if not length or length >= total else
                 f"--shortlist {_round_up(length, total)} would hold about 95% of it",
                 "or an index with more --bits"]
        if self.settings.candidates == "code":
            means.append("or --candidates both")
        return ("the code's noise hides this answer: the influence of the last hit is "
                f"{abs(last.influence) / error if error > 0 else 0:.1f} times the noise of a "
                f"code's score; {', '.join(means)}")

    def _hit(
        self, number: int, place: int, record: Record, exact: Exact | None, rank: int, score: float
    ) -> Hit:
        hit = make_hit(
            self.index.tokenizer, record, exact, score, rank,
            self.settings.train_sequences, self.settings.modules, self.targets[number].norm)
        hit.duplicates = self.index.copies(place)
        words = [token for text in self.targets[number].query.texts for token in text.tokens]
        hit.lexical = self.index.wording.overlap(words, hit.token_ids)
        hit.tfidf_rank = self.shortlists[number].place_in_list(place)
        return hit

    def _result(
        self, number: int, hits: list[Hit], recall: Recall, rescored: int, warnings: list[str]
    ) -> Result:
        settings, facts = self.settings, self.index.manifest
        groups, total, count = self._groups(number, hits)
        return Result(
            query=self.targets[number].query, hits=hits, recall=recall,
            sequences=facts.sequences, shortlist=self._lengths[number], rescored=rescored,
            train_sequences=settings.train_sequences,
            train_sequences_given=settings.train_sequences_given,
            coverage=self.index.coverage.share, damaged=list(self.index.coverage.damaged),
            layers=sorted({module.layer for module in settings.modules}),
            controls=settings.facts(), seconds={}, warnings=warnings,
            model=model_name(facts), index=self.index.digest, groups=groups,
            group_count=count, total=total,
        )

    def _groups(self, number: int, hits: list[Hit]) -> tuple[list[Group], Group | None, int]:
        """The groups asked for, the whole index as one, and how many groups there are."""
        settings = self.settings
        if settings.group_by is None:
            return [], None, 0
        shortlist, sample = self.shortlists[number], self._background
        counted = shortlist.advance(self.exact, self._lengths[number])
        estimate, variance = shortlist.estimates(
            settings.sign * self.ranking(number).scores(), counted,
            self._signed(number, counted), sample, self._signed(number, sample))
        grouping = self.index.grouping(settings.group_by)
        ids = [hit.id for hit in hits]
        places = np.searchsorted(self.index.contents.ids, ids).tolist()
        groups, total = total_groups(
            grouping, estimate, variance, settings.sign, dict(zip(ids, places, strict=True)),
            settings.train_sequences)
        return groups, total, len(grouping.values)


def _round_up(length: int, total: int) -> str:
    """A length people would type: two digits, upwards."""
    step = 10 ** max(0, len(str(length)) - 2)
    return str(min(total, -(-length // step) * step))
