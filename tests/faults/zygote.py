"""A process that has everything imported and forks a child for every job it is told.

Importing torch takes seconds; thousands of children that are to be killed can't each do it. The
zygote runs no thread, or a child could be forked while one of them holds a lock, and wait for ever
(tqdm's monitor and Arrow's allocator start threads unless they are told not to). It reads a JSON
line per job from standard input and answers with one: how the child ended, and what it reported. A
child may be attached to strace before it begins, be killed after some time, or be limited in
memory, in file size, in open files and in what it takes of the processor, or be another user's.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    import jobs
    import torch
    import tqdm

    tqdm.tqdm.monitor_interval = 0
    # its own lock is one of all processes: a child that is killed while it draws would keep it
    tqdm.tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    for line in sys.stdin:
        told = json.loads(line)
        if told["job"] == "load":  # here, for all children to come
            answer: dict[str, Any] = {"report": jobs.load(**told["arguments"])}
        else:
            answer = _run(told, jobs)
        print(json.dumps(answer), flush=True)


def _run(told: dict[str, Any], jobs: Any) -> dict[str, Any]:
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"{len(threads)} threads where a child is to be forked"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(told, jobs, writer)
    os.close(writer)
    tracer = _attach(child, told["strace"]) if told["strace"] else None
    begun = time.monotonic()
    deadline = begun + told["timeout"]
    kill_at = begun + told["kill_after"] if told["kill_after"] is not None else None
    shown = b""
    timed_out = False
    while True:
        now = time.monotonic()
        until = min(deadline, kill_at) if kill_at is not None else deadline
        ready, _, _ = select.select([reader], [], [], max(0, until - now))
        if ready:
            if not (piece := os.read(reader, 1 << 20)):
                break
            shown += piece
            continue
        timed_out = kill_at is None or time.monotonic() >= deadline
        kill_at = None
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if tracer is not None:
        tracer.wait()
    return {
        "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "timed_out": timed_out, "seconds": time.monotonic() - begun,
        "report": json.loads(shown) if shown.endswith(b"}") else None,
    }


def _attach(child: int, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """strace on a stopped child, which goes on when it is attached."""
    os.waitpid(child, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-f", "-qq", *arguments, "-p", str(child)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        if "TracerPid:\t0\n" not in Path(f"/proc/{child}/status").read_text():
            break
        if tracer.poll() is not None:
            raise RuntimeError("strace could not attach")
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    return tracer


def _child(told: dict[str, Any], jobs: Any, writer: int) -> None:
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    if told["strace"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    if told["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (told["memory"], told["memory"]))
    if told["processor"]:
        resource.setrlimit(resource.RLIMIT_CPU, (told["processor"], told["processor"]))
    if told["file_size"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (told["file_size"], told["file_size"]))
    if told["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (told["files"], told["files"]))
    try:
        if told["user"]:
            os.setgroups([])
            os.setgid(told["user"])
            os.setuid(told["user"])
        report = getattr(jobs, told["job"])(**told["arguments"])
    except BaseException as error:  # whatever it is, it is what the test looks at
        kinds = [kind.__name__ for kind in type(error).__mro__]
        report = {"error": kinds, "message": str(error),
                  "trace": traceback.format_exc().splitlines()[-12:]}
    content = json.dumps(report).encode()
    try:
        os.write(writer, content)
    except OSError:  # the fault that was injected, had it not struck before; it strikes once
        os.write(writer, content)
    os._exit(0)


if __name__ == "__main__":
    main()
