"""How fast a stage goes, and how long the rest of it will take, from when its units were done."""

from typing import NamedTuple

NEAR = 0.002  # of what a batch took: what is done so soon after it was done with it


class Standing(NamedTuple):
    """So many units were done at a time, in seconds."""

    time: float
    done: int


class StagePace:
    """The pace of a stage whose units are done one by one, in batches, or in bursts.

    A burst is several units that were worked on together and are noted one after the other. The
    first batch warms caches up, and may have loaded what the others find loaded, so it doesn't
    count once there are others.

    >>> pace = StagePace(0.0)
    >>> for time, done in ((60, 1), (60, 2), (60.1, 3), (100, 4), (100, 5), (100, 6)):
    ...     pace.note(time, done)
    >>> pace.batches, round(pace.seconds_left(105, left=3))
    (2, 35)
    """

    def __init__(self, now: float, done: int = 0):
        self._began = self._before = self._first = self._last = Standing(now, done)
        self._arrived = now  # when the last batch's first unit was noted
        self._in_bursts = False
        self.batches = 0

    def note(self, now: float, done: int) -> None:
        """Note that `done` units are done by now."""
        if self.batches and now - self._last.time < NEAR * (self._arrived - self._before.time):
            self._in_bursts = True
        else:
            self.batches += 1
            self._before, self._arrived = self._last, now
        self._last = Standing(now, done)
        if self.batches == 1:
            self._first = self._last

    def seconds_each(self) -> float:
        """Seconds that a unit takes; those of the first batch where there is no other."""
        if self.batches < 2:
            return _each(self._began, self._last)
        # the last burst may have been noted in part so far
        noted = self._before if self._in_bursts and self.batches > 2 else self._last
        return _each(self._first, noted)

    def seconds_left(self, now: float, left: int) -> float | None:
        """Seconds that `left` units take from now on; None while nothing is known."""
        if not self.batches:
            return None
        in_flight = self._last.done - self._before.done
        usual = left * self.seconds_each() - (now - self._last.time)
        # where the batch in flight takes longer than those before it, the rest may as well
        start = self._first if self.batches > 1 else self._began
        late = (left - in_flight) * _each(start, Standing(now, self._last.done + in_flight))
        return max(usual, late)


def _each(since: Standing, until: Standing) -> float:
    """Seconds a unit between two marks."""
    return (until.time - since.time) / max(1, until.done - since.done)
