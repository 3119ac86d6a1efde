"""Queries searched together: one scan, one store of exact scores, one way to lose segments.

All that needs a part of the index that may be gone is done here, and tried again without it.
"""

import time
from collections.abc import Iterator

import numpy as np

from gradindex.influence.exact import Rescorer
from gradindex.influence.preconditioned import Preconditioned
from gradindex.results import Result
from search.ask.settings import Settings, bounded
from search.rank.conclusion import conclude, provisional
from search.rank.coverage import LostError
from search.rank.query_gradient import QueryGradient
from search.rank.query_track import Common, Track, make_shortlist
from search.rank.shortlist import Shortlist
from search.rank.snapshot import Snapshot


class Session:
    """Some queries on their way from code scores to results, each on its own track.

    They are rescored one after the other, each sequence once for all of them. Sequences are known
    by their place among the N that are searched; only hits have ids.
    """

    def __init__(
        self, snapshot: Snapshot, settings: Settings, gradients: list[QueryGradient],
        preconditioned: Preconditioned, batch_tokens: int,
    ):
        self._gradients, self._settings = gradients, settings
        # always this very array: a cluster knows by it that the codes are scored already
        self._vectors = np.stack([gradient.vector for gradient in gradients])
        by = Rescorer(snapshot.model, settings.modules, snapshot.ekfac, settings.damping,
                      batch_tokens)
        snapshot, settings, shortlists = self._scan(snapshot)
        self.common = Common(snapshot, settings, by, preconditioned)
        self.tracks = [
            Track(self.common, number, gradient, shortlist)
            for number, (gradient, shortlist) in enumerate(zip(gradients, shortlists, strict=True))]
        self._plan()

    def _scan(self, snapshot: Snapshot) -> tuple[Snapshot, Settings, list[Shortlist]]:
        """Every query's shortlist, of as much of an index as can be reached.

        Raises LostError where nothing is left.
        """
        while True:
            settings = bounded(self._settings, len(snapshot))
            # a loss may strike while codes are scored, or while the best of them are fetched
            try:
                rankings = snapshot.rankings(self._vectors, settings.sign,
                                             settings.normalize != "none")
                return snapshot, settings, [
                    make_shortlist(snapshot, settings, gradient, ranking)
                    for gradient, ranking in zip(self._gradients, rankings, strict=True)]
            except LostError as lost:
                snapshot = snapshot.without(lost)

    def _plan(self) -> None:
        """Note which sequences are to be exact."""
        self._planned = set(self.common.exact)
        if self.common.settings.rescore:
            self._planned.update(place for track in self.tracks
                                 for place in track.shortlist.places(track.length))

    @property
    def planned(self) -> int:
        """How many sequences are to be exact, as far as is known now."""
        return len(self._planned)

    def _go_on_without(self, lost: LostError) -> None:
        """Leave segments out that can't be reached any more, which moves the others up.

        What is exact of those stays. Raises LostError where nothing is left.
        """
        common, before = self.common, self.common.snapshot.contents.ids
        # Nothing changes until all is known of the rest: that may take a while and be interrupted,
        # and then the query concludes from what it was.
        snapshot, settings, shortlists = self._scan(common.snapshot.without(lost))
        remaining = np.flatnonzero(np.isin(before, snapshot.contents.ids))
        moved = dict(zip(remaining.tolist(), range(len(remaining)), strict=True))  # place → place
        common.snapshot, common.settings = snapshot, settings
        common.exact = {moved[place]: exact for place, exact in common.exact.items()
                        if place in moved}
        common.random_sample = [moved[place] for place in common.random_sample if place in moved]
        for track, shortlist in zip(self.tracks, shortlists, strict=True):
            track.shortlist, track.length = shortlist, min(track.length, len(remaining))
        self._plan()

    # ---- exact scores

    def rescore(self, track: Track) -> Iterator[list[int]]:
        """Score a query's shortlist, longer and longer until its statement is what was asked for.

        Yields the places of every batch. Ends early, `timed_out`, when the time limit is over,
        which counts from the first call. Called again it goes on if the statement has changed.
        """
        if track.deadline is None:
            track.deadline = time.monotonic() + self.common.settings.time_limit
        track.timed_out = False
        # what is missing may change on the way: others move up where segments are lost
        while missing := self._missing(track):
            if track.length > self.common.settings.first and time.monotonic() > track.deadline:
                track.timed_out = True
                return
            for places in self._score(missing):
                yield places
                # over time, but for a shortlist that this batch has made whole
                if time.monotonic() > track.deadline and missing[-1] not in self.common.exact:
                    track.timed_out = True
                    return

    def _missing(self, track: Track) -> list[int]:
        """The places to be scored next for a query: none where its statement is good enough."""
        length = 0
        # what a longer shortlist adds may be exact already, for the queries before
        while not (missing := track.missing()) and length != track.length:
            length = track.length
            try:
                track.lengthen()
            except LostError as lost:
                self._go_on_without(lost)
                length = 0
        self._planned.update(missing)
        return missing

    def hear_random_sample(self, track: Track) -> None:
        """Score a fixed random sample, once: for percentiles, and the code's error on a query."""
        common = self.common
        if not common.random_sample:
            # a loss on the way draws another sample, of what is left
            while missing := [place for place in common.snapshot.random_sample()
                              if place not in common.exact]:
                for _ in self._score(missing):
                    pass
            common.random_sample = common.snapshot.random_sample()
            self._planned.update(common.random_sample)
        track.heard = True

    def _score(self, places: list[int]) -> Iterator[list[int]]:
        """Score places; what is lost on the way is left out in the end, which moves the others."""
        common = self.common
        sizes = common.settings.normalize != "none"
        try:
            for scores in common.snapshot.rescore(common.by, common.preconditioned, places,
                                                  sizes=sizes):
                common.exact.update(scores)
                yield [place for place, _ in scores]
        except LostError as lost:
            self._go_on_without(lost)

    # ---- results

    def provisional(self, track: Track) -> Result:
        """A query's best k by code alone, of which nothing is known yet."""
        while True:
            try:
                return provisional(track)
            except LostError as lost:
                self._go_on_without(lost)

    def conclude(self, track: Track, interrupted: bool) -> Result:
        """A query's top k, exact by token and module, and how complete it is."""
        # hits are scored again by token and module, and who has them may be lost even now
        while True:
            try:
                return conclude(track, interrupted)
            except LostError as lost:
                self._go_on_without(lost)
            if self.common.settings.rescore and not (interrupted or track.timed_out):
                for _ in self.rescore(track):  # who moved up
                    pass
