"""Bounded memory: what may be used for what, and that answers and bytes don't depend on it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gradindex
from gradindex import memory
from gradindex.errors import InputError, ResourceError
from gradindex.influence.curvature import file_entries
from gradindex.memory import Allowance, parse_size
from gradindex.model.tracked import tracked_modules
from gradindex.storage.records import Part, Record
from indexer.fit.batch_memory import batch_bytes
from indexer.fit.budget import gpu_width, held_bytes, partitions
from indexer.fit.notes import FitSettings
from search.ask.controls import Controls
from search.ask.settings import settle
from search.rank import query_gradient
from support.indexes import QUESTION, SMALL, files_of
from support.needed import skip_without_root


@pytest.mark.parametrize("text, expected", [
    ("8GB", 8 * 10**9), ("512MB", 512 * 10**6), ("1.5 GiB", 3 << 29), ("20kb", 20_000),
    ("4096", 4096), (4096, 4096), ("7B", 7)])
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "8 PB", "GB", "-1GB", "0GB", "many", "1,5GB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="expected a size such as 8GB"):
        parse_size(text)


def test_an_allowance_is_what_the_model_leaves():
    free = Allowance.beside(10**9, None, 10**12, "anything", 10**12)
    assert (free.bytes, free.fit, free.curvature, free.part(0.1, 77)) == (None, None, None, 77)
    bound = Allowance.beside(3000, 5000, 1200, "fitting m", 800)
    assert (bound.bytes, bound.fit, bound.planned, bound.curvature) == (2000, 1200, 1080, 500)
    assert (bound.part(0.25, 10**6), bound.part(0.25, 400)) == (500, 400)
    with pytest.raises(ResourceError, match=r"the model takes 3 kB, fitting m 1.2 kB and a batch "
                                            r"800 bytes; expected 5 kB at least"):
        Allowance.beside(3000, 4999, 1200, "fitting m", 800)


def machine(root, groups, cgroup, mountinfo, free=8_000_000):
    """The files of a system with `free` kB free, its control groups' files by name."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 16000000 kB\nMemAvailable: {free} kB\n")
    (root / "proc/self/statm").write_text("1000 500 100 1 0 800 0\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    for name, text in groups.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "41 31 0:38 {top} {place} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
CACHE = "anon 5\nactive_file 600000000\ninactive_file 400000000\n"
SYSTEMS = {
    "no group": ({}, "0::/\n", V2, 8_192_000_000),
    "a container sees its own group as the top": (
        {"sys/fs/cgroup/memory.max": "3000000000\n", "sys/fs/cgroup/memory.current": "500000000\n"},
        "0::/\n", V2, 2_500_000_000),
    "without a bound": (
        {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"},
        "0::/\n", V2, 8_192_000_000),
    "a job inside a bounded slice, a soft bound, and cache, which is free": (
        {"sys/fs/cgroup/user/memory.max": "4000000000\n",
         "sys/fs/cgroup/user/memory.current": "3500000000\n",
         "sys/fs/cgroup/user/memory.stat": CACHE,
         "sys/fs/cgroup/user/job 7/memory.max": "max\n",
         "sys/fs/cgroup/user/job 7/memory.high": "2000000000\n",
         "sys/fs/cgroup/user/job 7/memory.current": "700000000\n"},
        "0::/user/job 7\n", V2, 1_300_000_000),
    "the slice is the narrower": (
        {"sys/fs/cgroup/user/memory.max": "4000000000\n",
         "sys/fs/cgroup/user/memory.current": "3900000000\n",
         "sys/fs/cgroup/user/job/memory.max": "3000000000\n",
         "sys/fs/cgroup/user/job/memory.current": "700000000\n"},
        "0::/user/job\n", V2, 100_000_000),
    "v1, where no bound is a large number": (
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
         "sys/fs/cgroup/memory/memory.usage_in_bytes": "7000000000\n",
         "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "2000000000\n",
         "sys/fs/cgroup/memory/slurm/memory.usage_in_bytes": "1900000000\n",
         "sys/fs/cgroup/memory/slurm/memory.stat":
             "active_file 1\ntotal_active_file 800000000\ntotal_inactive_file 0\n"},
        "9:cpu:/\n4:memory:/slurm\n0::/\n", V1, 900_000_000),
    "v1 in a container without a name space, mounted further down": (
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1500000000\n",
         "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000000\n"},
        "4:cpu,memory:/docker/abc\n", V1.replace("{top}", "/docker/abc"), 1_000_000_000),
    "v2 beside v1": (
        {"sys/fs/cgroup/unified/memory.max": "1000000000\n",
         "sys/fs/cgroup/unified/memory.current": "0\n"},
        "0::/\n", V1 + V2.replace("{place}", "/sys/fs/cgroup/unified"), 1_000_000_000),
    "no room at all": (
        {"sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "5000\n"},
        "0::/\n", V2, 0),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_memory_to_be_had_is_that_of_the_narrowest_bound(system, tmp_path):
    groups, cgroup, mountinfo, expected = SYSTEMS[system]
    root = machine(tmp_path, groups, cgroup,
                   mountinfo.replace("{top}", "/").replace("{place}", "/sys/fs/cgroup"))
    found = memory.available(root) - memory.resident()
    assert found == pytest.approx(expected, abs=2e6)  # what this process takes changes meanwhile


def test_memory_to_be_had_under_a_limit_of_this_process():
    """`ulimit -v` and `-d`, as the shell sets them."""
    script = "from gradindex import memory; print(memory.available())"
    for flag in "vd":
        shown = subprocess.run(
            ["bash", "-c", f'ulimit -{flag} 2000000; exec "$0" -c "$1"', sys.executable, script],
            capture_output=True, text=True, check=True)
        assert 1_000_000_000 < int(shown.stdout) < 2_100_000_000  # libraries count, unlimited


def test_memory_to_be_had_in_a_real_control_group():
    """One that is made here, with 1 GB."""
    folder = Path(f"/sys/fs/cgroup/memory/gradindex-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError:
        skip_without_root("make a control group of v1")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(10**9))
        script = "from gradindex import memory; print(memory.available())"
        shown = subprocess.run(
            ["bash", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$0" -c "$1"', sys.executable,
             script], capture_output=True, text=True, check=True)
        assert 800_000_000 < int(shown.stdout) < 1_100_000_000
    finally:
        folder.rmdir()


def test_a_build_in_little_memory_gives_the_same_bytes(
    model_folder, data_file, tmp_path, monkeypatch
):
    asked = dict(SMALL, modules="mlp")  # of like size
    index = gradindex.build(str(model_folder), data_file, tmp_path / "whole", **asked)
    modules = index.manifest.modules
    gpu = gpu_width(index.model.device, index.manifest.plan.eigen_dtype)
    held = max(held_bytes([module], 1, 4, gpu) for module in modules)
    with pytest.raises(ResourceError, match=r"--max-memory .* does not suffice: the model takes"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **asked,
                        max_memory=index.model.bytes + held - 1)
    monkeypatch.setattr("indexer.prepare.batch_bytes", lambda *_: 0)  # it differs from run to run
    made = []
    monkeypatch.setattr("indexer.fit.schedule.partitions",
                        lambda *asked: made.append(partitions(*asked)) or made[-1])
    gradindex.build(str(model_folder), data_file, tmp_path / "index", **asked,
                    max_memory=index.model.bytes + held)
    assert [module for [module] in made[0]] == modules
    found, expected = files_of(tmp_path / "index"), files_of(tmp_path / "whole")
    made, whole = (json.loads(files.pop("manifest.json")) for files in (found, expected))
    assert found == expected
    anchors, same = (manifest["calibration"].pop("anchors") for manifest in (made, whole))
    for one, other in zip(anchors, same, strict=True):  # scored with fewer queries at a time
        assert one == [*other[:2], pytest.approx(other[2], rel=1e-4)]
    assert {**made, "sha256": ""} == {**whole, "sha256": ""}
    with pytest.raises(ResourceError, match="the curvature of"):
        gradindex.open(tmp_path / "whole", max_memory=index.model.bytes).search(**QUESTION, k=3)


def test_a_dry_run_plans_the_partitions_of_the_build(
    model_folder, data_file, index_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("indexer.prepare.batch_bytes", lambda *_: 0)  # it differs from run to run
    made = []
    monkeypatch.setattr("indexer.fit.schedule.partitions",
                        lambda *asked: made.append(partitions(*asked)) or made[-1])
    index = gradindex.open(index_folder)
    modules = [module for module in index.manifest.modules if module.kind == "mlp"]
    held = held_bytes(modules[:2], 1, 4, gpu_width(
        index.model.device, index.manifest.plan.eigen_dtype))
    for room, count in ((held, 4), (int(1.2 * held), 2)):  # a tenth is left for what isn't foreseen
        asked = dict(SMALL, modules="mlp", max_memory=index.model.bytes + room)
        found = gradindex.estimate(str(model_folder), data_file, tmp_path / "index", **asked)
        assert f"sums of the fit, in {count} partitions" in found.memory_parts
        gradindex.build(str(model_folder), data_file, tmp_path / str(count), **asked)
        assert len(made[-1]) == count


def test_what_a_batch_takes_is_measured(make_model):
    """Most of it are logits, whose memory their gradient takes."""
    model = make_model("gpt_neox", vocab_size=50_000, dtype=torch.float32)
    random = np.random.default_rng(0)
    sample = [Record(n, random.integers(0, 50_000, 40).astype(np.int32), np.ones(40, bool),
                     [Part(n, "x", n + 1, 0, 1, 0)]) for n in range(16)]
    settings = FitSettings([], "model", 16, 400, 0)
    logits = 400 * 50_000 * 4
    found = batch_bytes(model, tracked_modules(model.network), sample, settings)
    assert logits < found < 2 * logits
    less = batch_bytes(model, tracked_modules(model.network), sample,
                       replace(settings, batch_tokens=40))
    assert found / 20 < less < found / 4


def test_a_search_in_little_memory_gives_the_same_answer(index_folder):
    """Curvature read module by module, the query reduced to rank 32, hits scored in parts."""
    free = gradindex.open(index_folder)
    least = free.model.bytes + 3 * 4 * max(
        file_entries(m, 1) for m in free.manifest.modules)
    bound = gradindex.open(index_folder, max_memory=least)
    settings = settle(Controls(), bound.manifest)
    assert len(list(query_gradient.together(bound.snapshot, settings.modules))) > 1
    assert list(query_gradient.together(free.snapshot, settings.modules)) == [settings.modules]
    assert query_gradient.rank_for(free.snapshot, 1, settings) is None
    assert query_gradient.rank_for(bound.snapshot, 1, settings) == query_gradient.LOW_RANK
    for controls in (dict(k=5, shortlist="all"), dict(k=3, shortlist="all", normalize="cosine"),
                     dict(k=3, shortlist="all", rank=2)):
        expected = free.search(**QUESTION, **controls)
        found = bound.search(**QUESTION, **controls)
        assert [hit.id for hit in found] == [hit.id for hit in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.influence == pytest.approx(other.influence, rel=1e-4)
            assert one.token_influence == pytest.approx(other.token_influence, rel=1e-3, abs=1e-3)
            assert one.layer_influence == pytest.approx(other.layer_influence, rel=1e-3, abs=1e-3)
            assert one.code_score == pytest.approx(other.code_score, rel=1e-4)
