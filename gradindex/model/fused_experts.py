"""Fused experts of a mixture: each expert's linear map as a module that hooks can see.

transformers keeps the weights of all experts of a block in two tensors, [E, o, i] each, and runs
them in one go. Here the same is computed expert by expert: `open_experts` gives the block a
submodule for every linear map, without weights of its own, and `forward` runs them. transformers
calls `forward` where a model's configuration names it (`network.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradindex.transfers import Arriving, to_device

UP = ("gate_up_proj", "up_proj")  # the first map of an expert, by what it is called


class ExpertMap(nn.Module):
    """The linear map of one expert, by its number: W[e], and its bias where there is one."""

    def __init__(self, experts: Any, name: str, number: int):
        super().__init__()
        self._block = (experts,)  # in a tuple, or its weights would count as this module's
        self._name, self.number = name, number

    @property
    def experts(self) -> nn.Module:
        """The block that holds the weights of all experts."""
        [experts] = self._block
        block: nn.Module = experts
        return block

    @property
    def parameters_of_all(self) -> tuple[Tensor | None, Tensor | None]:
        """The block's tensors that W and the bias are parts of; None for computed ones."""
        parameters = self.experts._parameters
        return parameters.get(self._name), parameters.get(f"{self._name}_bias")

    @property
    def weight(self) -> Tensor:
        """W [o, i], a view of the block's tensor."""
        [experts] = self._block
        weight: Tensor = getattr(experts, self._name)[self.number]
        return weight.T if experts.is_transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The expert's bias [o], or None."""
        [experts] = self._block
        return getattr(experts, f"{self._name}_bias")[self.number] if experts.has_bias else None

    # `token_numbers` is for the hook alone: which token an input belongs to can't be told from x.
    def forward(self, x: Tensor, token_numbers: np.ndarray) -> Tensor:
        """Outputs [n, o] of the n tokens that were routed to the expert, with inputs x [n, i].

        `token_numbers` int64 [n], on the host, are theirs among all b·t tokens of the batch.
        """
        return functional.linear(x, self.weight, self.bias)


def open_experts(network: nn.Module) -> list[nn.Module]:
    """Give every block of fused experts a submodule for each linear map; returns the blocks."""
    blocks = [module for module in network.modules() if is_fused(module)]
    for experts in blocks:
        for name in _maps(experts):
            for number in range(experts.num_experts):  # type: ignore[arg-type]
                if not hasattr(experts, f"{name}_{number}"):  # of a model that was opened before
                    experts.add_module(f"{name}_{number}", ExpertMap(experts, name, number))
    return blocks


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds fused experts of the form that transformers runs in several ways."""
    return all(hasattr(module, name) for name in (
        "num_experts", "is_transposed", "is_concatenated", "has_bias", "has_gate", "down_proj"))


def _maps(experts: Any) -> tuple[str, str]:
    """The names of the block's tensors for an expert's first and second map."""
    return UP[not experts.has_gate], "down_proj"


def forward(
    experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """What a block of fused experts computes, expert by expert: hidden [n, h] → [n, h].

    `chosen` int64 [n, k] are the experts that each token is routed to, and `weights` [n, k] what
    their outputs are multiplied with before they are added up.
    """
    first, second = _maps(experts)
    # How many tokens each expert has decides the sizes of all that follows, so a GPU is waited for
    # here, once for all experts of the block.
    [host] = Arriving([chosen]).arrays()
    order = host.ravel().argsort(kind="stable")  # the tokens of an expert stay in their order
    ends = np.searchsorted(host.ravel()[order], np.arange(experts.num_experts + 1))
    numbers, rank = np.divmod(order, host.shape[1])
    tokens, ranks = to_device(np.stack([numbers, rank]), hidden.device)
    total = torch.zeros_like(hidden)
    for number, own in enumerate(map(slice, ends, ends[1:])):
        if own.start == own.stop:
            continue
        inner = getattr(experts, f"{first}_{number}")(
            hidden.index_select(0, tokens[own]), numbers[own])
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        outer = getattr(experts, f"{second}_{number}")(inner, numbers[own])
        if getattr(experts, "has_post_expert_norm", False):
            outer = experts.post_expert_norm(outer)
        outer = outer * weights[tokens[own], ranks[own], None]
        total.index_add_(0, tokens[own], outer.to(total.dtype))
    return total


def pack(
    values: Sequence[Tensor], token_numbers: np.ndarray, shape: tuple[int, int]
) -> tuple[list[Tensor], np.ndarray]:
    """Some tokens' values [n, f] by sequence, [b, m, f], and their positions, int64 [b, m].

    `token_numbers` int64 [n] are theirs among all tokens of a batch of `shape` (b, t). m is the
    most tokens that a sequence has; behind those of a shorter one stand zeros, and positions −1.

    >>> [packed], positions = pack([torch.tensor([[1.0], [2.0]])], np.array([1, 5]), (2, 4))
    >>> packed.tolist(), positions.tolist()
    ([[[1.0]], [[2.0]]], [[1], [1]])
    """
    # All of it is reckoned on the host, which knows the numbers: sizes that a GPU finds are waited
    # for. Stable: the tokens of a sequence stay in their order, so that sums come out the same.
    order = (token_numbers // shape[1]).argsort(kind="stable")
    rows = token_numbers[order] // shape[1]
    counts = np.bincount(rows, minlength=shape[0])
    columns = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
    most = int(counts.max())
    positions = np.full((shape[0], most), -1)
    positions[rows, columns] = token_numbers[order] % shape[1]
    device = values[0].device
    sources, targets = to_device(np.stack([order, rows * most + columns]), device)
    packed = [x.new_zeros(shape[0] * most, x.shape[-1]) for x in values]
    for x, target in zip(values, packed, strict=True):
        target.index_copy_(0, targets, x.index_select(0, sources))
    return [target.unflatten(0, (shape[0], most)) for target in packed], positions
