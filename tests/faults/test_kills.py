"""Killed at any moment, a command run again ends with the bytes of one that never was."""

import random
import shutil
import signal
import subprocess
import sys
import time

from faults.harness import build_arguments, fresh, inject, whole_build
from support.needed import needs_strace

BUILD = "SIGKILL at every write, sync, rename, truncate and removal of a 3-segment build"


@needs_strace
def test_a_build_killed_at_any_call(faults, tmp_path):
    whole, _ = whole_build(faults, tmp_path)
    assert sum(name.endswith("records.lmdb") for name in whole) == 3
    out = tmp_path / "killed"
    points = faults.points("build", build_arguments(faults, tmp_path / "counted"),
                           tmp_path / "counted", tmp_path / "log")
    for call, which in faults.some(points, 4):
        shutil.rmtree(out, ignore_errors=True)
        ended = faults.zygote.run("build", build_arguments(faults, out),
                                  strace=inject(call, which, "signal=KILL"))
        assert ended.signal == signal.SIGKILL, f"{call} {which}: {ended}"
        again = faults.zygote.run("build", build_arguments(faults, out))
        assert again.done, f"{call} {which}: {again}"
        assert again.report["files"] == whole, f"killed at {call} {which}"
        faults.count(BUILD, points=1, survived=1, digests_equal=1)


@needs_strace
def test_append_delete_and_compact_killed_at_any_call(faults, index_of_faults, more_data, tmp_path):
    """The old answer or the new one is there after the kill; run again, the bytes are the same."""
    deleted = fresh(index_of_faults, tmp_path / "deleted")
    assert faults.zygote.run("delete", {"index": deleted, "ids": [3, 17]}).done
    for job, before, arguments in (
            ("append", index_of_faults, {"data": more_data, "model": faults.model}),
            ("delete", index_of_faults, {"ids": [3, 17]}), ("compact", deleted, {})):
        whole = fresh(before, tmp_path / "whole")
        old = faults.zygote.run("probe", {"index": whole}).report["answer"]
        log, counted = tmp_path / "log", fresh(before, tmp_path / "counted")
        points = faults.points(job, {"index": counted, **arguments}, counted, log)
        expected = faults.zygote.run(job, {"index": whole, **arguments}).report["files"]
        new = faults.zygote.run("probe", {"index": whole}).report["answer"]
        row = f"SIGKILL at every such call of {job}"
        for call, which in faults.some(points, 2):
            out = fresh(before, tmp_path / "killed")
            ended = faults.zygote.run(job, {"index": out, **arguments},
                                      strace=inject(call, which, "signal=KILL"))
            assert ended.signal == signal.SIGKILL, f"{job}, {call} {which}: {ended}"
            seen = faults.zygote.run("probe", {"index": out})
            assert seen.done and seen.report["answer"] in (old, new), f"{job}, {call} {which}"
            if seen.report["answer"] == old:
                again = faults.zygote.run(job, {"index": out, **arguments})
                assert again.done and again.report["files"] == expected, f"{job}, {call} {which}"
            else:  # the commit was made; what is left is to be cleaned by the next writer
                assert faults.zygote.run("delete", {"index": out, "ids": []}).done
                left = faults.zygote.run("probe", {"index": out}).report["answer"]
                assert left == new
            faults.count(row, points=1, old_or_new_answer=1, resumed=1)


def test_a_build_killed_at_random_moments(faults, tmp_path):
    """And killed again while it resumes, up to three times."""
    whole, seconds = whole_build(faults, tmp_path)
    dice = random.Random(0)
    kills, wanted = 0, faults.size(4, 220)
    while kills < wanted:
        out = tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(dice.randint(1, 3)):
            ended = faults.zygote.run("build", build_arguments(faults, out),
                                      kill_after=dice.uniform(0, 1.1 * seconds))
            kills += ended.signal == signal.SIGKILL
        again = faults.zygote.run("build", build_arguments(faults, out))
        assert again.done, str(again)
        assert again.report["files"] == whole
        faults.count("builds killed at random moments, up to three times each", digests_equal=1)
    faults.count("builds killed at random moments, up to three times each", kills=kills,
                 survived=kills)


def test_the_command_itself_killed_at_random_moments(faults, tmp_path):
    """`gradindex build` as a process of its own, from the first import on."""
    def command(out):
        return [sys.executable, "-m", "gradindex", "build", str(faults.model), str(faults.data),
                "-o", str(out), "--seq-len", "24", "--bits", "512", "--segment-size", "18",
                "--batch-tokens", "96", "--id-field", "url", "--keep-fields", "place"]

    begun = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - begun
    dice = random.Random(1)
    for number in range(faults.size(1, 20)):
        out = tmp_path / f"killed-{number}"
        child = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "segments").is_dir() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.3 * seconds))
        child.kill()
        child.wait()
        killed = child.returncode == -signal.SIGKILL
        subprocess.run(command(out), check=True, capture_output=True)
        for path in sorted((tmp_path / "whole").rglob("*")):
            if path.is_file():
                twin = out / path.relative_to(tmp_path / "whole")
                assert twin.read_bytes() == path.read_bytes(), twin
        assert len(list(out.rglob("*"))) == len(list((tmp_path / "whole").rglob("*")))
        faults.count("`gradindex build` processes killed", kills=int(killed), digests_equal=1)
        shutil.rmtree(out)
