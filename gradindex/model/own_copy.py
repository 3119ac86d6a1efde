"""A network in modules of our own, on the weights of the one that was given.

Passes need evaluation mode, frozen weights, another way of running experts: all of it is set on the
copy, so that the owner's object stays as it is, in training too.
"""

import copy
from typing import Any

from torch import Tensor, nn

from gradindex.errors import InputError


def own_copy(network: nn.Module) -> Any:
    """The same modules once more, on the same weights: only what is not a tensor is copied.

    A weight that its owner changes in place changes here too. Hooks are kept. Raises InputError for
    a network that can't be copied.
    """
    same: dict[int, Any] = {}  # what `deepcopy` takes for copied already, by its address
    for module in network.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks"):  # they may hold on to anything: a trainer, all its data
                same[id(value)] = copy.copy(value)
            elif isinstance(value, Tensor):
                same[id(value)] = value
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            # a quantised one, of integers, has attributes of its own
            same[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) \
                if parameter.is_floating_point() else parameter
        for buffer in module._buffers.values():
            if buffer is not None:
                same[id(buffer)] = buffer.detach()
    try:
        return copy.deepcopy(network, same)
    except Exception as error:  # whatever hangs on the object, it isn't ours
        raise InputError(
            f"the model object ({type(network).__name__}) can't be copied: "
            f"{' '.join(str(error).split())[:200]}. Save it (save_pretrained) and give the folder."
        ) from None
