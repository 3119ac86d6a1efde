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


def resident() -> int:
    """Bytes of this process in memory now; where there is no /proc, the most there ever were."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return most()


def available() -> int:
    """Bytes of memory that this process may have in all, on this machine or in its container."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024 + resident()
    text = limit.read_text().strip() if limit.exists() else "max"
    return free if text == "max" else min(free, int(text))


def most() -> int:
    """Bytes: the most of this process in memory at once, so far or since `forget_most`."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(line) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_most() -> None:
    """Let `most` begin again from now; on Linux alone, elsewhere the peak stays the process's."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        Path("/proc/self/clear_refs").write_text("5")


def return_freed() -> None:
    """Give the system what was freed; glibc keeps pieces below 32 MB otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes of "8GB", "512MB", "16GiB", or of a number of bytes. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = (found[2].upper() or "B") if found else ""
    if not found or unit not in {"B": 1, **UNITS} or float(found[1]) == 0:
        raise InputError(f"--max-memory {text}: expected a size such as 8GB or 512MB.")
    return int(float(found[1]) * {"B": 1, **UNITS}[unit])


def parse_bound(max_memory: str | int | None) -> int | None:
    """--max-memory in bytes; None where there is no bound. Raises InputError."""
    return None if max_memory is None else parse_size(max_memory)


PLANNED = 0.9  # of what a partition of a fit may hold: a resumed build may find a little less


@dataclass(frozen=True)
class Allowance:
    """How `bytes` beside the model may be used; None: as much as there is.

    Of the GPU's memory where the model is on one, else of the host's. `batch` is for batches.
    """

    bytes: int | None = None
    batch: int = 0

    @classmethod
    def beside(
        cls, model_bytes: int, most: int | None, needed: int, what: str, batch: int
    ) -> "Allowance":
        """What `most` bytes in all leave beside the model, of which a batch takes `batch`.

        Raises ResourceError where that does not suffice for the `needed` bytes of `what`, too.
        """
        if most is None:
            return cls()
        if most - model_bytes < needed + batch:
            raise ResourceError(
                f"--max-memory {size(most)} does not suffice: the model takes {size(model_bytes)}, "
                f"{what} {size(needed)} and a batch {size(batch)}; expected "
                f"{size(model_bytes + needed + batch)} at least. Allow more, use smaller "
                "--batch-tokens, or track smaller --modules."
            )
        return cls(most - model_bytes, batch)

    def part(self, share: float, most: int) -> int:
        """A share of the bytes, `most` at most."""
        return most if self.bytes is None else min(most, int(share * self.bytes))

    @property
    def fit(self) -> int | None:
        """Bytes of sums and eigenvectors held at once by a fit."""
        return None if self.bytes is None else self.bytes - self.batch

    @property
    def planned(self) -> int | None:
        """Of these, how many a partition of the fit is planned for."""
        return None if self.fit is None else int(PLANNED * self.fit)

    @property
    def curvature(self) -> int | None:
        """Bytes of curvature kept once it was read."""
        return None if self.bytes is None else int(self.bytes / 4)
