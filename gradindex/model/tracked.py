"""Which linear maps of a network are tracked, and what of it is not.

A map is tracked where its gradient is Σ d aᵀ of what a hook on it sees: it computes W a + b and
nothing else, it is called in a pass, and its weight belongs to no other kind of module.
"""

import re
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradindex.errors import InputError
from gradindex.model import fused_experts
from gradindex.model.adapter_probe import readable_parts
from gradindex.model.adapters import IDLE, Parts, no_adapter
from gradindex.model.probe import called_in_a_pass
from gradindex.model.quantised import is_bitsandbytes
from gradindex.modules import Module, choose_modules

TRACKABLE = ("attention", "linear maps", "experts")  # what a choice of modules can add
SMALL_PARTS = ("embeddings", "LM head", "norms")  # never tracked, as in Grosse et al. 2023

_ATTENTION = re.compile(r"(^|[._])(self_?)?att(ention|n)?([._]|$)", re.IGNORECASE)
# These compute W a + b and nothing else, though in a `forward` of their own.
_PLAIN_SUBCLASSES = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def _stored(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The parameters that hold a linear map's weight and bias.

    An expert's hold those of all experts. None for one that is computed from other parameters.
    """
    if isinstance(linear, fused_experts.ExpertMap):
        return linear.parameters_of_all
    return linear._parameters.get("weight"), linear._parameters.get("bias")


def identity_of(linear: nn.Module) -> tuple[int, int]:
    """Which weight a linear map has: the address of its tensor, and an expert's number in it."""
    weight, _ = _stored(linear)
    address = id(linear) if weight is None else _address(weight)
    return address, linear.number if isinstance(linear, fused_experts.ExpertMap) else 0


def maps_by_weight(network: nn.Module) -> dict[tuple[int, int], list[nn.Module]]:
    """A network's linear maps by the identity of their weight, those that share one in order."""
    maps: dict[tuple[int, int], list[nn.Module]] = {}
    for module in network.modules():
        if is_linear(module):
            maps.setdefault(identity_of(module), []).append(module)
    return maps


def _address(parameter: Tensor) -> int:
    """Where a parameter lies in memory: equal for tied ones, be they one object or several."""
    try:
        return parameter.data_ptr() or id(parameter)  # 0: its content isn't loaded
    except RuntimeError:  # a wrapper of other tensors
        return id(parameter)


def tracked_modules(network: nn.Module, choice: str = "mlp") -> list[Module]:
    """The linear maps of the transformer blocks to take gradients of, in model order.

    `choice` is one of `choose_modules`; "mlp" as in Grosse et al. 2023, §5. Embeddings and the LM
    head lie outside the blocks and are never tracked. Every fused expert has a module for each of
    its maps, "….experts.down_proj_5". Maps that share a weight are one module, with a bias if they
    and no others share that too.
    Raises InputError where nothing matches, where an adapter is chosen and none runs that has maps,
    and where the network isn't causal.
    """
    parts = readable_parts(network)
    maps = _linear_maps(network, parts)
    if not maps:
        homes = ", ".join(list(untracked(network, []))[:5])
        raise InputError(
            f"{type(network).__name__} has no linear map that can be tracked: its weights are in "
            f"{homes}. Expected nn.Linear, Conv1D or transformers' fused experts in its blocks; "
            "give the model in its whole form (not quantised by GPTQ, AWQ and the like)."
        )
    if "adapter" in map(str.strip, choice.split(",")) and \
            not any(module.kind == "adapter" for module in maps):
        raise InputError(f"--modules {choice}: {no_adapter(network)}.")
    _, blocks = _blocks(network)
    return choose_modules(maps, choice, f"the linear modules of the {len(blocks)} blocks")


def _linear_maps(network: nn.Module, parts: Parts) -> list[Module]:
    """All linear maps of the blocks that can be tracked, in model order."""
    prefix, blocks = _blocks(network)
    owners, maps, inside = _owners(network), maps_by_weight(network), set(blocks.modules())
    called = called_in_a_pass(network, [linear for sharing in maps.values() for linear in sharing])
    modules: list[Module] = []
    seen: set[tuple[int, int]] = set()
    for layer, block in enumerate(blocks):
        for name, linear in block.named_modules():
            if not is_linear(linear) or linear in parts.idle or identity_of(linear) in seen:
                continue
            if linear in parts.unclear:  # a gradient that looks sound could be wrong
                continue
            if not (linear in called or isinstance(linear, fused_experts.ExpertMap)):
                continue  # if its weight is used, then not by running it
            seen.add(identity_of(linear))
            sharing = maps[identity_of(linear)]
            users = {_owner(other) for other in sharing}
            # A weight that an embedding has too, or a map outside the blocks, or the transpose of
            # another map: hooks on linear maps would miss a part of its gradient.
            if not users.issuperset(owners.get(identity_of(linear)[0], users)) or \
                    any(other not in inside or _form(other) != _form(linear) for other in sharing):
                continue
            kind = "adapter" if linear in parts.lora else \
                "attention" if _ATTENTION.search(name) else "mlp"
            d_out, d_in = _shape(linear)
            # A bias is W's last column only where the same maps, and no others, share it too.
            bias = linear.bias is not None and linear not in parts.no_bias
            if bias and (stored := _stored(linear)[1]) is not None:
                bias = users == set(owners[_address(stored)])
            # An expert's inputs are padded with zeros behind, where a bias's 1 must not be: it is
            # put beside them before, and counts as one of them.
            if bias and isinstance(linear, fused_experts.ExpertMap):
                d_in, bias = d_in + 1, False
            modules.append(Module(f"{prefix}.{layer}.{name}", layer, kind, d_out, d_in, bias))
    return modules


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W a + b and nothing else, so that its gradient is Σ d aᵀ."""
    if isinstance(module, fused_experts.ExpertMap):
        return True
    # By its `forward` and not by its class: a subclass may as well round, rescale or route.
    return isinstance(module, (nn.Linear, Conv1D)) and (
        type(module).forward in (nn.Linear.forward, Conv1D.forward)
        or f"{type(module).__module__}.{type(module).__name__}" in _PLAIN_SUBCLASSES
        or is_bitsandbytes(module))


def _owners(network: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter themselves, not in a child, by its address."""
    owners: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(_address(parameter), []).append(module)
    return owners


def _owner(linear: nn.Module) -> nn.Module:
    """The module that holds a linear map's weight: the map, or the block of an expert."""
    return linear.experts if isinstance(linear, fused_experts.ExpertMap) else linear


def _form(linear: Any) -> tuple[Any, ...]:
    """What maps that share a weight must have in common to be one linear map (Conv1D is Wᵀ)."""
    return type(linear), _shape(linear), getattr(_owner(linear), "is_transposed", None)


def _shape(linear: Any) -> tuple[int, int]:
    """[o, i] of a linear map, whatever form its weight is stored in."""
    if isinstance(linear, nn.Linear):
        # not of the weight, which 4-bit quantisation packs into one column
        return int(linear.out_features), int(linear.in_features)
    o, i = linear.weight.shape
    return (int(i), int(o)) if isinstance(linear, Conv1D) else (int(o), int(i))


def _blocks(network: Any) -> tuple[str, nn.ModuleList]:
    """The name of the list of transformer blocks, and the list. Raises InputError without one."""
    layers = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in network.named_modules()
             if isinstance(module, nn.ModuleList) and len(module)]
    for name, module in lists:
        if len(module) == layers:
            return name, module
    # ALBERT runs each block several times, so its list is shorter than its layers.
    shared = [(name, module) for name, module in lists if layers and layers % len(module) == 0]
    if shared:  # the outermost of them comes first
        return shared[0]
    raise InputError(
        f"{type(network).__name__}: found no list of {layers} transformer blocks "
        "(config.num_hidden_layers); expected a causal language model made of blocks."
    )


def parameter_share(network: nn.Module, modules: list[Module]) -> float:
    """Tracked weights and biases as a share, 0 to 1, of all parameters of the model."""
    tracked = sum(module.size for module in modules)
    return tracked / sum(_parameter_counts(network).values())


def untracked(network: nn.Module, modules: list[Module]) -> dict[str, float]:
    """What isn't tracked: shares of all parameters, 0 to 1, largest first.

    They go by kind (attention, linear maps, experts, embeddings, LM head, norms); what can't be
    tracked goes by the class of its module.
    """
    counts = _parameter_counts(network)
    tracked: dict[nn.Module, int] = {}
    for module in modules:
        holder = network.get_submodule(module.name)
        if isinstance(holder, fused_experts.ExpertMap):  # which has no weights itself
            holder = holder.experts
        tracked[holder] = tracked.get(holder, 0) + module.size
    total, rests = sum(counts.values()), dict[str, float]()
    prefix, _ = _blocks(network)
    parts = readable_parts(network)
    maps = {network.get_submodule(module.name) for module in _linear_maps(network, parts)}
    for name, holder in network.named_modules():
        if rest := counts.get(holder, 0) - tracked.get(holder, 0):
            kind = _kind(holder, name.removeprefix(prefix), name.startswith(f"{prefix}."))
            kind = parts.own.get(holder, parts.unclear.get(holder, kind))
            if holder in parts.idle:
                kind = IDLE
            # "attention: 40%" reads as a choice that the user could make: here it is none.
            if kind in TRACKABLE and holder not in maps and not fused_experts.is_fused(holder):
                kind = f"{kind} that aren't called, or share a weight with something else"
            rests[kind] = rests.get(kind, 0.0) + rest / total
    return dict(sorted(rests.items(), key=lambda share: (-share[1], share[0])))


def _kind(module: nn.Module, name: str, in_block: bool) -> str:
    """What a module is, as `untracked` calls it: one of TRACKABLE or SMALL_PARTS, or its class."""
    class_name = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in class_name.lower():
        return "norms"
    if fused_experts.is_fused(module):
        return "experts"
    if isinstance(module, (nn.Linear, Conv1D)) and not in_block:
        return "LM head"
    if is_linear(module):
        return "attention" if _ATTENTION.search(name) else "linear maps"
    return class_name


def _parameter_counts(network: nn.Module) -> dict[nn.Module, int]:
    """How many parameters each module holds besides its children's; shared ones count once."""
    seen: set[int] = set()
    counts: dict[nn.Module, int] = {}
    for module in network.modules():
        # A quantised weight counts as what it stands for: two or more numbers share a byte of it.
        packed = _is_packed(module)
        count = module.in_features * module.out_features if packed else 0  # type: ignore[operator]
        for parameter in module.parameters(recurse=False):
            known = _address(parameter) in seen
            seen.add(_address(parameter))
            if packed and parameter.ndim > 1:
                count = 0 if known else count
            elif not known:
                count += parameter.numel()
        if count:
            counts[module] = count  # type: ignore[assignment]
    return counts


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight is quantised, be it a parameter or a buffer."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return isinstance(getattr(module, "in_features", None), int) and \
        isinstance(getattr(module, "out_features", None), int) and \
        any(not tensor.is_floating_point() for tensor in tensors)
