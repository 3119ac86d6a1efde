"""A build that several processes share: the same bytes, whoever does what, and clear refusals."""

import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import gradindex
from gradindex.errors import GradindexError, InputError, ResourceError
from gradindex.progress import Progress
from gradindex.storage.locks import one_of_writers, only_writer
from indexer import shards
from indexer.shards import BuildStage, Shard, parse_shard
from indexer.state import BuildState
from support.indexes import SMALL, SMALL_FLAGS, files_of
from support.waiting import HANG, IN_VAIN, until


@pytest.fixture(autouse=True)
def short_naps(monkeypatch):
    monkeypatch.setattr(shards, "POLL", 0.01)


def share(model_folder, data_file, out, of, **changes):
    """Run all shards at once, in threads; what each returned."""
    def one(number):
        return gradindex.build(str(model_folder), data_file, out, **{**SMALL, **changes},
                               shard=f"{number}/{of}", wait=HANG)

    with ThreadPoolExecutor(of) as pool:
        waited = [pool.submit(one, number) for number in range(of)]
    for shard in sorted(waited, key=lambda shard: "in vain" in str(shard.exception())):
        shard.result()  # raises what one failed on before that others waited for it
    return [shard.result() for shard in waited]


@pytest.mark.parametrize("of", [2, 3])
def test_shards_and_merge_give_the_bytes_of_one_process(
    of, model_folder, data_file, index_folder, tmp_path
):
    out = tmp_path / "index"
    assert share(model_folder, data_file, out, of) == [None] * of
    with pytest.raises(InputError, match=r"unfinished build.*gradindex merge"):
        gradindex.open(out)
    found = gradindex.merge(out)
    assert files_of(out) == files_of(index_folder)
    assert len(found) == len(gradindex.open(index_folder))
    assert gradindex.build(str(model_folder), data_file, out, **SMALL, shard="1/9") is None
    gradindex.merge(out)
    assert files_of(out) == files_of(index_folder)


def test_shards_of_several_models(model_folder, other_folder, data_file, tmp_path):
    also = {"also": {"base": str(other_folder)}}
    gradindex.build(str(model_folder), data_file, tmp_path / "whole", **SMALL, **also)
    share(model_folder, data_file, tmp_path / "index", 2, **also)
    index = gradindex.merge(tmp_path / "index")
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")
    assert index.manifest.also.keys() == {"base"}


def test_one_process_finishes_what_shards_began(model_folder, data_file, index_folder, tmp_path):
    """Shard 0 of 2 alone comes as far as the first sum; the blocks of both are used."""
    out = tmp_path / "index"
    with pytest.raises(GradindexError, match=r"in vain for shard 1 of 2: covariance.*--shard 1/2"):
        gradindex.build(str(model_folder), data_file, out, **SMALL, shard="0/2", wait=IN_VAIN)
    with pytest.raises(GradindexError, match="in vain for shard 0 of 2"):
        gradindex.build(str(model_folder), data_file, out, **SMALL, shard="1/2", wait=IN_VAIN)
    waiting = sorted(path.name for path in (out / "curvature.partial").iterdir())
    assert waiting == ["covariance-0-4.000001.safetensors", "covariance-0-4.000002.safetensors",
                       "covariance-0-4.000003.safetensors", "covariance-0-4.safetensors",
                       "fit.json"]
    with pytest.raises(InputError, match="can't be merged yet: the curvature is not fitted"):
        gradindex.merge(out)
    gradindex.build(str(model_folder), data_file, out, **SMALL)
    assert files_of(out) == files_of(index_folder)


def test_no_shard_runs_far_ahead(model_folder, data_file, index_folder, tmp_path, monkeypatch):
    """Blocks wait on the disk for the first shard: at most AHEAD of each of the others."""
    monkeypatch.setattr("indexer.fit.schedule.AHEAD", 1)
    out = tmp_path / "index"
    for shard, said in (("0/2", "shard 1 of 2"), ("1/2", "shard 0 of 2: covariance")):
        with pytest.raises(GradindexError, match=f"in vain for {said}"):
            gradindex.build(str(model_folder), data_file, out, **SMALL, shard=shard, wait=IN_VAIN)
    assert sorted(path.name for path in out.glob("curvature.partial/covariance-0-4.0*")) == [
        "covariance-0-4.000001.safetensors", "covariance-0-4.000002.safetensors"]
    share(model_folder, data_file, out, 2)
    gradindex.merge(out)
    assert files_of(out) == files_of(index_folder)


def test_a_shard_of_another_plan_keeps_a_build_from_beginning_anew(
    model_folder, data_file, tmp_path
):
    """It would add its sums to the new build's."""
    out = tmp_path / "index"
    with pytest.raises(GradindexError, match="in vain for"):
        gradindex.build(str(model_folder), data_file, out, **SMALL, shard="0/2", wait=IN_VAIN)
    shutil.rmtree(out / "curvature.partial")
    with one_of_writers(out, 1, "one of 2 shards"), \
            pytest.raises(InputError, match="seed: 0 before, 5 now"):
        gradindex.build(str(model_folder), data_file, out, **SMALL, seed=5, shard="0/2",
                        wait=IN_VAIN)
    assert BuildState.resumed(out).plan.seed == 0
    with pytest.raises(GradindexError, match="in vain for"):
        gradindex.build(str(model_folder), data_file, out, **SMALL, seed=5, shard="0/2",
                        wait=IN_VAIN)
    assert BuildState.resumed(out).plan.seed == 5


def test_what_is_done_needs_no_room_on_the_disk(model_folder, data_file, tmp_path, monkeypatch):
    out = tmp_path / "index"
    share(model_folder, data_file, out, 2)
    usage = shutil.disk_usage(out)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=600))
    shutil.move(out / "segments" / "000002", out / "segments" / "000002.partial")
    with pytest.raises(ResourceError, match=r"the codes need .* and the fit 0 bytes; .* 600 bytes"):
        gradindex.build(str(model_folder), data_file, out, **SMALL)
    shutil.move(out / "segments" / "000002.partial", out / "segments" / "000002")
    gradindex.merge(out)


def test_merge_names_what_is_missing(model_folder, data_file, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(InputError, match="is no folder"):
        gradindex.merge(out)
    out.mkdir()
    with pytest.raises(InputError, match="holds no unfinished build"):
        gradindex.merge(out)
    share(model_folder, data_file, out, 2)
    shutil.move(out / "segments" / "000002", out / "segments" / "000002.partial")
    with pytest.raises(InputError, match=r"1 of 4 segments are not encoded \(000002"):
        gradindex.merge(out)


def test_another_plan_is_refused(model_folder, data_file, tmp_path):
    out = tmp_path / "index"
    share(model_folder, data_file, out, 2)
    for shard in ("0/2", "1/2"):
        with pytest.raises(InputError, match=r"damping: 0\.1 before, 0\.2 now"):
            gradindex.build(str(model_folder), data_file, out, **SMALL, damping=0.2, shard=shard)


def test_a_later_shard_waits_for_a_build_that_may_begin_anew(model_folder, data_file, tmp_path):
    """What the first shard read for another command, without fitting, is not joined."""
    out = tmp_path / "index"
    for bits, shard in ((1024, "0/2"), (512, "1/2")):
        with pytest.raises(GradindexError, match="in vain for"):
            gradindex.build(str(model_folder), data_file, out, **{**SMALL, "bits": bits},
                            shard=shard, wait=IN_VAIN)
        shutil.rmtree(out / "curvature.partial", ignore_errors=True)


def test_who_may_write_beside_whom(tmp_path):
    three = "one of 3 shards"
    with one_of_writers(tmp_path, 0, three), one_of_writers(tmp_path, 1, three):
        said = f"another process is shard 1 .* process {os.getpid()} on "
        with pytest.raises(GradindexError, match=said), one_of_writers(tmp_path, 1, three):
            pass
        said = f"is being built by process {os.getpid()} on .*, one of 3 shards; this is one of 2"
        with pytest.raises(GradindexError, match=said), \
                one_of_writers(tmp_path, 2, "one of 2 shards"):
            pass
        with pytest.raises(GradindexError, match="another process is writing"), \
                only_writer(tmp_path, "a test"):
            pass
    with only_writer(tmp_path, "a test"), \
            pytest.raises(GradindexError, match=r"another process is writing.*a test"), \
            one_of_writers(tmp_path, 0, three):
        pass
    (tmp_path / "shard.1").write_text("process 7 on gone, one of 2 shards")  # a killed one's
    with one_of_writers(tmp_path, 0, three):
        pass
    (tmp_path / "shard.1").unlink()
    assert not list(tmp_path.iterdir())


def test_a_killed_shard_runs_again(model_folder, data_file, tmp_path):
    """SIGKILL of one of two processes in the fit; the other waits, and both end."""
    out, threads = tmp_path / "index", torch.get_num_threads()

    def start(number):
        return subprocess.Popen(
            [sys.executable, "-m", "gradindex", "build", str(model_folder), str(data_file), "-o",
             str(out), *SMALL_FLAGS, "--shard", "auto"], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(number), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})

    first, second = start(0), start(1)
    until(lambda: first.poll() is not None or second.poll() is not None
          or list(out.glob("curvature.partial/covariance-0-*")))
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    again = start(1)
    said = [child.communicate(timeout=HANG)[1] for child in (first, again)]
    assert [first.returncode, again.returncode] == [0, 0], said
    assert f"shard 0/2 is done; when all are: gradindex merge {out}" in said[0]
    gradindex.merge(out)
    alone = tmp_path / "alone"
    torch.set_num_threads(1)  # as the shards
    try:
        gradindex.build(str(model_folder), data_file, alone, **SMALL)
    finally:
        torch.set_num_threads(threads)
    assert files_of(out) == files_of(alone)


# ---- waiting


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: time that passes while a shard sleeps, and never else."""
    now = [0.0]
    monkeypatch.setattr(shards, "time", SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)))
    return now


def test_waiting_ends_when_nothing_is_missing_and_counts_from_the_last_news(clock):
    left = [[3, 5], [3, 5], [5], []]
    shard = Shard(0, 4, patience=math.inf)
    shard.complete(BuildStage("blocks"), lambda: left.pop(0))
    assert not left
    begun = clock[0]
    states = iter([[1], [1], [1, 2]])
    with pytest.raises(GradindexError, match=r"shards 1, 2 of 4: blocks \(2 missing\)"):
        Shard(0, 4, patience=0.05).complete(BuildStage("blocks"), lambda: next(states, [1, 2]))
    assert clock[0] - begun >= 0.05


def test_a_shard_says_whom_it_waits_for(monkeypatch, clock):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, line: said.append(line))
    Shard(1, 3).complete(BuildStage("eigenvectors", 2), lambda: [3, 2] if clock[0] < 0.05 else [])
    assert said == ["waiting for shards 0, 2 of 3: eigenvectors of partition 2"]


@pytest.mark.parametrize("text, environment, expected", [
    ("2/8", {}, (2, 8)), ("0/1", {}, (0, 1)),
    ("auto", {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, (3, 4)),
    ("auto", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "5",
              "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "8"}, (3, 5)),
    ("auto", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1",
              "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "0"}, (0, 1)),
    ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
])
def test_a_shards_number(text, environment, expected):
    shard = parse_shard(text, environment=environment)
    assert (shard.number, shard.of) == expected


@pytest.mark.parametrize("text", ["8/8", "-1/8", "1", "a/b", "1/0", "", "1/2/3"])
def test_a_number_that_is_none(text):
    with pytest.raises(InputError, match="expected i/n"):
        parse_shard(text)


@pytest.mark.parametrize("own, least, most, count, said", [
    (3, 3, 3, 1, "one task, number 3; .* say --shard i/n"),
    (6, 0, 6, 4, "4 tasks numbered 0 to 6, .*without gaps"),
    (5, 2, 5, 2, "2 tasks numbered 2 to 5, .*without gaps"),
    (9, 0, 7, 8, "SLURM_ARRAY_TASK_ID is 9, of 8 from 0 on"),
    (1, 2, 3, 2, "SLURM_ARRAY_TASK_ID is 1, of 2 from 2 on"),
])
def test_an_array_that_does_not_number_shards(own, least, most, count, said):
    """One failed task that is run again, gaps, steps, and what can't be."""
    environment = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in
                   (("ID", own), ("MIN", least), ("MAX", most), ("COUNT", count))}
    with pytest.raises(InputError, match=f"--shard auto: .*{said}"):
        parse_shard("auto", environment=environment)


@pytest.mark.parametrize("environment, said", [
    ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is ''; expected a number"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "two"}, "SLURM_NTASKS is 'two'; expected a number"),
    ({"SLURM_ARRAY_TASK_ID": "-1", "SLURM_ARRAY_TASK_COUNT": "1"}, "TASK_ID is '-1'; expected a"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, of 2 from 0 on"),
])
def test_what_a_starter_says_is_no_number(environment, said):
    with pytest.raises(InputError, match=said):
        parse_shard("auto", environment=environment)


def test_auto_without_a_starter():
    with pytest.raises(InputError, match="Say --shard i/n"):
        parse_shard("auto", environment={"RANK": "1"})
