"""What the system refuses is told as that, and never as damage: rights, limits, mounts, disks.

Each fault is one that the kernel gives (limits, file systems), or that strace puts in its place.
"""

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import click
import pytest

from faults.harness import fresh, inject
from search.query_flags import check_outputs
from support.needed import file_system, needs_strace, skip_without_root

# by what is refused: the words that tell it, and the errors of which a search meets them
TOLD = {
    "EACCES": "this user has no right to it", "EPERM": "this user has no right to it",
    "EMFILE": r"has as many files open as it may, \d+", "ENFILE": "as many files are open on this",
    "ENOMEM": "memory ran out", "EIO": "the disk failed, or the mount",
    "ESTALE": "the server of its file system no longer knows it",
    "ENOTCONN": "the disk failed, or the mount", "ETIMEDOUT": "the disk failed, or the mount",
    "EBUSY": "another process or the system holds it", "ETXTBSY": "it is in use as a program",
    "EPROTO": "the system refused it",
}
DAMAGE = re.compile(r"[Cc]opy(ing)? the index again|damaged and what to do|delete --segment|"
                    r"[Bb]uild again|was changed after|not a sound")


def reading_points(faults, job, arguments, root, log, calls):
    """Every (call, which one of its kind, line) that a job makes on files below `root`."""
    ended = faults.zygote.run(job, arguments, strace=[
        "-y", "-s", "0", "-e", f"trace={','.join(calls)}", "-o", str(log)])
    assert ended.done, str(ended)
    counts, found = Counter(), []
    for line in log.read_text(errors="replace").splitlines():
        if match := re.match(r"\d+ +(\w+)\((.*)", line):
            counts[match[1]] += 1
            if str(root) in match[2]:
                found.append((match[1], counts[match[1]], line))
    return found


def is_of_the_system(ended, where):
    assert ended.signal is None, f"{where}: {ended}"
    assert ended.error[:1] == ["ResourceError"], f"{where}: {ended}"
    assert not DAMAGE.search(ended.report["message"]), f"{where}: {ended}"
    return ended.report["message"]


JOBS = ["info", "probe", "verify"]


@needs_strace
@pytest.mark.parametrize("job", JOBS)
def test_a_file_that_may_not_be_opened_or_read_is_not_called_damaged(
    faults, index_of_faults, tmp_path, job
):
    """At every opening, reading and mapping of a file of the index, by each error in turn."""
    index = fresh(index_of_faults, tmp_path / "index")
    points = reading_points(faults, job, {"index": index}, index, tmp_path / "log",
                            ("openat", "read", "mmap"))
    assert {call for call, _, _ in points} >= {"openat", "read"}
    right = faults.zygote.run(job, {"index": index}).report
    names, struck = list(TOLD), 0
    for number, (call, which, line) in enumerate(faults.some(points, 12)):
        if call == "read" and line.endswith(" = 0"):
            continue  # the end of a file, which was read already
        name = "ENODEV" if call == "mmap" and number % 2 else names[number % len(names)]
        log = tmp_path / "injected"
        ended = faults.zygote.run(job, {"index": index}, strace=[
            "-y", "-s", "0", "-o", str(log), *inject(call, which, f"error={name}")])
        where = f"{job}, {name} at {call} {which}, {line}"
        if not any("INJECTED" in line and str(index) in line
                   for line in log.read_text(errors="replace").splitlines()):
            continue  # in this run it was another file's turn
        if ended.done:  # LMDB looks at a file's first bytes before it opens it; it may fail to
            assert ended.report == right, where
            continue
        struck += 1
        message = is_of_the_system(ended, where)
        expected = "its file system doesn't map files" if name == "ENODEV" else TOLD[name]
        assert re.search(expected, message) and os.strerror(getattr(errno, name)) in message, where
        faults.count("the system refuses a file at every opening, reading and mapping",
                     typed_error=1)
    assert struck > 5


@needs_strace
def test_a_mount_that_can_t_map_files(faults, index_of_faults, more_data, tmp_path):
    """Searched, verified and appended to: each says why, and leaves the index as it is."""
    for name in ("ENODEV", "EINVAL"):
        for job, arguments in (("probe", {}), ("verify", {}),
                               ("append", {"data": more_data, "model": faults.model})):
            index = fresh(index_of_faults, tmp_path / "index")
            files = [*index.glob("segments/*/records.lmdb"),
                     index / "segments/000003.partial/records.lmdb.tmp"]
            ended = faults.zygote.run(job, {"index": index, **arguments}, strace=[
                *(part for file in files for part in ("-P", str(file))),
                *inject("mmap", 1, f"error={name}")])
            message = is_of_the_system(ended, f"{job} {name}")
            assert re.search(r"records.lmdb could not be mapped: its file system doesn't "
                             r"map files into memory, which LMDB needs", message), message
            assert faults.zygote.run("probe", {"index": index}).done


def test_a_limit_on_open_files(faults, index_of_faults):
    """A real one, from the fewest that there can be up to where it suffices."""
    seen = set()
    for files in range(8, 24):
        ended = faults.zygote.run("probe", {"index": index_of_faults}, files=files)
        if ended.done:
            break
        message = is_of_the_system(ended, f"{files} files")
        assert f"has as many files open as it may, {files} (Too many open files)" in message
        assert "`ulimit -n 1024`" in message
        seen.add(files)
    assert ended.done and seen
    faults.count("searches under a limit on open files", typed_error=len(seen), answered=1)


def test_a_right_that_is_missing(faults, index_of_faults):
    """As another user, who may not read a file, or enter the folder."""
    if os.getuid():
        skip_without_root("become another user")
    for name in ("manifest.json", "segments/000000/rows.npy", "segments/000001/records.lmdb",
                 "background.safetensors", "curvature", "segments", "."):
        with tempfile.TemporaryDirectory() as folder:  # which others may enter, as pytest's not
            Path(folder).chmod(0o755)
            index = fresh(index_of_faults, Path(folder) / "index")
            found = faults.zygote.run("verify", {"index": index}, user=65534).report
            assert found["sound"], found["findings"]
            (index / name).chmod(0)
            message = is_of_the_system(
                faults.zygote.run("verify", {"index": index}, user=65534), name)
            assert "this user has no right to it (Permission denied)" in message


def test_an_index_on_a_read_only_mount(faults, index_of_faults, more_data, tmp_path):
    """It is searched and verified; whoever would write to it is told why not."""
    place = tmp_path / "mounted"
    with file_system(place):
        index = fresh(index_of_faults, place / "index")
        before = faults.zygote.run("probe", {"index": index}).report
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        assert faults.zygote.run("probe", {"index": index}).report == before
        assert faults.zygote.run("verify", {"index": index}).report["sound"]
        assert faults.zygote.run("info", {"index": index}).done
        with pytest.raises(click.UsageError, match=r"nothing can be written .* mounted read"):
            check_outputs({"-o": place / "hits.json"}, [])
        for job, arguments in (
                ("append", {"data": more_data, "model": faults.model}), ("delete", {"ids": [1]}),
                ("build", {"model": faults.model, "data": faults.data, "out": place / "new",
                           "settings": faults.settings})):
            arguments = arguments if job == "build" else {"index": index, **arguments}
            message = is_of_the_system(faults.zygote.run(job, arguments), job)
            assert "its file system is mounted read-only (Read-only file system)" in message, job
            assert "disk failed" not in message


def test_one_large_document_on_a_small_disk(faults, tmp_path):
    """LMDB says EIO of a write that was cut; it is said that the disk is full."""
    place = tmp_path / "small"
    with file_system(place, "-o", "size=1m"):
        data = tmp_path / "large.txt"
        data.write_text("The apple grows by the river. " * 40_000)
        ended = faults.zygote.run("build", {
            "model": faults.model, "data": data, "out": place / "index",
            "settings": {"bits": 512, "seq_len": 24, "segment_size": 100_000}})
        message = is_of_the_system(ended, "build")
        assert re.search(r"^the disk is full: .*records.lmdb could not be written, which needs "
                         r"[\d,]+ bytes \(.* free; No space left on device\)", message), message


def test_files_that_are_cut_while_an_index_is_open(faults, index_of_faults, tmp_path):
    """What was read into memory goes on; what is mapped, or is read again, is told as damage."""
    index = fresh(index_of_faults, tmp_path / "index")
    curvature = [str(path.relative_to(index)) for path in index.glob("curvature/*.safetensors")]
    ended = faults.zygote.run("cut", {"index": index,
                                      "names": [*curvature, "background.safetensors"]})
    assert ended.done and ended.report["before"] == ended.report["after"], str(ended)
    for name, options in (("segments/000001/records.lmdb", {}),
                          ("segments/000001/vectors.faiss", {"mapped": True})):
        index = fresh(index_of_faults, tmp_path / "index")
        ended = faults.zygote.run("cut", {"index": index, "names": [name], **options})
        assert ended.signal is None and ended.error[:1] == ["DamagedIndexError"], f"{name}: {ended}"
        assert f"{name} has 0 bytes, expected" in ended.report["message"]
    faults.count("files cut while an index is open", answered=1, typed_error=2)


def test_memory_is_taken_by_the_size_of_files(faults, index_of_faults, more_data, tmp_path):
    """In the address space of 200 MB more (`ulimit -v`) everything ends as it should."""
    faults.zygote.run("info", {"index": index_of_faults})  # whatever it needs is imported
    for job, arguments in (
            ("info", {"index": index_of_faults}), ("probe", {"index": index_of_faults}),
            ("verify", {"index": index_of_faults}),
            ("append", {"index": fresh(index_of_faults, tmp_path / "index"), "data": more_data,
                        "model": faults.model}),
            ("delete", {"index": tmp_path / "index", "ids": [3]}),
            ("build", {"model": faults.model, "data": faults.data, "out": tmp_path / "new",
                       "settings": faults.settings})):
        ended = faults.zygote.run(job, arguments, memory=faults.zygote.address_space + 200 * 10**6)
        assert ended.done, f"{job}: {ended}"
    refused = 0
    for extra in faults.some([0, 1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22], 6):
        ended = faults.zygote.run("verify", {"index": index_of_faults, "no_model": True},
                                  memory=faults.zygote.address_space + extra)
        if not ended.done:
            assert ended.signal is None and ended.error[0] in ("ResourceError", "MemoryError")
            assert not DAMAGE.search(ended.report["message"]), str(ended)
            refused += 1
    assert refused
    faults.count("jobs in 200 MB of address space, and in too little", answered=6,
                 typed_error=refused)


STRANGE = {
    "a space and quotes": b"my \"index\" of 'yesterday'", "a newline": b"two\nlines",
    "not UTF-8": b"ind\xe9x", "a leading dash": b"-o", "letters of the world": "索引 é".encode(),
    "a dollar": b"$HOME `id` *", "as long as a name may be": b"x" * 255,
}


@pytest.mark.parametrize("called", STRANGE)
def test_an_index_may_be_called_anything(faults, more_data, tmp_path, called):
    """Built, searched, appended to, verified; and its commands can be copied to a shell."""
    index = tmp_path / os.fsdecode(STRANGE[called])
    data = faults.data
    if called not in ("not UTF-8", "as long as a name may be"):
        data = shutil.copy(faults.data, tmp_path / f"{os.fsdecode(STRANGE[called])}.jsonl")
    built = faults.zygote.run("build", {"model": faults.model, "data": data, "out": index,
                                        "settings": faults.settings})
    assert built.done, str(built)
    for job, arguments in (("probe", {}), ("append", {"data": more_data, "model": faults.model}),
                           ("delete", {"ids": [1]}), ("compact", {}), ("info", {})):
        ended = faults.zygote.run(job, {"index": index, **arguments})
        assert ended.done, f"{job}: {ended}"
    assert faults.zygote.run("verify", {"index": index}).report["sound"]
    (index / "background.safetensors").unlink()
    ended = faults.zygote.run("probe", {"index": index})
    said = ended.report["message"]
    command = re.search(r"`gradindex verify (.*)` says all", said, re.DOTALL)[1]
    shown = subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True, check=True)
    assert shown.stdout == os.fsencode(index), said
    assert command.isprintable()
    faults.count("indexes with strange names", whole_lives=1)


def test_a_path_that_is_too_long(faults, tmp_path):
    for out in (tmp_path / ("x" * 256), tmp_path.joinpath(*["x" * 200] * 25)):
        ended = faults.zygote.run("build", {"model": faults.model, "data": faults.data,
                                            "out": out, "settings": faults.settings})
        message = is_of_the_system(ended, str(out))
        assert "its path is too long for the system (File name too long)" in message
    ended = faults.zygote.run("probe", {"index": tmp_path / ("x" * 256)})
    assert "its path is too long" in is_of_the_system(ended, "probe")
