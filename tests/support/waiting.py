"""Waiting for what has to come. Time decides nothing here: the limits are for what hangs alone."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HANG = 900.0  # seconds that no wait lasts on a machine that is merely busy
LATE = 5  # times that a signal may come too late
IN_VAIN = 0.1  # seconds that the product is told to wait for others where none are


def until(reached: Callable[[], Any]) -> Any:
    """What `reached` returns, once that is true."""
    limit = time.monotonic() + HANG
    while not (found := reached()):
        assert time.monotonic() < limit, "it hangs"
        time.sleep(0.005)
    return found


def is_gone(process: int) -> bool:
    """Whether no process has that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def heed_interrupts() -> None:
    """In a child: a shell starts background jobs, such as this test run, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def struck(
    command: Sequence[str | Path], sign: int, moment: Callable[["subprocess.Popen[str]"], Any],
    fresh: Callable[[], Any] = lambda: None, **options: Any,
) -> "subprocess.CompletedProcess[str]":
    """A command that gets a signal once `moment` says so of its process; `options` are Popen's.

    One that was through before the signal came begins anew, with `fresh` before it.
    """
    for _ in range(LATE):
        fresh()
        with subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options) as child:
            until(lambda child=child: moment(child) or child.poll() is not None)
            child.send_signal(sign)
            said, errors = child.communicate(timeout=HANG)
        if child.returncode:
            break
    return subprocess.CompletedProcess(command, child.returncode, said, errors)
