"""Rough cosines: those of whitened gradients, as numpy has them."""

import numpy as np
import pytest
import torch

from gradindex.modules import Module
from indexer.pace import rough_cosines
from indexer.pace.rough_cosines import RoughCosines

DAMPING = 0.1


def handed(seed, modules, sequences=5, tokens=7):
    """What modules are handed of a batch, padded in its last sequence."""
    random = torch.Generator().manual_seed(seed)
    real = torch.ones(sequences, tokens, dtype=torch.bool)
    real[-1, 4:] = False
    for module in modules:
        a = torch.randn(sequences, tokens, module.d_in, generator=random)
        d = torch.randn(sequences, tokens, module.d_out, generator=random) * real[..., None]
        yield module, a, d, real


def plain(batches, stride=1):
    """The same in float64: vec(G)ᵀ (S ⊗ A)⁻¹ vec(G'), each damped by itself, in a dense matrix."""
    total = 0
    for parts in zip(*batches, strict=True):
        a, d = ([part[which].double().numpy()[..., ::stride] for part in parts] for which in (1, 2))
        real = [part[3].numpy() for part in parts]
        sums = []
        for rows in (np.concatenate([x[r] for x, r in zip(a, real, strict=True)]),
                     np.concatenate([x[r] for x, r in zip(d, real, strict=True)])):
            square = rows.T @ rows
            sums.append(square / np.diag(square).mean() + DAMPING**0.5 * np.eye(len(square)))
        gradients = np.concatenate([np.einsum("bto,bti->boi", x, y).reshape(len(x), -1)
                                    for x, y in zip(d, a, strict=True)])
        products = gradients @ np.linalg.inv(np.kron(sums[1], sums[0])) @ gradients.T
        total = total + products / np.diag(products).mean()
    sizes = np.sqrt(np.diag(total))
    return total / np.outer(sizes, sizes)


@pytest.mark.parametrize("most, stride", [(2048, 1), (4, 3)])
def test_cosines_are_those_of_the_whitened_gradients(monkeypatch, most, stride):
    monkeypatch.setattr(rough_cosines, "MOST_SIDE", most)
    modules = [Module("m", 0, "mlp", 9, 12, True), Module("n", 0, "mlp", 12, 9, False)]
    rough, batches = RoughCosines(DAMPING), [list(handed(seed, modules)) for seed in (0, 1)]
    for batch in batches:
        for parts in batch:
            rough.keep(*parts[:3], parts[1][parts[3]])
    found, expected = rough.cosines(), plain(batches, stride)
    assert np.isnan(np.diag(found)).all()
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_module_that_tells_nothing_is_left_out():
    modules = [Module("m", 0, "mlp", 3, 4, False), Module("n", 0, "mlp", 4, 3, False)]
    alone, together, neither = (RoughCosines(DAMPING) for _ in range(3))
    for module, a, d, real in handed(0, modules):
        wrong = d * 0 if module.name == "n" else d
        together.keep(module, a, wrong, a[real])
        neither.keep(module, a * float("nan"), d, a[real] * float("nan"))
        if module.name == "m":
            alone.keep(module, a, d, a[real])
    np.testing.assert_array_equal(alone.cosines(), together.cosines())
    assert np.isnan(neither.cosines()).all()
