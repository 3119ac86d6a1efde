"""One small pass through a network with adapters of other kinds than LoRA: what can hooks read?

An adapter may scale the output of the map under it, or add to it, and the map's gradient is Σ d aᵀ
all the same; or use its weight in another way. Which it is, the gradient by autograd tells.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradindex.model.adapters import Parts, adapter_parts
from gradindex.model.config import vocabulary_size

LENGTH = 4  # tokens
NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; of shorter dtypes:
ROUGHLY = 0.03


def readable_parts(network: Any) -> Parts:
    """The parts of a network's adapters, without the maps under them that hooks read rightly.

    One layer of each kind speaks for all of its kind. Where the weights aren't in memory (on the
    device "meta", in a dry run) or quantised, maps under other kinds than LoRA stay unclear.
    """
    parts = adapter_parts(network)
    parts.unclear = {module: word for module, word in parts.unclear.items()
                     if isinstance(module, (nn.Linear, Conv1D))}
    first: dict[str, list[nn.Module]] = {}
    for module, word in parts.unclear.items():
        weight = module._parameters.get("weight")
        if isinstance(weight, nn.Parameter) and weight.is_floating_point() and \
                weight.device.type != "meta":
            first.setdefault(f"{word} {type(module)}", []).append(module)
    wrong = _misread(network, [maps[0] for maps in first.values()])
    sound = {module for maps in first.values() if maps[0] not in wrong for module in maps}
    # its bias may be used in another way than its weight; few models have one
    parts.no_bias |= sound
    parts.unclear = {module: word for module, word in parts.unclear.items() if module not in sound}
    return parts


def _misread(network: Any, maps: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of the maps whose gradient by autograd isn't Σ d aᵀ of what a hook sees, or none."""
    chosen = list(maps)
    if not chosen:
        return set()
    device = next(network.parameters()).device
    vocabulary = vocabulary_size(network.config)
    tokens = (vocabulary // 2 + torch.arange(LENGTH, device=device)) % vocabulary
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in chosen}
    handles = [module.register_forward_hook(
        lambda module, args, output: seen[module].append((args[0], output))) for module in chosen]
    weights: list[Tensor] = [module._parameters["weight"] for module in chosen]  # type: ignore[misc]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            logits = network(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            log_p = logits.float().log_softmax(-1).gather(-1, tokens[1:, None]).sum()
        outputs = [output for module in chosen for _, output in seen[module]]
        if not log_p.requires_grad:  # a copy of the weights is used, or nothing of them
            return set(chosen)
        found = torch.autograd.grad(log_p, [*weights, *outputs], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for weight in frozen:
            weight.requires_grad_(False)
    truths, d = found[: len(chosen)], iter(found[len(chosen):])
    wrong = set[nn.Module]()
    for module, truth in zip(chosen, truths, strict=True):
        read = sum((_product(module, a, one) for a, _ in seen[module]
                    if (one := next(d)) is not None), start=torch.zeros(()))
        bound = NEAR.get(weights[0].dtype, ROUGHLY)
        if truth is None or (truth - read.to(truth)).abs().max() > bound * truth.abs().max():
            wrong.add(module)
    return wrong


def _product(module: nn.Module, a: Tensor, d: Tensor) -> Tensor:
    """Σ d aᵀ in the form of a map's weight: [o, i], or its transpose."""
    a, d = a.reshape(-1, a.shape[-1]), d.reshape(-1, d.shape[-1])
    return a.T @ d if isinstance(module, Conv1D) else d.T @ a
