"""Weights moved along a direction for a while, and how far that moves what the model says.

A step θ + s p is taken in the tracked weights themselves and taken back bit by bit. Between the
outputs before and after lies the Bregman divergence D of the objective's loss (`divergence`), to
second order ½ s² pᵀ G p with the Gauss–Newton matrix G of the rows: that is how curvature along a
direction is measured here, whatever EK-FAC says of it.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gradindex.influence.preconditioned import Gradients
from gradindex.model.linear_maps import written_to
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective.batch import Batch


class Movable:
    """The weights of some modules, which can be moved along directions [o, i] by module name.

    Raises InputError for weights that can't be moved (`written_to`). Who uses it holds
    `model.one_at_a_time`: meanwhile the model is another.
    """

    def __init__(self, model: LanguageModel, modules: Sequence[Module]):
        self._model, self._modules = model, modules
        self._parts = {
            module.name: written_to(model.member(module.member).sharing(module.path)[0],
                                    module.name, module.shape[1]) for module in modules}
        # put back from here: subtracting would leave rounding behind
        self._kept = {name: [part.clone() for part in parts] for name, parts in self._parts.items()}

    @contextlib.contextmanager
    def moved(self, direction: Gradients, length: float) -> Iterator[None]:
        """The model at θ + `length` · direction; afterwards it is again as it was, to the bit."""
        try:
            with torch.no_grad():
                for name, parts in self._parts.items():
                    width = parts[0].shape[1]
                    step = direction[name].to(parts[0].dtype)
                    parts[0].add_(step[:, :width], alpha=length)
                    for bias in parts[1:]:
                        bias.add_(step[:, width], alpha=length)
            yield
        finally:
            with torch.no_grad():
                for name, parts in self._parts.items():
                    for part, before in zip(parts, self._kept[name], strict=True):
                        part.copy_(before)

    def outputs(self, batch: Batch) -> Tensor:
        """What the model says of a batch now."""
        with torch.no_grad():
            return self._model.objective.outputs(self._model.network, batch)

    def log_p(self, batch: Batch) -> np.ndarray:
        """log p of each row now, in nats: float64 [b]."""
        found, _ = self._model.objective.log_p(self.outputs(batch), batch)
        return found.double().sum(1).cpu().numpy()

    def curvature_along(self, direction: Gradients, length: float, batch: Batch) -> np.ndarray:
        """pᵀ G_i p of each row of a batch, from steps of ± `length`: float64 [b].

        Both ways, so that what is of third order cancels.
        """
        before = self.outputs(batch)
        found = np.zeros(len(batch.real))
        for sign in (1, -1):
            with self.moved(direction, sign * length):
                after = self.outputs(batch)
            found += self._model.objective.divergence(before, after, batch).cpu().numpy()
        # D(+s) + D(−s) = s² pᵀ G p
        return found / length**2
