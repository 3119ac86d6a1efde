"""The command line: as a process of its own, or, without its seconds of imports, in this one."""

import io
import os
import subprocess
import sys
from unittest.mock import patch

from gradindex import cli
from support.waiting import HANG

COMMAND = [sys.executable, "-m", "gradindex"]

Done = subprocess.CompletedProcess[str]


def run(*arguments: object, **options: object) -> Done:
    """The command as a process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=HANG, **options)  # type: ignore[call-overload]


def run_here(*arguments: object, input: str = "") -> Done:
    """The command in this process, from its arguments and streams to its exit code."""
    streams = {"stdin": _stream(input), "stdout": _stream(), "stderr": _stream()}
    with patch.multiple(sys, argv=["gradindex", *map(str, arguments)], **streams):
        code = cli._run()
    for stream in streams.values():
        stream.flush()
    shown, said = (streams[name].buffer.getvalue().decode() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(sys.argv, code, shown, said)


def _stream(content: str = "") -> io.TextIOWrapper:
    """Text over bytes, as the streams of a process are."""
    return io.TextIOWrapper(io.BytesIO(content.encode()), encoding="utf-8")
