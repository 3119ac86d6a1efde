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
        assert "the GPU failed (CUDA error: unspecified launch failure)" in last
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
    assert little.returncode == 4 and "the bound is the GPU's" in little.stderr, little.stderr
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
    seen = set()
    with torch.no_grad():
        backward(model, tracked_modules(network), model.batch(sequences),
                 lambda *_: seen.add(torch.get_float32_matmul_precision()))
    assert seen == {"highest" if dtype == torch.float32 else "high"}
    assert torch.get_float32_matmul_precision() == "highest"


def covariances(sizes):
    random = torch.Generator().manual_seed(0)
    for number, n in enumerate(sizes):
        rows = torch.randn(3 * n, n, dtype=torch.float64, generator=random)
        yield f"map {number}", rows.T @ rows


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_eigenvectors_from_the_device_are_those_of_the_host(dtype, within):
    sizes, said = (5, 9, 5, 7, 9), []
    found = list(eigenvectors_of_all(covariances(sizes), torch.device("cuda"), dtype, said.append))
    assert not said and [len(vectors) for vectors in found] == list(sizes)
    for (name, matrix), vectors in zip(covariances(sizes), found, strict=True):
        assert vectors.dtype == torch.float64 and vectors.device.type == "cpu"
        torch.testing.assert_close(vectors, eigenvectors(matrix, name), rtol=within, atol=within)


@pytest.mark.parametrize("broken", ["one", "all"])
def test_what_the_device_decomposes_wrongly_the_host_does(broken, monkeypatch):
    real = torch.linalg.eigh

    def eigh(matrices):
        values, vectors = real(matrices)
        if matrices.device.type == "cuda" and broken == "all":
            raise torch.linalg.LinAlgError("failed to converge")
        if matrices.device.type == "cuda":
            vectors[0, 0] += 0.1
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    said = []
    found = list(eigenvectors_of_all(covariances((6, 6)), torch.device("cuda"), torch.float64,
                                     said.append))
    assert len(said) == {"one": 1, "all": 2}[broken]
    assert said[0].startswith("map 0 is decomposed on the host: the GPU's eigenvectors are unsound")
    for (name, matrix), vectors in zip(covariances((6, 6)), found, strict=True):
        torch.testing.assert_close(vectors, eigenvectors(matrix, name))
