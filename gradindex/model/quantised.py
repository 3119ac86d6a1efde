"""Models with quantised weights: which dtype they have, and passes that always give the same.

The gradient is that of the dequantised weights. bitsandbytes is never imported here: transformers
loads such a model with it, and its layers are known by their attributes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradindex.errors import InputError


def quantised_dtype(name: str, own: torch.dtype, dtype: str) -> torch.dtype:
    """The dtype of a quantised model, which can't be cast. Raises InputError for another."""
    if dtype not in ("auto", called := str(own).removeprefix("torch.")):
        raise InputError(
            f"--dtype {dtype}: the weights of {name} are quantised and can't be cast; what isn't "
            f"quantised is {called}. Leave --dtype out, or name the model it was made from."
        )
    return own


def as_dequantised(network: nn.Module) -> None:
    """Make bitsandbytes' maps compute with their dequantised weights alone, whatever runs before.

    By itself an 8-bit map rounds its inputs, in a way that depends on all tokens of a batch
    (LLM.int8, Dettmers et al. 2022), and a 4-bit one is packed anew by the first pass without
    gradients on some CPUs, for a product that has no gradient. Raises InputError where that is done
    already: it rounds the scales, and bitsandbytes doesn't put them back in order.
    """
    for name, module in network.named_modules():
        layer: Any = module
        if _has_four_bits(layer):
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if state is not None and state.absmax.ndim > 1:
                raise InputError(
                    f"the model ran without gradients before, and bitsandbytes packed {name} anew "
                    "for this CPU, which changed it. Give the model's folder or hub id, or load it "
                    "again and build first."
                )
        elif _has_eight_bits(layer):
            layer.forward = partial(_eight_bits, layer)


def is_bitsandbytes(layer: Any) -> bool:
    """Whether a map is one that `as_dequantised` looks after."""
    return _has_four_bits(layer) or _has_eight_bits(layer)


def _has_four_bits(layer: Any) -> bool:
    return hasattr(layer, "support_avx512bf16_for_cpu")


def _has_eight_bits(layer: Any) -> bool:
    return hasattr(layer, "init_8bit_state") and layer.weight.dtype == torch.int8


def _eight_bits(layer: Any, x: Tensor) -> Tensor:
    """x [·, i] → [·, o] by an 8-bit map: W = weight (int8 [o, i]) times its scale [o] / 127."""
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    product: Tensor = _Product.apply(x, layer.weight.data, scale / 127)
    return product if layer.bias is None else product + layer.bias.to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ; W is dequantised when it is needed, and again for the gradient, and never kept."""

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
