"""Which linear maps of a network are tracked, and what of it is not.

A map is tracked where its gradient is Σ d aᵀ of what a hook on it sees: it computes W a + b and
nothing else, it is called in a pass, and its weight belongs to no other kind of module.
"""

import re
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradindex.errors import InputError
from gradindex.model import experts
from gradindex.model.adapters import (
    Parts,
    adapter_parts,
    no_adapter,
)
from gradindex.model.probe import called_in_a_pass
from gradindex.model.quantised import is_bitsandbytes
from gradindex.modules import Module, choose_modules


def _stored(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The parameters that a linear map's weight and bias are, or, an expert's, are parts of; None
    for what is computed from others."""
    if isinstance(linear, experts.ExpertMap):
        return linear.parameters_of_all
    return linear._parameters.get("weight"), linear._parameters.get("bias")


def identity_of(linear: nn.Module) -> tuple[int, int]:
    """Which weight a linear map has: its place, and for an expert its number there."""
    weight, _ = _stored(linear)
    place = id(linear) if weight is None else _place(weight)
    return place, linear.number if isinstance(linear, experts.ExpertMap) else 0


def maps_by_weight(network: nn.Module) -> dict[tuple[int, int], list[nn.Module]]:
    """The linear maps that have the same weight, in model order, by its identity."""
    found: dict[tuple[int, int], list[nn.Module]] = {}
    for module in network.modules():
        if is_linear(module):
            found.setdefault(identity_of(module), []).append(module)
    return found


def _place(parameter: Tensor) -> int:
    """Where a parameter lies in memory: equal for tied ones, be they one object or several."""
    try:
        return parameter.data_ptr() or id(parameter)  # 0: its content isn't loaded
    except RuntimeError:  # a wrapper of other tensors
        return id(parameter)
_ATTENTION = re.compile(r"(^|[._])(self_?)?att(ention|n)?([._]|$)", re.IGNORECASE)


def tracked_modules(network: nn.Module, choice: str = "mlp") -> list[Module]:
    """The linear maps of the transformer blocks to take gradients of, in model order.

    `choice` is one of `choose_modules`; "mlp" as in Grosse et al. 2023, §5. Embeddings and the LM
    head lie outside the blocks and are never tracked. Fused experts count one map each,
    "….experts.down_proj_5". Maps that share a weight are one module, with a bias if they and no
    others share that too. Raises InputError when nothing matches, no adapter runs, or one that
    isn't plain LoRA matches, or the network isn't causal (a small pass tells, and which maps are
    called at all).
    """
    parts = adapter_parts(network)
    found = _linear_maps(network, parts)
    if not found:
        odd = ", ".join(list(untracked(network, []))[:5])
        raise InputError(
            f"{type(network).__name__} has no linear map that can be tracked: its weights are in "
            f"{odd}. Expected nn.Linear, Conv1D or transformers' fused experts in its blocks; give "
            "the model in its whole form (not quantised by GPTQ, AWQ and the like)."
        )
    if "adapter" in map(str.strip, choice.split(",")) and not parts.own:
        raise InputError(f"--modules {choice}: {no_adapter(network)}.")
    _, blocks = _blocks(network)
    chosen = choose_modules(found, choice, f"the linear modules of the {len(blocks)} blocks")
    for module in chosen:
        if network.get_submodule(module.name) in parts.odd:
            raise InputError(
                f"--modules {choice!r}: {module.name} is part of an adapter that isn't plain LoRA "
                "(DoRA, AdaLoRA, another kind, or LoRA on a bare parameter), so its gradient can't "
                "be read from its inputs and outputs. Leave it out with --modules REGEX."
            )
    return chosen


def _linear_maps(network: nn.Module, parts: Parts) -> list[Module]:
    """All that can be tracked."""
    prefix, blocks = _blocks(network)
    owners, maps, inside = _owners(network), maps_by_weight(network), set(blocks.modules())
    called = called_in_a_pass(network, [one for sharing in maps.values() for one in sharing])
    found: list[Module] = []
    seen: set[tuple[int, int]] = set()
    for layer, block in enumerate(blocks):
        for name, linear in block.named_modules():
            if not is_linear(linear) or linear in parts.idle or identity_of(linear) in seen:
                continue
            if not (linear in called or isinstance(linear, experts.ExpertMap)):
                continue  # if its weight is used, then not by running it
            seen.add(identity_of(linear))
            sharing = maps[identity_of(linear)]
            own = {_owner(one) for one in sharing}
            if not own.issuperset(owners.get(identity_of(linear)[0], own)) or \
                    any(one not in inside or _form(one) != _form(linear) for one in sharing):
                continue  # a hook on linear maps would miss a part of the gradient
            kind = "adapter" if linear in parts.own else \
                "attention" if _ATTENTION.search(name) else "mlp"
            d_out, d_in = _shape(linear)
            bias = linear.bias is not None
            if bias and (stored := _stored(linear)[1]) is not None:
                bias = own == set(owners[_place(stored)])
            if bias and isinstance(linear, experts.ExpertMap):  # then a column of W
                d_in, bias = d_in + 1, False
            found.append(Module(f"{prefix}.{layer}.{name}", layer, kind, d_out, d_in, bias))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W a + b and nothing else, so that its gradient is Σ d aᵀ.

    A subclass of nn.Linear with a `forward` of its own may as well round, rescale or route.
    """
    if isinstance(module, experts.ExpertMap):
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and (
        type(module).forward in (nn.Linear.forward, Conv1D.forward)
        or f"{type(module).__module__}.{type(module).__name__}" in _LINEAR_AS_WELL
        or is_bitsandbytes(module))
_LINEAR_AS_WELL = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def _owners(network: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that have a parameter as their own, by its place."""
    found: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(_place(parameter), []).append(module)
    return found


def _owner(linear: nn.Module) -> nn.Module:
    """The module that has a linear map's weight as its own parameter."""
    return linear.experts if isinstance(linear, experts.ExpertMap) else linear


def _form(linear: Any) -> tuple[Any, ...]:
    """What maps that share a weight must have in common to be one linear map."""
    return type(linear), _shape(linear), getattr(_owner(linear), "is_transposed", None)


def _shape(linear: Any) -> tuple[int, int]:
    """[o, i] of a linear map, whatever its weight is stored as."""
    if isinstance(linear, nn.Linear):
        return int(linear.out_features), int(linear.in_features)
    o, i = linear.weight.shape
    return (int(i), int(o)) if isinstance(linear, Conv1D) else (int(o), int(i))


def _blocks(network: Any) -> tuple[str, nn.ModuleList]:
    """The list of blocks and its name; a shorter one where each runs several times (ALBERT)."""
    layers = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in network.named_modules()
             if isinstance(module, nn.ModuleList) and len(module)]
    for name, module in lists:
        if len(module) == layers:
            return name, module
    shared = [one for one in lists if layers and layers % len(one[1]) == 0]
    if shared:  # the outermost of them comes first
        return shared[0]
    raise InputError(
        f"{type(network).__name__}: found no list of {layers} transformer blocks "
        "(config.num_hidden_layers); expected a causal language model made of blocks."
    )


def parameter_share(network: nn.Module, modules: list[Module]) -> float:
    """Tracked weights and biases as a share of all parameters of the model; shared ones count
    once, quantised ones as what they stand for."""
    tracked = sum(module.shape[0] * module.shape[1] for module in modules)
    return tracked / sum(_own_parameters(network).values())


def untracked(network: nn.Module, modules: list[Module]) -> dict[str, float]:
    """What isn't tracked: shares of all parameters, largest first.

    By what it is (attention, linear maps, experts, embeddings, LM head, norms), or by the class of
    the module for what can't be tracked.
    """
    every = _own_parameters(network)
    tracked: dict[nn.Module, int] = {}
    for module in modules:
        own = network.get_submodule(module.name)
        if isinstance(own, experts.ExpertMap):
            own = own.experts
        tracked[own] = tracked.get(own, 0) + module.shape[0] * module.shape[1]
    total, left = sum(every.values()), dict[str, float]()
    prefix, _ = _blocks(network)
    found = _linear_maps(network, adapter_parts(network))
    maps = {network.get_submodule(one.name) for one in found}
    for name, own in network.named_modules():
        if rest := every.get(own, 0) - tracked.get(own, 0):
            what = _what(own, name.removeprefix(prefix), name.startswith(f"{prefix}."))
            if what in TRACKABLE and own not in maps and not experts.is_fused(own):
                what = f"{what} that aren't called, or share a weight with something else"
            left[what] = left.get(what, 0.0) + rest / total
    return dict(sorted(left.items(), key=lambda one: (-one[1], one[0])))
TRACKABLE = ("attention", "linear maps", "experts")  # of a choice of modules
SMALL_PARTS = ("embeddings", "LM head", "norms")  # never tracked, as in Grosse et al. 2023


def _what(module: nn.Module, name: str, in_block: bool) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in kind.lower():
        return "norms"
    if experts.is_fused(module):
        return "experts"
    if isinstance(module, (nn.Linear, Conv1D)) and not in_block:
        return "LM head"
    if is_linear(module):
        return "attention" if _ATTENTION.search(name) else "linear maps"
    return kind


def _own_parameters(network: nn.Module) -> dict[nn.Module, int]:
    """How many parameters each module has besides its children's; shared ones count once, packed
    ones as what they stand for."""
    seen: set[int] = set()
    found: dict[nn.Module, int] = {}
    for module in network.modules():
        packed = _is_packed(module)
        count = module.in_features * module.out_features if packed else 0  # type: ignore[operator]
        for parameter in module.parameters(recurse=False):
            known = _place(parameter) in seen
            seen.add(_place(parameter))
            if packed and parameter.ndim > 1:
                count = 0 if known else count
            elif not known:
                count += parameter.numel()
        if count:
            found[module] = count  # type: ignore[assignment]
    return found


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight is quantised, be it a parameter or a buffer."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return isinstance(getattr(module, "in_features", None), int) and \
        isinstance(getattr(module, "out_features", None), int) and \
        any(not tensor.is_floating_point() for tensor in own)
