"""The one meaning of "score": exact EK-FAC influence of a sequence on a query.

I(q, m) = ⟨∇ log p(completion | prompt), (G+λI)⁻¹ ∇ log p(sequence m)⟩ = Σ_u Σ_t d_tᵀ P_u a_t,
P_u = (G_u+λ_u I)⁻¹ G_q,u  (Grosse et al. 2023, eqs. 25, 30, 31). Positive: one more copy of m
makes the completion more likely, by I / N_train nats to first order.

Everything needed of a sequence comes from one forward and backward pass: `Influences`, `Terms` and
`GradientSizes` each take what a module hands over and add up their part. `rescore` runs the passes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gradindex.influence.blockwise import pieces, rotator
from gradindex.influence.curvature import Ekfac
from gradindex.influence.gradients import Each, backward
from gradindex.influence.preconditioned import Preconditioned
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.influence.vocabulary import OutputGradients
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective.batch import Batch
from gradindex.storage.records import Record
from gradindex.transfers import Arriving, stacked_on_host

SMALLEST_CHUNK, LARGEST_CHUNK = 4, 128  # sequences; batches are of like lengths within a chunk


class Influences:
    """Adds up the influence I [q, b] of a batch's sequences on every query, module by module.

    >>> m = Module("m", 0, "mlp", d_out=1, d_in=2, bias=False)
    >>> influences = Influences(Preconditioned({"m": torch.tensor([[[1.0, 2.0]]])}))
    >>> influences(m, a=torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), d=torch.ones(1, 2, 1))
    >>> influences.total.tolist()  # (1 + 2) of the first token and 2 of the second
    [[5.0]]
    """

    def __init__(self, preconditioned: Preconditioned):
        self._preconditioned = preconditioned
        self._parts: dict[str, Tensor] = {}

    def __call__(self, module: Module, a: Tensor, d: OutputGradients) -> None:
        self._parts[module.name] = self._preconditioned.of(module).scores(module, a, d)

    @cached_property
    def _shares(self) -> np.ndarray:
        # float64: float32 would lose digits over hundreds of modules of unlike size
        return stacked_on_host(list(self._parts.values())).astype(np.float64)

    @property
    def total(self) -> np.ndarray:
        """I, float64 [q, b]."""
        total = np.zeros(self._shares.shape[1:])
        for share in self._shares:  # one after the other, whatever the shape
            total += share
        return total

    def stacked(self, modules: list[Module]) -> np.ndarray:
        """The shares of the modules, float64 [q, b, u]: summed over u they are I."""
        order = list(self._parts)
        return np.moveaxis(self._shares[[order.index(module.name) for module in modules]], 0, -1)


class Terms:
    """Keeps the terms of the influence on one query, by token and module.

    >>> m = Module("m", 0, "mlp", d_out=1, d_in=2, bias=False)
    >>> batch = Batch.of(*np.ones((3, 1, 2), dtype=np.int64), torch.device("cpu"))
    >>> terms = Terms(Preconditioned({"m": torch.tensor([[[1.0, 2.0]]])}), batch)
    >>> terms(m, a=torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), d=torch.ones(1, 2, 1))
    >>> terms.stacked([m]).tolist()
    [[[3.0], [2.0]]]
    """

    def __init__(self, preconditioned: Preconditioned, batch: Batch):
        self._preconditioned, self._batch = preconditioned, batch
        self._parts: dict[str, Tensor] = {}

    def __call__(self, module: Module, a: Tensor, d: OutputGradients) -> None:
        self._parts[module.name] = self._batch.by_position(
            module, self._preconditioned.of(module).terms(module, a, d))

    def stacked(self, modules: list[Module]) -> np.ndarray:
        """The terms d_tᵀ P_u a_t, [b, t, u]: summed over t and u they are I."""
        return np.moveaxis(
            stacked_on_host([self._parts[module.name] for module in modules]), 0, -1)


class GradientSizes:
    """Adds up three sizes of each sequence's gradient ∇m; of several models, their weighted sums.

    `self_influence` is ∇mᵀ (G+λ)⁻¹ ∇m, which is ‖m̃‖² for m̃ = (G+λ)^−½ ∇m. `squared_step` is
    ‖(G+λ)⁻¹ ∇m‖², the squared change of parameters that adding m causes: I over its square root is
    θ-RelatIF (Barshan et al. 2020, eq. 7). `squared_norm` is ‖∇m‖².

    >>> m = Module("m", 0, "mlp", d_out=1, d_in=2, bias=False)
    >>> from gradindex.influence.curvature import Curvature
    >>> ekfac = {"m": Curvature(torch.eye(2), torch.eye(1), torch.tensor([[2.0, 4.0]]))}
    >>> sizes = GradientSizes(ekfac, damping=0.0)
    >>> sizes(m, a=torch.tensor([[[2.0, 4.0]]]), d=torch.ones(1, 1, 1))
    >>> sizes.found().tolist()  # 4/2 + 16/4, 1² + 1², 2² + 4²
    [[6.0], [2.0], [20.0]]
    """

    def __init__(self, ekfac: Ekfac, damping: float):
        self._ekfac, self._damping = ekfac, damping
        self._sums: dict[torch.device, Tensor] = {}  # float64 [3, b]

    def __call__(self, module: Module, a: Tensor, d: OutputGradients) -> None:
        c = self._ekfac[module.name]
        like = c.eigenvalues
        if like.device not in self._sums:
            self._sums[like.device] = like.new_zeros(3, len(a), dtype=torch.float64)
        self_influence, squared_step, squared_norm = self._sums[like.device]
        rotate = rotator(module, a, d, c.eigenvectors_a, c.eigenvectors_s)
        # Here gradients are formed after all, [n, o, i]: some at a time, and changed in place.
        for rows, outputs in pieces(module, len(a)):
            part = rotate(rows, outputs).square_()
            weight = module.weight
            squared_norm[rows] += weight * part.sum((1, 2))  # which no rotation changes
            damped = c.damped(self._damping, outputs)
            self_influence[rows] += weight * part.div_(damped).sum((1, 2))
            squared_step[rows] += weight * part.div_(damped).sum((1, 2))

    @property
    def sums(self) -> list[Tensor]:
        """What each device added up, float64 [3, b]; together they are the sizes."""
        return list(self._sums.values())

    def found(self) -> np.ndarray:
        """`self_influence`, `squared_step`, `squared_norm` of every sequence: float64 [3, b]."""
        sizes: np.ndarray = np.sum(Arriving(self.sums).arrays(), axis=0)
        return sizes


def collect(
    model: LanguageModel, modules: list[Module], batch: Batch,
    *collectors: Each, numbers: Tensor | None = None,
) -> Tensor:
    """One forward and backward pass of a batch, whose a and d every collector is called with.

    With `numbers`, gradients are the curvature's, as for `backward`, whose log p it returns.
    """
    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        for collector in collectors:
            collector(module, a, d)

    with torch.no_grad():
        return backward(model, modules, batch, each, numbers)


@dataclass
class Rescorer:
    """How sequences are scored exactly.

    `modules` are those that count, `damping` is λ in units of mean(Λ), and a batch has at most
    `batch_tokens` tokens, padding counted. `halved` counts the batches that were halved because
    memory ran out.
    """

    model: LanguageModel
    modules: list[Module]
    ekfac: Ekfac
    damping: float
    batch_tokens: int
    halved: int = 0


@dataclass
class Exact:
    """The exact scores of one sequence.

    `influence` float64 [q] is its influence on each query, `log_p` its own log p in nats. The rest
    is None unless `rescore` was asked for it: the sizes of `GradientSizes`; `terms` [t, u], by
    token and module, which exist for a single query only; and `by_module` float64 [q, u].
    """

    influence: np.ndarray
    log_p: float = 0.0
    self_influence: float | None = None
    squared_step: float | None = None
    squared_norm: float | None = None
    terms: np.ndarray | None = None
    by_module: np.ndarray | None = None


def chunk_ends(count: int) -> list[int]:
    """Where the chunks of `count` sequences end. Whenever one is done, a prefix of them is exact.

    >>> chunk_ends(200)
    [4, 12, 28, 60, 124, 200]
    """
    # Small chunks first: a user who watches, or interrupts, has exact scores of the best soon. Of a
    # large model on a CPU four sequences take seconds.
    ends, size = [0], SMALLEST_CHUNK
    while ends[-1] < count:
        ends.append(min(count, ends[-1] + size))
        size = min(LARGEST_CHUNK, 2 * size)
    return ends[1:]


def rescore(
    by: Rescorer, preconditioned: Preconditioned | None, sequences: Sequence[Record],
    sizes: bool = False, terms: bool = False, by_module: bool = False, one_chunk: bool = False,
) -> Iterator[list[tuple[int, Exact]]]:
    """Score sequences exactly, and yield each batch as pairs (position in `sequences`, scores).

    Within a chunk (`chunk_ends`) batches come in no order of the sequences; chunks come in order.
    With `one_chunk` all are one. `sizes`, `terms` and `by_module` say which parts of `Exact` are
    wanted; without queries there are log p and sizes alone. Raises ResourceError where memory
    doesn't hold one sequence.
    """
    first = 0
    for end in [len(sequences)] if one_chunk else chunk_ends(len(sequences)):
        chunk = sequences[first:end]

        def run(rows: list[int], chunk: Sequence[Record] = chunk) -> list[Exact]:
            return _score_batch(by, preconditioned, [chunk[row] for row in rows], sizes, terms,
                                by_module)

        lengths, splits = by.model.lengths(chunk), Splits()
        for rows, scores in in_batches(lengths, by.batch_tokens, splits, run):
            yield [(first + row, exact) for row, exact in zip(rows, scores, strict=True)]
        by.halved += len(splits.halved)
        first = end


def exact_scores(
    model: LanguageModel, modules: list[Module], preconditioned: Preconditioned,
    sequences: list[Record], batch_tokens: int,
) -> np.ndarray:
    """Exact influence of every sequence on every query: float64 [q, sequences]."""
    scores = np.zeros((len(preconditioned), len(sequences)))
    # no sizes are asked for, which alone need a curvature
    by = Rescorer(model, modules, ekfac={}, damping=0.0, batch_tokens=batch_tokens)
    for part in rescore(by, preconditioned, sequences, one_chunk=True):
        for position, exact in part:
            scores[:, position] = exact.influence
    return scores


def self_influence(
    by: Rescorer, sequences: list[Record],
    batch_of: Callable[[list[Record]], tuple[Batch, Tensor | None]],
) -> np.ndarray:
    """The influence of every sequence on itself, ‖m̃‖² (`GradientSizes`): float64 [sequences].

    `batch_of` makes a batch of some records, with the numbers by which `backward` forms the
    curvature's gradients, or None where the targets' own are meant. Raises ResourceError as
    `rescore` does.
    """
    def run(rows: list[int]) -> np.ndarray:
        batch, numbers = batch_of([sequences[row] for row in rows])
        sizes = GradientSizes(by.ekfac, by.damping)
        collect(by.model, by.modules, batch, sizes, numbers=numbers)
        return np.asarray(sizes.found()[0])

    squares = np.zeros(len(sequences))
    for rows, sizes in in_batches(
            by.model.lengths(sequences), by.batch_tokens, Splits(), run):
        squares[rows] = sizes  # batches come in no order of the sequences
    return squares


def joined(parts: Sequence[Exact]) -> Exact:
    """A sequence's scores on all modules from those on parts of them, with terms and sizes.

    Parts, in the order of their modules, are what a search scores where memory doesn't hold the
    query's whole gradient.

    >>> parts = [Exact(np.array([n]), -5.0, n, n, n, np.array([[n]])) for n in (1.0, 2.0)]
    >>> joined(parts)
    Exact(influence=array([3.]), log_p=-5.0, self_influence=3.0, squared_step=3.0,
          squared_norm=3.0, terms=array([[1., 2.]]), by_module=None)
    """
    return Exact(
        np.sum([part.influence for part in parts], axis=0), parts[0].log_p,
        sum(part.self_influence or 0.0 for part in parts),
        sum(part.squared_step or 0.0 for part in parts),
        sum(part.squared_norm or 0.0 for part in parts),
        np.concatenate([part.terms for part in parts if part.terms is not None], axis=1),
    )


def _score_batch(
    by: Rescorer, preconditioned: Preconditioned | None, records: list[Record], sizes: bool,
    terms: bool, by_module: bool,
) -> list[Exact]:
    """The scores of one batch of sequences, in their order; see `rescore`."""
    batch = by.model.batch(records)
    gradient_sizes = GradientSizes(by.ekfac, by.damping)
    collector = None if preconditioned is None else \
        Terms(preconditioned, batch) if terms else Influences(preconditioned)
    wanted = [*([collector] if collector is not None else []), *([gradient_sizes] * sizes)]
    log_p = collect(by.model, by.modules, batch, *wanted)
    # on its way before the scores are waited for: it is there when they are, and costs no wait more
    beside = Arriving([log_p.double().sum(1), *gradient_sizes.sums])
    if collector is None:
        scores = [Exact(np.zeros(0)) for _ in records]
    elif isinstance(collector, Terms):
        # The score is the sum of the very terms that are shown, so that they add up to it. Padding
        # has none, and each is copied, or one hit would keep the whole batch's terms in memory.
        scores = [
            Exact(by_token.sum(keepdims=True, dtype=np.float64)[0], terms=by_token)
            for by_token in (of_all[real] for of_all, real in
                             zip(collector.stacked(by.modules), batch.real, strict=True))
        ]
    else:
        scores = [Exact(column) for column in collector.total.T]
        if by_module:
            shares = collector.stacked(by.modules).swapaxes(0, 1)
            for exact, share in zip(scores, shares, strict=True):
                exact.by_module = share
    row_log_p, *sums = beside.arrays()
    for exact, own in zip(scores, row_log_p.tolist(), strict=True):
        exact.log_p = own
    if sizes:
        for exact, (size, step, norm) in zip(
                scores, np.sum(sums, axis=0).T.tolist(), strict=True):
            exact.self_influence, exact.squared_step, exact.squared_norm = size, step, norm
    return scores
