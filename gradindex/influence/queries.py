"""Queries made ready: their gradients in the eigenbasis, preconditioned, whole or of low rank.

P_u = (G_u+λ_u I)⁻¹ G_q,u  (Grosse et al. 2023, eqs. 25, 30) is what every sequence's gradient is
multiplied with (`exact.py`). Of many queries it may be kept as two factors of low rank, which
bounds its memory (§3.2.2 there).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradindex import draws
from gradindex.influence.blockwise import rotated
from gradindex.influence.codes import Codes
from gradindex.influence.curvature import Ekfac
from gradindex.influence.gradients import apply_inputs, backward, gradient
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective import Batch

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


@dataclass(frozen=True)
class Whole:
    """P of one module for several queries: [q, o, i].

    >>> p = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    >>> a, d = torch.ones(1, 3, 2), torch.ones(1, 3, 2)  # three tokens of one sequence
    >>> Whole(p).scores(Module("m", 0, "mlp", 2, 2, False), a, d).tolist()  # 3 · (2 + 1)
    [[9.0]]
    """

    p: Tensor

    def __len__(self) -> int:
        return len(self.p)

    def terms(self, module: Module, a: Tensor, d: Tensor) -> Tensor:
        """d_tᵀ P a_t for every token, for the only query: [b, t]."""
        [p] = self.p
        return terms(module, a.to(p.dtype), d.to(p.dtype), p)

    def scores(self, module: Module, a: Tensor, d: Tensor) -> Tensor:
        """Σ_t d_tᵀ P a_t of every sequence: [q, b]. Each sequence's gradient is formed once."""
        if len(self) == 1:
            return self.terms(module, a, d).sum(-1)[None]
        p, a, d = self.p, a.to(self.p.dtype), d.to(self.p.dtype)
        # some rows of the gradients at a time, so that P is read once and not once a sequence
        most = max(1, LARGEST_BLOCK // max(1, len(a) * p.shape[2]))
        found = p.new_zeros(len(p), len(a))
        for rows, some in zip(p.split(most, 1), d.split(most, -1), strict=True):
            found += rows.flatten(1) @ gradient(module, a, some).flatten(1).T
        return found

    def arrays(self) -> np.ndarray:
        """The same for another process."""
        return self.p.cpu().numpy()


@dataclass(frozen=True)
class LowRank:
    """The same of rank r: L [q, o, r] times R [q, r, i].

    The factors are the truncated singular value decomposition's, found by subspace iteration from
    fixed numbers.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, p: Tensor, rank: int) -> "LowRank":
        """The best matrices of rank r near p [q, o, i]."""
        with draws.always_alike(p.device):
            u, s, v = torch.svd_lowrank(p, q=min(rank + OVERSAMPLING, *p.shape[1:]), niter=4)
        return cls(u[..., :rank] * s[..., None, :rank], v[..., :rank].transpose(1, 2))

    def __len__(self) -> int:
        return len(self.left)

    def terms(self, module: Module, a: Tensor, d: Tensor) -> Tensor:
        """d_tᵀ P a_t for every token, for the only query: [b, t]."""
        dtype = self.left.dtype
        return _low_rank_terms(module, a.to(dtype), d.to(dtype), self.left, self.right)[0]

    def scores(self, module: Module, a: Tensor, d: Tensor) -> Tensor:
        """Σ_t d_tᵀ P a_t of every sequence: [q, b]. No gradient is formed, but where L R is small
        and takes less arithmetic than the tokens by its factors."""
        if len(self) == 1:
            return self.terms(module, a, d).sum(-1)[None]
        if _better_joined(module, self.left, a):
            return Whole(self.left @ self.right).scores(module, a, d)
        left, right = self.left, self.right
        a, d = a.to(left.dtype), d.to(left.dtype)
        most = max(1, LARGEST_BLOCK // max(1, a.shape[0] * a.shape[1] * left.shape[2]))
        return torch.cat([
            _low_rank_terms(module, a, d, *some).sum(-1)
            for some in zip(left.split(most), right.split(most), strict=True)])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The same for another process."""
        return self.left.cpu().numpy(), self.right.cpu().numpy()


class Preconditioned:
    """P_u of several queries, by module name: Whole, or LowRank where `rank` is less than all."""

    def __init__(self, gradients: Gradients, rank: int | None = None):
        self._parts: dict[str, Whole | LowRank] = {}
        self._rank = rank
        self.rank: int | None = None  # of what was reduced to it, if anything was
        self.add(gradients)

    def add(self, gradients: Gradients) -> None:
        """More modules of the same queries."""
        for name, p in gradients.items():
            if self._rank is None or self._rank >= min(p.shape[1:]):
                self._parts[name] = Whole(p)
            else:
                self._parts[name], self.rank = LowRank.of(p, self._rank), self._rank

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())))

    def of(self, module: Module) -> Whole | LowRank:
        """One module's."""
        return self._parts[module.name]

    @classmethod
    def join(cls, parts: list["Preconditioned"]) -> "Preconditioned":
        """The queries of several, in order; all of one rank. They are emptied, to save memory."""
        joined = cls({})
        joined.rank = parts[0].rank
        for name in list(parts[0]._parts):
            joined._parts[name] = _joined([part._parts.pop(name) for part in parts])
        return joined

    def arrays(self) -> Arrays:
        """All of it in NumPy's arrays, for another process."""
        return {name: part.arrays() for name, part in self._parts.items()}

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, rank: int | None, device: torch.device
    ) -> "Preconditioned":
        """What `arrays` was called on, on another device; the arrays are copied."""
        made = cls({})
        made.rank = rank
        for name, part in arrays.items():
            made._parts[name] = Whole(torch.tensor(part, device=device)) \
                if isinstance(part, np.ndarray) else LowRank(
                    *(torch.tensor(factor, device=device) for factor in part))
        return made

    def one(self, query: int) -> "Preconditioned":
        """One query's, whole gradients only."""
        if len(self) == 1:
            return self
        return Preconditioned({name: part.p[query : query + 1]
                               for name, part in self._parts.items() if isinstance(part, Whole)})


def _joined(parts: list[Whole | LowRank]) -> Whole | LowRank:
    whole = [part.p for part in parts if isinstance(part, Whole)]
    if whole:
        return Whole(torch.cat(whole))
    low = [part for part in parts if isinstance(part, LowRank)]
    return LowRank(torch.cat([part.left for part in low]), torch.cat([part.right for part in low]))


def slices(module: Module, rows: int) -> Iterator[slice]:
    """Some of `rows` at a time, whose gradients [n, o, i] fit in memory together."""
    most = max(1, LARGEST_BLOCK // (module.shape[0] * module.shape[1]))
    size = -(-rows // -(-rows // most)) if rows else 1  # of like numbers
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


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
    by_query: Tensor = own.unflatten(-1, left.shape[::2]).sum(-1)
    return by_query.movedim(-1, 0)
