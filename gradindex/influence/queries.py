"""The one meaning of "score": exact EK-FAC influence of a sequence on a query.

I(q, m) = ⟨∇ log p(completion | prompt), (G+λI)⁻¹ ∇ log p(sequence m)⟩ = Σ_u Σ_t d_tᵀ P_u a_t,
P_u = (G_u+λ_u I)⁻¹ G_q,u  (Grosse et al. 2023, eqs. 25, 30, 31). Positive: one more copy of m
makes the completion more likely, by I / N_train nats to first order.

Everything needed of a sequence comes from one forward and backward pass: `Influences`, `Terms` and
`Sizes` each take what a module hands over and add up their part.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gradindex import draws
from gradindex.influence.blockwise import rotated, rotator
from gradindex.influence.codes import Codes
from gradindex.influence.curvature import Ekfac
from gradindex.influence.gradients import (
    Splits,
    apply_inputs,
    backward,
    gradient,
    in_batches,
)
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective import Batch
from gradindex.storage.records import Record

Gradients = dict[str, Tensor]  # [q, o, i] by module name, a row a query
Arrays = dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]  # whole, or L and R, by module name

OVERSAMPLING = 8  # directions beyond the rank, so that the best come out right (Halko et al. 2011)
LARGEST_BLOCK = 1 << 22  # entries of gradients, or of what low-rank queries take, formed at once
LARGEST_JOINED = 1 << 23  # entries of L R: 32 MB in float32


def query_coordinates(
    model: LanguageModel, modules: list[Module], ekfac: Ekfac, batch: Batch, damping: float
) -> tuple[Gradients, Tensor]:
    """C_u [q, o, i] of each query of a batch by module name, and log p [q, t] in nats."""
    coordinates: Gradients = {}

    def each(module: Module, a: Tensor, d: Tensor) -> None:
        c = ekfac[module.name]
        g = rotated(module, a, d, c.eigenvectors_a, c.eigenvectors_s)
        coordinates[module.name] = g / c.damped(damping)

    log_p = backward(model, modules, batch, each)
    return {module.name: coordinates[module.name] for module in modules}, log_p


def precondition(ekfac: Ekfac, coordinates: Gradients) -> Gradients:
    """P_u = Q_S C_u Q_Aᵀ from coordinates C_u, both [q, o, i] by module name."""
    return {name: ekfac[name].leave_eigenbasis(c) for name, c in coordinates.items()}


def query_norms(ekfac: Ekfac, coordinates: Gradients, damping: float) -> Tensor:
    """‖q̃‖ [q], q̃ = (G+λ)^−½ ∇q: the square root of each query's influence on itself."""
    total = sum((c.square() * ekfac[name].damped(damping)).sum((1, 2))
                for name, c in coordinates.items())
    assert isinstance(total, Tensor)
    return total.sqrt()


def prepare(
    codes: Codes, ekfac: Ekfac, coordinates: Gradients, damping: float, vectors: Tensor,
    squares: Tensor, preconditioned: "Preconditioned",
) -> None:
    """Make queries ready, module by module, and empty `coordinates` (C_u [q, o, i]) on the way.

    Adds to their vectors v_q [q, K], to ‖q̃‖² [q], and to their preconditioned gradients. So no more
    than one module is there twice.
    """
    for name in list(coordinates):
        one = {name: coordinates.pop(name)}
        codes.add_query(vectors, name, one[name])
        squares += query_norms(ekfac, one, damping).square()
        preconditioned.add(precondition(ekfac, one))


class Preconditioned:
    """P_u of several queries, whole [q, o, i], or of rank r as L [q, o, r] times R [q, r, i].

    A low rank bounds the memory of many queries (Grosse et al. 2023, §3.2.2). The factors are the
    truncated singular value decomposition's, found by subspace iteration from fixed numbers.
    """

    def __init__(self, gradients: Gradients, rank: int | None = None):
        self._parts: dict[str, tuple[Tensor, Tensor] | Tensor] = {}
        self._rank = rank
        self.rank: int | None = None  # of what was reduced to it, if anything was
        self.add(gradients)

    def add(self, gradients: Gradients) -> None:
        """More modules of the same queries."""
        for name, p in gradients.items():
            if self._rank is None or self._rank >= min(p.shape[1:]):
                self._parts[name] = p
            else:
                self._parts[name], self.rank = _factors(p, self._rank), self._rank

    def __len__(self) -> int:
        part = next(iter(self._parts.values()))
        return len(part if isinstance(part, Tensor) else part[0])

    @classmethod
    def join(cls, parts: list["Preconditioned"]) -> "Preconditioned":
        """The queries of several, in order; all of one rank. They are emptied, to save memory."""
        joined = cls({})
        joined.rank = parts[0].rank
        for name in list(parts[0]._parts):
            own = [part._parts.pop(name) for part in parts]
            joined._parts[name] = torch.cat(own) if isinstance(own[0], Tensor) else (  # type: ignore[arg-type]
                torch.cat([one[0] for one in own]), torch.cat([one[1] for one in own]))
        return joined

    def arrays(self) -> Arrays:
        """All of it in NumPy's arrays, for another process."""
        return {name: part.cpu().numpy() if isinstance(part, Tensor) else
                (part[0].cpu().numpy(), part[1].cpu().numpy())
                for name, part in self._parts.items()}

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, rank: int | None, device: torch.device
    ) -> "Preconditioned":
        """What `arrays` was called on, on another device; the arrays are copied."""
        made = cls({})
        made.rank = rank
        for name, part in arrays.items():
            made._parts[name] = torch.tensor(part, device=device) \
                if isinstance(part, np.ndarray) else (
                    torch.tensor(part[0], device=device), torch.tensor(part[1], device=device))
        return made

    def one(self, query: int) -> "Preconditioned":
        """One query's, whole gradients only."""
        assert self.rank is None
        if len(self) == 1:
            return self
        return Preconditioned({name: part[query : query + 1]  # type: ignore[misc]
                               for name, part in self._parts.items()})

    def terms(self, module: Module, a: Tensor, d: Tensor) -> Tensor:
        """d_tᵀ P a_t for every token of a [b, t, i], d [b, t, o], for the only query: [b, t]."""
        part = self._parts[module.name]
        if isinstance(part, Tensor):
            [p] = part
            return terms(module, a.to(p.dtype), d.to(p.dtype), p)
        left, right = part
        [found] = _low_rank_terms(module, a.to(left.dtype), d.to(left.dtype), left, right)
        return found

    def scores(self, module: Module, a: Tensor, d: Tensor) -> Tensor:
        """Σ_t d_tᵀ P a_t of every sequence of a [b, t, i], d [b, t, o]: [q, b].

        Of several whole P, each sequence's gradient is formed once; of low rank, never, but where
        L R is small and takes less arithmetic than the tokens by its factors.
        """
        if len(self) == 1:
            return self.terms(module, a, d).sum(-1)[None]
        part = self._parts[module.name]
        if not isinstance(part, Tensor) and _better_joined(module, part[0], a):
            part = part[0] @ part[1]
        if isinstance(part, Tensor):
            a, d = a.to(part.dtype), d.to(part.dtype)
            most = max(1, LARGEST_BLOCK // max(1, len(a) * part.shape[2]))  # so P is read once
            found = part.new_zeros(len(part), len(a))
            for p, some in zip(part.split(most, 1), d.split(most, -1), strict=True):
                found += p.flatten(1) @ gradient(module, a, some).flatten(1).T
            return found
        left, right = part
        a, d = a.to(left.dtype), d.to(left.dtype)
        most = max(1, LARGEST_BLOCK // max(1, a.shape[0] * a.shape[1] * left.shape[2]))
        return torch.cat([
            _low_rank_terms(module, a, d, *some).sum(-1)
            for some in zip(left.split(most), right.split(most), strict=True)])


def slices(module: Module, rows: int) -> Iterator[slice]:
    """Some of `rows` at a time, whose gradients [n, o, i] fit in memory together."""
    most = max(1, LARGEST_BLOCK // (module.shape[0] * module.shape[1]))
    size = -(-rows // -(-rows // most)) if rows else 1  # of like numbers
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _factors(p: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L [q, o, r] and R [q, r, i] of the best rank-r matrices near p [q, o, i]."""
    with draws.always_alike(p.device):
        u, s, v = torch.svd_lowrank(p, q=min(rank + OVERSAMPLING, *p.shape[1:]), niter=4)
    return u[..., :rank] * s[..., None, :rank], v[..., :rank].transpose(1, 2)


def terms(module: Module, a: Tensor, d: Tensor, p: Tensor) -> Tensor:
    """d_tᵀ P a_t for every token: a [b, t, i], d [b, t, o], P [o, i] → [b, t]."""
    return apply_inputs(a, p, module.bias).mul_(d).sum(-1)


def _better_joined(module: Module, left: Tensor, a: Tensor) -> bool:
    """Whether L [q, o, r] times R [q, r, i] had better be made for a batch a [b, t, i]."""
    (o, i), (queries, _, rank), (rows, length, _) = module.shape, left.shape, a.shape
    return queries * o * i <= LARGEST_JOINED and \
        o * i * (queries * rank + rows * length + rows * queries) < \
        rows * length * queries * rank * (o + i)


def _low_rank_terms(module: Module, a: Tensor, d: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """d_tᵀ L R a_t for every token, L [q, o, r] and R [q, r, i]: [q, b, t]."""
    own = d @ left.transpose(0, 1).flatten(1)
    own *= apply_inputs(a, right.flatten(0, 1), module.bias)
    return own.unflatten(-1, left.shape[::2]).sum(-1).movedim(-1, 0)


class Influences:
    """Adds up I [q, b] of a batch on every query."""

    def __init__(self, preconditioned: Preconditioned, rows: int):
        self._preconditioned = preconditioned
        self.total = torch.zeros(len(preconditioned), rows, dtype=torch.float64)
        self._parts: dict[str, Tensor] = {}

    def __call__(self, module: Module, a: Tensor, d: Tensor) -> None:
        own = self._preconditioned.scores(module, a, d).to("cpu", torch.float64)
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
            module, self._preconditioned.terms(module, a, d))

    def stacked(self, modules: list[Module]) -> Tensor:
        """[b, t, u], summing to I over t and u."""
        return torch.stack([self._parts[module.name] for module in modules], dim=-1)


class Sizes:
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


def score(
    model: LanguageModel, modules: list[Module], preconditioned: Preconditioned, batch: Batch
) -> Tensor:
    """The terms of each sequence's influence on one query: [b, t, u], summing to I over t, u."""
    collector = Terms(preconditioned, batch)
    collect(model, modules, batch, collector)
    return collector.stacked(modules)


def exact_scores(
    model: LanguageModel, modules: list[Module], preconditioned: Preconditioned,
    sequences: list[Record], batch_tokens: int,
) -> np.ndarray:
    """Exact influence of every sequence on every query: float64 [q, sequences]."""
    def run(rows: list[int]) -> np.ndarray:
        members = [sequences[row] for row in rows]
        batch = model.batch(members)
        collector = Influences(preconditioned, len(rows))
        collect(model, modules, batch, collector)
        return collector.total.numpy()

    scores = np.zeros((len(preconditioned), len(sequences)))
    lengths = [len(record.tokens) for record in sequences]
    for rows, found in in_batches(lengths, batch_tokens, Splits(), run):
        scores[:, rows] = found
    return scores
