"""Fused experts of a mixture: each expert's linear map as a module that hooks can see.

transformers keeps the weights of all experts of a block in two tensors, [E, o, i] each, and runs
them in one go. Here the same is computed expert by expert: `open_experts` gives the block a
submodule for every linear map, without weights of its own, and `forward` runs them. transformers
calls `forward` where a model's configuration names it (`network.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

UP = ("gate_up_proj", "up_proj")  # the first map of an expert, by what it is called


class ExpertMap(nn.Module):
    """One expert's linear map: W[e], and its bias where there is one.

    It is run on the tokens that were routed to the expert, x [n, i], whose places among all of the
    batch's come along.
    """

    def __init__(self, experts: Any, name: str, number: int):
        super().__init__()
        self._of = (experts,)  # in a tuple, or its weights would count as this one's
        self._name, self.number = name, number

    @property
    def experts(self) -> nn.Module:
        """The block that has the weights."""
        [experts] = self._of
        found: nn.Module = experts
        return found

    @property
    def parameters_of_all(self) -> tuple[Tensor | None, Tensor | None]:
        """The experts' own tensors that W and the bias are parts of; None for computed ones."""
        of = self.experts._parameters
        return of.get(self._name), of.get(f"{self._name}_bias")

    @property
    def weight(self) -> Tensor:
        """W [o, i], a view of the experts' tensor."""
        [experts] = self._of
        weight: Tensor = getattr(experts, self._name)[self.number]
        return weight.T if experts.is_transposed else weight

    @property
    def bias(self) -> Tensor | None:
        [experts] = self._of
        return getattr(experts, f"{self._name}_bias")[self.number] if experts.has_bias else None

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x [n, i] of tokens at `places` [n] of the batch's → [n, o]."""
        return functional.linear(x, self.weight, self.bias)


def open_experts(network: nn.Module) -> list[nn.Module]:
    """Give every block of fused experts a submodule for each linear map; the blocks."""
    found = [module for module in network.modules() if is_fused(module)]
    for experts in found:
        for name in _maps(experts):
            for number in range(experts.num_experts):  # type: ignore[arg-type]
                if not hasattr(experts, f"{name}_{number}"):
                    experts.add_module(f"{name}_{number}", ExpertMap(experts, name, number))
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether transformers can run a module's experts in several ways, and so in ours."""
    return all(hasattr(module, name) for name in (
        "num_experts", "is_transposed", "is_concatenated", "has_bias", "has_gate", "down_proj"))


def _maps(experts: Any) -> tuple[str, str]:
    return UP[not experts.has_gate], "down_proj"


def forward(
    experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """What fused experts compute, expert by expert: hidden [n, h] → [n, h].

    `chosen` and `weights` [n, k] are each token's experts and what their outputs are multiplied
    with.
    """
    first, second = _maps(experts)
    total = torch.zeros_like(hidden)
    for number in range(experts.num_experts):
        places, rank = torch.where(chosen == number)
        if not len(places):
            continue
        inner = getattr(experts, f"{first}_{number}")(hidden[places], places)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        outer = getattr(experts, f"{second}_{number}")(inner, places)
        if getattr(experts, "has_post_expert_norm", False):
            outer = experts.post_expert_norm(outer)
        outer = outer * weights[places, rank, None]
        total.index_add_(0, places, outer.to(total.dtype))
    return total


def pack(x: Tensor, places: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tokens x [n, ·] at `places` of a batch [b, t], by sequence: [b, m, ·], zeros behind.

    m is the most tokens that a sequence has. Also their positions in it, int64 [b, m], −1 behind.
    """
    rows, order = (places // shape[1]).sort(stable=True)
    counts = torch.bincount(rows, minlength=shape[0])
    slots = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[rows]
    most = int(counts.max()) if len(rows) else 0
    packed = x.new_zeros(shape[0], most, x.shape[-1])
    positions = places.new_full((shape[0], most), -1)
    packed[rows, slots] = x[order]
    positions[rows, slots] = places[order] % shape[1]
    return packed, positions
