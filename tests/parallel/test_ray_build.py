"""A build on a Ray cluster of two nodes on this machine: the bytes of one process."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import gradindex
import gradindex.model.network
from gradindex.errors import GradindexError, InputError
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage.locks import one_of_writers
from indexer.build_request import make_request
from indexer.fit.folder import FitFolder
from indexer.fit.schedule import Fit
from indexer.fit.units import FitUnits
from indexer.parallel import ray_build
from indexer.parallel.ray_build import BuildWorkers, Receipt, WorkerJob, _Worker
from indexer.prepare import load_model, prepare_build
from indexer.shards import OVER_RAY, BuildStage, Shard
from indexer.state import BuildState
from support.clusters import two_nodes
from support.indexes import SMALL, SMALL_FLAGS, files_of
from support.needed import library
from support.waiting import HANG, IN_VAIN, is_gone, struck, until

ray = library("ray")

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster():
    with two_nodes(num_cpus=1) as cluster:
        yield cluster


@pytest.fixture
def alone(model_folder, data_file, tmp_path, one_thread):
    """The files of an index built by one process."""
    gradindex.build(str(model_folder), data_file, tmp_path / "alone", **SMALL)
    return files_of(tmp_path / "alone")


class Heard(Progress):
    """Notes what is said, and does `then` at it."""

    def __init__(self, then=lambda line: None):
        super().__init__()
        self.lines, self._then = [], then

    def say(self, line):
        self.lines.append(line)
        self._then(line)


@pytest.fixture
def begun(model_folder, data_file, tmp_path, one_thread):
    """The folder of a build whose first block alone is summed."""
    with pytest.raises(GradindexError, match="in vain for shards 1, 2, 3 of 4"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL, shard="0/4",
                        wait=IN_VAIN)
    return tmp_path / "index"


def process_of(lock):
    """The process of the worker that holds a lock."""
    return int(lock.read_text().split()[1])


def gone(process):
    """Wait until a process ended."""
    return until(lambda: is_gone(process))


def command(model, data, out, cluster):
    """A build of the same index from the command line."""
    return [sys.executable, "-m", "gradindex", "build", str(model), str(data), "-o", str(out),
            *SMALL_FLAGS, "--ray", cluster.address]


@pytest.mark.parametrize("moment", [
    pytest.param("while it starts", marks=pytest.mark.slow), "once a block is summed"])
def test_the_bytes_of_one_process_though_a_worker_is_killed(
    moment, cluster, alone, model_folder, data_file, tmp_path
):
    out, killed, done = tmp_path / "index", [], threading.Event()

    def kill():
        """One of those that are there; the other is watched."""
        there = []
        while not there or (moment == "once a block is summed" and
                            not list(out.glob("curvature.partial/covariance-0-*"))):
            if done.wait(0.002):
                return
            there = [lock for lock in out.glob("shard.[12]") if lock.stat().st_size]
        killed.extend(map(process_of, there))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = gradindex.build(str(model_folder), data_file, out, **SMALL, ray=cluster.address,
                                ray_workers=2)
    finally:
        done.set()
        killer.join()
    assert files_of(out) == alone
    assert len(found) == 52
    assert not ray.is_initialized() and killed and all(map(gone, killed))


def test_a_model_named_from_another_folder(
    cluster, alone, model_folder, data_file, tmp_path, monkeypatch
):
    """Workers have the working directory of the cluster."""
    shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    gradindex.build("./model", data_file, "index", **SMALL, ray=cluster.address)
    there, here = (json.loads((tmp_path / name / "manifest.json").read_bytes())
                   for name in ("alone", "index"))
    assert there["files"] == here["files"]


@pytest.mark.slow
def test_a_worker_out_of_reach_is_ended_before_another_does_its_unit(
    cluster, alone, model_folder, data_file, tmp_path, monkeypatch
):
    """It may live, and hold its lock."""
    out, get, reached = tmp_path / "index", ray.get, []

    def get_but_once(reference):
        found = get(reference)
        if isinstance(found, Receipt) and (out / "curvature.partial").is_dir() and not reached:
            reached.append(process_of(out / "shard.1"))
            raise ray.exceptions.ActorUnavailableError("the network broke", b"0" * 16)
        return found

    monkeypatch.setattr(ray, "get", get_but_once)
    heard = Heard()
    gradindex.build(str(model_folder), data_file, out, **SMALL, ray=cluster.address, ray_workers=1,
                    progress=heard)
    assert any("the network broke" in line for line in heard.lines)
    assert gone(*reached) and files_of(out) == alone


@pytest.mark.slow
def test_what_is_waited_for(cluster, alone, model_folder, data_file, tmp_path, monkeypatch):
    """A worker that has no place in the cluster, and two that load."""
    monkeypatch.setattr(ray_build, "WORKER_PATIENCE", 0.2)
    out = tmp_path / "index"
    out.mkdir()
    locked, free = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as held:  # what workers wait for, while they load
            for number in (1, 2, 3):
                held.enter_context(one_of_writers(out, number, OVER_RAY))
            locked.set()
            free.wait()

    def then(line):
        if "1 of 3 have no process yet" in line:
            free.set()

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(HANG)
    heard = Heard(then)
    try:
        gradindex.build(str(model_folder), data_file, out, **SMALL, ray=cluster.address,
                        ray_workers=3, progress=heard)
    finally:
        free.set()
        holder.join()
    assert any("2 of 3 load the model" in line for line in heard.lines)
    assert files_of(out) == alone


@pytest.mark.slow
def test_an_error_of_the_folder_is_tried_again(
    cluster, alone, model_folder, data_file, begun, monkeypatch
):
    """Such as a shared file system has for a moment; in the end it is said."""
    monkeypatch.setattr(ray_build, "PAUSE", 0.1)
    [first] = begun.glob("curvature.partial/covariance-*.safetensors")
    odd = first.with_suffix(".000001.safetensors")
    odd.mkdir()
    (odd / "full").touch()
    heard = Heard()
    with pytest.raises(GradindexError, match=r"unit 1 of covariance failed 4 times: IsADirectory"
                                             r"Error: .*run the same command again to go on"):
        gradindex.build(str(model_folder), data_file, begun, **SMALL, ray=cluster.address,
                        ray_workers=2, progress=heard)
    assert sum("unit 1 of covariance failed: IsADir" in line for line in heard.lines) == 3

    def mend(line):
        if "unit 1 of covariance failed: IsADir" in line:
            (odd / "full").unlink()
            odd.rmdir()

    gradindex.build(str(model_folder), data_file, begun, **SMALL, ray=cluster.address,
                    ray_workers=2, progress=Heard(mend))
    assert not odd.exists() and files_of(begun) == alone


def test_an_unforeseen_error_is_one_line(cluster, model_folder, data_file, begun):
    """And no worker is left, though the connection is the user's and stays."""
    job = WorkerJob.of(make_request(str(model_folder), data_file, begun, **SMALL))
    ray.init(cluster.address, log_to_driver=False)
    processes = []

    def left():
        processes.extend(map(process_of, begun.glob("shard.*")))
        return [0]

    try:
        with (pytest.raises(GradindexError, match=r"^a worker failed in a way .*: KeyError: 'odd'$")
              as kept, BuildWorkers(cluster.address, 1, job, Progress()) as hands):
            hands.complete(BuildStage("odd"), left)
        assert kept.tb and ray.is_initialized() and processes and all(map(gone, processes))
    finally:
        ray.shutdown()


def test_a_worker_is_where_the_plan_says(model_folder, data_file, tmp_path, one_thread):
    """Whatever it would choose itself: what it can't have it refuses."""
    build = partial(make_request, str(model_folder), data_file, tmp_path / "index", **SMALL)
    with pytest.raises(GradindexError, match="in vain for shard 1 of 2"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL, dtype="float64",
                        shard="0/2", wait=IN_VAIN)
    worker = _Worker(WorkerJob.of(build(dtype="float64")), 1)
    assert worker.load() == Receipt()
    assert worker._prepared.model.dtype == torch.float64
    worker._stack.close()
    assert not list(tmp_path.glob("index/shard.*"))
    if not torch.cuda.is_available():
        state = BuildState.resumed(tmp_path / "index")
        state.saved_plan["device"] = "cuda"
        state.save()
        asked = build(dtype="float64")
        asked.plan = replace(asked.plan, device="cuda")
        receipt = _Worker(WorkerJob.of(asked), 1).load()
        assert receipt.error == "InputError" and "sees no CUDA GPU" in receipt.message


def test_a_worker_reads_once_what_units_of_a_stage_share(model_folder, data_file, begun):
    """The numbers of units done by a process each, though the files they share are gone."""
    asked = make_request(str(model_folder), data_file, begun, **SMALL)
    state = BuildState.resumed(begun)
    about = prepare_build(
        begun, *load_model(asked.source, "float32", state, Progress()), state, Progress())
    folder = begun / "curvature.partial"

    def worker():
        return FitUnits(about.model, about.run.records,
                        FitFolder(folder, about.tracked, about.settings, first=False), Progress())

    def files(pattern):
        return {path.name: {name: one.numpy().tobytes() for name, one in load_file(path).items()}
                for path in folder.glob(pattern)}

    def done(stage, units, shared, made):
        """What a process each leaves, what one leaves that reads once, and that it let go."""
        for unit in units:
            worker().do(stage, unit)
        apart = files(made)
        for name in apart:
            (folder / name).unlink()
        one = worker()
        one.do(stage, units[0])
        aside = {path: path.rename(folder / f"aside.{path.name}") for path in folder.glob(shared)}
        assert aside
        for unit in units[1:]:
            one.do(stage, unit)
        for path, where in aside.items():
            where.rename(path)
        assert len(apart) == len(units) and files(made) == apart
        one.forget()
        assert one._at_hand is None

    for block in (1, 2, 3):
        worker().do(BuildStage("covariance"), block)
    first = Fit(about.model, about.tracked, about.run.records, about.settings, folder, Progress(),
                Shard(0, 2))
    first._add_waiting(BuildStage("covariance"), first.folder.sums(BuildStage("covariance")))
    done(BuildStage("eigenvectors"), range(len(about.tracked)), "covariance-*", "*.eigenvectors.*")
    done(BuildStage("eigenvalues"), range(4), "*.eigenvectors.*", "eigenvalues-*")


def test_a_killed_driver_goes_on(cluster, alone, model_folder, data_file, tmp_path):
    out = tmp_path / "index"
    again = command(model_folder, data_file, out, cluster)
    driver = struck(again, signal.SIGKILL, lambda _: list(out.glob("segments/000000")),
                    lambda: shutil.rmtree(out, ignore_errors=True), env=ONE_THREAD)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    ended = subprocess.run(again, capture_output=True, text=True, env=ONE_THREAD, timeout=HANG)
    assert ended.returncode == 0, ended.stderr
    assert "next: gradindex search" in ended.stderr
    assert files_of(out) == alone


def test_an_error_of_a_worker_is_the_builds(cluster, model_folder, data_file, tmp_path, one_thread):
    """With no gradient finite the fit fails in a worker; the driver says why."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "final" in name)
    weights[name].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(GradindexError, match="sequences of the fit have a gradient that"):
        gradindex.build(str(model), data_file, tmp_path / "index", **SMALL, ray=cluster.address,
                        ray_workers=1)


def test_what_ray_can_not_do(model_folder, data_file, tmp_path):
    loaded = LanguageModel.load(ModelSource(str(model_folder))).network
    with pytest.raises(InputError, match="got an object"):
        gradindex.build(loaded, data_file, tmp_path / "index", **SMALL, ray="local")
    with pytest.raises(InputError, match="exclude each other"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL, ray="local",
                        shard="0/2")
    for address, said in (("127.0.0.1:1", "no cluster is there"), ("x", "expected auto or host"),
                          ("127.0.0.1:99999", "no cluster is there")):
        with pytest.raises(InputError, match=f"--ray {address}: {said}"):
            gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL, ray=address)
    assert not (tmp_path / "index").exists()


@pytest.mark.slow
def test_a_terminated_driver_goes_on(cluster, alone, model_folder, data_file, tmp_path):
    """As one without Ray does, which takes the signal for itself."""
    out = tmp_path / "index"
    driver = struck(command(model_folder, data_file, out, cluster), signal.SIGTERM,
                    lambda _: list(out.glob("curvature.partial/covariance*")),
                    lambda: shutil.rmtree(out, ignore_errors=True), stdout=subprocess.PIPE,
                    env=ONE_THREAD)
    assert (driver.returncode, driver.stdout) == (130, ""), driver.stderr
    assert driver.stderr.rstrip().endswith("goes on when the same command runs again.")
    assert "Traceback" not in driver.stderr and "ray" not in driver.stderr.lower()
    gradindex.build(str(model_folder), data_file, out, **SMALL, ray=cluster.address)
    assert files_of(out) == alone
