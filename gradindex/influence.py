"""The one meaning of "score": exact EK-FAC influence of a sequence on a query.

I(q, m) = ⟨∇ log p(completion | prompt), (G+λI)⁻¹ ∇ log p(sequence m)⟩ = Σ_u Σ_t d_tᵀ P_u a_t,
P_u = (G_u+λ_u I)⁻¹ G_q,u  (Grosse et al. 2023, eqs. 25, 30, 31). Positive: one more copy of m
makes the completion more likely, by I / N_train nats to first order.
"""

import numpy as np
import torch
from torch import Tensor

from gradindex.curvature import Ekfac
from gradindex.gradients import (
    Batch,
    apply_inputs,
    backward,
    gradient,
    make_batch,
    plan_batches,
)
from gradindex.model import LanguageModel, Module
from gradindex.records import Record

Gradients = dict[str, Tensor]  # [o, i] by module name


def query_gradient(
    model: LanguageModel, modules: list[Module], batch: Batch
) -> tuple[Gradients, Tensor]:
    """∇ log p(completion | prompt) of a batch of one, and log p per position [t] in nats."""
    gradients: Gradients = {}

    def each(module: Module, a: Tensor, d: Tensor) -> None:
        wide = model.accumulate
        gradients[module.name] = gradient(module, a.to(wide), d.to(wide))[0]

    log_p = backward(model, modules, batch, each)
    return {module.name: gradients[module.name] for module in modules}, log_p[0]


def query_coordinates(
    model: LanguageModel, modules: list[Module], ekfac: Ekfac, batch: Batch, damping: float
) -> tuple[Gradients, Tensor]:
    """C_u of a query (a batch of one) by module name, and log p per position [t] in nats."""
    gradients, log_p = query_gradient(model, modules, batch)
    return {name: ekfac[name].coordinates(g, damping) for name, g in gradients.items()}, log_p


def precondition(ekfac: Ekfac, coordinates: Gradients) -> Gradients:
    """P_u = Q_S C_u Q_Aᵀ from coordinates C_u, both [o, i] by module name."""
    return {name: ekfac[name].leave_eigenbasis(c) for name, c in coordinates.items()}


def terms(module: Module, a: Tensor, d: Tensor, p: Tensor) -> Tensor:
    """d_tᵀ P a_t for every token: a [b, t, i], d [b, t, o], P [o, i] → [b, t]."""
    return (apply_inputs(a, p, module.bias) * d).sum(-1)


def score(
    model: LanguageModel, modules: list[Module], preconditioned: Gradients, batch: Batch
) -> Tensor:
    """The terms of the influence of each sequence of a batch: [b, t, u], summing to I over t, u."""
    parts: dict[str, Tensor] = {}

    def each(module: Module, a: Tensor, d: Tensor) -> None:
        p = preconditioned[module.name]
        parts[module.name] = terms(module, a.to(p.dtype), d.to(p.dtype), p)

    backward(model, modules, batch, each)
    return torch.stack([parts[module.name] for module in modules], dim=-1)


def exact_scores(
    model: LanguageModel, modules: list[Module], preconditioned: list[Gradients],
    sequences: list[Record], batch_tokens: int,
) -> np.ndarray:
    """Exact influence of every sequence on every query: float64 [queries, sequences].

    `preconditioned` holds P_u [o, i] by module name for each query. Each sequence's gradient is
    formed once, whatever the number of queries.
    """
    stacked = {
        module.name: torch.stack([p[module.name] for p in preconditioned]) for module in modules
    }
    scores = np.zeros((len(preconditioned), len(sequences)))
    for rows in plan_batches([len(record.ids) for record in sequences], batch_tokens):
        members = [sequences[row] for row in rows]
        batch = make_batch([(member.ids, member.scored) for member in members], model.device)
        total = torch.zeros(len(preconditioned), len(rows), dtype=torch.float64)

        def each(module: Module, a: Tensor, d: Tensor) -> None:
            p = stacked[module.name]
            g = gradient(module, a.to(p.dtype), d.to(p.dtype))
            total.add_((p.flatten(1) @ g.flatten(1).T).cpu())  # noqa: B023

        backward(model, modules, batch, each)
        scores[:, rows] = total.numpy()
    return scores
