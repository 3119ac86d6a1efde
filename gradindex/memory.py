"""How much memory this process has, may have, and uses for what."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from gradindex.errors import InputError, ResourceError
from gradindex.progress import size

T = TypeVar("T")
Made = TypeVar("Made")

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


def available(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have in all, what it has already among them.

    That is what is free on this machine, or less: in the control groups (v1 or v2) of its
    containers, its job or its user, and under `ulimit -v` and `-d`. `root` is where the system's
    own files lie.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    # MemAvailable counts the page cache as free, rightly: a mapped index fills it on every search.
    rooms = [int(facts["MemAvailable"].split()[0]) * 1024]
    rooms += [room for group in _groups(root) if (room := _room(group)) is not None]
    pages = [int(number) for number in (root / "proc/self/statm").read_text().split()]
    for limit, taken in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        if (bound := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            rooms.append(bound - taken * resource.getpagesize())
    return max(0, min(rooms)) + resident()


def _groups(root: Path) -> Iterator[Path]:
    """The control groups that bound this process's memory, from its own up to the outermost."""
    # 31 23 0:28 /jobs /sys/fs/cgroup rw,relatime - cgroup2 cgroup rw
    mounts = {}
    for words in _lines(root / "proc/self/mountinfo"):
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options):
            mounts[kind] = PurePosixPath(words[3]), PurePosixPath(words[4])
    # 4:memory:/jobs/17 in v1, 0::/jobs/17 in v2; the path counts from the top, which a container
    # may not see: then its mount begins further down
    for line in (" ".join(words) for words in _lines(root / "proc/self/cgroup")):
        number, names, path = line.split(":", 2)
        kind = "cgroup2" if number == "0" else "cgroup" if "memory" in names.split(",") else ""
        if kind not in mounts:
            continue
        top, place = mounts[kind]
        inner = PurePosixPath(path)
        below = inner.relative_to(top) if inner.is_relative_to(top) else PurePosixPath()
        for part in (below, *below.parents):
            yield root / place.relative_to("/") / part


def _lines(path: Path) -> list[list[str]]:
    """The lines of a file of the system's, in words; none where there is no such file."""
    with contextlib.suppress(OSError):
        return [line.split() for line in path.read_text(errors="replace").splitlines()]
    return []


def _room(group: Path) -> int | None:
    """Bytes that a control group leaves, its page cache being free; None where it sets no bound."""
    numbers: dict[str, int] = {}
    for name in ("memory.max", "memory.high", "memory.current", "memory.limit_in_bytes",
                 "memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no bound
            numbers[name] = int((group / name).read_text())
    limits = [numbers[name] for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
              if name in numbers]
    if not limits:
        return None
    stat = {words[0]: int(words[1]) for words in _lines(group / "memory.stat") if len(words) == 2}
    cached = sum(stat.get(f"total_{name}", stat.get(name, 0))  # total_: with groups inside, in v1
                 for name in ("active_file", "inactive_file"))
    used = numbers.get("memory.current", numbers.get("memory.usage_in_bytes", 0))
    return min(limits) - max(0, used - cached)


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


# what PyTorch's allocators say, on a host and on a GPU, and CUDA's libraries
_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a GPU.

    >>> ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")), ran_out(RuntimeError("no"))
    (True, False)
    """
    # PyTorch's allocator on a CPU has no class for it: only the words of its RuntimeError
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))


def gpu_failed(error: BaseException) -> bool:
    """Whether an error is one of the GPU itself, which nothing in this process can use any more.

    >>> gpu_failed(RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"))
    True
    """
    # by its name, for torch may not be imported yet; and what CUDA's libraries and Triton say of it
    return type(error).__name__ == "AcceleratorError" or any(words in str(error) for words in (
        "CUDA error", "CUBLAS_STATUS", "cusolver error", "CUDNN_STATUS", "Triton Error [CUDA]"))


def threads(most: int) -> int:
    """How many threads may read files at once: `most`, or 1 where the address space is bounded.

    A thread that finds no memory to begin with leaves whoever started it waiting for ever.
    """
    bounded = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return 1 if bounded else max(1, min(most, os.cpu_count() or 1))


def in_threads(function: Callable[[T], Made], items: Iterable[T], most: int) -> list[Made]:
    """What a function gives for each item, found by `most` threads, or in this one: see `threads`.

    >>> in_threads(abs, [-1, 2, -3], most=2)
    [1, 2, 3]
    """
    if (count := threads(most)) == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, items))


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
