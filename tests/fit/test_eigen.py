"""Eigenvectors where the first method fails, and modules that have none."""

import io

import numpy as np
import pytest
import scipy.linalg
import torch

import gradindex
from gradindex.errors import GradindexError
from gradindex.progress import Progress
from gradindex.storage import manifest
from indexer.fit import eigen
from indexer.fit.eigen import eigenvectors
from search.study.describe import describe
from support.documents import save, tiny_tokens
from support.indexes import TINY, TINY_QUESTION, build_tiny, files_of, scores
from support.models import random_network

pytestmark = pytest.mark.usefixtures("few_queries")


@pytest.fixture
def data(tmp_path):
    return save(tmp_path / "data.npy", tiny_tokens(0))


def covariance():
    random = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return random.T @ random / 40


def truth(matrix):
    """NumPy's eigenvectors, their largest entry positive."""
    _, vectors = np.linalg.eigh(matrix.numpy())
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return vectors * np.where(largest < 0, -1, 1)


def fails(*_, **__):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def garbage(matrix, *_, **__):
    return torch.linalg.eigvalsh(matrix), torch.eye(len(matrix), dtype=matrix.dtype)


def not_numbers(matrix, *_, **__):
    return torch.full((len(matrix),), torch.nan), torch.full_like(matrix, torch.nan)


@pytest.mark.parametrize("broken", [fails, garbage, not_numbers])
def test_eigenvectors_come_from_the_fallback_where_the_first_method_fails(broken, monkeypatch):
    usual = eigenvectors(covariance(), "m/A")
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    fallback = eigenvectors(covariance(), "m/A")
    np.testing.assert_allclose(usual, truth(covariance()), atol=1e-10)
    np.testing.assert_allclose(fallback, truth(covariance()), atol=1e-10)


def test_eigenvectors_are_tried_once_more_on_a_matrix_that_is_moved_a_little(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    tries, real = [], scipy.linalg.eigh

    def eigh(matrix, driver):
        tries.append(matrix.copy())
        if len(tries) == 1:
            raise scipy.linalg.LinAlgError("no convergence")
        return real(matrix, driver=driver)

    monkeypatch.setattr(eigen.scipy.linalg, "eigh", eigh)
    found = eigenvectors(covariance(), "m/A")
    np.testing.assert_allclose(found, truth(covariance()), atol=1e-9)
    moved = tries[1] - tries[0]
    mean = float(covariance().diagonal().mean())
    np.testing.assert_allclose(moved, 1e-12 * mean * np.eye(12), atol=1e-15)


def test_a_build_on_fallback_eigenvectors_gives_the_same_scores(data, tmp_path, monkeypatch):
    right = scores(build_tiny(data, tmp_path / "whole"))
    monkeypatch.setattr(torch.linalg, "eigh", garbage)
    found = scores(build_tiny(data, tmp_path / "index"))
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4 * np.abs(right).max())


def test_eigenvectors_that_cannot_be_found_name_the_module(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        patch.setattr(eigen.scipy.linalg, "eigh", fails)
        with pytest.raises(GradindexError, match=(
                r"covariance gpt_neox\.layers\.0\.mlp\.dense_h_to_4h/A has no eigendecomposition "
                r"\(the algorithm failed to converge; .*--modules REGEX.*--fit-sequences")):
            build_tiny(data, tmp_path / "index")
    build_tiny(data, tmp_path / "index")
    build_tiny(data, tmp_path / "whole")
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")


def test_a_module_without_a_gradient_is_left_out_and_said(data, tmp_path):
    network = random_network("gpt_neox", torch.float32)
    with torch.no_grad():  # nothing of what dense_h_to_4h gives reaches the logits
        network.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.zero_()
    said, out = io.StringIO(), tmp_path / "index"
    searcher = gradindex.build(network, data, out, progress=Progress(said), **TINY)
    facts, gone = manifest.load(out), "gpt_neox.layers.1.mlp.dense_h_to_4h"
    assert [module.name for module in facts.modules] == [
        f"gpt_neox.layers.{place}" for place in ("0.mlp.dense_h_to_4h", "0.mlp.dense_4h_to_h",
                                                 "1.mlp.dense_4h_to_h")] + ["lm_head"]
    assert list(facts.fit["left_out"]) == [gone]
    assert not (out / "curvature" / f"{gone}.safetensors").exists()
    assert f"module {gone} is left out: it has no gradient on any of the 8 fit" in said.getvalue()
    assert describe(out)["fit"]["left_out"] == facts.fit["left_out"]
    found = searcher.search(**TINY_QUESTION)
    alone = gradindex.build(network, data, tmp_path / "alone",
                            modules=r"0\.mlp|1\.mlp\.dense_4h|head", **TINY)
    for hit, expected in zip(found, alone.search(**TINY_QUESTION), strict=True):
        assert hit.id == expected.id
        assert hit.influence == pytest.approx(expected.influence, rel=1e-5)
    assert gradindex.verify(out, model=network).sound
    gradindex.append(out, save(tmp_path / "more.npy", tiny_tokens(1, 2)), model=network)
    with pytest.raises(GradindexError, match=r"no tracked module has a gradient.*--modules"):
        gradindex.build(network, data, tmp_path / "none", modules=r"1\.mlp\.dense_h",
                        **{**TINY, "bits": 256})
