"""A device that fails, that is too small, that computes less well than it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradindex
from gradindex.influence.gradients import backward
from gradindex.influence.split_batches import Splits
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from indexer.encode import encode_batches
from indexer.fit.eigen import eigenvectors, eigenvectors_of_all
from support.indexes import APPLES, SMALL, SMALL_FLAGS, influences, records_in
from support.models import random_network
from support.pretend.ledger import LEDGER
from support.waiting import HANG

COMMAND = [sys.executable, "-m", "gradindex"]


def command(*arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True,
                          timeout=HANG, env={**os.environ, **variables}, check=False)


@pytest.mark.slow
def test_a_device_that_is_lost_costs_no_more_than_a_kill(model_folder, data_file, tmp_path):
    build = ("build", model_folder, data_file, "-o", tmp_path / "index", *SMALL_FLAGS,
             "--fit-sequences", "32")
    whole = gradindex.build(str(model_folder), data_file, tmp_path / "whole", fit_sequences=32,
                            **SMALL)
    LEDGER.forget()
    for after in (2500, 9000):
        lost = command(*build, PRETEND_LOST_AFTER=str(after))
        assert lost.returncode == 1, lost.stderr
        last = lost.stderr.strip().splitlines()[-1]
        assert "the GPU failed (CUDA error: " in last
        assert "goes on from it" in last and "Traceback" not in lost.stderr
    done = command(*build)
    assert done.returncode == 0, done.stderr
    found = influences(gradindex.open(tmp_path / "index"))
    np.testing.assert_allclose(list(found.values()), list(influences(whole).values()), rtol=1e-5,
                               atol=1e-4)
    search = ("search", tmp_path / "index", "-p", APPLES["prompt"], "-c", APPLES["completion"],
              "--format", "json")
    lost = command(*search, PRETEND_LOST_AFTER="500")
    assert lost.returncode == 1 and "the GPU failed" in lost.stderr
    assert json.loads(command(*search).stdout)["hits"]


@pytest.mark.slow
def test_a_device_that_holds_too_little(model_folder, data_file, tmp_path):
    weights = sum(file.stat().st_size for file in Path(model_folder).glob("*.safetensors"))
    build = ("build", model_folder, data_file, "-o", tmp_path / "index", *SMALL_FLAGS)
    none = command(*build, PRETEND_CAPACITY=str(weights // 2))
    assert none.returncode == 4 and "the model takes" in none.stderr
    assert "cuda) has" in none.stderr and "Use another GPU" in none.stderr
    little = command(*build, PRETEND_CAPACITY=str(weights + 20_000))
    assert little.returncode == 4 and "out of memory" in little.stderr, little.stderr
    assert "--max-memory SIZE" in little.stderr
    assert "Traceback" not in little.stderr and not (tmp_path / "index" / "segments").exists()


def test_batches_are_halved_where_memory_runs_out(model_folder, data_file, tmp_path, monkeypatch):
    index = gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)
    model, codes, records = index.model, index.snapshot.codes, records_in(index)

    def encoded(splits):
        vectors = np.zeros((len(records), SMALL["bits"]), np.float32)
        for rows, part in encode_batches(model, codes, records, 4096, splits):
            vectors[rows] = part
        return vectors

    LEDGER.forget()
    expected, used = encoded(Splits()), LEDGER.used[0]
    monkeypatch.setattr(LEDGER, "capacity", used + (LEDGER.peak[0] - used) // 2)
    splits = Splits()
    np.testing.assert_allclose(encoded(splits), expected, rtol=1e-4, atol=1e-3)
    assert splits.halved[0] == (splits.halved[0][0], len(records))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_half_precision_passes_are_in_tf32(sequences, dtype):
    network = random_network("llama", dtype).to("cuda").requires_grad_(False)
    model = LanguageModel(network, None, ModelSource(network))
    seen, inside = set(), set()
    # the network's own products stay as they are: they may be of positions' angles
    network.model.layers[0].register_forward_hook(
        lambda *_: inside.add(torch.backends.cuda.matmul.fp32_precision))
    with torch.no_grad():
        backward(model, tracked_modules(network), model.batch(sequences),
                 lambda *_: seen.add(torch.backends.cuda.matmul.fp32_precision))
    assert seen == {"ieee" if dtype == torch.float32 else "tf32"}
    assert inside == {"none"} and torch.backends.cuda.matmul.fp32_precision == "none"


DEVICE = torch.device("cuda", 0)


def covariances(sizes, *devices):
    """Matrices with names, on one device after the other."""
    random = torch.Generator().manual_seed(0)
    for number, n in enumerate(sizes):
        rows = torch.randn(3 * n, n, dtype=torch.float64, generator=random)
        yield f"map {number}", rows.T @ rows, devices[number % len(devices)] if devices else None


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_eigenvectors_from_the_device_are_those_of_the_host(dtype, within):
    sizes, said = (5, 9, 5, 7, 9), []
    found = list(eigenvectors_of_all(covariances(sizes, DEVICE), dtype, said.append))
    assert not said and [len(vectors) for vectors in found] == list(sizes)
    for (name, matrix, _), vectors in zip(covariances(sizes), found, strict=True):
        assert vectors.dtype == torch.float64 and vectors.device.type == "cpu"
        torch.testing.assert_close(vectors, eigenvectors(matrix, name), rtol=within, atol=within)


@pytest.mark.parametrize("broken, count, reason", [
    (None, 1, "the GPU's eigenvectors are unsound (residual"),
    (torch.linalg.LinAlgError("failed to converge"), 2, "the GPU failed (failed to converge"),
    (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"), 2, "the GPU failed (cusolver"),
])
def test_what_the_device_decomposes_wrongly_the_host_does(broken, count, reason, monkeypatch):
    real = torch.linalg.eigh

    def eigh(matrices):
        values, vectors = real(matrices)
        if matrices.device.type == "cuda" and broken is not None:
            raise broken
        if matrices.device.type == "cuda":
            vectors[0, 0] += 0.1
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    said = []
    found = list(eigenvectors_of_all(covariances((6, 6), DEVICE), torch.float64, said.append))
    assert len(said) == count
    assert said[0].startswith(f"map 0 is decomposed on the host: {reason}")
    for (name, matrix, _), vectors in zip(covariances((6, 6)), found, strict=True):
        torch.testing.assert_close(vectors, eigenvectors(matrix, name))


def test_matrices_are_decomposed_fewer_at_a_time_where_memory_runs_out(monkeypatch):
    real, stacks, said = torch.linalg.eigh, [], []

    def eigh(matrices):
        if matrices.device.type == "cuda":
            stacks.append(len(matrices))
            if len(matrices) > 1 or len(stacks) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    found = list(eigenvectors_of_all(covariances((6,) * 4, DEVICE), torch.float64, said.append))
    assert stacks == [4, 2, 1, 1, 2, 1, 1]
    assert [line.partition(" is ")[0] for line in said] == ["map 2", "map 3"]
    for (name, matrix, _), vectors in zip(covariances((6,) * 4), found, strict=True):
        torch.testing.assert_close(vectors, eigenvectors(matrix, name))


def test_each_matrix_is_decomposed_on_its_own_device():
    LEDGER.forget()
    list(eigenvectors_of_all(covariances((6, 6, 6), torch.device("cuda", 1)), torch.float64,
                             pytest.fail))
    assert LEDGER.devices == {1}
