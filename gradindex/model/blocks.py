"""The transformer blocks of a network: the lists whose members run when it reads a text.

They are found by what they do. A list's length tells nothing: a vision tower may have as many
layers as the text decoder, heads for further tokens stand in lists too, and some networks have
several lists of blocks, or run one list several times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradindex.errors import InputError
from gradindex.model.linear_maps import is_linear_class

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class TransformerBlock:
    """A transformer block, its name in the network, and the number of its layer."""

    name: str
    layer: int
    module: nn.Module


def find_blocks(network: Any, called: Sequence[nn.Module]) -> list[TransformerBlock]:
    """The blocks of a network, in the order in which their lists run.

    `called` are the modules that run in a pass, in the order of their first runs. Layers are
    numbered through all lists; lists that take turns (one of attentions, one of MLPs) are parts of
    the same layers. Raises InputError where there is none.
    """
    order = {module: place for place, module in enumerate(called)}
    lists = []
    for name, members in _lists(network):
        # when its blocks begin; some networks call a block's parts and not the block
        begins = [min(places) for member in members.values()
                  if (places := [order[part] for part in member.modules() if part in order])]
        if begins:
            lists.append((name, members, begins))
    blocks: list[TransformerBlock] = []
    first = count = 0  # the layer of the last list's first block; how many layers there are
    last_begun = 0  # when the last block of the lists before begins
    for name, members, begins in sorted(lists, key=lambda one: min(one[2])):
        if min(begins) > last_begun:  # the lists before are through
            first = count
        last_begun, count = max(last_begun, *begins), max(count, first + len(members))
        blocks += [TransformerBlock(f"{name}.{key}", first + number, member)
                   for number, (key, member) in enumerate(members.items())]
    if not blocks:
        raise InputError(
            f"{type(network).__name__} has no list of transformer blocks that run when it reads a "
            "text (an nn.ModuleList); expected a causal language model made of blocks."
        )
    return blocks


def _lists(network: Any) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """The outermost lists with blocks among their members: names, and their members."""
    # The LM head may be a list too, of a head for each of several outputs.
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    found: list[str] = []
    for name, module in network.named_modules():
        members = dict(module.named_children())
        # copies that an adapter trains in full take the place of what isn't a list
        if isinstance(module, _LISTS) and module is not head and \
                not name.endswith(".modules_to_save") and \
                not any(name.startswith(f"{outer}.") for outer in found) and \
                any(map(_is_block, members.values())) and not _is_parts(module):
            found.append(name)
            yield name, members


def _is_parts(module: nn.Module) -> bool:
    """Whether a module holds a network's parts by name, the list of blocks among them."""
    return isinstance(module, nn.ModuleDict) and any(
        isinstance(part, nn.ModuleList) and any(map(_is_block, part.children()))
        for part in module.children())


def _is_block(member: nn.Module) -> bool:
    """Whether a member of a list has matrices in its parts, be they linear maps or packed ones.

    A mere map is a part of something else, such as of embeddings.
    """
    if is_linear_class(member) or hasattr(member, "base_layer") or not [*member.children()]:
        return False
    return any(
        tensor.ndim > 1 for module in member.modules() if not isinstance(module, nn.Embedding)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
