"""The head and the embedding of a vocabulary against autograd and dense algebra in float64."""

import numpy as np
import pytest
import torch

from gradindex.influence import blockwise
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.exact import GradientSizes, collect, exact_scores
from gradindex.influence.gradients import backward, gradient
from gradindex.influence.preconditioned import (
    Preconditioned,
    precondition,
    query_coordinates,
    query_vectors,
)
from gradindex.model.tracked import tracked_modules
from indexer.encode import encode_batch
from support.fits import fitted, records_of
from support.models import labels_of, random_network
from support.reference import log_likelihood

# the families of tests/support/models.py, with the head tied to the embedding or not
NETWORKS = {
    "apart": ("gpt_neox", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied, positions": ("gpt2", {}),
    "padding": ("llama", {"tie_word_embeddings": True, "pad_token_id": 5}),
    "scaled": ("gemma3_text", {"hidden_size": 12, "num_hidden_layers": 2, "head_dim": 6,
                               "num_attention_heads": 2, "num_key_value_heads": 1,
                               "intermediate_size": 20}),
    "bias": ("gptj", {"n_embd": 12, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
}


@pytest.fixture(params=NETWORKS)
def model(request, make_model, monkeypatch):
    family, changes = NETWORKS[request.param]
    monkeypatch.setitem(random_network.__globals__["SIZES"], family,
                        random_network.__globals__["SIZES"].get(family, {}))
    return make_model(family, **changes)


def over_vocabulary(model):
    return [module for module in tracked_modules(model.network, "everything") if module.diagonal]


def true_gradients(model, modules, sequence):
    """∂ log p / ∂ W of whole weights, tied ones by all of their uses: by plain autograd."""
    ids, scored = sequence[:2]
    parts = [[getattr(model.network.get_submodule(module.name), name)
              for name in ("weight", "bias")[: 1 + module.bias]] for module in modules]
    parameters = [one for part in parts for one in part]
    for one in parameters:
        one.requires_grad_()
    said = log_likelihood(model.network, torch.from_numpy(ids).long(), labels_of(ids, scored))
    found = iter(torch.autograd.grad(said, parameters, allow_unused=True))
    model.network.requires_grad_(False)
    gradients = {}
    for module, part in zip(modules, parts, strict=True):
        own = [torch.zeros_like(one) if g is None else g
               for one, g in zip(part, (next(found) for _ in part), strict=True)]
        gradients[module.name] = own[0] if len(own) == 1 else \
            torch.cat([own[0], own[1][:, None]], 1)
    return gradients


def test_gradients_are_those_of_autograd(model, sequences):
    modules = over_vocabulary(model)
    assert [module.kind for module in modules] == (
        ["embeddings", "head"] if not model.network.config.tie_word_embeddings else ["head"])
    found = {}
    backward(model, modules, model.batch(sequences),
             lambda module, a, d: found.__setitem__(module.name, gradient(module, a, d)))
    for row, sequence in enumerate(sequences):
        for name, true in true_gradients(model, modules, sequence).items():
            torch.testing.assert_close(found[name][row], true, rtol=1e-5, atol=1e-6)
            assert true.any() or len(sequence[0]) < 3


@pytest.mark.parametrize("largest", [1, 60, 1 << 22])
def test_scores_sizes_and_curvature_are_those_of_dense_algebra(
    model, sequences, tmp_path, largest, monkeypatch
):
    """Whatever is formed at once: a row of the vocabulary, some rows, or all of them."""
    for place in ("blockwise", "preconditioned"):
        monkeypatch.setattr(f"gradindex.influence.{place}.LARGEST_BLOCK", largest)
    modules = over_vocabulary(model)
    ekfac = fitted(model, modules, sequences, tmp_path)
    true = [true_gradients(model, modules, sequence) for sequence in sequences]
    dense = {}
    for module in modules:
        c = ekfac[module.name]
        for vectors, side in zip((c.eigenvectors_s, c.eigenvectors_a), module.shape, strict=True):
            assert torch.equal(vectors, torch.ones(side, 1, dtype=torch.float64))
        expected = torch.stack([g[module.name] for g in true]).square().mean(0)
        torch.testing.assert_close(c.eigenvalues, expected, rtol=1e-5,
                                   atol=float(1e-9 * expected.max()))
        dense[module.name] = torch.diag(expected.flatten() + 0.1 * expected.mean())
    solved = [{name: torch.linalg.solve(dense[name], g.flatten()) for name, g in own.items()}
              for own in true]
    expected = np.array([sum(float(one[name] @ g.flatten()) for name, g in solved[4].items())
                         for one in ({n: g.flatten() for n, g in own.items()} for own in true)])

    coordinates, _ = query_coordinates(model, modules, ekfac, model.batch([sequences[4]]), 0.1)
    alone, *two = (Preconditioned(precondition(ekfac, dict(coordinates))) for _ in range(3))
    for queries in (alone, Preconditioned.join(two)):
        found = exact_scores(model, modules, queries, records_of(sequences), 24)
        np.testing.assert_allclose(found, np.tile(expected, (len(found), 1)), rtol=1e-5,
                                   atol=1e-7)
    sizes = GradientSizes(ekfac, 0.1)
    collect(model, modules, model.batch(sequences), sizes)
    np.testing.assert_allclose(sizes.found(), np.array([
        [sum(float(g.flatten() @ own[name]) for name, g in m.items()),
         sum(float(own[name] @ own[name]) for name in m),
         sum(float(g.square().sum()) for g in m.values())]
        for m, own in zip(true, solved, strict=True)]).T, rtol=1e-5, atol=1e-12)


def test_codes_estimate_the_influence(model, sequences, tmp_path):
    modules = over_vocabulary(model)
    ekfac = fitted(model, modules, sequences, tmp_path)
    coordinates, _ = query_coordinates(model, modules, ekfac, model.batch([sequences[4]]), 0.1)
    exact = exact_scores(model, modules, Preconditioned(precondition(ekfac, dict(coordinates))),
                         records_of(sequences), 24)[0]
    found = []
    for seed in range(300):
        codes = Codes(modules, ekfac, CodeSettings(1024, 32, seed, 0.1))
        v = encode_batch(model, codes, records_of(sequences))
        q = codes.query_vectors(coordinates)
        if not seed:  # formed a piece at a time
            torch.testing.assert_close(query_vectors(model, codes, ekfac,
                                                     model.batch([sequences[4]])), q)
        found.append((v @ q[0]).numpy())
    error = np.std(found, axis=0) / len(found) ** 0.5
    assert (np.abs(np.mean(found, axis=0) - exact) < 5 * error + 1e-9).all()
    assert [blockwise.square_entries(module, 1) for module in modules] == [
        37 + module.shape[1] for module in modules]
