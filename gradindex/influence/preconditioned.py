"""Queries made ready: their gradients in the eigenbasis, preconditioned, whole or of low rank.

P_u = (G_u+λ_u I)⁻¹ G_q,u  (Grosse et al. 2023, eqs. 25, 30) is a query's preconditioned gradient.
The influence of a sequence is its inner product with the sequence's gradient (`exact.py`). For many
queries, P_u may be kept as two factors of low rank, which bounds its memory (§3.2.2 there).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradindex import draws
from gradindex.influence.blockwise import LARGEST_BLOCK, pieces, rotated, rotator
from gradindex.influence.codes import Codes
from gradindex.influence.curvature import Curvature, Ekfac
from gradindex.influence.gradients import apply_inputs, backward, gradient
from gradindex.influence.vocabulary import OutputGradients, OverVocabulary
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective.batch import Batch

Gradients = dict[str, Tensor]  # [q, o, i] by module name, a row a query
Arrays = dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]  # whole, or L and R, by module name

OVERSAMPLING = 8  # directions beyond the rank, so that the best come out right (Halko et al. 2011)
LARGEST_PRODUCT = 1 << 23  # entries of L R: 32 MB in float32


def query_coordinates(
    model: LanguageModel, modules: list[Module], ekfac: Ekfac, batch: Batch, damping: float
) -> tuple[Gradients, Tensor]:
    """The coordinates C_u [q, o, i] of a batch's queries by module name, and log p [q, t] in nats.

    C_u = w_u (Q_Sᵀ G_u Q_A) / (Λ+λ) is the preconditioned gradient in the eigenbasis times what its
    model counts in the score; `damping` is λ in units of mean(Λ).
    """
    coordinates: Gradients = {}

    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        c = ekfac[module.name]
        g = rotated(module, a, d, c.eigenvectors_a, c.eigenvectors_s)
        coordinates[module.name] = weigh(module, c.divided(g, damping))

    log_p = backward(model, modules, batch, each)
    # Modules arrived from the last to the first; all later sums go in the order of the model.
    return {module.name: coordinates[module.name] for module in modules}, log_p


def precondition(ekfac: Ekfac, coordinates: Gradients) -> Gradients:
    """P_u = Q_S C_u Q_Aᵀ from coordinates C_u, both [q, o, i] by module name.

    >>> from gradindex.influence.curvature import Curvature
    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> ekfac = {"m": Curvature(swap, torch.eye(1), torch.ones(1, 2))}
    >>> precondition(ekfac, {"m": torch.tensor([[[1.0, 2.0]]])})
    {'m': tensor([[[2., 1.]]])}
    """
    return {name: ekfac[name].leave_eigenbasis(c) for name, c in coordinates.items()}


def weigh(module: Module, gradients: Tensor) -> Tensor:
    """Gradients of a module times what its model counts in the score, in place."""
    return gradients if module.weight == 1 else gradients.mul_(module.weight)


def query_square(curvature: Curvature, c: Tensor, damping: float, weight: float) -> Tensor:
    """A module's part of ‖q̃‖² [q], q̃ = (G+λ)^−½ ∇q: of each query's influence on itself.

    c [q, o, i] are the queries' coordinates.

    >>> curvature = Curvature(torch.eye(2), torch.eye(1), torch.tensor([[1.0, 3.0]]))
    >>> query_square(curvature, torch.tensor([[[2.0, 2.0]]]), 0.0, 1.0)  # 4·1 + 4·3
    tensor([16.])
    """
    # C already holds one factor 1/(Λ+λ); its square times Λ+λ leaves the one that is wanted. So it
    # is with the weight of its model, which is there once and would be squared.
    return (c.square() * curvature.damped(damping)).sum((1, 2)) / weight


def prepare(
    codes: Codes, ekfac: Ekfac, modules: Sequence[Module], coordinates: Gradients, damping: float,
    vectors: Tensor, squares: Tensor, preconditioned: "Preconditioned | None",
) -> None:
    """Make queries ready for scan and rescoring, from their coordinates C_u [q, o, i] of `modules`.

    Adds their parts to the vectors v_q [q, K], to the squared norms ‖q̃‖² [q] and to the
    preconditioned gradients, which take three quarters of the time: with None there are none.
    `coordinates` is empty afterwards.
    """
    for module in modules:
        # Taken out, so that memory holds no more than one module twice: as C_u and as P_u.
        name, c = module.name, coordinates.pop(module.name)
        codes.add_query(vectors, name, c)
        squares += query_square(ekfac[name], c, damping, module.weight).to(squares.device)
        if preconditioned is not None:
            preconditioned.add(precondition(ekfac, {name: c}))


def query_vectors(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, batch: Batch
) -> Tensor:
    """The vectors v_q [q, K] of a batch's queries, without their preconditioned gradients.

    That is half of the work of `prepare`, and no gradient is held longer than its module's turn.
    """
    vectors = codes.empty(len(batch.tokens))

    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        add_query_vectors(codes, vectors, ekfac[module.name], module, a, d)

    with torch.no_grad():
        backward(model, codes.modules, batch, each)
    return vectors


def add_query_vectors(
    codes: Codes, vectors: Tensor, curvature: Curvature, module: Module, a: Tensor,
    d: OutputGradients,
) -> None:
    """Add one module's part to the vectors v_q [q, K] of a batch's queries, from a and d."""
    rotate = rotator(module, a, d, curvature.eigenvectors_a, curvature.eigenvectors_s)
    for rows, outputs in pieces(module, len(a)):
        c = curvature.divided(rotate(rows, outputs), codes.settings.damping, outputs)
        codes.add_query(vectors[rows], module.name, weigh(module, c), outputs)


@dataclass(frozen=True)
class Whole:
    """P of one module for several queries, [q, o, i], every entry of it.

    >>> p = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    >>> a, d = torch.ones(1, 3, 2), torch.ones(1, 3, 2)  # three tokens of one sequence
    >>> Whole(p).scores(Module("m", 0, "mlp", 2, 2, False), a, d).tolist()  # 3 · (2 + 1)
    [[9.0]]
    """

    p: Tensor

    def __len__(self) -> int:
        return len(self.p)

    def terms(self, module: Module, a: Tensor, d: OutputGradients) -> Tensor:
        """d_tᵀ P a_t for every token, [b, t], where there is one query."""
        [p] = self.p
        return terms(module, a.to(p.dtype), d.to(p.dtype), p)

    def scores(self, module: Module, a: Tensor, d: OutputGradients) -> Tensor:
        """Σ_t d_tᵀ P a_t of every sequence: [q, b], from a [b, t, i] and d [b, t, o]."""
        if len(self) == 1:
            return self.terms(module, a, d).sum(-1)[None]
        p, a, d = self.p, a.to(self.p.dtype), d.to(self.p.dtype)
        if isinstance(d, OverVocabulary):
            return _scores_over_vocabulary(module, a, d, p)
        # Of several queries, each sequence's gradient is formed once for all of them, some of its
        # rows at a time, so that P is read once and not once a sequence.
        most = max(1, LARGEST_BLOCK // max(1, len(a) * p.shape[2]))
        scores = p.new_zeros(len(p), len(a))
        for p_rows, d_rows in zip(p.split(most, 1), d.split(most, -1), strict=True):
            scores += p_rows.flatten(1) @ gradient(module, a, d_rows).flatten(1).T
        return scores

    def arrays(self) -> np.ndarray:
        """P as NumPy's array, to be sent to another process: [q, o, i]."""
        return self.p.cpu().numpy()


@dataclass(frozen=True)
class LowRank:
    """P of one module for several queries as a product of rank r: L [q, o, r] times R [q, r, i].

    The factors are those of the truncated singular value decomposition, found by subspace iteration
    from fixed numbers.

    >>> p = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))[None]
    >>> low = LowRank.of(p, rank=1)
    >>> low.left.shape, low.right.shape, bool(torch.allclose(low.left @ low.right, p, atol=1e-4))
    (torch.Size([1, 2, 1]), torch.Size([1, 1, 3]), True)
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, p: Tensor, rank: int) -> "LowRank":
        """The matrices of rank r nearest to p [q, o, i], nearly."""
        # PyTorch draws the start from its global generator: unguarded, the same search would give
        # other scores each time, and the user's own numbers would shift.
        with draws.always_alike(p.device):
            u, s, v = torch.svd_lowrank(p, q=min(rank + OVERSAMPLING, *p.shape[1:]), niter=4)
        return cls(u[..., :rank] * s[..., None, :rank], v[..., :rank].transpose(1, 2))

    def __len__(self) -> int:
        return len(self.left)

    def terms(self, module: Module, a: Tensor, d: OutputGradients) -> Tensor:
        """d_tᵀ P a_t for every token, [b, t], where there is one query."""
        dtype = self.left.dtype
        return _low_rank_terms(module, a.to(dtype), d.to(dtype), self.left, self.right)[0]

    def scores(self, module: Module, a: Tensor, d: OutputGradients) -> Tensor:
        """Σ_t d_tᵀ P a_t of every sequence: [q, b], from a [b, t, i] and d [b, t, o]."""
        if len(self) == 1:
            return self.terms(module, a, d).sum(-1)[None]
        # As a rule the factors are applied to tokens and no gradient is formed; but where L R is
        # small and there are many tokens, gradients take less arithmetic.
        if _product_is_cheaper(module, self.left, a):
            return Whole(self.left @ self.right).scores(module, a, d)
        left, right = self.left, self.right
        a, d = a.to(left.dtype), d.to(left.dtype)
        most = max(1, LARGEST_BLOCK // max(1, a.shape[0] * a.shape[1] * left.shape[2]))
        return torch.cat([
            _low_rank_terms(module, a, d, *factors).sum(-1)
            for factors in zip(left.split(most), right.split(most), strict=True)])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """L and R as NumPy's arrays, to be sent to another process: [q, o, r] and [q, r, i]."""
        return self.left.cpu().numpy(), self.right.cpu().numpy()


class Preconditioned:
    """P_u of several queries, by module name: Whole, or LowRank in modules larger than `rank`.

    `rank` is None in the end where nothing had to be reduced.

    >>> gradients = {"small": torch.ones(2, 1, 3), "large": torch.ones(2, 4, 4)}
    >>> queries = Preconditioned(gradients, rank=1)
    >>> len(queries), queries.rank
    (2, 1)
    >>> type(queries.of(Module("small", 0, "mlp", 1, 3, False))).__name__
    'Whole'
    """

    def __init__(self, gradients: Gradients, rank: int | None = None):
        self._parts: dict[str, Whole | LowRank] = {}
        self._rank = rank
        self.rank: int | None = None
        self.add(gradients)

    def add(self, gradients: Gradients) -> None:
        """Add modules, P_u [q, o, i] by name, of the same queries."""
        for name, p in gradients.items():
            if self._rank is None or self._rank >= min(p.shape[1:]):
                self._parts[name] = Whole(p)
            else:
                self._parts[name], self.rank = LowRank.of(p, self._rank), self._rank

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())))

    def of(self, module: Module) -> Whole | LowRank:
        """P_u of one module."""
        return self._parts[module.name]

    @classmethod
    def join(cls, parts: list["Preconditioned"]) -> "Preconditioned":
        """All queries of several objects of one rank, in order. The objects are empty afterwards.
        """
        joined = cls({})
        joined.rank = parts[0].rank
        # Emptied module by module: the queries of all parts together are what memory just holds.
        for name in list(parts[0]._parts):
            joined._parts[name] = _joined([part._parts.pop(name) for part in parts])
        return joined

    def arrays(self) -> Arrays:
        """All of it as NumPy's arrays, to be sent to another process."""
        return {name: part.arrays() for name, part in self._parts.items()}

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, rank: int | None, device: torch.device
    ) -> "Preconditioned":
        """The queries that `arrays` gave in another process, on this one's device."""
        queries = cls({})
        queries.rank = rank
        # Copied: what arrives from another process may be memory that PyTorch may not write to.
        for name, part in arrays.items():
            queries._parts[name] = Whole(torch.tensor(part, device=device)) \
                if isinstance(part, np.ndarray) else LowRank(
                    *(torch.tensor(factor, device=device) for factor in part))
        return queries

    def one(self, query: int) -> "Preconditioned":
        """The query of this number alone. Modules of low rank are left out."""
        assert self.rank is None
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


def _scores_over_vocabulary(
    module: Module, a: Tensor, d: OverVocabulary, p: Tensor
) -> Tensor:
    """`Whole.scores` for P [q, v, i], the gradients being formed a piece of them at a time."""
    scores = p.new_zeros(len(p), len(a))
    for rows, outputs in pieces(module, len(a)):
        scores[:, rows] += p[:, outputs].flatten(1) @ d.gradient(a, rows, outputs).flatten(1).T
    return scores


def terms(module: Module, a: Tensor, d: OutputGradients, p: Tensor) -> Tensor:
    """d_tᵀ P a_t for every token, [b, t], from a [b, t, i], d [b, t, o] and P [o, i].

    >>> p, a = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    >>> terms(Module("m", 0, "mlp", 1, 2, False), a, torch.tensor([[[1.0], [-1.0]]]), p)
    tensor([[ 3., -2.]])
    """
    if isinstance(d, OverVocabulary):
        return d.terms(a, p)
    return apply_inputs(a, p, module.bias).mul_(d).sum(-1)


def _product_is_cheaper(module: Module, left: Tensor, a: Tensor) -> bool:
    """Whether scoring a batch a [b, t, i] by L R takes less arithmetic than by L [q, o, r] and R.
    """
    (o, i), (queries, _, rank), (rows, length, _) = module.shape, left.shape, a.shape
    return queries * o * i <= LARGEST_PRODUCT and \
        o * i * (queries * rank + rows * length + rows * queries) < \
        rows * length * queries * rank * (o + i)


def _low_rank_terms(
    module: Module, a: Tensor, d: OutputGradients, left: Tensor, right: Tensor
) -> Tensor:
    """d_tᵀ L R a_t for every token, [q, b, t], with L [q, o, r] and R [q, r, i]."""
    # All queries' factors side by side, [·, q·r]: two large products and not 2q small ones.
    products = d @ left.transpose(0, 1).flatten(1)
    products *= apply_inputs(a, right.flatten(0, 1), module.bias)
    by_query: Tensor = products.unflatten(-1, left.shape[::2]).sum(-1)
    return by_query.movedim(-1, 0)
