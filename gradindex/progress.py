"""Progress on standard error: bars on a terminal, elsewhere one line every 30 seconds.

A stage with a total says how long it will take once two batches have been measured. Durations are
shown, never stored.
"""

import sys
import time
from typing import Any, TextIO

from gradindex.terminal import visible_lines

EVERY = 30.0  # seconds between lines where there is no terminal


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
        self._total = self._done = self._updates = 0
        self._start_time = self._printed = 0.0
        self._first = (0.0, 0)

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
        print(visible_lines(line), file=self._stream, flush=True)

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a stage of `total` units (0: unknown), of which `done` were done in earlier runs.
        """
        self._stage, self._unit, self._total = stage, unit, total
        self._done, self._updates = done, 0
        self._start_time = self._printed = time.monotonic()
        if self._terminal:
            from tqdm import tqdm  # late: most uses have no terminal

            self._bar = tqdm(total=total or None, initial=done, desc=stage, unit=f" {unit}",
                             leave=False, file=self._stream, dynamic_ncols=True, mininterval=0.2)

    def update(self, n: int, total: int | None = None) -> None:
        """Note that `n` more units are done; `total` is the new one where it has changed."""
        if total is not None and total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.total = total
        self._done += n
        self._updates += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(n)
        elif self._stream is not None and self._updates > 1 and now - self._printed >= EVERY:
            self._printed = now
            of = f"/{self._total:,}" if self._total else ""
            self.say(f"  {self._stage}: {self._done:,}{of} {self._unit}{self._left(now)}")
        # Speed is measured from the end of the first batch: that one warms caches up, and may have
        # loaded what the others find loaded.
        if self._updates == 1:
            self._first = (now, self._done)

    def _left(self, now: float) -> str:
        """How long the rest of the stage will take, in words; nothing while that isn't known."""
        if not self._total or self._done <= self._first[1]:
            return ""
        return f", about {duration((self._total - self._done) * self.seconds_each(now))} left"

    def seconds_each(self, now: float | None = None) -> float:
        """Seconds that a unit takes, measured since the end of the stage's first batch."""
        when, done = self._first
        elapsed = (time.monotonic() if now is None else now) - when
        return elapsed / max(1, self._done - done)

    def say_expected(self, seconds: float) -> None:
        """Say how many seconds everything still to come will take, from two measured batches."""
        self.say(f"expected: about {duration(seconds)} more (measured on two batches)")

    @property
    def measured(self) -> bool:
        """Whether the update just made is the one after which two batches have been measured."""
        return self._updates == 3  # equal, not above: what hangs on it is said once

    def finish(self, summary: str = "") -> None:
        """End the stage with one line: `summary`, or what was done, and how long it took."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        seconds = time.monotonic() - self._start_time
        done = f"{self._done:,} {self._unit}" if self._unit else ""
        self.say(f"{self._stage}: {summary or done} ({duration(seconds)})")


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
