"""What runs out or goes wrong during the work: memory, the disk, time."""

import errno
import io
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradindex
from gradindex.errors import ResourceError
from gradindex.influence import gradients
from gradindex.influence.split_batches import Splits
from gradindex.progress import Progress
from gradindex.storage import files, segments
from indexer.fit.notes import FitNotes
from support.documents import save, tiny_tokens
from support.indexes import TINY, TINY_QUESTION, add, build_tiny, files_of, scores
from support.kills import KilledError, each_kill
from support.models import random_network, tiny_network
from support.waiting import struck

pytestmark = pytest.mark.usefixtures("few_queries")


# ---- memory


@pytest.fixture
def data(tmp_path):
    return save(tmp_path / "data.npy", tiny_tokens(0))


class Memory:
    """Runs out at the n-th pass or module of it, or wherever `most` sequences are too many."""

    def __init__(self, monkeypatch, at=None, most=None):
        self.calls, self.struck = 0, None
        self.sizes = []  # sequences of each pass
        real = gradients._backward

        def backward(model, modules, batch, each, uniforms):
            def reach(where):
                if at == self.calls or (most is not None and len(batch.tokens) > most):
                    self.struck = (where, len(batch.tokens))
                    self.calls += 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                self.calls += 1

            def counted(module, a, d):
                reach("module")  # what the one before added is there already
                each(module, a, d)

            self.sizes.append(len(batch.tokens))
            reach("pass")
            return real(model, modules, batch, counted, uniforms)

        monkeypatch.setattr(gradients, "_backward", backward)


def noted(out):
    """The splits noted by the fit, and by the segments."""
    fitted = FitNotes.read(out / "curvature").splits
    return fitted, {folder.name: segments.read_facts(folder).splits
                    for folder in sorted((out / "segments").iterdir())}


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_memory_that_runs_out_anywhere_in_a_build_halves_the_batch(
    every, data, tmp_path, monkeypatch
):
    """At every pass and every module of it; killed after the split was noted, the bytes are equal.

    Where one sequence alone is too much, as for a query of the calibration, that is said; the same
    command goes on once there is room.
    """
    whole = build_tiny(data, tmp_path / "whole")
    expected, right = files_of(tmp_path / "whole"), scores(whole)
    assert noted(tmp_path / "whole") == ({}, {"000000": []})
    stages = dict.fromkeys(("fit", "encode", "calibrate", "single"), 0)
    for at in itertools.count(step=every):
        out = tmp_path / f"at-{at}"
        with monkeypatch.context() as patch:
            memory = Memory(patch, at)
            try:
                built = build_tiny(data, out)
            except ResourceError as error:
                assert memory.struck[1] == 1, memory.struck
                assert "on a batch of 1 × 6 tokens" in str(error) and error.exit_code == 4
                assert "Use smaller --batch-tokens (one sequence is the least)" in str(error)
                built = None
        if memory.struck is None:
            break
        if built is None:
            stages["single"] += 1
            build_tiny(data, out)
            assert files_of(out) == expected, at
            continue
        found = scores(built)
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
        fitted, encoded = noted(out)
        halved = [one for splits in (fitted, encoded) for made in splits.values() for one in made]
        assert halved in ([(0, 4)], [(4, 4)], []), (at, halved)
        stages["fit" if fitted else "encode" if halved else "calibrate"] += 1
        if halved:
            again = tmp_path / f"again-{at}"
            _killed_after_a_split(data, again, at, monkeypatch)
            build_tiny(data, again)
            assert files_of(again) == files_of(out), at
            shutil.rmtree(again)
        shutil.rmtree(out)
    assert all(stages.values()), stages


def _killed_after_a_split(data, out, at, monkeypatch):
    real = Splits.add

    def add_split(self, batch):
        real(self, batch)
        raise KilledError

    with monkeypatch.context() as patch:
        Memory(patch, at)
        patch.setattr(Splits, "add", add_split)
        with pytest.raises(KilledError):
            build_tiny(data, out)


def test_where_only_one_sequence_fits_each_batch_is_halved_down_to_it(data, tmp_path, monkeypatch):
    whole = build_tiny(data, tmp_path / "whole")
    right = scores(whole)
    said = io.StringIO()
    with monkeypatch.context() as patch:
        Memory(patch, most=1)
        built = build_tiny(data, tmp_path / "index", progress=Progress(said))
        result = built.search(**TINY_QUESTION)
    fitted, encoded = noted(tmp_path / "index")
    splits = [(0, 4), (0, 2), (2, 2), (4, 4), (4, 2), (6, 2)]
    assert encoded == {"000000": splits}
    assert fitted == {"covariance 0": splits, "eigenvalues 0": splits}
    assert "memory ran out on 12 batches of the fit" in said.getvalue()
    assert "memory ran out on 6 batches, which were halved; smaller --batch-tokens" in \
        said.getvalue()
    np.testing.assert_allclose(scores(built), right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
    assert "memory ran out on 12 batches, which were halved" in result.warnings[0]  # 6, and hits
    assert gradindex.verify(tmp_path / "index", model=tiny_network()).sound
    with monkeypatch.context() as patch:
        Memory(patch, most=0)
        with pytest.raises(ResourceError, match=r"batch of 1 × 6 tokens .*--batch-tokens"):
            build_tiny(data, tmp_path / "none")


def test_memory_that_runs_out_anywhere_in_a_search_changes_no_answer(data, tmp_path, monkeypatch):
    searcher = build_tiny(data, tmp_path / "index")
    right = searcher.search(**TINY_QUESTION, normalize="relatif")
    scale = max(abs(hit.influence) for hit in right)
    struck = {1: 0, 8: 0}
    for at in itertools.count():
        with monkeypatch.context() as patch:
            memory = Memory(patch, at)
            try:
                result = searcher.search(**TINY_QUESTION, normalize="relatif")
            except ResourceError as error:
                assert memory.struck[1] == 1 and "--batch-tokens" in str(error)
                struck[1] += 1
                continue
        if memory.struck is None:
            break
        struck[8] += 1
        assert [hit.id for hit in result] == [hit.id for hit in right]
        for one, other in zip(result, right, strict=True):
            assert one.influence == pytest.approx(other.influence, rel=1e-5, abs=1e-5 * scale)
            assert one.relatif == pytest.approx(other.relatif, rel=1e-4, abs=1e-6)
            np.testing.assert_allclose(one.token_influence, other.token_influence, rtol=1e-3,
                                       atol=1e-5 * scale)
    assert all(struck.values()), struck


def test_memory_that_runs_out_on_several_queries_halves_them(data, tmp_path, monkeypatch):
    searcher = build_tiny(data, tmp_path / "index")
    queries = [{"token_ids": tokens} for tokens in tiny_tokens(8, 4).tolist()]
    right = [[hit.influence for hit in result] for result in searcher.search_many(queries)]
    with monkeypatch.context() as patch:
        Memory(patch, most=2)
        found = [[hit.influence for hit in result] for result in searcher.search_many(queries)]
    np.testing.assert_allclose(found, right, rtol=1e-4)


def test_memory_that_runs_out_in_an_append_is_noted_and_replayed(data, tmp_path, monkeypatch):
    build_tiny(data, tmp_path / "index")
    more = save(tmp_path / "more.npy", tiny_tokens(1, 6))
    resumed = shutil.copytree(tmp_path / "index", tmp_path / "resumed")
    with monkeypatch.context() as patch:
        memory = Memory(patch, most=3)
        add(tmp_path / "index", more)
    assert memory.sizes[:4] == [4, 2, 2, 2]
    assert noted(tmp_path / "index")[1] == {"000000": [], "000001": [(0, 4)]}
    with monkeypatch.context() as patch:
        Memory(patch, most=3)
        real = Splits.add

        def killed(self, batch):
            real(self, batch)
            raise KilledError

        patch.setattr(Splits, "add", killed)
        with pytest.raises(KilledError):
            add(resumed, more)
    with monkeypatch.context() as patch:
        memory = Memory(patch)
        add(resumed, more)
    assert memory.sizes[:3] == [2, 2, 2]  # though there is room for four now
    assert files_of(resumed) == files_of(tmp_path / "index")


# ---- the disk

LEAST = {"modules": "dense_h_to_4h", "bits": 256, "batch_tokens": 4096}  # for time
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_is_said_wherever_it_fills_and_the_build_goes_on(
    every, data, tmp_path, monkeypatch
):
    """At every sync; then again with room, which ends with the same bytes."""
    build_tiny(data, tmp_path / "whole", **LEAST)
    expected = files_of(tmp_path / "whole")
    for which, out in each_kill(monkeypatch, lambda n: tmp_path / f"full-{n}",
                                lambda out: build_tiny(data, out, **LEAST), FULL, every):
        build_tiny(data, out, **LEAST)
        assert files_of(out) == expected, f"full at sync {which}"
    assert which > 30


def test_a_full_disk_in_an_append_a_deletion_and_a_compaction(data, tmp_path, monkeypatch):
    start = tmp_path / "start"
    build_tiny(data, start, **LEAST)
    gradindex.delete(start, [1])
    more = save(tmp_path / "more.npy", tiny_tokens(1, 6))
    for place, run in enumerate((lambda out: add(out, more),
                                 lambda out: gradindex.delete(out, [2, 5]), gradindex.compact)):
        whole = shutil.copytree(start, tmp_path / "whole")
        run(whole)
        expected, before = files_of(whole), gradindex.open(start).snapshot.digest
        after = gradindex.open(whole).snapshot.digest
        for which, out in each_kill(monkeypatch,
                                    lambda n, place=place: shutil.copytree(
                                        start, tmp_path / f"full-{place}-{n}"),
                                    run, FULL):
            assert gradindex.open(out).snapshot.digest in (before, after)
            run(out)
            gradindex.delete(out, [])
            shutil.rmtree(out / "deleted", ignore_errors=True)
            assert files_of(out) == {name: content for name, content in expected.items()
                                     if not name.startswith("deleted")}, f"full at sync {which}"
            shutil.rmtree(out)
        shutil.rmtree(whole)


def test_a_disk_that_fills_while_a_file_is_written_says_the_bytes_needed(
    data, tmp_path, monkeypatch
):
    """At every write of ours, those that FAISS asks for among them; no half a file is left."""
    build_tiny(data, tmp_path / "whole", **LEAST)
    expected, real = files_of(tmp_path / "whole"), files.Writer.write
    sizes = {name.rsplit("/", 1)[-1]: len(content) for name, content in expected.items()}
    names, out = set(), tmp_path / "index"
    for which in itertools.count():
        left = [which]

        def write(self, content, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise FULL
            return real(self, content)

        with monkeypatch.context() as patch:
            patch.setattr(files.Writer, "write", write)
            try:
                build_tiny(data, out, **LEAST)
                break
            except ResourceError as error:
                said = str(error)
        name = said.split(" could not be written")[0].rsplit("/", 1)[1]
        names.add(name)
        needed = int(said.split("which needs ")[1].split(" bytes")[0].replace(",", ""))
        if name in ("rows.npy", "tokens.npz", "manifest.json"):
            assert needed == sizes[name], name
        assert needed > 0 and "run the same command again" in said
        assert not list(out.rglob("*.tmp")), said
        if which % 4 == 0:
            build_tiny(data, out, **LEAST)
            assert files_of(out) == expected, which
        shutil.rmtree(out)
    sums = {name.partition("-")[0] for name in names if "-" in name}
    assert sums >= {"covariance", "eigenvalues"}
    assert {"build.json", "fit.json", "vectors.faiss", "rows.npy", "tokens.npz", "segment.json",
            "manifest.json"} <= names


@pytest.mark.parametrize("limit, name", [(1 << 13, "records.lmdb"), (3 << 14, "covariance")])
def test_the_systems_own_limit_reaches_lmdb_and_faiss_alike(limit, name, tmp_path):
    """A real EFBIG from write(2), within LMDB and within our own writer."""
    tokens = save(tmp_path / "a.npy", tiny_tokens(0, 40))
    options = {**TINY, "segment_size": 40, "bits": 1 << 11}
    network = random_network("gpt_neox", torch.float32, num_hidden_layers=1,
                             intermediate_size=90)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError, match=rf"{name}.* could not be written: a file of "
                           rf"[\d,]+ bytes is larger than this process may write, {limit:,} bytes"):
            gradindex.build(network, tokens, tmp_path / "index", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gradindex.build(network, tokens, tmp_path / "index", **options)
    gradindex.build(network, tokens, tmp_path / "whole", **options)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")


def test_a_disk_that_fails_is_told_from_a_full_one(data, tmp_path, monkeypatch):
    failed = OSError(errno.EIO, os.strerror(errno.EIO))

    def fsync(_):
        raise failed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ResourceError, match=r"the disk failed, .*Nothing committed before was"):
            build_tiny(data, tmp_path / "index")
    assert len(build_tiny(data, tmp_path / "index")) == 8


def test_a_compaction_without_room_is_refused_before_it_writes(data, tmp_path, monkeypatch):
    index = tmp_path / "index"
    build_tiny(data, index)
    gradindex.delete(index, [1, 6])
    before = files_of(index)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"compacting writes at most .* has 1 kB free"):
        gradindex.compact(index)
    more = save(tmp_path / "more.npy", tiny_tokens(1, 30))
    with pytest.raises(ResourceError, match=r"the codes need .* has 1 kB free"):
        add(index, more)
    assert {name: one for name, one in files_of(index).items() if name in before} == before
    monkeypatch.undo()
    assert len(add(index, more)) == 36


# ---- time


def seconds_worked_by_children():
    """Seconds of the processor, whatever else the machine does, of children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds_worked(process):
    """The same of a process that is there."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_command_that_is_told_to_stop_stops_within_seconds_and_goes_on(
    index_folder, model_folder, tmp_path
):
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({
        "text": f"A late plum ripens in the garden, number {n}. " * 3, "url": f"late/{n}",
        "place": "garden"}) + "\n" for n in range(40)))
    index, worked = tmp_path / "index", {}
    whole = shutil.copytree(index_folder, tmp_path / "whole")

    def fresh():
        shutil.rmtree(index, ignore_errors=True)
        shutil.copytree(index_folder, index)
        worked["by others"] = seconds_worked_by_children()

    def begun(child):
        if found := list((index / "segments").glob("*.partial")):
            worked["until then"] = seconds_worked(child.pid)
        return found

    child = struck([sys.executable, "-m", "gradindex", "append", str(index), str(more)],
                   signal.SIGTERM, begun, fresh, cwd=Path(__file__).parent.parent)
    assert child.returncode == 130, child.stderr
    assert seconds_worked_by_children() - sum(worked.values()) < 10
    said = child.stderr
    assert "an append" in said and "goes on when the same command runs again" in said
    assert "Traceback" not in said
    assert (index / "append.json").is_file() and not (index / "writer.json").exists()
    assert len(gradindex.open(index)) == len(gradindex.open(index_folder))
    gradindex.append(index, more)
    gradindex.append(whole, more)
    assert files_of(index) == files_of(whole)
