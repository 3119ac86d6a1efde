"""What some tests need and not every machine has; the suite says at its end what was missing."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = re.compile(r"no (?P<what>.+) here: (?P<remedy>.+)")


def _reason(what: str, remedy: str) -> str:
    return f"no {what} here: {remedy}"  # as MISSING finds it


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason=_reason("Chromium", "apt-get install chromium"))
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason=_reason("strace", "apt-get install strace"))


def library(name: str) -> Any:
    """An optional library; without it the test, or the file, is skipped."""
    __tracebackhide__ = True  # or two files that skip are one to xdist
    return pytest.importorskip(name, reason=_reason(name, f"pip install {name}"))


def skip_without_root(what: str) -> None:
    """Skip a test that could not do what needs root."""
    pytest.skip(_reason(f"right to {what}", "run the tests as root"))


@contextlib.contextmanager
def file_system(place: Path, *options: str) -> Iterator[None]:
    """A file system in memory at `place`, a folder that is made; without root, the test is skipped.
    """
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", *options, "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        skip_without_root("mount a file system")
    try:
        yield
    finally:
        os.sync()
        subprocess.run(["umount", str(place)], check=True)


def missing(reports: list[Any]) -> list[str]:
    """A line for each thing that was missing: what, for how many tests, and how to get it.

    `reports` are those of what was skipped; of a file that was skipped as a whole there is one.
    """
    found: dict[tuple[str, str], list[Any]] = {}
    for report in reports:
        _, _, reason = report.longrepr
        match = MISSING.search(reason)
        key = match.group("what", "remedy") if match else (reason, "")
        found.setdefault(key, []).append(report)
    lines = []
    for (what, remedy), of in sorted(found.items()):
        files = sum(isinstance(report, pytest.CollectReport) for report in of)
        counts = [f"{count} {kind}{'s' if count > 1 else ''}"
                  for count, kind in ((len(of) - files, "test"), (files, "file")) if count]
        lines.append(f"{what}, {' and '.join(counts)}" + (f": {remedy}" if remedy else ""))
    return lines
