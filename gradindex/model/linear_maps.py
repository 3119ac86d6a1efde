"""Linear maps of a network: what is one, its shape, and which of them share a weight.

The embedding of the input's tokens is one as well, of a vocabulary: what it looks up are rows of
its weight, which the map to the logits may share (`influence/vocabulary.py`).
"""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradindex.errors import InputError
from gradindex.model import fused_experts
from gradindex.model.quantised import is_bitsandbytes

# These compute W a + b and nothing else, though in a `forward` of their own.
_PLAIN_SUBCLASSES = ("transformers.models.falcon.modeling_falcon.FalconLinear",)

Identity = tuple[int, int]  # of a weight
LEAST_PRECISION = 4  # bytes of a weight that is changed by little


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W a + b and nothing else, so that its gradient is Σ d aᵀ."""
    if isinstance(module, fused_experts.ExpertMap):
        return True
    # By its `forward` and not by its class: a subclass may as well round, rescale or route.
    return is_linear_class(module) and (
        type(module).forward in (nn.Linear.forward, Conv1D.forward)
        or f"{type(module).__module__}.{type(module).__name__}" in _PLAIN_SUBCLASSES
        or is_bitsandbytes(module))


def is_linear_class(module: nn.Module) -> bool:
    """Whether a module is linear by its class, whatever its `forward` makes of it."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_lookup(module: nn.Module) -> bool:
    """Whether a module gives rows of its weight, perhaps times a number (Gemma 3, BART)."""
    # what else it may do shows in a small pass (`probe.py`)
    return isinstance(module, nn.Embedding) and module.max_norm is None and \
        not module.scale_grad_by_freq


def lookup_gradient(embedding: Any, tokens: Tensor, d: Tensor) -> Tensor:
    """The gradient of the rows that were looked up, [..., i], of that of the outputs, d [..., i].

    `tokens` [...] are whose rows they are; that of padding is never trained.

    >>> import torch
    >>> lookup_gradient(nn.Embedding(3, 1, padding_idx=0), torch.tensor([2, 0]), torch.ones(2, 1))
    tensor([[1.],
            [0.]])
    """
    scale = getattr(embedding, "embed_scale", None)
    if scale is not None:
        d = d * scale
    if embedding.padding_idx is not None:
        d = d.masked_fill((tokens == embedding.padding_idx)[..., None], 0.0)
    return d


def stored(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The parameters that hold a linear map's weight and bias.

    An expert's hold those of all experts. None for one that is computed from other parameters.
    """
    if isinstance(linear, fused_experts.ExpertMap):
        return linear.parameters_of_all
    return linear._parameters.get("weight"), linear._parameters.get("bias")


def identity_of(linear: nn.Module) -> Identity:
    """Which weight a linear map has: the address of its tensor, and an expert's number in it."""
    weight, _ = stored(linear)
    where = id(linear) if weight is None else address(weight)
    return where, linear.number if isinstance(linear, fused_experts.ExpertMap) else 0


def maps_by_weight(network: Any) -> dict[Identity, list[nn.Module]]:
    """A network's linear maps by the identity of their weight, those that share one in order."""
    maps: dict[Identity, list[nn.Module]] = {}
    embedding = network.get_input_embeddings()
    for module in network.modules():
        if is_linear(module) or (module is embedding and is_lookup(module)):
            maps.setdefault(identity_of(module), []).append(module)
    return maps


def address(parameter: Tensor) -> int:
    """Where a parameter lies in memory: equal for tied ones, be they one object or several."""
    try:
        return parameter.data_ptr() or id(parameter)  # 0: its content isn't loaded
    except RuntimeError:  # a wrapper of other tensors
        return id(parameter)


def written_to(linear: Any, name: str, width: int) -> list[Tensor]:
    """A map's weight [o, i], and its bias [o] where it is the last of `width` columns: views, by
    which the network's own are changed.

    Raises InputError for a weight in which a small change is lost, or that isn't what is kept.
    """
    weight, _ = stored(linear)
    if weight is None or not weight.is_floating_point():
        raise InputError(f"the weight of {name} can't be moved: it is quantised, or computed from "
                         "others. Leave it out with --modules, or ask without --check.")
    if weight.dtype.itemsize < LEAST_PRECISION:
        raise InputError(
            f"the model is in {str(weight.dtype).removeprefix('torch.')}, in which a step of one "
            "copy is lost in rounding. --check needs an index that was built with --dtype float32.")
    view = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    return [view.detach(), *([linear.bias.detach()] if width > view.shape[1] else [])]


def holders_of_parameters(network: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter themselves, not in a child, by its address."""
    found: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(address(parameter), []).append(module)
    return found


def holder(linear: nn.Module) -> nn.Module:
    """The module that holds a linear map's weight: the map, or the block of an expert."""
    return linear.experts if isinstance(linear, fused_experts.ExpertMap) else linear


def form(linear: Any) -> tuple[Any, ...]:
    """What maps that share a weight must have in common to be one linear map (Conv1D is Wᵀ)."""
    kind = nn.Linear if isinstance(linear, nn.Embedding) else type(linear)  # of a tied head
    return kind, shape(linear), getattr(holder(linear), "is_transposed", None)


def shape(linear: Any) -> tuple[int, int]:
    """[o, i] of a linear map, whatever form its weight is stored in."""
    if isinstance(linear, nn.Linear):
        # not of the weight, which 4-bit quantisation packs into one column
        return int(linear.out_features), int(linear.in_features)
    o, i = linear.weight.shape
    return (int(i), int(o)) if isinstance(linear, Conv1D) else (int(o), int(i))
