"""Influence between all sequences of an index, by autograd and dense matrices alone."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from support.reference import ekfac_matrix, log_likelihood


def log_p_of(network: Any, task: str, record: Any) -> torch.Tensor:
    """The log p of a sequence, read alone and without a mask."""
    there = next(network.parameters()).device
    tokens = torch.from_numpy(record.tokens.astype(np.int64)).to(there)
    if task == "causal":
        labels = torch.where(torch.from_numpy(record.scored).to(there), tokens, -100)
        return log_likelihood(network, tokens, labels)
    if task == "classification":
        return network(input_ids=tokens[None]).logits.log_softmax(-1)[0, record.label]
    parts = (tokens[: record.border], tokens[record.border :])
    one, other = (network(input_ids=part[None]).logits[0, 0] for part in parts)
    return logsigmoid(one - other - record.offset)


def gradients_of(index: Any, record: Any, task: str) -> tuple[float, dict[str, torch.Tensor]]:
    """log p, and its gradient [o·i] by each tracked map's weight with its bias."""
    network = index.model.network
    maps = {module.name: network.get_submodule(module.name) for module in index.manifest.modules}
    chosen = [p for linear in maps.values() for p in (linear.weight, linear.bias) if p is not None]
    for parameter in chosen:
        parameter.requires_grad_(True)
    value = log_p_of(network, task, record)
    parts = iter(torch.autograd.grad(value, chosen, allow_unused=True))
    for parameter in chosen:
        parameter.requires_grad_(False)
    found = {}
    for name, linear in maps.items():
        weight = next(parts)
        weight = weight if isinstance(linear, torch.nn.Linear) else weight.T  # Conv1D
        if linear.bias is not None:
            weight = torch.cat([weight, next(parts)[:, None]], 1)
        found[name] = weight.flatten().cpu()
    return value.item(), found


def gram(index: Any, records: list[Any], task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The influence [n, n] of all sequences on each other, log p [n], and ‖∇m‖ [n]."""
    found = [gradients_of(index, record, task) for record in records]
    influence, squares = np.zeros((len(records),) * 2), np.zeros(len(records))
    for module in index.manifest.modules:
        c = index.snapshot.ekfac[module.name]
        g = torch.stack([gradients[module.name] for _, gradients in found])
        damping = index.manifest.damping * c.eigenvalues.mean().item()
        matrix = ekfac_matrix(*(part.cpu() for part in (
            c.eigenvectors_s, c.eigenvectors_a, c.eigenvalues)), damping)
        influence += (g @ torch.linalg.solve(matrix, g.T)).numpy()
        squares += g.square().sum(1).numpy()
    return influence, np.array([log_p for log_p, _ in found]), np.sqrt(squares)
