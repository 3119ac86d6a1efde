"""A build on a Ray cluster of two nodes on this machine: the bytes of one process."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from test_build import files_of

import gradindex
import gradindex.model
from gradindex.errors import GradindexError, InputError

ray = pytest.importorskip("ray")

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def one_thread():
    """A worker takes as many cores as the build has threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def alone(model_folder, data_file, tmp_path, one_thread):
    """The files of an index built by one process."""
    gradindex.build(str(model_folder), data_file, tmp_path / "alone", **SMALL)
    return files_of(tmp_path / "alone")


def process_of(lock):
    """The process of the worker that holds a lock."""
    return int(lock.read_text().split()[1])


def gone(process):
    """Whether a process ended, in ten seconds at most."""
    for _ in range(1000):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def command(model, data, out, cluster):
    """A build of the same index from the command line."""
    flags = [part for name, value in SMALL.items()
             for part in (f"--{name.replace('_', '-')}",
                          ",".join(value) if isinstance(value, list) else str(value))]
    return [sys.executable, "-m", "gradindex", "build", str(model), str(data), "-o", str(out),
            *flags, "--ray", cluster.address]


@pytest.mark.parametrize("moment", ["while it starts", "once a block is summed"])
def test_the_bytes_of_one_process_though_a_worker_is_killed(
    moment, cluster, alone, model_folder, data_file, tmp_path
):
    out, killed = tmp_path / "index", []

    def kill():
        """One of the two; the other is watched."""
        while not (all((out / f"shard.{number}").is_file() and
                       (out / f"shard.{number}").stat().st_size for number in (1, 2)) and
                   (moment == "while it starts" or
                    list(out.glob("curvature.partial/covariance-0-*")))):
            time.sleep(0.002)
        killed.extend(process_of(out / f"shard.{number}") for number in (1, 2))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = gradindex.build(str(model_folder), data_file, out, **SMALL, ray=cluster.address,
                            ray_workers=2)
    killer.join()
    assert files_of(out) == alone
    assert len(found) == 52
    assert not ray.is_initialized() and all(map(gone, killed))


def test_a_killed_driver_goes_on(cluster, alone, model_folder, data_file, tmp_path):
    out = tmp_path / "index"
    again = command(model_folder, data_file, out, cluster)
    driver = subprocess.Popen(again, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    while not list(out.glob("segments/000000")):
        assert driver.poll() is None
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    ended = subprocess.run(again, capture_output=True, text=True, env=ONE_THREAD, timeout=120)
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
    loaded = gradindex.model.ModelSource(str(model_folder)).load().network
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


def test_a_terminated_driver_goes_on(cluster, alone, model_folder, data_file, tmp_path):
    """As one without Ray does, which takes the signal for itself."""
    out = tmp_path / "index"
    driver = subprocess.Popen(command(model_folder, data_file, out, cluster), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD)
    while not list(out.glob("curvature.partial/covariance*")):
        assert driver.poll() is None
        time.sleep(0.005)
    driver.send_signal(signal.SIGTERM)
    said, errors = driver.communicate()
    assert (driver.returncode, said) == (130, "")
    assert errors.rstrip().endswith("goes on when the same command runs again.")
    assert "Traceback" not in errors and "ray" not in errors.lower()
    gradindex.build(str(model_folder), data_file, out, **SMALL, ray=cluster.address)
    assert files_of(out) == alone
