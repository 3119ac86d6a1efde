"""What a tracked module is, and how some of them are chosen, at a build or for a query."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradindex.errors import InputError

EMBEDDED = -1  # the layer of an embedding, before those of the blocks
LAST = "last"  # the member that the model itself is
AT = "@"  # in the name of another member's module, behind the member's
MEMBER_FORM = r"^[A-Za-z0-9][\w.-]{0,63}$"  # what names other members


@dataclass(frozen=True)
class Module:
    """One tracked linear map s = W a; with a bias, a 1 is appended to a as its last entry.

    `layer` is the number of the block that it belongs to, or, of a head, the one behind the last,
    and of an embedding EMBEDDED.
    `kind` is "mlp" (whatever of a block isn't attention), "attention", "head" for what makes the
    model's outputs of what the blocks give, "embeddings", or "adapter" for LoRA's own maps. Where
    the outputs are the tokens of a vocabulary the curvature is `diagonal`: Q_S = I and Q_A = I. An
    embedding that has its weight from the head is a part of that.
    Where several models share the score (`model/members.py`), `member` is the one that it is of,
    whose name its own begins with, and `weight` is what its part counts in the score.

    >>> Module("layers.0.mlp.up", layer=0, kind="mlp", d_out=8, d_in=2, bias=True).shape
    (8, 3)
    """

    name: str
    layer: int
    kind: str
    d_out: int
    d_in: int
    bias: bool
    diagonal: bool = False
    member: str = LAST
    weight: float = 1.0

    @property
    def path(self) -> str:
        """Its name in its own model.

        >>> Module("early@layers.0.mlp.up", 0, "mlp", 8, 2, True, member="early").path
        'layers.0.mlp.up'
        """
        return self.name if self.member == LAST else self.name.partition(AT)[2]

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i], the shape of its gradient. A bias is the last column and counts in i."""
        return self.d_out, self.d_in + self.bias

    @property
    def size(self) -> int:
        """o · i, the number of entries of its gradient, those of a bias counted.

        >>> Module("layers.0.mlp.up", layer=0, kind="mlp", d_out=8, d_in=2, bias=True).size
        24
        """
        o, i = self.shape
        return o * i


KINDS = {"mlp": {"mlp"}, "attention": {"attention"}, "head": {"head"},
         "all": {"mlp", "attention", "head"}, "adapter": {"adapter"},
         "embeddings": {"embeddings"}, "everything": {"mlp", "attention", "head", "embeddings"}}


def choose_modules(modules: Sequence[Module], choice: str, what: str) -> list[Module]:
    """The modules of some layers, of some kinds, or whose names match, in order.

    `choice` is layers ("8-15", "0,2-4"); or "mlp" (all of the blocks but attention), "attention",
    "head" (the map to the outputs), "all" (of these), "adapter" (lora_A and lora_B), "embeddings",
    "everything" ("all" and "embeddings"), several of these with commas; or a regular expression,
    searched in names. Raises InputError where none is chosen, and says with `what` what there was
    to choose.

    >>> modules = [Module(f"layers.{n}.mlp", n, "mlp", 4, 4, False) for n in range(4)]
    >>> [module.layer for module in choose_modules(modules, "0,2-3", "the model's modules")]
    [0, 2, 3]
    """
    layers, kinds = numbers_in(choice), [part.strip() for part in choice.split(",")]
    # Numbers and words come first, though both are regular expressions too: "8-15" or "mlp" means
    # a layer or a kind to whoever types it, never a part of a name.
    if layers is not None:
        chosen = [module for module in modules if module.layer in layers]
    elif set(kinds) <= set(KINDS):
        allowed = set().union(*(KINDS[kind] for kind in kinds))
        chosen = [module for module in modules if module.kind in allowed]
    else:
        try:
            pattern = re.compile(choice)
        except re.error as error:
            raise InputError(
                f"--modules {choice!r}: neither layers (8-15), nor some of {', '.join(KINDS)}, nor "
                f"a regular expression: {error}."
            ) from None
        chosen = [module for module in modules if pattern.search(module.path)]
    if not chosen:
        layers = {module.layer for module in modules}
        shown = f", which are in layers {min(layers)} to {max(layers)} and named like " \
            f"{modules[0].name}" if layers else ""
        raise InputError(
            f"--modules {choice!r} matches none of {what}{shown}. Give layers (8-15), "
            f"{', '.join(KINDS)}, or a regular expression."
        )
    return chosen


def split_name(value: Any) -> tuple[str | None, Any]:
    """The member's name and the model of "NAME=MODEL"; None for the name where none is given.

    >>> split_name("early=runs/step-64"), split_name("org/model@step2000")
    (('early', 'runs/step-64'), (None, 'org/model@step2000'))
    """
    name, found, model = str(value).partition("=")
    # folders may have an = in their names
    if not isinstance(value, str) or not found or not re.match(MEMBER_FORM, name) or \
            Path(value).exists():
        return None, value
    return name, model


def by_member(modules: Sequence[Module]) -> dict[str, list[Module]]:
    """The modules of each member, in order.

    >>> two = [Module("m", 0, "mlp", 4, 4, False), Module("a@m", 0, "mlp", 4, 4, False, member="a")]
    >>> {member: len(own) for member, own in by_member(two).items()}
    {'last': 1, 'a': 1}
    """
    members: dict[str, list[Module]] = {}
    for module in modules:
        members.setdefault(module.member, []).append(module)
    return members


def weighted(modules: Sequence[Module], weights: Mapping[str, float]) -> list[Module]:
    """The modules with the weights of their members in the score; those of weight 0 are left out.

    >>> [m.weight for m in weighted([Module("m", 0, "mlp", 4, 4, False)], {"last": 0.5})]
    [0.5]
    """
    return [replace(module, weight=weights[module.member]) for module in modules
            if weights.get(module.member)]


def numbers_in(text: str) -> set[int] | None:
    """The numbers of "3", "8-15" or "0,2-4", both ends included; None for any other text.

    >>> numbers_in("0,2-4"), numbers_in("mlp")
    ({0, 2, 3, 4}, None)
    """
    # six digits at most: "0-9999999999" would fill the memory
    if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text):
        return None
    numbers = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
