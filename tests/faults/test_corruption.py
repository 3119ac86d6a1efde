"""Damage of every kind, to every file: an error of ours or the right answer, never anything else.

The same damage is also given to the libraries alone (LMDB, FAISS, safetensors, NumPy, SciPy, JSON),
to show what the digests are for.
"""

import json
import os
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from faults.harness import build_arguments, fresh, inject
from gradindex.storage import layout, manifest, sealed_json
from gradindex.storage.files import facts_of
from support.needed import needs_strace

HOSTILE = (0, 1, -1, 255, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
KINDS = ("bit", "byte", "integer", "cut", "zeros", "junk", "swap")
MEMORY = 24 << 30  # of address space: torch alone takes several GB of it


def files_in(index):
    return sorted(str(path.relative_to(index)) for path in index.rglob("*") if path.is_file())


def damage(kind: str, content: bytes, other: bytes, dice: random.Random) -> bytes:
    """The content, damaged; `other` is the same file of another place."""
    place, length = dice.randrange(len(content)), len(content)
    if kind == "bit":
        return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + \
            content[place + 1 :]
    if kind == "byte":
        return content[:place] + dice.choice([b"\x00", b"\xff"]) + content[place + 1 :]
    if kind == "integer":
        place -= place % 4
        value = dice.choice(HOSTILE).to_bytes(8, "little", signed=True)[: dice.choice([4, 8])]
        return (content[:place] + value + content[place + len(value) :])[:length]
    if kind == "cut":
        return content[: dice.choice([0, 1, length // 2, length - 1, place])]
    if kind == "zeros":
        place -= place % 4096
        return content[:place] + bytes(min(4096, length - place)) + content[place + 4096 :]
    if kind == "junk":
        return content + dice.randbytes(dice.choice([1, 100, 5000]))
    return other


def twin_of(index, name):
    """The same file of another segment, or another file of the index."""
    others = [one for one in files_in(index) if one != name and Path(one).name == Path(name).name]
    return (index / (others or [one for one in files_in(index) if one != name])[0]).read_bytes()


def judge(ended, truth):
    """What became of a child: detected, harmless, silent or crashed."""
    if ended.signal is not None or ended.report is None:
        return "crashed"
    if ended.error:
        return "detected" if "GradindexError" in ended.error else "crashed"
    return "harmless" if ended.report["answer"] == truth else "silent"


def judge_bare(ended, truth):
    if ended.signal is not None or ended.report is None:
        return "crashed"
    if ended.error:
        return "detected"
    return "harmless" if ended.report["answer"] == truth else "silent"


def test_damage_is_detected_or_harmless(faults, index_of_faults, tmp_path):
    truth = faults.zygote.run("probe", {"index": index_of_faults}).report["answer"]
    assert faults.zygote.run("probe", {"index": index_of_faults}).report["answer"] == truth
    index, dice = fresh(index_of_faults, tmp_path / "damaged"), random.Random(2)
    names = files_in(index)
    each = faults.size(2, 105)
    for name in names:
        path, suffix = index / name, Path(name).suffix
        whole, other = path.read_bytes(), twin_of(index, name)
        bare_truth = faults.zygote.run("bare", {"path": path}).report["answer"]
        for number in range(each):
            kind = KINDS[(number + names.index(name)) % len(KINDS)]
            spoiled = damage(kind, whole, other, dice)
            if spoiled == whole:
                continue
            path.write_bytes(spoiled)
            ended = faults.zygote.run("probe", {"index": index}, memory=MEMORY)
            outcome = judge(ended, truth)
            assert outcome in ("detected", "harmless"), f"{kind} in {name}: {outcome}: {ended}"
            faults.count(f"damage to {suffix} files", injected=1, **{outcome: 1})
            bare = faults.zygote.run("bare", {"path": path}, memory=MEMORY, processor=3)
            faults.count(f"the same to the library alone, {suffix}", injected=1,
                         **{judge_bare(bare, bare_truth): 1})
        path.write_bytes(whole)
    assert faults.zygote.run("probe", {"index": index}).report["answer"] == truth
    for suffix in {Path(name).suffix for name in names}:
        assert not faults.rows[f"damage to {suffix} files"]["silent"]


@pytest.mark.parametrize("what", ["removed", "folder", "pipe", "link inside", "link outside",
                                  "device"])
def test_files_that_are_no_files(faults, index_of_faults, tmp_path, what):
    """Removed, or replaced by a folder, a pipe, a link (even to the same bytes) or a device."""
    outside = tmp_path / "outside"
    for name in faults.some(files_in(index_of_faults), 5):
        index = fresh(index_of_faults, tmp_path / "index")
        path = index / name
        shutil.copy(path, outside)
        path.unlink()
        if what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "link inside":
            shutil.copy(outside, index / "copy")
            path.symlink_to(index / "copy")
        elif what == "link outside":
            path.symlink_to(outside)
        elif what == "device":
            path.symlink_to("/dev/zero")
        ended = faults.zygote.run("probe", {"index": index}, memory=MEMORY, processor=20)
        assert judge(ended, "") == "detected", f"{what}, {name}: {ended}"
        faults.count("files removed, or replaced by a folder, pipe, link or device", injected=1,
                     detected=1)
    folder = fresh(index_of_faults, tmp_path / "index") / "segments"
    shutil.copytree(folder, tmp_path / "segments")
    shutil.rmtree(folder)
    if what.startswith("link"):
        folder.symlink_to(tmp_path / "segments")
        assert judge(faults.zygote.run("probe", {"index": folder.parent}), "") == "detected"


def vouch(index: Path, name: str) -> None:
    """Make the manifest say that a file is as it should be: what a hostile stranger would do."""
    facts = manifest.load(index)
    manifest.commit(index, replace(facts, files={**facts.files, name: facts_of(index / name)}))


def test_hostile_files_under_a_manifest_that_vouches_for_them(faults, index_of_faults, tmp_path):
    """No digest helps against who writes the digests. Nothing may crash, run or hang even so."""
    dice = random.Random(3)
    names = [name for name in files_in(index_of_faults) if name != layout.MANIFEST]
    index = fresh(index_of_faults, tmp_path / "hostile")
    vouched = (index / layout.MANIFEST).read_bytes()
    kinds = [kind for kind in KINDS if kind != "bit"]
    for name in names:
        path = index / name
        whole, other = path.read_bytes(), twin_of(index, name)
        for number in range(faults.size(1, 45)):
            kind = kinds[(number + names.index(name)) % len(kinds)]
            path.write_bytes(damage(kind, whole, other, dice))
            vouch(index, name)
            ended = faults.zygote.run("probe", {"index": index}, memory=MEMORY, processor=30)
            outcome = judge(ended, "")
            assert outcome != "crashed", f"{kind} in {name}: {ended}"
            faults.count("hostile files that the manifest vouches for", injected=1,
                         **{"refused" if outcome == "detected" else "answered from": 1})
            (index / layout.MANIFEST).write_bytes(vouched)
        path.write_bytes(whole)


def hostile_values(value):
    """Values to put in a manifest in place of one."""
    found = [None, True, -1, 0, 2**31, 2**62, 2**63, 1e308, "", "../../etc/passwd", "/etc/passwd",
             "\x1b[2J", [], {}, [[]] * 3, "9" * 5000]
    return [one for one in found if one != value]


def places_in(content, path=()):
    """Every place in nested JSON."""
    yield path
    if isinstance(content, dict):
        for name in content:
            yield from places_in(content[name], (*path, name))
    elif isinstance(content, list):
        for number in range(min(2, len(content))):
            yield from places_in(content[number], (*path, number))


def test_hostile_manifests(faults, index_of_faults, tmp_path):
    """Any value anywhere, with the right digest: an error of ours, or a search like any other."""
    index = fresh(index_of_faults, tmp_path / "hostile")
    content = asdict(manifest.load(index))
    dice = random.Random(4)
    places = [path for path in places_in(content) if path]
    chosen = [dice.choice(places) for _ in range(faults.size(12, 900))]
    for path in chosen:
        spoiled = json.loads(json.dumps(content))
        inner = spoiled
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = dice.choice(hostile_values(inner[path[-1]]))
        (index / layout.MANIFEST).write_bytes(sealed_json.with_digest(spoiled))
        job = dice.choice(["probe", "probe", "info", "verify", "compact", "delete", "append"])
        arguments = {"append": {"data": faults.data, "model": faults.model}, "delete": {"ids": [3]},
                     "verify": {"rebuild": True}}.get(job, {})
        ended = faults.zygote.run(job, {"index": index, **arguments}, memory=MEMORY, processor=30)
        if job not in ("probe", "info"):
            index = fresh(index_of_faults, tmp_path / "hostile")
        outcome = "answered" if ended.done else judge(ended, "")
        assert outcome != "crashed", f"{job}: {path}: {inner[path[-1]]!r}: {ended}"
        faults.count("hostile values in a manifest with the right digest", injected=1,
                     **{"refused" if outcome == "detected" else "answered from": 1})
    for raw in (b"", b"[]", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"format": 1}',
                b'{"format": NaN}', b'{"format": "1"}', b'{"format": 1e999}', b"null",
                b'{"format": ' + b"1" * 10_000 + b"}"):
        (index / layout.MANIFEST).write_bytes(raw)
        ended = faults.zygote.run("probe", {"index": index}, memory=MEMORY, processor=30)
        assert judge(ended, "") == "detected", f"{raw[:40]!r}: {ended}"
        faults.count("hostile values in a manifest with the right digest", injected=1, refused=1)


def test_damage_is_left_out_on_demand(faults, index_of_faults, tmp_path):
    """With allow_damaged the segments that are whole answer, and exactly they."""
    index = fresh(index_of_faults, tmp_path / "damaged")
    for segment in ("000000", "000002"):
        path = index / "segments" / segment / "vectors.faiss"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        ended = faults.zygote.run("probe", {"index": index, "allow_damaged": True})
        assert ended.done, str(ended)
        gone = fresh(index_of_faults, tmp_path / "gone")
        shutil.rmtree(gone / "segments" / segment)
        without = faults.zygote.run("probe", {"index": gone, "allow_damaged": True})
        assert without.report["answer"] == ended.report["answer"]
        path.write_bytes(whole)


def test_an_index_is_not_what_its_segments_alone_are(index_of_faults, tmp_path):
    """A segment of another build, sealed and of the right form, is not taken for one's own."""
    import gradindex
    from gradindex.errors import DamagedIndexError

    index = fresh(index_of_faults, tmp_path / "mixed")
    segments = index / "segments"
    (segments / "000000").rename(segments / "aside")
    (segments / "000001").rename(segments / "000000")
    (segments / "aside").rename(segments / "000001")
    with pytest.raises(DamagedIndexError, match=r"was changed after it was written|expected"):
        gradindex.open(index)
    assert np.load(segments / "000000" / "rows.npy")["id"][0] == 18


COMMANDS = ("probe", "info", "verify", "compact", "delete", "append", "discard")


@pytest.mark.parametrize("place", [
    "segments", "deleted", "curvature", "writer.json", "manifest.json.tmp", "segments/000999",
    "segments/000003.partial", "append.json", "build.json", "curvature.partial",
])
def test_no_command_touches_what_a_link_leads_to(faults, index_of_faults, tmp_path, place):
    """A stranger's index may hold links to anything of ours."""
    home = tmp_path / "home"
    for name in ("000001/a", "2024/b", "000009.npy", "x.tmp"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("mine")
    (tmp_path / "letter").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for job in COMMANDS:
        index = fresh(index_of_faults, tmp_path / "index")
        assert faults.zygote.run("delete", {"index": index, "ids": [3, 4]}).done
        if (index / place).is_dir():
            shutil.rmtree(index / place)
        file = Path(place).suffix in (".json", ".tmp")
        (index / place).symlink_to(tmp_path / "letter" if file else home)
        arguments = {"append": {"data": faults.data, "model": faults.model}, "delete": {"ids": [5]},
                     "verify": {"rebuild": True}}.get(job, {})
        ended = faults.zygote.run(job, {"index": index, **arguments}, processor=30)
        assert ended.done or judge(ended, "") == "detected", f"{job}: {ended}"
        for path, content in before.items():
            assert path.read_bytes() == content, f"{job} through {place} changed {path}"
        shutil.rmtree(index)
        assert set(before) == {path for path in tmp_path.rglob("*") if path.is_file()}
        faults.count("commands on an index with links to its user's files", tried=1, untouched=1)


@needs_strace
def test_a_killed_build_that_is_damaged_before_it_goes_on(faults, tmp_path):
    """An error that says so, or the whole index as it should be; never another one."""
    whole = faults.zygote.run("build", build_arguments(faults, tmp_path / "whole")).report["files"]
    dice = random.Random(5)
    points = faults.points("build", build_arguments(faults, tmp_path / "counted"),
                           tmp_path / "counted", tmp_path / "log")
    late = points[len(points) // 5 :]
    for number in range(faults.size(3, 120)):
        call, which = late[(number * 37) % len(late)]
        out = tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        faults.zygote.run("build", build_arguments(faults, out),
                          strace=inject(call, which, "signal=KILL"))
        kept = [name for name in files_in(out) if name != "writer.json"]
        name = dice.choice(kept)
        kind = dice.choice(KINDS[:-1])
        path = out / name
        content = path.read_bytes() or b"x"
        path.write_bytes(damage(kind, content, content, dice))
        ended = faults.zygote.run("build", build_arguments(faults, out), memory=MEMORY)
        outcome = judge(ended, "") if not ended.done else \
            "repeated" if ended.report["files"] == whole else "silent"
        if outcome == "silent" and manifest.exists(out):  # committed before it was damaged
            outcome = judge(faults.zygote.run("probe", {"index": out}), "")
        assert outcome in ("detected", "repeated"), f"{kind} in {name}, {call} {which}: {ended}"
        faults.count("killed builds that were damaged before they went on", injected=1,
                     **{outcome: 1})
