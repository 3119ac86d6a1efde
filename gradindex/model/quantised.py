"""Models with quantised weights: their dtype, and passes that don't depend on batch or machine.

The gradient is that of the dequantised weights. bitsandbytes is never imported here: transformers
loads such a model with it, and its layers are known by their attributes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradindex.errors import InputError


def quantised_dtype(name: str, own: torch.dtype, dtype: str) -> torch.dtype:
    """The dtype of the quantised model `name`, which is its `own`: it can't be cast.

    `dtype` is what the user asked for, or "auto". Raises InputError for another.
    """
    if dtype not in ("auto", called := str(own).removeprefix("torch.")):
        raise InputError(
            f"--dtype {dtype}: the weights of {name} are quantised and can't be cast; what isn't "
            f"quantised is {called}. Leave --dtype out, or name the model it was made from."
        )
    return own


def as_dequantised(network: nn.Module) -> None:
    """Make bitsandbytes' maps compute with their dequantised weights alone, in every pass.

    Raises InputError for a network whose 4-bit weights were packed anew by an earlier pass.
    """
    for name, module in network.named_modules():
        layer: Any = module
        if _has_four_bits(layer):
            # On some CPUs the first pass without gradients packs the weights anew, for a product
            # that has no gradient.
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            # Where that happened before, the scales were rounded for good.
            if state is not None and state.absmax.ndim > 1:
                raise InputError(
                    f"the model ran without gradients before, and bitsandbytes packed {name} anew "
                    "for this CPU, which changed it. Give the model's folder or hub id, or load it "
                    "again and build first."
                )
        elif _has_eight_bits(layer):
            # By itself such a map rounds its inputs, in a way that depends on all tokens of a batch
            # (LLM.int8, Dettmers et al. 2022).
            layer.forward = partial(_eight_bits, layer)


def is_bitsandbytes(layer: Any) -> bool:
    """Whether a map is one of bitsandbytes' that `as_dequantised` makes linear."""
    return _has_four_bits(layer) or _has_eight_bits(layer)


def _has_four_bits(layer: Any) -> bool:
    return hasattr(layer, "support_avx512bf16_for_cpu")


def _has_eight_bits(layer: Any) -> bool:
    return hasattr(layer, "init_8bit_state") and layer.weight.dtype == torch.int8


def _eight_bits(layer: Any, x: Tensor) -> Tensor:
    """The outputs [..., o] of an 8-bit map for x [..., i]; W is int8 [o, i] · scale [o] / 127."""
    # bitsandbytes moves the scale from the weight to the state when a pass has run.
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x, layer.weight.data, scale / 127)
    return product if layer.bias is None else product + layer.bias.to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ [..., o] for x [..., i], W = int8 [o, i] · scale [o]."""

    # W is dequantised for the product and again for its gradient: kept for all layers until the
    # backward pass, it would take the memory that quantising saved.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, _dequantised(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return d @ _dequantised(weight, scale, d.dtype), None, None


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale.unsqueeze(-1)).to(dtype)
