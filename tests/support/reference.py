"""Slow, plain truths in float64 to compare the product with.

Everything here is written from the formulas, with `torch.func` or dense algebra, and shares no
code with the product.
"""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D


def log_likelihood(network: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Σ_t log p(label_t | ids before t) of one sequence; ids and labels [t], −100 not counted."""
    logits = network(input_ids=ids[None], use_cache=False).logits[0]
    return -cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


def sequence_gradient(
    network: nn.Module, names: list[str], ids: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """∂ log-likelihood / ∂ W̄ of the named modules, by `torch.func`: [o, i], the bias last.

    That of a weight that several modules have is by all of their uses.
    """
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    first = {id(p): name for name, p in network.named_parameters()}  # a shared one's own name
    own = {name: first[id(p)] for name, p in network.named_parameters(remove_duplicate=False)}

    def function(chosen: dict[str, Tensor]) -> Tensor:
        module = _Likelihood(network, labels)
        everything = {f"network.{name}": p for name, p in {**parameters, **chosen}.items()}
        return functional_call(module, everything, (ids,))

    shared = {name: own[name] for name in own if name.rpartition(".")[0] in names}
    found = grad(function)({name: parameters[name] for name in shared.values()})
    gradients = {name: found[shared[name]] for name in shared}
    return {name: _joined(network.get_submodule(name), name, gradients) for name in names}


class _Likelihood(nn.Module):
    def __init__(self, network: nn.Module, labels: Tensor):
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, ids: Tensor) -> Tensor:
        return log_likelihood(self.network, ids, self.labels)


def _joined(module: nn.Module, name: str, gradients: dict[str, Tensor]) -> Tensor:
    weight = gradients[f"{name}.weight"]
    if isinstance(module, Conv1D):
        weight = weight.T
    if f"{name}.bias" in gradients:
        weight = torch.cat([weight, gradients[f"{name}.bias"][:, None]], dim=1)
    return weight


def ekfac_matrix(q_s: Tensor, q_a: Tensor, eigenvalues: Tensor, damping: float) -> Tensor:
    """The damped EK-FAC block, materialised: [o·i, o·i] for row-major vec of [o, i]."""
    # the axes themselves, as over a vocabulary
    q_s, q_a = (torch.diag(q[:, 0]) if q.shape[1] == 1 else q for q in (q_s, q_a))
    basis = torch.kron(q_s, q_a)  # row-major vec(Q_S X Q_Aᵀ) = (Q_S ⊗ Q_A) vec(X)
    return basis @ torch.diag(eigenvalues.flatten() + damping) @ basis.T


def covariances(inputs: list[Tensor], output_gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A and S: outer products averaged over all positions of all sequences [t, i] and [t, o]."""
    positions = sum(len(a) for a in inputs)
    a = sum((torch.outer(row, row) for x in inputs for row in x), start=torch.zeros(()))
    s = sum((torch.outer(row, row) for x in output_gradients for row in x), start=torch.zeros(()))
    return a / positions, s / positions


def true_recall(influence: list[float], found: list[int], k: int) -> float:
    """Share of the k largest of `influence` among the k largest of `found` (places)."""
    order = sorted(range(len(influence)), key=lambda place: (-influence[place], place))
    best = set(order[:k])
    kept = sorted(found, key=lambda place: (-influence[place], place))[:k]
    return len(best & set(kept)) / k


def plain_score(query: list[int], documents: list[set[int]], place: int) -> float:
    """Σ over query tokens of (k₁+1)·e/(k₁+e) · IDF, e = 1 where the document holds the token."""
    total = 0.0
    for token in query:
        count = sum(token in document for document in documents)
        idf = math.log((len(documents) - count + 0.5) / (count + 0.5) + 1)
        there = float(token in documents[place])
        total += (1.5 + 1) * there / (1.5 + there) * idf
    return total
