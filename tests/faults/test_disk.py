"""Full and failing disks: a typed error, nothing committed is touched, and it goes on later."""

import shutil
import subprocess

import pytest

from faults.harness import (
    CALLS,
    build_arguments,
    fresh,
    inject,
    whole_build,
)
from support.needed import file_system, needs_strace

# What can fail for want of space or by a failing device; removing and syncing can only fail.
SPACE = {"write", "pwrite64", "writev", "pwritev", "ftruncate", "mkdir", "fsync", "fdatasync",
         "rename", "renameat", "renameat2"}


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_build_on_a_failing_disk(faults, tmp_path, error):
    whole, _ = whole_build(faults, tmp_path)
    out = tmp_path / "failed"
    points = faults.points("build", build_arguments(faults, tmp_path / "counted"),
                           tmp_path / "counted", tmp_path / "log")
    points = [point for point in points if point[0] in SPACE]
    row = f"{error} at every such call of a 3-segment build"
    for call, which in faults.some(points, 3):
        shutil.rmtree(out, ignore_errors=True)
        ended = faults.zygote.run("build", build_arguments(faults, out),
                                  strace=inject(call, which, f"error={error}"))
        assert ended.signal is None, f"{call} {which}: {ended}"
        if ended.done:  # of the note that says who is writing, which may fail
            assert ended.report["files"] == whole, f"{call} {which}"
            faults.count(row, points=1, harmless=1)
            continue
        assert "ResourceError" in ended.error, f"{call} {which}: {ended}"
        assert ("disk is full" if error == "ENOSPC" else "disk failed") in ended.report["message"]
        again = faults.zygote.run("build", build_arguments(faults, out))
        assert again.done and again.report["files"] == whole, f"{call} {which}: {again}"
        faults.count(row, points=1, typed_error_and_resumed=1)


@needs_strace
def test_append_and_compact_on_a_failing_disk(faults, index_of_faults, more_data, tmp_path):
    """The committed index answers as before, and the command succeeds once there is space."""
    deleted = fresh(index_of_faults, tmp_path / "deleted")
    assert faults.zygote.run("delete", {"index": deleted, "ids": [3, 17]}).done
    for job, before, arguments in (
            ("append", index_of_faults, {"data": more_data, "model": faults.model}),
            ("compact", deleted, {})):
        whole = fresh(before, tmp_path / "whole")
        old = faults.zygote.run("probe", {"index": whole}).report["answer"]
        counted = fresh(before, tmp_path / "counted")
        points = faults.points(job, {"index": counted, **arguments}, counted, tmp_path / "log")
        points = [point for point in points if point[0] in SPACE]
        expected = faults.zygote.run(job, {"index": whole, **arguments}).report["files"]
        new = faults.zygote.run("probe", {"index": whole}).report["answer"]
        for call, which in faults.some(points, 1):
            out = fresh(before, tmp_path / "failed")
            ended = faults.zygote.run(job, {"index": out, **arguments},
                                      strace=inject(call, which, "error=ENOSPC"))
            assert ended.signal is None, f"{job}, {call} {which}: {ended}"
            row = f"ENOSPC at every such call of {job}"
            if ended.done:  # of the note that says who is writing, which may fail
                assert ended.report["files"] == expected, f"{job}, {call} {which}"
                faults.count(row, points=1, harmless=1)
                continue
            assert "ResourceError" in ended.error, f"{job}, {call} {which}: {ended}"
            seen = faults.zygote.run("probe", {"index": out})
            assert seen.report["answer"] in (old, new), f"{job}, {call} {which}: {seen}"
            if seen.report["answer"] == old:
                again = faults.zygote.run(job, {"index": out, **arguments})
                assert again.done and again.report["files"] == expected, f"{call} {which}"
                faults.count(row, points=1, typed_error_and_resumed=1)
            else:
                faults.count(row, points=1, typed_error_after_the_commit=1)


@needs_strace
def test_every_call_that_changes_a_disk_is_watched(faults, tmp_path):
    """No call that changes files is made that the other tests would not see."""
    log = tmp_path / "log"
    ended = faults.zygote.run("build", build_arguments(faults, tmp_path / "out"), strace=[
        "-y", "-s", "0", "-e", "trace=%desc,%file", "-o", str(log)])
    assert ended.done, str(ended)
    seen = {line.split("(")[0].split()[-1] for line in log.read_text(errors="replace").splitlines()
            if str(tmp_path / "out") in line and "(" in line}
    reading = {"openat", "open", "close", "read", "pread64", "fstat", "newfstatat", "lseek", "dup",
               "fcntl", "mmap", "getdents64", "statx", "stat", "lstat", "readlink", "statfs",
               "fstatfs", "flock", "ioctl", "access", "faccessat", "faccessat2", "fadvise64",
               "readlinkat", "statvfs", "getcwd", "chdir", "dup2", "dup3"}
    assert seen - reading <= set(CALLS)
    assert {"fsync", "fdatasync"} & seen and {"rename", "renameat", "renameat2"} & seen


def test_a_file_system_that_fills_up(faults, tmp_path):
    """A real one, of every size from far too small on, until the build ends as it should."""
    whole, _ = whole_build(faults, tmp_path)
    place = tmp_path / "small"
    with file_system(place, "-o", "size=64k"):
        step = 16 if faults.long else 64
        for kilobytes in range(step, 1024, step):
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)
            ended = faults.zygote.run("build", build_arguments(faults, place / "out"))
            assert ended.signal is None, f"{kilobytes} kB: {ended}"
            if ended.done:
                break
            assert "ResourceError" in ended.error, f"{kilobytes} kB: {ended}"
            faults.count("builds on a real file system of too few kB", typed_error=1)
        assert ended.done and ended.report["files"] == whole, f"{kilobytes} kB: {ended}"
        faults.count("builds on a real file system of too few kB", resumed_to_equal_digests=1)


def test_a_limit_on_file_size(faults, tmp_path):
    """`ulimit -f`, as batch systems set it: a write fails in the middle."""
    whole, _ = whole_build(faults, tmp_path)
    out = tmp_path / "limited"
    for limit in faults.some([100, 1000, 3000, 5000, 9000, 20000], 3):
        shutil.rmtree(out, ignore_errors=True)
        ended = faults.zygote.run("build", build_arguments(faults, out), file_size=limit)
        assert "ResourceError" in ended.error, f"{limit}: {ended}"
        again = faults.zygote.run("build", build_arguments(faults, out))
        assert again.done and again.report["files"] == whole, f"{limit}: {again}"
        faults.count("builds under a limit on file size", typed_error_and_resumed=1)
