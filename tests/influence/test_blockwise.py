"""Covariances split in blocks: products, fit, scores and codes against dense algebra in float64."""

import json

import numpy as np
import pytest
import torch

import gradindex
from gradindex.errors import InputError
from gradindex.influence import blockwise
from gradindex.influence.blockwise import (
    add_outer,
    enter,
    identity,
    leave,
    right,
    right_transposed,
    rotated,
    square_blocks,
    square_entries,
    symmetric,
)
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Curvature
from gradindex.influence.exact import exact_scores
from gradindex.influence.gradients import backward
from gradindex.influence.preconditioned import Preconditioned, precondition, query_coordinates
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.progress import Progress
from indexer.fit.eigen import eigenvectors
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import fit
from support.fits import records_of
from support.indexes import QUESTION, SMALL
from support.models import labels_of
from support.reference import covariances, ekfac_matrix, sequence_gradient


def dense(matrix):
    """[n, m] in blocks → [n, n]."""
    n, rows = matrix.shape
    full = matrix.new_zeros(n, n)
    for first in range(0, n, rows):
        size = min(rows, n - first)
        full[first : first + size, first : first + size] = matrix[first : first + size, :size]
    return full


def random_blocks(n, rows):
    """An orthogonal matrix [n, n] in blocks of so many rows, float64."""
    made = torch.zeros(n, rows, dtype=torch.float64)
    for block in square_blocks(made):
        block.copy_(torch.linalg.qr(torch.randn(len(block), len(block), dtype=torch.float64))[0])
    return made


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("strip", [2, 256])
def test_products_with_blocks_are_those_with_the_whole_matrix(rows, strip, monkeypatch):
    torch.manual_seed(rows)
    monkeypatch.setitem(blockwise.STRIP, "cpu", strip)
    q = random_blocks(7, rows)
    whole = dense(q)
    assert torch.equal(dense(identity(7, rows, q)), torch.eye(7, dtype=torch.float64))
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(right(x, q), x @ whole)
    torch.testing.assert_close(right_transposed(x, q), x @ whole.T)
    x[..., -1] = 1
    torch.testing.assert_close(right(x[..., :-1], q, bias=True), x @ whole)
    sums = torch.zeros(7, rows, dtype=torch.float64)
    add_outer(sums, x[0] - 1)
    add_outer(sums, x[0, :, :-1])  # with a bias: its 1 is left out
    for block in square_blocks(sums):
        block.copy_(symmetric(block))
    mask = dense(torch.ones(7, rows)).bool()
    outer = x[0].T @ x[0] + (x[0] - 1).T @ (x[0] - 1)
    torch.testing.assert_close(dense(sums), outer.where(mask, torch.zeros(())).double())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("rows", [(2, 4), (4, 7), (1, 1), (3, 2)])
def test_gradients_enter_and_leave_a_basis_of_blocks(rows, tokens):
    torch.manual_seed(0)
    module = Module("m", 0, "mlp", 4, 6, True)
    q_s, q_a = random_blocks(4, rows[0]), random_blocks(7, rows[1])
    a, d = (torch.randn(3, tokens, n, dtype=torch.float64) for n in (6, 4))
    g = d.mT @ torch.cat([a, torch.ones(3, tokens, 1, dtype=torch.float64)], -1)
    expected = dense(q_s).T @ g @ dense(q_a)
    torch.testing.assert_close(rotated(module, a, d, q_a, q_s), expected)
    torch.testing.assert_close(enter(g, q_a, q_s), expected)
    torch.testing.assert_close(leave(expected, q_a, q_s), g)


@pytest.mark.parametrize("blocks", [2, 5])
def test_fit_and_influence_are_those_of_covariances_without_what_is_between(
    make_model, sequences, tmp_path, blocks
):
    model = make_model("gpt2")
    modules = tracked_modules(model.network, "mlp,attention")
    records = records_of(sequences)
    settings = FitSettings(list(range(len(records))), "data", 2, 24, 5, covariance_blocks=blocks)
    ekfac, _ = fit(model, modules, lambda ids: [records[n] for n in ids], settings, tmp_path,
                   Progress())
    inputs, outputs = ({module.name: [] for module in modules} for _ in "AS")

    def each(module, a, d):
        inputs[module.name].append(torch.cat([a, torch.ones(1, a.shape[1], 1)], -1)[0])
        outputs[module.name].append(d[0])

    for sequence in sequences:
        backward(model, modules, model.batch([sequence]), each)
    names = [module.name for module in modules]
    gradients = [sequence_gradient(model.network, names, torch.from_numpy(ids).long(),
                                   labels_of(ids, scored)) for ids, scored, *_ in sequences]
    expected = np.zeros(len(sequences))
    for module in modules:
        found = ekfac[module.name]
        whole = []
        for matrix, q in zip(covariances(inputs[module.name], outputs[module.name]),
                             (found.eigenvectors_a, found.eigenvectors_s), strict=True):
            n, rows = len(matrix), -(-len(matrix) // blocks)
            assert q.shape == (n, rows)
            mask = dense(torch.ones(n, rows)).bool()
            parts = [eigenvectors(matrix[first : first + rows, first : first + rows], "a part")
                     for first in range(0, n, rows)]
            whole.append(torch.block_diag(*parts))
            assert (dense(q)[~mask] == 0).all()
            diagonal = dense(q).T @ matrix.where(mask, torch.zeros(())) @ dense(q)
            torch.testing.assert_close(diagonal, torch.diag(diagonal.diag()), rtol=0,
                                       atol=float(1e-9 * matrix.abs().max()))
        truth = torch.stack([(dense(found.eigenvectors_s).T @ g[module.name]
                              @ dense(found.eigenvectors_a)) ** 2 for g in gradients]).mean(0)
        torch.testing.assert_close(found.eigenvalues, truth, rtol=1e-8,
                                   atol=float(1e-12 * truth.max()))
        q_a, q_s = whole
        own = torch.stack([(q_s.T @ g[module.name] @ q_a) ** 2 for g in gradients]).mean(0)
        matrix = ekfac_matrix(q_s, q_a, own, float(0.1 * own.mean()))
        solved = torch.linalg.solve(matrix, gradients[4][module.name].flatten())
        expected += np.array([float(g[module.name].flatten() @ solved) for g in gradients])
    coordinates, _ = query_coordinates(model, modules, ekfac,
                                       model.batch([sequences[4]]), 0.1)
    scores = exact_scores(model, modules, Preconditioned(precondition(ekfac, coordinates)),
                          records, 24)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-6, atol=1e-9)


def test_codes_are_those_of_the_whole_eigenvectors():
    torch.manual_seed(2)
    module = Module("m", 0, "mlp", 5, 8, True)
    q_a, q_s, eigenvalues = random_blocks(9, 4), random_blocks(5, 3), torch.rand(5, 9).double()
    split, whole = (
        Codes([module], {"m": Curvature(a, s, eigenvalues)}, CodeSettings(64, 4, 1, 0.1))
        for a, s in ((q_a, q_s), (dense(q_a), dense(q_s))))
    assert split.digest == whole.digest
    a, d = (torch.randn(3, 6, n, dtype=torch.float64) for n in (8, 5))
    vectors = []
    for codes in (split, whole):
        vectors.append(codes.empty(3))
        codes.add(vectors[-1], module, a, d)
    torch.testing.assert_close(*vectors)


def test_an_index_of_blocks(model_folder, data_file, index_folder, tmp_path):
    out = tmp_path / "index"
    index = gradindex.build(str(model_folder), data_file, out, **SMALL, covariance_blocks=2)
    usual = gradindex.open(index_folder)
    module = index.manifest.modules[0]
    o, i = module.shape
    found = index.snapshot.ekfac[module.name]
    assert found.eigenvectors_a.shape == (i, -(-i // 2))
    assert found.eigenvectors_s.shape == (o, -(-o // 2))
    entries = sum(square_entries(one, 2) + one.shape[0] * one.shape[1]
                  for one in index.manifest.modules)
    sizes = [facts.size for name, facts in index.manifest.files.items()
             if name.startswith("curvature/") and name.endswith("safetensors")]
    assert sum(sizes) == pytest.approx(4 * entries, rel=0.05, abs=400 * len(sizes))
    assert gradindex.verify(out, str(model_folder)).sound
    answers = [one.search(**QUESTION, k=5, shortlist="all") for one in (index, usual)]
    assert [hit.influence for hit in answers[0]] != [hit.influence for hit in answers[1]]
    assert json.loads((out / "manifest.json").read_text())["plan"]["covariance_blocks"] == 2
    assert usual.manifest.plan.covariance_blocks == 1
    with pytest.raises(InputError, match="covariance_blocks: 2 before, 1 now"):
        gradindex.build(str(model_folder), data_file, out, **SMALL)
    for wrong, message in ((0, "expected a number above 0"), (2000, "expected 1 to 1024")):
        with pytest.raises(InputError, match=message):
            gradindex.build(str(model_folder), data_file, tmp_path / "other", **SMALL,
                            covariance_blocks=wrong)
    assert not (tmp_path / "other").exists()
