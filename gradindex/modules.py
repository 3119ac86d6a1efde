"""What a tracked module is, and how some of them are chosen, at a build or for a query."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gradindex.errors import InputError


@dataclass(frozen=True)
class Module:
    """One tracked linear map s = W a; with a bias, a 1 is appended to a as its last entry.

    `kind` is "mlp" (whatever isn't attention), "attention", or "adapter" for LoRA's own maps.
    """

    name: str
    layer: int
    kind: str
    d_out: int
    d_in: int
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i] of its gradient, the bias folded in."""
        return self.d_out, self.d_in + self.bias


KINDS = {"mlp": {"mlp"}, "attention": {"attention"}, "all": {"mlp", "attention"},
         "adapter": {"adapter"}}


def choose_modules(found: Sequence[Module], choice: str, what: str) -> list[Module]:
    """Those of a layer range, of a kind, or whose name matches, in order.

    `choice`: layers ("8-15", "0,2-4"); "mlp" (all but attention), "attention", "all" (both),
    "adapter" (lora_A and lora_B), several of these with commas; or a regular expression searched in
    names. Raises InputError where none is chosen; `what` says then what they were chosen from.
    """
    layers, kinds = numbers_in(choice), [part.strip() for part in choice.split(",")]
    if layers is not None:
        chosen = [module for module in found if module.layer in layers]
    elif set(kinds) <= set(KINDS):
        wanted = set().union(*(KINDS[kind] for kind in kinds))
        chosen = [module for module in found if module.kind in wanted]
    else:
        try:
            pattern = re.compile(choice)
        except re.error as error:
            raise InputError(
                f"--modules {choice!r}: neither layers (8-15), nor some of {', '.join(KINDS)}, nor "
                f"a regular expression: {error}."
            ) from None
        chosen = [module for module in found if pattern.search(module.name)]
    if not chosen:
        layers = {module.layer for module in found}
        shown = f", which are in layers {min(layers)} to {max(layers)} and named like " \
            f"{found[0].name}" if layers else ""
        raise InputError(
            f"--modules {choice!r} matches none of {what}{shown}. Give layers (8-15), "
            f"{', '.join(KINDS)}, or a regular expression."
        )
    return chosen


def numbers_in(text: str) -> set[int] | None:
    """The numbers of "3", "8-15" or "0,2-4", both ends included; None where it isn't that."""
    if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text):
        return None
    numbers = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
