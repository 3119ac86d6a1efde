"""Which linear maps of a network are tracked, and what of it is not.

A map is tracked where its gradient is Σ d aᵀ of what a hook on it sees: it computes W a + b and
nothing else, it is called in a pass, and its weight belongs to no other kind of module.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradindex.errors import InputError
from gradindex.model import fused_experts
from gradindex.model.adapters import IDLE, Parts, adapter_parts, no_adapter
from gradindex.model.blocks import TransformerBlock, find_blocks
from gradindex.model.linear_maps import (
    address,
    form,
    holder,
    holders_of_parameters,
    identity_of,
    is_linear,
    is_linear_class,
    is_lookup,
    maps_by_weight,
    shape,
    stored,
)
from gradindex.model.probe import Probe, check_logits, probe
from gradindex.modules import EMBEDDED, LAST, Module, choose_modules
from gradindex.task import CAUSAL, Task

# what a choice of modules can add
TRACKABLE = ("attention", "linear maps", "experts", "head", "embeddings")
SMALL_PARTS = ("LM head", "norms", "other embeddings")  # that aren't missed
NOT_RUN = "parts that a short text doesn't run"  # towers of vision and audio, further heads

_ATTENTION = re.compile(r"(^|[._])(self_?)?att(ention|n)?s?([._]|$)", re.IGNORECASE)


@dataclass
class Anatomy:
    """What is known of a network before any choice.

    That is what small passes tell, the parts of adapters, the blocks, the maps that can be tracked;
    and its task.
    """

    task: Task
    probe: Probe
    parts: Parts
    blocks: list[TransformerBlock]
    maps: list[Module]


def tracked_modules(
    network: nn.Module, choice: str = "mlp", anatomy: Anatomy | None = None
) -> list[Module]:
    """The linear maps of a network to take gradients of, in model order.

    `choice` is one of `choose_modules`; "mlp" as in Grosse et al. 2023, §5. What lies outside the
    transformer blocks is the "head", to the logits or to what is said of whole texts, and the
    "embeddings" of tokens; of a weight that both have, the gradient is that of both uses. Every
    fused expert has a module for each of its maps, "….experts.down_proj_5". Maps that share a
    weight are one module, with a bias if they and no others share that too.
    `anatomy` is what `examine` gave of the network [examined now].
    Raises InputError where nothing matches, where an adapter is chosen and none runs that has maps,
    and where the network isn't causal, mixes the sequences of a batch, or fails in a small pass.
    """
    anatomy = anatomy or examine(network)  # small passes, of which a caller may have made some
    check_logits(network, anatomy.task)
    # the maps of a vocabulary are never chosen but by name
    if not any(not module.diagonal for module in anatomy.maps) and not _is_of_vocabulary(choice):
        homes = ", ".join(list(_shares(network, [], anatomy))[:5])
        raise InputError(
            f"{type(network).__name__} has no linear map that can be tracked: its weights are in "
            f"{homes}." + (_left_out(network, anatomy) if anatomy.parts.unclear else
            " Expected nn.Linear, Conv1D or transformers' fused experts in its blocks; give the "
            "model in its whole form (not quantised by GPTQ, AWQ and the like).")
        )
    if "adapter" in map(str.strip, choice.split(",")) and \
            not any(module.kind == "adapter" for module in anatomy.maps):
        raise InputError(f"--modules {choice}: {no_adapter(network)}.")
    try:
        return choose_modules(
            anatomy.maps, choice,
            f"the linear modules of the {len(anatomy.blocks)} blocks that can be tracked")
    except InputError as error:
        raise InputError(f"{error}{_left_out(network, anatomy)}") from None


def _is_of_vocabulary(choice: str) -> bool:
    return {*map(str.strip, choice.split(","))} <= {"head", "embeddings"}


def _left_out(network: nn.Module, anatomy: Anatomy) -> str:
    """Which maps run and can't be tracked, as a sentence to go on with; nothing where all can."""
    unclear = anatomy.parts.unclear
    reasons = {**unclear, **anatomy.probe.left_out}
    names = [f"{name}, {reasons[module]}" for name, module in network.named_modules()
             if module in reasons]
    fix = " The adapter uses weights of its base in another way than by running their maps: " \
          "merge it into the base (merge_and_unload) and save that." if unclear else ""
    return f" {len(names)} maps can't be tracked, such as {names[0]}.{fix}" if names else ""


def examine(network: nn.Module, task: Task = CAUSAL) -> Anatomy:
    """Run small passes through a network, and find its blocks and maps. Raises InputError."""
    sharing = maps_by_weight(network)
    found = probe(network, list(sharing.values()), task)
    parts, blocks = _readable_parts(network, found), find_blocks(network, found.called)
    vocabulary = _vocabulary_map(network, parts) if task.is_causal else None
    head = _head(network, found, blocks, task, vocabulary)
    return Anatomy(task, found, parts, blocks, _linear_maps(
        network, parts, found, [*_embedding(network, vocabulary), *blocks, *head], vocabulary))


def _head(
    network: Any, found: Probe, blocks: list[TransformerBlock], task: Task,
    vocabulary: nn.Module | None,
) -> list[TransformerBlock]:
    """The linear maps to the network's outputs: a pooler's, a classifier's. Each is a part.

    They run behind the blocks. Of a causal model it is the map to the vocabulary alone.
    """
    order = {module: place for place, module in enumerate(found.called)}
    # a module is through when its parts are
    through = max((order[block.module] for block in blocks if block.module in order), default=-1)
    layer = max((block.layer for block in blocks), default=-1) + 1
    return [TransformerBlock(name, layer, module) for name, module in network.named_modules()
            if is_linear(module) and order.get(module, 0) > through
            and (not task.is_causal or module is vocabulary)]


def _vocabulary_map(network: Any, parts: Parts) -> nn.Module | None:
    """The map to the logits of each next token; of what adapters put in its place, what runs."""
    head = network.get_output_embeddings()
    return None if head is None else next(
        (one for one in head.modules() if is_linear(one) and one not in parts.idle | parts.lora),
        None)


def _embedding(network: Any, vocabulary: nn.Module | None) -> list[TransformerBlock]:
    """The embedding of the input's tokens, a part of its own before the blocks.

    One that is tied to the map to the logits is a part of that.
    """
    embedding = network.get_input_embeddings()
    tied = vocabulary is not None and identity_of(vocabulary) == identity_of(embedding)
    if tied or not is_lookup(embedding):
        return []
    return [TransformerBlock(name, EMBEDDED, module) for name, module in network.named_modules()
            if module is embedding]


def _readable_parts(network: nn.Module, found: Probe) -> Parts:
    """The parts of a network's adapters, without the maps under them that hooks read rightly.

    An adapter may scale what the map under it gives, or add to it, and the map's gradient is Σ d aᵀ
    all the same; or use its weight in another way. Where a weight is quantised or not in memory, a
    small pass can't tell, and the map stays unclear.
    """
    parts = adapter_parts(network)
    parts.unclear = {module: word for module, word in parts.unclear.items()
                     if is_linear_class(module)}
    called = {*found.called}
    sound = {module for module in parts.unclear
             if module in called and module not in found.left_out
             and _has_its_own_gradient(module)}
    # its bias may be used in another way than its weight; few models have one
    parts.no_bias |= sound
    parts.unclear = {module: word for module, word in parts.unclear.items() if module not in sound}
    return parts


def _has_its_own_gradient(linear: nn.Module) -> bool:
    """Whether a small pass could compare a map's gradient with that of its weight by autograd."""
    weight, _ = stored(linear)
    return isinstance(weight, nn.Parameter) and weight.is_floating_point() and \
        weight.device.type != "meta"


def _linear_maps(
    network: Any, parts: Parts, found: Probe, blocks: list[TransformerBlock],
    vocabulary: nn.Module | None,
) -> list[Module]:
    """All linear maps of the blocks that can be tracked, in model order."""
    owners, maps, called = holders_of_parameters(network), maps_by_weight(network), {*found.called}
    inside = {module for block in blocks for module in block.module.modules()}
    inside.add(network.get_input_embeddings())  # of a tied head
    modules: list[Module] = []
    seen: set[tuple[int, int]] = set()
    for block in blocks:
        for name, linear in block.module.named_modules():
            if not (is_linear(linear) or (linear is block.module and is_lookup(linear))) or \
                    linear in parts.idle or identity_of(linear) in seen:
                continue
            if linear in parts.unclear:  # a gradient that looks sound could be wrong
                continue
            # An expert runs where tokens are routed to it; any other map whose weight is used
            # without running it has a gradient that no hook sees.
            if holder(linear) not in called:
                continue
            seen.add(identity_of(linear))
            sharing = maps[identity_of(linear)]
            users = {holder(other) for other in sharing}
            # A weight that a map outside the blocks has too, or the transpose of another map: hooks
            # on linear maps would miss a part of its gradient. An embedding may have the head's.
            diagonal = linear is vocabulary or is_lookup(linear)
            if not users.issuperset(owners.get(identity_of(linear)[0], users)) or \
                    any(other not in inside or form(other) != form(linear) or
                        other in found.left_out or (is_lookup(other) and not diagonal)
                        for other in sharing):
                continue
            d_out, d_in = shape(linear)
            # A bias is W's last column only where the same maps, and no others, share it too.
            bias = getattr(linear, "bias", None) is not None and linear not in parts.no_bias
            if bias and (own := stored(linear)[1]) is not None:
                bias = users == set(owners[address(own)])
            # An expert's inputs are padded with zeros behind, where a bias's 1 must not be: it is
            # put beside them before, and counts as one of them.
            if bias and isinstance(linear, fused_experts.ExpertMap):
                d_in, bias = d_in + 1, False
            kind = "adapter" if linear in parts.lora else "embeddings" if is_lookup(linear) else \
                "head" if block.module is linear else \
                "attention" if _is_attention(f"{_from_list(block.name)}.{name}") else "mlp"
            modules.append(Module(
                ".".join(filter(None, (block.name, name))), block.layer, kind, d_out, d_in, bias,
                diagonal))
    return modules


def _is_attention(name: str) -> bool:
    """Whether a map is an attention's, by its name from its list of blocks on."""
    return _ATTENTION.search(name) is not None


def parameter_share(network: nn.Module, modules: list[Module]) -> float:
    """Tracked weights and biases as a share, 0 to 1, of all parameters of the model."""
    tracked = sum(module.size for module in modules if module.member == LAST)
    return tracked / sum(_parameter_counts(network).values())


def untracked(
    network: nn.Module, modules: list[Module], anatomy: Anatomy | None = None
) -> dict[str, float]:
    """What isn't tracked: shares of all parameters, 0 to 1, largest first.

    They go by kind (attention, linear maps, experts, embeddings, LM head, norms); what can't be
    tracked says why, or goes by the class of its module. `anatomy` is as for `tracked_modules`.
    """
    return _shares(network, modules, anatomy or examine(network))


def _shares(network: Any, modules: list[Module], anatomy: Anatomy) -> dict[str, float]:
    counts, sharing = _parameter_counts(network), maps_by_weight(network)
    tracked: dict[nn.Module, int] = {}
    for module in modules:
        if module.member != LAST:
            continue
        # a shared weight counts where it comes first, be it in another block
        holders = [holder(one) for one in sharing[identity_of(network.get_submodule(module.name))]]
        first = next((one for one in holders if one in counts), holders[0])
        tracked[first] = tracked.get(first, 0) + module.size
    total, rests, kind_of = sum(counts.values()), dict[str, float](), _Kinds(network, anatomy)
    for one, count in counts.items():
        if rest := count - tracked.get(one, 0):
            kind = kind_of(one)
            rests[kind] = rests.get(kind, 0.0) + rest / total
    return dict(sorted(rests.items(), key=lambda share: (-share[1], share[0])))


class _Kinds:
    """What a module that holds parameters is, as `untracked` calls it.

    One of TRACKABLE or SMALL_PARTS, one of them with the reason why it can't be tracked, or the
    name of its class.
    """

    def __init__(self, network: Any, anatomy: Anatomy):
        self._probe, self._parts = anatomy.probe, anatomy.parts
        self._in_blocks = {
            module: name for block in anatomy.blocks
            for name, module in block.module.named_modules(prefix=_from_list(block.name))}
        sharing = maps_by_weight(network)
        # of a tied one the embedding, too
        self._heads = {
            one for module in anatomy.maps if module.kind == "head"
            for one in sharing[identity_of(network.get_submodule(module.name))]}
        self._trackable = {
            holder(one) for module in anatomy.maps
            for one in sharing[identity_of(network.get_submodule(module.name))]}
        self._not_run = _not_run(network, {*anatomy.probe.called})
        self._body = {*network.base_model.modules()} if network.base_model is not network else set()

    def __call__(self, module: nn.Module) -> str:
        class_name, parts = type(module).__name__, self._parts
        if module in parts.idle:
            return IDLE
        if word := parts.own.get(module, parts.unclear.get(module)):
            return word
        if module in self._not_run:
            return NOT_RUN
        if module in self._heads:
            return "head"
        if isinstance(module, nn.Embedding):
            return "embeddings" if module in self._trackable else "other embeddings"
        if "norm" in class_name.lower():
            return "norms"
        fused = fused_experts.is_fused(module)
        if is_linear_class(module) and module not in self._in_blocks:
            return "linear maps outside the blocks" if module in self._body else "LM head"
        if not fused and not is_linear(module):
            return class_name
        kind = "experts" if fused else \
            "attention" if _is_attention(self._in_blocks.get(module, "")) else "linear maps"
        # "attention: 40%" reads as a choice that the user could make: here it is none.
        return kind if module in self._trackable else f"{kind} {self._why(module)}"

    def _why(self, module: nn.Module) -> str:
        """Why a map, or a block of experts, can't be tracked."""
        for one in module.modules():
            if one in self._probe.left_out:
                return self._probe.left_out[one]
        return "that aren't called, or share a weight with something else"


def _from_list(name: str) -> str:
    """The name of a block with its list's own name alone: "layers.3" of "model.layers.3"."""
    return ".".join(name.split(".")[-2:])


def _not_run(network: nn.Module, called: set[nn.Module]) -> set[nn.Module]:
    """The modules in parts of which nothing runs; a map whose parent runs is in none."""
    found: set[nn.Module] = set()
    for module in network.modules():
        inside = [*module.modules()]
        if module not in found and len(inside) > 1 and called.isdisjoint(inside) and \
                not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found.update(inside)
    return found


def _parameter_counts(network: nn.Module) -> dict[nn.Module, int]:
    """How many parameters each module holds besides its children's; shared ones count once."""
    seen: set[int] = set()
    counts: dict[nn.Module, int] = {}
    for module in network.modules():
        # A quantised weight counts as what it stands for: two or more numbers share a byte of it.
        packed = _is_packed(module)
        count = module.in_features * module.out_features if packed else 0  # type: ignore[operator]
        for parameter in module.parameters(recurse=False):
            known = address(parameter) in seen
            seen.add(address(parameter))
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
