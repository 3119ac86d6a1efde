"""One build shared out to several processes, which meet in the index's folder and nowhere else.

A build is made of units: a block of fit sequences to sum up, a module's eigenvectors, a segment to
encode. Each is committed by a rename and comes out with the same bytes whoever does it, so doing
one again, when who did it before is gone, is harmless. Shard i of n does the units whose number
leaves i when divided by n, then waits for the others' where a stage needs all of them. Shard 0 also
does what can't be shared: it reads the data, and adds up the blocks in order.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gradindex.errors import GradindexError, InputError
from gradindex.progress import Progress, duration

POLL = 0.5  # seconds between looks at what the others did
OVER_RAY = "part of a build over Ray"  # see `one_of_writers`
SAY_AGAIN = 60.0  # seconds until it is said again whom a shard waits for

# What starts several processes tells each its number and how many there are, by these names.
ARRAY = "SLURM_ARRAY_TASK_"
STARTERS = (("RANK", "WORLD_SIZE"), (f"{ARRAY}ID", f"{ARRAY}COUNT"),
            ("SLURM_PROCID", "SLURM_NTASKS"))


@dataclass(frozen=True)
class BuildStage:
    """A stage of a build whose units can be shared out: `name` and, of a fit, the partition.

    covariance and eigenvalues have a unit a block, eigenvectors a module, encode a segment.
    """

    name: str
    partition: int = 0

    def __str__(self) -> str:
        return self.name if not self.partition else f"{self.name} of partition {self.partition}"


class Share(Protocol):
    """Which units of a build this process does itself, and how the others get done."""

    @property
    def first(self) -> bool:
        """Whether it does what can't be shared out."""

    @property
    def of(self) -> int:
        """Among how many the units are shared out."""

    def takes(self, unit: int) -> bool:
        """Whether a unit is this process's own."""

    def complete(self, stage: BuildStage, missing: Callable[[], list[int]]) -> None:
        """See to it that no unit is missing any more: wait for others, or hand the units out.

        Raises GradindexError.
        """


@dataclass(frozen=True)
class Shard:
    """Shard `number` (from 0) of `of`; the only one of a build that isn't shared.

    `patience` is how many seconds it waits at most for others who do nothing.
    """

    number: int = 0
    of: int = 1
    patience: float = math.inf
    progress: Progress = field(default_factory=Progress, compare=False)

    @property
    def first(self) -> bool:
        """Whether this one does what can't be shared."""
        return self.number == 0

    def takes(self, unit: int) -> bool:
        """Whether a unit is this shard's own."""
        return unit % self.of == self.number  # in turn, so that all end at about the same time

    def complete(self, stage: BuildStage, missing: Callable[[], list[int]]) -> None:
        """Wait until `missing`, the numbers of units that others have yet to do, is empty.

        Raises GradindexError where nothing new came for `patience` seconds.
        """
        units = missing()
        last_news = time.monotonic()
        last_line = -math.inf  # so whom it waits for is said at once, and then now and again
        while units:
            now = time.monotonic()
            if now - last_line > SAY_AGAIN:
                self.progress.say(f"waiting for {self._shards(units)}: {stage}")
                last_line = now
            if now - last_news > self.patience:
                raise GradindexError(
                    f"waited {duration(self.patience)} in vain for {self._shards(units)}: {stage} "
                    f"({len(units)} missing). Is it running? Start it with the same command and "
                    f"--shard {units[0] % self.of}/{self.of}, then this one again; what is done "
                    "stays done."
                )
            time.sleep(POLL)
            previous, units = units, missing()
            # patience counts from the last news: a slow shard is no dead one
            if units != previous:
                last_news = now

    def _shards(self, units: list[int]) -> str:
        numbers = sorted({unit % self.of for unit in units})
        shown = ", ".join(map(str, numbers[:5])) + ", …" * (len(numbers) > 5)
        return f"shard{'s' if len(numbers) > 1 else ''} {shown} of {self.of}"


def parse_shard(
    text: str, patience: float | None = None, progress: Progress | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Shard:
    """The shard called "2/8", or "auto": what torchrun or SLURM say. Raises InputError."""
    first, separator, second = text.partition("/")
    if text == "auto":
        number, of = _by_starter(environment)
    elif separator and first.isdecimal() and second.isdecimal():
        number, of = int(first), int(second)
    else:
        number = of = 0
    if not number < of:  # so is what could not be read, as 0 of 0
        raise InputError(f"--shard {text}: expected i/n, such as 0/8, with i from 0 to n - 1.")
    return Shard(number, of, math.inf if patience is None else patience, progress or Progress())


def _by_starter(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's number and how many there are, by what started it. Raises InputError."""
    def value(name: str) -> int:
        text = environment[name]
        if not text.isdecimal():
            raise InputError(f"--shard auto: {name} is {text!r}; expected a number. Say --shard "
                             "i/n.")
        return int(text)

    for name, count in STARTERS:  # torchrun first: it may run inside a SLURM job
        if name in environment and count in environment:
            break
    else:
        raise InputError(
            "--shard auto: found none of RANK, SLURM_ARRAY_TASK_ID and SLURM_PROCID in the "
            "environment, by which torchrun and SLURM number processes. Say --shard i/n."
        )
    number, of, first = value(name), value(count), 0
    if name.startswith(ARRAY):
        # the tasks of an array are numbered as its user likes: only without gaps is task i shard i
        first = value(f"{ARRAY}MIN") if f"{ARRAY}MIN" in environment else 0
        last = value(f"{ARRAY}MAX") if f"{ARRAY}MAX" in environment else first + of - 1
        if last - first + 1 != of:
            raise InputError(
                f"--shard auto: the array has {of} tasks numbered {first} to {last}, so which "
                "shard task i is can't be told; expected numbers without gaps, such as --array=0-7."
                " To run some shards again say --shard i/n with the first n.")
        if of == 1 and number != 0:  # more likely one of many that is run again than all there is
            raise InputError(
                f"--shard auto: the array has one task, number {number}; expected all tasks, or "
                "number 0 for an only one. To run a shard again say --shard i/n with the first n.")
    if not 0 <= number - first < of:
        raise InputError(f"--shard auto: {name} is {number}, of {of} from {first} on; expected "
                         f"less than {first + of}. Say --shard i/n.")
    return number - first, of
