"""Progress on standard error: bars on a terminal, elsewhere one line every 30 seconds.

A stage with a total says how long the rest of it will take, from what it has taken so far
(`time_left.py`); it is shown whether or not anything was done meanwhile. Durations are shown, never
stored.
"""

import sys
import threading
import time
import weakref
from typing import Any, TextIO

from gradindex.terminal import visible_lines
from gradindex.time_left import StagePace

EVERY = 30.0  # seconds between lines where there is no terminal
REFRESHED = 1.0  # seconds between looks of a bar
SHORTEST = 1.0  # seconds that are said to be left while anything is


class Progress:
    """Says what is going on, on a stream; `Progress(None)` is silent, as a library should be.

    >>> progress = Progress(sys.stdout)
    >>> progress.start("encode", total=10, unit="sequences", done=4)
    >>> progress.update(6)
    >>> progress.finish()  # doctest: +ELLIPSIS
    encode: 10 sequences (...)
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream
        self._terminal = bool(stream and stream.isatty())
        self._bar: Any = None
        self._stage = ""
        self._unit = ""
        self._total = self._done = 0
        self._start_time = 0.0
        self._pace = StagePace(0.0)
        self._measured = False
        self._finished: threading.Event | None = None

    @property
    def shown(self) -> bool:
        """Whether anyone sees it: what is computed only to be said needn't be, else."""
        return self._stream is not None

    def say(self, line: str) -> None:
        """Show one line."""
        if self._stream is None:
            return
        if self._bar is not None:
            self._bar.clear()  # or the line would be written behind a half-drawn bar
        # in one piece: a stage is shown from a thread of its own
        print(visible_lines(line) + "\n", end="", file=self._stream, flush=True)

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a stage of `total` units (0: unknown), of which `done` were done in earlier runs.
        """
        self._stop()
        self._stage, self._unit, self._total, self._done = stage, unit, total, done
        self._start_time = time.monotonic()
        self._pace = StagePace(self._start_time, done)
        if self._terminal:
            from tqdm import tqdm  # late: most uses have no terminal

            # its own guess of the time left goes by the last update, and is 0 in a burst
            self._bar = tqdm(total=total or None, initial=done, desc=stage, unit=f" {unit}",
                             leave=False, file=self._stream, dynamic_ncols=True, mininterval=0.2,
                             bar_format=_BAR if total else None)
        if self._stream is not None:
            self._finished = threading.Event()
            every = REFRESHED if self._terminal else EVERY
            threading.Thread(target=_keep_showing, args=(weakref.ref(self), self._finished, every),
                             daemon=True, name=f"progress of {stage}").start()

    def update(self, n: int, total: int | None = None) -> None:
        """Note that `n` more units are done; `total` is the new one where it has changed."""
        if total is not None and total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.total = total
        self._done += n
        before = self._pace.batches
        self._pace.note(time.monotonic(), self._done)
        # equal, not above: what hangs on it is said once
        self._measured = before == 2 and self._pace.batches == 3
        if self._bar is not None:
            self._bar.update(n)

    def show(self) -> None:
        """Show where the stage stands now, as is done again and again while it lasts."""
        if (bar := self._bar) is not None:
            bar.set_postfix_str(self._left().removeprefix(", "))
            return
        of = f"/{self._total:,}" if self._total else ""
        stands = f" {self._done:,}{of} {self._unit}" if self._unit else ""
        since = duration(time.monotonic() - self._start_time)
        self.say(f"  {self._stage}:{stands}{self._left() or f', {since} so far'}")

    def _left(self) -> str:
        """How long the rest of the stage will take, in words; nothing while that isn't known."""
        left = self._total - self._done
        seconds = self._pace.seconds_left(time.monotonic(), left) if left > 0 else None
        # it is late by an unknown time where less than nothing is left
        if seconds is None or seconds <= 0:
            return ""
        return f", about {duration(max(SHORTEST, seconds))} left"

    def seconds_each(self) -> float:
        """Seconds that a unit takes, measured since the end of the stage's first batch."""
        return self._pace.seconds_each()

    def say_expected(self, seconds: float) -> None:
        """Say how many seconds everything still to come will take, from two measured batches."""
        self.say(f"expected: about {duration(max(SHORTEST, seconds))} more (measured on two "
                 "batches)")

    @property
    def measured(self) -> bool:
        """Whether the update just made is the one after which two batches have been measured."""
        return self._measured

    def follow(self, done: int, total: int) -> None:
        """Note that `done` of `total` units are done in all; once measured, say what is to come."""
        self.update(done - self._done, total=total)
        if self.measured:
            self.say_expected(self.seconds_each() * (total - done))

    def finish(self, summary: str = "") -> None:
        """End the stage with one line: `summary`, or what was done, and how long it took."""
        self._stop()
        seconds = time.monotonic() - self._start_time
        done = f"{self._done:,} {self._unit}" if self._unit else ""
        self.say(f"{self._stage}: {summary or done} ({duration(seconds)})")

    def _stop(self) -> None:
        """Show a stage no longer, if one is."""
        if self._finished is not None:
            self._finished.set()
            self._finished = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _keep_showing(
    shown: "weakref.ref[Progress]", finished: threading.Event, every: float
) -> None:
    """Show a stage until it is finished, or forgotten: a batch may take many minutes."""
    while not finished.wait(every):
        progress = shown()
        if progress is None:
            return
        progress.show()
        del progress  # or it would never be forgotten


_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def stderr_progress() -> Progress:
    """The progress of the command line: on standard error, for standard output is data."""
    return Progress(sys.stderr)


def duration(seconds: float) -> str:
    """A duration as people say it.

    >>> duration(0.42), duration(12.3), duration(200), duration(18720)
    ('0.4 s', '12 s', '3 min 20 s', '5 h 12 min')
    """
    if seconds < 9.95:  # which would be rounded to "10.0 s", while 10 is "10 s"
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """A number of bytes as people say it, in powers of 1,000.

    >>> size(512), size(1.2e6)
    ('512 bytes', '1.2 MB')
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def shares(parts: dict[str, float]) -> str:
    """Parts of a whole, by name, as people say them. Those below 0.05% are left out.

    >>> shares({"mlp": 0.62, "attention": 0.3797, "norms": 0.0003})
    'mlp 62.0%, attention 38.0%'
    """
    return ", ".join(f"{name} {share:.1%}" for name, share in parts.items() if share >= 0.0005)
