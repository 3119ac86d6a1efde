"""Children to be killed, starved and fed with damage, and the report of how they fared."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.waiting import HANG

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults.md"
OPENING, CLOSING = "<!-- faults: written by `make faults` -->", "<!-- end of faults -->"
# What an index is written with. A point is a call of one of them on a file of the index.
CALLS = ("write", "pwrite64", "writev", "pwritev", "fsync", "fdatasync", "ftruncate", "rename",
         "renameat", "renameat2", "mkdir", "unlink", "unlinkat", "rmdir")


@dataclass
class Ended:
    """How a child ended: by itself with a `report`, or by a `signal`."""

    report: dict[str, Any] | None
    signal: int | None
    timed_out: bool
    seconds: float

    @property
    def error(self) -> list[str]:
        """The class of the exception it ended with, and its bases; [] where there was none."""
        return list((self.report or {}).get("error", []))

    @property
    def done(self) -> bool:
        return self.report is not None and not self.error

    def __str__(self) -> str:
        return f"signal {self.signal}, timed out {self.timed_out}, {self.report}"


WIDE = 1 << 46  # bytes of address space, which no job reaches


class Zygote:
    """Runs jobs (`jobs.py`) in forked children, one at a time."""

    def __init__(self, model: Path):
        # no digest is remembered, or a child would make other calls than the one before it
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                       "XDG_CACHE_HOME": os.devnull,
                       "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
                       "PYTHONWARNINGS": "ignore",
                       "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        self._tell("load", {"model": str(model)})

    def _tell(self, job: str, arguments: dict[str, Any], **how: Any) -> dict[str, Any]:
        told = {"job": job, "arguments": arguments, "strace": None, "kill_after": None,
                "memory": None, "file_size": None, "files": None, "user": None, "processor": None,
                "timeout": HANG, **how}
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    def run(self, job: str, arguments: dict[str, Any], **how: Any) -> Ended:
        """Run a job in a child; `how`: strace, kill_after, memory, file_size, files (how many may
        be open), user (the number of another one), processor, timeout.

        `processor` bounds the seconds that the child itself works, so that a child that goes round
        in circles is found soon, and no other on a busy machine. Under strace, whose numbers are
        those of a thread, the child has one: its address space has a bound, however wide.
        """
        if how.get("strace"):
            how.setdefault("memory", WIDE)
        answer = self._tell(job, {name: str(value) if isinstance(value, Path) else value
                                  for name, value in arguments.items()}, **how)
        return Ended(answer["report"], answer["signal"], answer["timed_out"], answer["seconds"])

    @property
    def address_space(self) -> int:
        """Bytes of address space that each child begins with."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[0]
        return int(pages) * resource.getpagesize()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass
class Faults:
    """The harness: children, the sizes of a short or a long run, and the report."""

    zygote: Zygote
    model: Path
    data: Path
    settings: dict[str, Any]
    long: bool
    rows: dict[str, Counter[str]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def count(self, row: str, **counts: int) -> None:
        """Add to a row of the report."""
        self.rows.setdefault(row, Counter()).update(counts)

    def size(self, short: int, long: int) -> int:
        """How many: in `make test`, or in `make faults`."""
        return long if self.long else short

    def some(self, everything: list[Any], short: int) -> list[Any]:
        """All of a list in the long run, else about `short` of them, spread evenly."""
        step = 1 if self.long else max(1, len(everything) // short)
        return everything[::step]

    def points(self, job: str, arguments: dict[str, Any], root: Path, log: Path) -> list[
            tuple[str, int]]:
        """Every (call, which one of its kind) that a job makes on files below `root`."""
        ended = self.zygote.run(job, arguments, strace=[
            "-y", "-s", "0", "-e", f"trace={','.join(CALLS)}", "-o", str(log)])
        assert ended.done, str(ended)
        counts: Counter[str] = Counter()
        found = []
        for line in log.read_text(errors="replace").splitlines():
            if match := re.match(r"\d+ +(\w+)\((.*)", line):
                counts[match[1]] += 1
                if str(root) in match[2]:
                    found.append((match[1], counts[match[1]]))
        return found

    def report(self) -> str:
        """The report as a table."""
        minutes = (time.monotonic() - self.begun) / 60
        lines = [OPENING, "", f"`make faults`, {time.strftime('%Y-%m-%d')}, {minutes:.0f} minutes "
                 f"on {os.cpu_count()} CPU cores.", "", "| fault | outcome |", "|---|---|"]
        for row, counts in self.rows.items():
            outcome = ", ".join(f"{name.replace('_', ' ')} {count:,}"
                                for name, count in counts.items())
            lines.append(f"| {row} | {outcome} |")
        return "\n".join([*lines, "", CLOSING])

    def write_report(self) -> None:
        """Put the report in its place in benchmarks/results/faults.md."""
        text = RESULTS.read_text()
        before, _, rest = text.partition(OPENING)
        _, _, after = rest.partition(CLOSING)
        RESULTS.write_text(before + self.report() + after)


def inject(call: str, which: int, what: str) -> list[str]:
    """strace's arguments for a fault at one point: "signal=KILL", "error=ENOSPC"."""
    return ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={which}"]


def fresh(source: Path, place: Path) -> Path:
    """A copy of an index in a place of its own."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(source, place, symlinks=True))


def build_arguments(faults: Faults, out: Path) -> dict[str, Any]:
    """What the job `build` takes."""
    return {"model": faults.model, "data": faults.data, "out": out, "settings": faults.settings}


def whole_build(faults: Faults, tmp_path: Path) -> tuple[dict[str, str], float]:
    """The digests of a build that nothing befell, and its seconds."""
    ended = faults.zygote.run("build", build_arguments(faults, tmp_path / "whole"))
    assert ended.done, str(ended)
    return ended.report["files"], ended.seconds
