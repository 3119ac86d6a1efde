"""How much memory this process has, may have, and uses for what."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from gradindex.errors import InputError, ResourceError
from gradindex.progress import size

LOW_RANK = 32  # of queries whose gradients don't fit in full (Grosse et al. 2023, §3.2.2)


def resident() -> int:
    """Bytes of this process in memory now; where there is no /proc, the most there ever were.

    >>> 0 < resident() <= most()
    True
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return most()


def available() -> int:
    """Bytes of memory that this process may have in all, what it has already among them.

    On this machine, or in its container where that has less.
    """
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    # MemAvailable counts the page cache as free, rightly: a mapped index fills it on every search.
    free = int(facts["MemAvailable"].split()[0]) * 1024 + resident()
    text = limit.read_text().strip() if limit.exists() else "max"
    return free if text == "max" else min(free, int(text))


def most() -> int:
    """The most bytes of this process in memory at once, so far or since `forget_most`."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(line) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes elsewhere


def forget_most() -> None:
    """Let `most` begin again from now. On Linux alone: elsewhere it stays that of the process."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        Path("/proc/self/clear_refs").write_text("5")


def return_freed() -> None:
    """Give freed memory back to the system, where the C library can be asked to."""
    # glibc keeps pieces below 32 MB for later: they would count against the next stage's bound.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes of "8GB", "512MB", "16GiB", or of a number of bytes. Raises InputError.

    >>> parse_size("8GB"), parse_size("1.5 KiB"), parse_size(4096)
    (8000000000, 1536, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = (match[2].upper() or "B") if match else ""
    if not match or unit not in {"B": 1, **UNITS} or float(match[1]) == 0:
        raise InputError(f"--max-memory {text}: expected a size such as 8GB or 512MB.")
    return int(float(match[1]) * {"B": 1, **UNITS}[unit])


def parse_bound(max_memory: str | int | None) -> int | None:
    """--max-memory in bytes; None where there is no bound. Raises InputError."""
    return None if max_memory is None else parse_size(max_memory)


PLANNED = 0.9  # of what a partition of a fit may hold: a resumed build may find a little less


@dataclass(frozen=True)
class Allowance:
    """How `bytes` of memory beside the model may be used; None: as much as there is.

    It is the GPU's memory where the model is on one, else the host's. `batch` bytes are kept for
    batches. The properties below divide the rest.

    >>> allowance = Allowance.beside(10**9, most=2 * 10**9, needed=10**8, what="A", batch=10**8)
    >>> allowance.fit, allowance.planned, allowance.curvature
    (900000000, 810000000, 250000000)
    """

    bytes: int | None = None
    batch: int = 0

    @classmethod
    def beside(
        cls, model_bytes: int, most: int | None, needed: int, what: str, batch: int
    ) -> "Allowance":
        """What a bound of `most` bytes in all [none] leaves beside a model of `model_bytes`.

        A batch takes `batch` bytes of it, and `what` (in words, for the message) takes `needed`.
        Raises ResourceError where the bound does not suffice for model, batch and `needed`.
        """
        if most is None:
            return cls()
        # Now, and not in the middle of a fit: memory that is too small is a mistake in the command.
        if most - model_bytes < needed + batch:
            raise ResourceError(
                f"--max-memory {size(most)} does not suffice: the model takes {size(model_bytes)}, "
                f"{what} {size(needed)} and a batch {size(batch)}; expected "
                f"{size(model_bytes + needed + batch)} at least. Allow more, use smaller "
                "--batch-tokens, or track smaller --modules."
            )
        return cls(most - model_bytes, batch)

    def part(self, share: float, most: int) -> int:
        """A share of the bytes beside the model, and `most` at most."""
        return most if self.bytes is None else min(most, int(share * self.bytes))

    @property
    def fit(self) -> int | None:
        """How many bytes of sums and eigenvectors a fit may hold at once."""
        return None if self.bytes is None else self.bytes - self.batch

    @property
    def planned(self) -> int | None:
        """How many bytes of `fit` a partition of modules is planned for."""
        return None if self.fit is None else int(PLANNED * self.fit)

    @property
    def curvature(self) -> int | None:
        """How many bytes of curvature a search keeps in memory once they were read."""
        return None if self.bytes is None else int(self.bytes / 4)
