"""How alike gradients are, roughly, from the few sequences that a dry run runs anyway.

Nothing is fitted yet. Of a few modules A and S are summed over the batches' tokens, and damped each
by itself: (A/ā + √λ) ⊗ (S/s̄ + √λ), ā and s̄ being their mean diagonals. A Cholesky decomposition
of each, a tenth of the time of its eigenvectors, whitens the gradients of some sequences, whose
inner products are then cosines. Of other modules, sequences and damping than the build's, so what
they say of codes is rough: benchmarks/results/real_model.md has it beside what builds found.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gradindex.influence.gradients import gradient
from gradindex.influence.vocabulary import OutputGradients, OverVocabulary
from gradindex.modules import Module

MOST_SIDE = 2048  # coordinates of a wide module that are looked at: they speak for the others
EACH = 16  # sequences of a batch whose gradients are compared


class RoughCosines:
    """Takes what modules are handed of each batch, and makes cosines of it.

    >>> rough = RoughCosines(damping=0.1)
    >>> a, d = torch.eye(2).view(1, 2, 2).repeat(3, 1, 1), torch.ones(3, 2, 2)
    >>> rough.keep(Module("m", 0, "mlp", 2, 2, False), a, d, inputs=a.flatten(0, 1))
    >>> rough.cosines().round(3).tolist()  # equal sequences
    [[nan, 1.0, 1.0], [1.0, nan, 1.0], [1.0, 1.0, nan]]
    """

    def __init__(self, damping: float):
        self._damping = damping
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._some: dict[str, list[tuple[Module, Tensor, Tensor]]] = {}

    def keep(self, module: Module, a: Tensor, d: OutputGradients, inputs: Tensor) -> None:
        """Add a batch's a [b, t, i] and d [b, t, o]; `inputs` [n, i] are those of real tokens."""
        step = -(-a.shape[-1] // MOST_SIDE)
        inputs = inputs[:, : a.shape[-1] : step].float()
        a, apart = a[..., ::step], -(-module.d_out // MOST_SIDE)
        d = d.whole(apart) if isinstance(d, OverVocabulary) else d[..., ::apart]
        outputs = d.flatten(0, 1).float()
        sums = (inputs.T @ inputs, outputs.T @ outputs)
        before = self._sums.get(module.name)
        self._sums[module.name] = sums if before is None else (before[0] + sums[0],
                                                               before[1] + sums[1])
        # without a bias: its column would be one of many, and the inputs' mean says as much
        plain = replace(module, bias=False)
        self._some.setdefault(module.name, []).append(
            (plain, a[:EACH].to(torch.float32, copy=True), d[:EACH].to(torch.float32, copy=True)))

    def cosines(self) -> np.ndarray:
        """The cosines [s, s] of the sequences' gradients with each other; NaN with themselves.

        All are NaN where no module tells any: without a gradient, or with one that isn't finite.
        """
        products = [product for name in list(self._sums)
                    if (product := self._products(name)) is not None]
        if not products:
            return np.full((1, 1), np.nan)
        total = torch.stack(products).sum(0)
        sizes = total.diagonal().sqrt()
        found = (total / torch.outer(sizes, sizes)).cpu().numpy()
        np.fill_diagonal(found, np.nan)
        return np.asarray(found, dtype=np.float64)

    def _products(self, name: str) -> Tensor | None:
        """Inner products [s, s] of the whitened gradients of a module, their squares 1 in the mean.

        None where they are zero, or not finite.
        """
        # one module after the other: together they would take much memory
        x = torch.cat([gradient(*some) for some in self._some.pop(name)])
        for sums in self._sums.pop(name):
            mean = sums.diagonal().mean()
            if not torch.isfinite(sums).all() or not mean > 0:
                return None
            damped = sums / mean
            damped.diagonal().add_(self._damping**0.5)
            # transposed each time: A is met on the right of [s, o, i], S on the right of [s, i, o]
            x = torch.linalg.solve_triangular(torch.linalg.cholesky(damped), x.mT, upper=False)
        flat = x.flatten(1)
        products = flat @ flat.T
        mean = products.diagonal().mean()
        return products / mean if torch.isfinite(products).all() and mean > 0 else None
