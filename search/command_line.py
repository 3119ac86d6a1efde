"""What the commands of this package share: flags read from the table of controls."""

from collections.abc import Callable
from typing import Any, get_args

import click

from search.ask.controls import CONTROLS, DEFAULTS, TYPES, Controls, flag_of

Flag = Callable[[Any], Any]  # a decorator of click's


def control_flags(*names: str) -> list[Flag]:
    """The flags of some controls, in that order."""
    return [_control_flag(name) for name in names]


def _control_flag(name: str) -> Flag:
    control, flag, default = CONTROLS[name], flag_of(name), getattr(DEFAULTS, name)
    if TYPES[name] is bool:
        return click.option(flag, is_flag=True, help=control.help)
    return click.option(flag, type=_type_of_flag(name), default=default, metavar=control.unit,
                        show_default=default is not None, help=control.help)


def _type_of_flag(name: str) -> type | None:
    """What click makes of a flag's text: a number, or None where it stays text."""
    kinds = get_args(TYPES[name])
    return None if str in kinds else next((kind for kind in kinds if kind in (int, float)), None)


def take_controls(flags: dict[str, Any]) -> Controls:
    """The controls among a command's flags, which are taken out of them."""
    chosen: dict[str, Any] = {}
    for name in CONTROLS:
        given = flag_of(name).removeprefix("--").replace("-", "_")
        if TYPES[name] is bool and getattr(DEFAULTS, name):
            # a control that is on without its flag: the flag says no
            if given in flags:
                chosen[name] = not flags.pop(given)
        elif name in flags:
            chosen[name] = flags.pop(name)
    return Controls(**chosen)
