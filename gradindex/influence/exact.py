"""The one meaning of "score": exact EK-FAC influence of a sequence on a query.

I(q, m) = ⟨∇ log p(completion | prompt), (G+λI)⁻¹ ∇ log p(sequence m)⟩ = Σ_u Σ_t d_tᵀ P_u a_t,
P_u = (G_u+λ_u I)⁻¹ G_q,u  (Grosse et al. 2023, eqs. 25, 30, 31). Positive: one more copy of m
makes the completion more likely, by I / N_train nats to first order.

Everything needed of a sequence comes from one forward and backward pass: `Influences`, `Terms` and
`GradientSizes` each take what a module hands over and add up their part. `rescore` runs the passes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradindex.influence.batches import Splits, in_batches
from gradindex.influence.blockwise import rotator
from gradindex.influence.curvature import Ekfac
from gradindex.influence.gradients import backward
from gradindex.influence.queries import Preconditioned, slices
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective import Batch
from gradindex.storage.records import Record

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128  # sequences; batches are of like lengths within a chunk


class Influences:
    """Adds up I [q, b] of a batch on every query."""

    def __init__(self, preconditioned: Preconditioned, rows: int):
        self._preconditioned = preconditioned
        self.total = torch.zeros(len(preconditioned), rows, dtype=torch.float64)
        self._parts: dict[str, Tensor] = {}

    def __call__(self, module: Module, a: Tensor, d: Tensor) -> None:
        own = self._preconditioned.of(module).scores(module, a, d).to("cpu", torch.float64)
        self._parts[module.name] = own
        self.total += own

    def stacked(self, modules: list[Module]) -> Tensor:
        """[q, b, u], summing to I over u."""
        return torch.stack([self._parts[module.name] for module in modules], dim=-1)


class Terms:
    """Keeps the terms of I on one query: [b, t] by module name."""

    def __init__(self, preconditioned: Preconditioned, batch: Batch):
        self._preconditioned, self._batch = preconditioned, batch
        self._parts: dict[str, Tensor] = {}

    def __call__(self, module: Module, a: Tensor, d: Tensor) -> None:
        self._parts[module.name] = self._batch.by_position(
            module, self._preconditioned.of(module).terms(module, a, d))

    def stacked(self, modules: list[Module]) -> Tensor:
        """[b, t, u], summing to I over t and u."""
        return torch.stack([self._parts[module.name] for module in modules], dim=-1)


class GradientSizes:
    """Adds up two sizes of each sequence's gradient, float64 [b].

    `self_influence` = ‖m̃‖² = ∇mᵀ (G+λ)⁻¹ ∇m, with m̃ = (G+λ)^−½ ∇m; `squared_step` =
    ‖(G+λ)⁻¹ ∇m‖², the change of parameters that adding m causes: I over its square root is
    θ-RelatIF (Barshan et al. 2020, eq. 7).
    """

    def __init__(self, ekfac: Ekfac, damping: float, rows: int):
        self._ekfac, self._damping = ekfac, damping
        self.self_influence = torch.zeros(rows, dtype=torch.float64)
        self.squared_step = torch.zeros(rows, dtype=torch.float64)

    def __call__(self, module: Module, a: Tensor, d: Tensor) -> None:
        c = self._ekfac[module.name]
        damped = c.damped(self._damping)
        some = rotator(module, a, d, c.eigenvectors_a, c.eigenvectors_s)
        for rows in slices(module, len(a)):
            part = some(rows).square_().div_(damped)
            self.self_influence[rows] += part.sum((1, 2)).cpu()
            self.squared_step[rows] += part.div_(damped).sum((1, 2)).cpu()


def collect(
    model: LanguageModel, modules: list[Module], batch: Batch,
    *collectors: Callable[[Module, Tensor, Tensor], None], numbers: Tensor | None = None,
) -> None:
    """One forward and backward pass of a batch, handed to every collector.

    With `numbers` [b, t], labels are drawn from the model, as for `backward`.
    """
    def each(module: Module, a: Tensor, d: Tensor) -> None:
        for collector in collectors:
            collector(module, a, d)

    with torch.no_grad():
        backward(model, modules, batch, each, numbers)


@dataclass
class Rescorer:
    """How gradients are formed: the model, the modules that count, λ's factor, tokens a batch.

    `halved` counts the batches that were halved because memory ran out.
    """

    model: LanguageModel
    modules: list[Module]
    ekfac: Ekfac
    damping: float
    batch_tokens: int
    halved: int = 0


@dataclass
class Exact:
    """One sequence, scored: influence [q] on each query, and the sizes of its gradient if asked.

    `terms` [t, u] by token and module, for a single query and if asked; `by_module` [q, u] if
    asked.
    """

    influence: np.ndarray
    self_influence: float | None = None
    squared_step: float | None = None
    terms: np.ndarray | None = None
    by_module: np.ndarray | None = None


def chunk_ends(count: int) -> list[int]:
    """Where the chunks of `count` sequences end: small ones first, so that something is exact soon.

    Whenever a chunk is finished, a prefix of the sequences is exact.
    """
    ends, size = [0], SMALLEST_CHUNK
    while ends[-1] < count:
        ends.append(min(count, ends[-1] + size))
        size = min(LARGEST_CHUNK, 2 * size)
    return ends[1:]


def rescore(
    by: Rescorer, preconditioned: Preconditioned, sequences: Sequence[Record],
    sizes: bool = False, terms: bool = False, by_module: bool = False, whole: bool = False,
) -> Iterator[list[tuple[int, Exact]]]:
    """Yield, batch by batch, (place in `sequences`, score); chunks in order, or one as a `whole`.
    """
    first = 0
    for end in [len(sequences)] if whole else chunk_ends(len(sequences)):
        chunk = sequences[first:end]

        def run(rows: list[int], chunk: Sequence[Record] = chunk) -> list[Exact]:
            return _score_batch(by, preconditioned, [chunk[row] for row in rows], sizes, terms,
                                by_module)

        lengths, splits = [len(record.tokens) for record in chunk], Splits()
        for rows, found in in_batches(lengths, by.batch_tokens, splits, run):
            yield [(first + row, one) for row, one in zip(rows, found, strict=True)]
        by.halved += len(splits.made)
        first = end


def exact_scores(
    model: LanguageModel, modules: list[Module], preconditioned: Preconditioned,
    sequences: list[Record], batch_tokens: int,
) -> np.ndarray:
    """Exact influence of every sequence on every query: float64 [q, sequences]."""
    scores = np.zeros((len(preconditioned), len(sequences)))
    by = Rescorer(model, modules, {}, 0.0, batch_tokens)  # no sizes are asked for
    for part in rescore(by, preconditioned, sequences, whole=True):
        for place, exact in part:
            scores[:, place] = exact.influence
    return scores


def self_influence(
    by: Rescorer, sequences: list[Record],
    batch_of: Callable[[list[Record]], tuple[Batch, Tensor | None]],
) -> np.ndarray:
    """‖m̃‖² of every sequence: float64 [sequences], see `GradientSizes`.

    `batch_of` makes the batch of some, and the numbers that draw their labels from the model [its
    targets are the labels].
    """
    def run(rows: list[int]) -> np.ndarray:
        batch, numbers = batch_of([sequences[row] for row in rows])
        sizes = GradientSizes(by.ekfac, by.damping, len(rows))
        collect(by.model, by.modules, batch, sizes, numbers=numbers)
        return sizes.self_influence.numpy()

    every = np.zeros(len(sequences))
    lengths = [len(record.tokens) for record in sequences]
    for rows, sizes in in_batches(lengths, by.batch_tokens, Splits(), run):
        every[rows] = sizes
    return every


def joined(parts: Sequence[Exact]) -> Exact:
    """One sequence's score from those by parts of the modules, in order; with terms and sizes."""
    return Exact(
        np.sum([part.influence for part in parts], axis=0),
        sum(part.self_influence or 0.0 for part in parts),
        sum(part.squared_step or 0.0 for part in parts),
        np.concatenate([part.terms for part in parts if part.terms is not None], axis=1),
    )


def _score_batch(
    by: Rescorer, preconditioned: Preconditioned, members: list[Record], sizes: bool, terms: bool,
    by_module: bool,
) -> list[Exact]:
    batch = by.model.batch(members)
    own = GradientSizes(by.ekfac, by.damping, len(members))
    extra = [own] if sizes else []
    if terms:
        parts = Terms(preconditioned, batch)
        collect(by.model, by.modules, batch, parts, *extra)
        stacked = parts.stacked(by.modules).cpu().numpy()
        found = [
            Exact(each[: len(m.tokens)].sum(keepdims=True, dtype=np.float64)[0],
                  terms=each[: len(m.tokens)].copy())
            for m, each in zip(members, stacked, strict=True)
        ]
    else:
        influences = Influences(preconditioned, len(members))
        collect(by.model, by.modules, batch, influences, *extra)
        found = [Exact(column) for column in influences.total.numpy().T]
        if by_module:
            shares = influences.stacked(by.modules).transpose(0, 1).numpy()
            for one, share in zip(found, shares, strict=True):
                one.by_module = share
    if sizes:
        for one, size, step in zip(found, own.self_influence.tolist(), own.squared_step.tolist(),
                                   strict=True):
            one.self_influence, one.squared_step = size, step
    return found
