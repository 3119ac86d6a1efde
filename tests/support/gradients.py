"""Every gradient of a batch, kept, and what goes into one."""

from typing import Any

from torch import Tensor

from gradindex.influence.gradients import backward, gradient
from gradindex.results import UNSCORED


def captured(model: Any, modules: Any, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients [b, o, i] of each module by name, and log p of each sequence [b]."""
    found: dict[str, Tensor] = {}
    log_p = backward(model, modules, batch,
                     lambda m, a, d: found.__setitem__(m.name, gradient(m, a, d)))
    return found, log_p


def unscored(targets: Tensor) -> Tensor:
    """The numbers of the positions without a target, among all."""
    return (targets.flatten() == UNSCORED).nonzero()[:, 0]
