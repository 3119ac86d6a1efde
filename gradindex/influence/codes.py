"""The one meaning of "code": gradient → vector, query gradient → query vector, and its error.

The influence ⟨C_q, Q_Sᵀ G_m Q_A⟩ is a sum over every pair of eigen-coordinates of every module:
far too many to store. It is estimated without bias in two steps that both sides share.

1. Two-sided mixing. R_S [k, o] and R_A [k, i] have independent entries ±1/√k, so for any Y and Z
   E⟨R_S Y R_Aᵀ, R_S Z R_Aᵀ⟩ = ⟨Y, Z⟩. A side that has no more than k dimensions (LoRA's rank, a
   narrow model) is mixed by columns of a Hadamard matrix with random signs, which changes no inner
   product, and the other side gets more coordinates in its place. So it does where a side's energy
   lies in few directions: of a gradient that is one outer product, as of a classifier's head, the
   error of the whole is that of the other side. On the sequence's side
   Y = w_S w_Aᵀ ∘ (Q_Sᵀ G_m Q_A), where w_S w_Aᵀ is separable and near to (Λ+λ)^−½ where the energy
   is (`whitening`): that spreads the energy evenly, which is what a few bits per
   coordinate can carry. Because it is separable, everything is applied to tokens before the outer
   product:
   X = Σ_t (P_S d_t)(P_A a_t)ᵀ,  P_S = R_S diag(w_S) Q_Sᵀ,  P_A = R_A diag(w_A) Q_Aᵀ.
   On the query's side Z = C_q / (w_S w_Aᵀ) takes back what the split left out, so damping, the set
   of modules and Λ itself belong to the query alone.
2. Count sketch (Charikar et al. 2002). The k_S · k_A entries of each X get random signs and are
   added up in K buckets, all modules in the same K, none of which may stay empty: an empty one has
   the same sign in every code, and the quantised query would take that for likeness.

FAISS then keeps the K signs and one scale (`code_index.py`). The error of the resulting score is
Gaussian with sd σ = c ‖v_q‖ ‖v_m‖ / √K.

The bucket of entry j of a module is (offset + j + turn · ⌊j/K⌋) mod K, its sign random. Signs
alone make the sketch unbiased and the entries are mixed already, so buckets need not be random:
contiguous pieces are added where a hash would scatter, and sums come out in the same order on every
device. Each time round they begin elsewhere (`turn`), or all entries of a bucket could have one
factor in common, whose sign would be that of many bits.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

from gradindex import draws
from gradindex.draws import Stream
from gradindex.influence.blockwise import LARGEST_BLOCK, right_transposed
from gradindex.influence.curvature import Curvature, Ekfac
from gradindex.influence.gradients import apply_inputs
from gradindex.influence.vocabulary import OutputGradients
from gradindex.modules import Module

# How codes are made. Indexes of before have the first, in which narrow sides are mixed as wide ones
# are and both have as many coordinates as the narrower has dimensions, or the second, which whitens
# by all entries of Λ alike, knows no side of few directions, has k ≤ 256 and no turn.
RECIPES = (1, 2, 3)
FEW = 8  # a side has few directions where they are less than an eighth of k
LEAST_WIDTH, LARGEST_WIDTH = 32, 1024
LEAST_ENERGY = 1e-6  # of a direction, in units of its Λ+λ
GOLDEN = (5**0.5 - 1) / 2  # turned by so much of a circle, nothing soon comes near where it was


@dataclass(frozen=True)
class CodeSettings:
    """What decides a code besides the model.

    `length` is K, the bits a sequence; `width` is k, the mixed coordinates of each side of a
    module; `damping` is λ in units of mean(Λ), here of the whitening alone; `recipe` is one of
    RECIPES.
    """

    length: int
    width: int
    seed: int
    damping: float
    recipe: int = RECIPES[-1]

    @classmethod
    def of(
        cls, length: int, modules: Sequence[Module], seed: int, damping: float,
        recipe: int = RECIPES[-1],
    ) -> "CodeSettings":
        """Those of K = `length` for so many modules."""
        width = default_width(length, len(modules))
        return cls(length, width if recipe > 2 else min(width, 256), seed, damping, recipe)

    def sides(
        self, module: Module, directions: tuple[float, float] | None = None
    ) -> tuple[int, int]:
        """k_S and k_A, the mixed coordinates of a module's output and input side.

        A side of no more than k dimensions has the power of two at or above them. The other then
        has as many as make the product k², or where that is as many as its dimensions or more, the
        power of two at or above these. The same where a side has more, but its energy lies in few
        `directions` (`Whitened`; before the fit they aren't known): it has at least a quarter of k.

        >>> settings = CodeSettings(length=16384, width=64, seed=0, damping=0.1)
        >>> settings.sides(Module("wide", 0, "mlp", d_out=512, d_in=2048, bias=False))
        (64, 64)
        >>> settings.sides(Module("lora", 0, "adapter", d_out=2048, d_in=8, bias=False))
        (512, 8)
        >>> pooler = Module("pooler", 0, "head", d_out=384, d_in=384, bias=False)
        >>> settings.sides(pooler, directions=(2.0, 90.0))
        (16, 256)
        """
        o, i = module.shape
        k = self.width
        if self.recipe == 1:
            return min(k, o, i), min(k, o, i)
        few_s, few_a = directions or (k, k)
        if min(o, i) <= k:
            narrow, wide, turned = _power_of_two(min(o, i)), max(o, i), o > i
        elif min(few_s, few_a) < k / FEW:
            turned = few_a < few_s
            narrow, wide = k // 4, o if turned else i
        else:
            return k, k
        other = k * k // narrow
        if other >= wide:
            other = _power_of_two(wide)
            if min(o, i) > k:  # what the wide side doesn't need
                narrow = min(k * k // other, _power_of_two(i if turned else o))
        return (other, narrow) if turned else (narrow, other)

    def filled(self, modules: Sequence[Module]) -> int:
        """How many different numbers the codes of these modules are made of, at the most.

        >>> settings = CodeSettings(length=16384, width=64, seed=0, damping=0.1)
        >>> settings.filled([Module("lora", 0, "adapter", d_out=2048, d_in=6, bias=False)])
        3072
        """
        return sum(min(k_s, module.shape[0]) * min(k_a, module.shape[1])
                   for module in modules for k_s, k_a in [self.sides(module)])


def default_length(sequence_length: int) -> int:
    """K as it is thought to be until exact scores tell, for sequences of so many tokens.

    The power of two at or above 256 bits a token, at least 16,384: longer sequences have longer
    gradients, among which one match stands out less.

    >>> default_length(64), default_length(300)
    (16384, 131072)
    """
    return max(16384, 1 << (256 * sequence_length - 1).bit_length())


def default_width(length: int, modules: int) -> int:
    """k such that modules · k² ≈ 16 K: a multiple of 16 between 32 and 1,024.

    >>> default_width(length=32768, modules=24)
    144
    """
    return int(min(LARGEST_WIDTH, max(
        LEAST_WIDTH, 16 * round((16 * length / modules) ** 0.5 / 16))))


def _power_of_two(dimensions: int) -> int:
    """The power of two at or above a number of dimensions."""
    return 1 << (dimensions - 1).bit_length()


@dataclass
class Whitened:
    """Separable weights w_S [o] and w_A [i] of a module's eigen-coordinates, and what they leave.

    `directions` are how many directions the energy of each side lies in once it is weighted:
    (Σ e)² / Σ e² of its expected squares e.
    """

    w_s: Tensor
    w_a: Tensor
    directions: tuple[float, float]


def whitening(curvature: Curvature, damping: float) -> Whitened:
    """w_S w_Aᵀ near to (Λ+λ)^−½ where the energy is.

    The error of a score is ‖v_q‖ ‖v_m‖ times some, and the squares of both are on average
    Σ Λ/(Λ+λ) (r + 1/r) where r = (Λ+λ) w_S² w_A² should be 1. Of that sum each side is the least,
    given the other: the output side given the mean over outputs, then the input side.

    >>> separable = Curvature(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 4.0], [4.0, 16.0]]))
    >>> whitened = whitening(separable, damping=0.0)
    >>> torch.outer(whitened.w_s, whitened.w_a)
    tensor([[1.0000, 0.5000],
            [0.5000, 0.2500]])
    >>> whitened.directions  # all of the same energy now
    (2.0, 2.0)
    """
    # In float64, once a module: a few operations a number, on any card. Some outputs at a time:
    # those of a vocabulary would take several times the model's memory.
    o, i = curvature.eigenvalues.shape
    added = damping * curvature.eigenvalues.mean()
    strips = curvature.eigenvalues.split(max(1, LARGEST_BLOCK // i))

    def damped_and_energy(strip: Tensor) -> tuple[Tensor, Tensor]:
        damped = (strip + added).double()
        # a little everywhere: where there is none, a weight is as good as any, but not its size
        return damped, strip.double().clamp(min=0) + LEAST_ENERGY * damped

    square_a = o / torch.stack([(strip + added).double().sum(0) for strip in strips]).sum(0)
    outputs, above, below = list[Tensor](), torch.zeros_like(square_a), torch.zeros_like(square_a)
    for damped, energy in map(damped_and_energy, strips):
        inverse = energy / damped.square()
        # x makes b x + a / x least where it is √(a / b)
        outputs.append(((inverse @ (1 / square_a)) / (energy @ square_a)).sqrt())
        above += inverse.T @ (1 / outputs[-1])
        below += energy.T @ outputs[-1]
    square_s, square_a = torch.cat(outputs), (above / below).sqrt()
    held = torch.cat([energy @ square_a for _, energy in map(damped_and_energy, strips)])
    parts = square_s * held, square_a * below
    few_s, few_a = (float(part.sum().square() / part.square().sum()) for part in parts)
    dtype = curvature.eigenvalues.dtype
    return Whitened(square_s.sqrt().to(dtype), square_a.sqrt().to(dtype), (few_s, few_a))


def _whitened_alike(curvature: Curvature, damping: float) -> Whitened:
    """The separable weights of indexes of before: nearest to (Λ+λ)^−½ in all logarithms alike."""
    logarithm = -0.5 * curvature.damped(damping).double().log()
    # Row mean + column mean − mean: the mean is shared out evenly between the two factors.
    mean = logarithm.mean()
    w_s = (logarithm.mean(1) - mean / 2).exp()
    w_a = (logarithm.mean(0) - mean / 2).exp()
    dtype = curvature.eigenvalues.dtype
    return Whitened(w_s.to(dtype), w_a.to(dtype), (math.inf, math.inf))


@dataclass
class _Projection:
    """How one module's gradients enter a code: its mixing matrices, whitening and signs."""

    mix_s: Tensor  # ±1, int8 [k_S, o]: R_S = mix_s / √k_S
    mix_a: Tensor  # ±1, int8 [k_A, i]
    w_s: Tensor  # [o]
    w_a: Tensor  # [i]
    project_s: Tensor  # P_S [k_S, o]
    project_a: Tensor  # P_A [k_A, i]
    signs: Tensor  # ±1 [k_S · k_A], of the count sketch
    offset: int  # the bucket of the first entry


class Codes:
    """Gradients → vectors [b, K], for one set of modules, one curvature and one seed.

    `digest` is the SHA-256 of all random numbers drawn, in hex: an index keeps it, so that a search
    on another machine notices if its own came out differently.

    The inner product of a sequence's vector and a query's is the influence in the mean over seeds:

    >>> m = Module("m", 0, "mlp", d_out=2, d_in=2, bias=False)
    >>> ekfac = {"m": Curvature(torch.eye(2), torch.eye(2), torch.ones(2, 2))}
    >>> a, d = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]])  # G = [[1, 2], [0, 0]]
    >>> c = torch.tensor([[[3.0, 0.0], [0.0, 0.0]]])  # so the influence is 1 · 3
    >>> scores = []
    >>> for seed in range(500):
    ...     codes = Codes([m], ekfac, CodeSettings(length=64, width=2, seed=seed, damping=0.1))
    ...     vectors = codes.empty(1)
    ...     codes.add(vectors, m, a, d)
    ...     scores.append(float((vectors * codes.query_vectors({"m": c})).sum()))
    >>> bool(abs(np.mean(scores) - 3) < 0.5)
    True
    """

    def __init__(self, modules: list[Module], ekfac: Ekfac, settings: CodeSettings):
        self.settings = settings
        self.modules = modules
        # odd, so that a side of a power of two begins anew at no multiple of it
        self._turn = int(GOLDEN * settings.length) | 1 if settings.recipe > 2 else 0
        self._projections: dict[str, _Projection] = {}
        digest = hashlib.sha256()
        offset = 0
        # Offsets go round the buckets in a random order of modules, so that modules of one kind
        # (a model has few kinds, in a fixed cycle) don't pile up in the same buckets.
        order = draws.order(Stream.CODE_OFFSETS, settings.seed, len(modules))
        for module in (modules[int(number)] for number in order):
            projection, numbers_digest = self._draw(module, ekfac[module.name], offset)
            digest.update(numbers_digest)
            offset = (offset + projection.signs.numel()) % settings.length
            self._projections[module.name] = projection
        self.digest = digest.hexdigest()

    def _draw(
        self, module: Module, curvature: Curvature, offset: int
    ) -> tuple[_Projection, bytes]:
        """The projection of one module, and the digest of the random numbers in it."""
        o, i = module.shape
        make = _whitened_alike if self.settings.recipe < 3 else whitening
        whitened = make(curvature, self.settings.damping)
        w_s, w_a = whitened.w_s, whitened.w_a
        k_s, k_a = self.settings.sides(module, whitened.directions)
        like = curvature.eigenvalues
        # Each of the three has a stream of its own: equal matrices on both sides would correlate.
        drawn = {part: partial(draws.signs, self.settings.seed, f"{module.name}/{part}")
                 for part in ("output", "input", "bucket")}
        signs = {"output": self._mixing_signs(drawn["output"], k_s, o),
                 "input": self._mixing_signs(drawn["input"], k_a, i),
                 "bucket": drawn["bucket"](k_s * k_a)}
        # kept as int8, a quarter of float32: a query needs R itself beside P
        mix_s = torch.from_numpy(signs["output"]).view(k_s, o).to(like.device, torch.int8)
        mix_a = torch.from_numpy(signs["input"]).view(k_a, i).to(like.device, torch.int8)
        projection = _Projection(
            mix_s, mix_a, w_s, w_a,
            project_s=right_transposed(_mixing(mix_s, like) * w_s, curvature.eigenvectors_s),
            project_a=right_transposed(_mixing(mix_a, like) * w_a, curvature.eigenvectors_a),
            signs=torch.from_numpy(signs["bucket"]).to(like), offset=offset,
        )
        content = hashlib.sha256(module.name.encode())
        for array in signs.values():
            content.update(array.tobytes())
        return projection, content.digest()

    def _mixing_signs(self, drawn: Callable[[int], np.ndarray], k: int, n: int) -> np.ndarray:
        """The ±1 of a side's R, row by row: [k · n]."""
        if k < n or self.settings.recipe == 1:
            return drawn(k * n)
        columns = hadamard(k, dtype=np.int8)[:, :n]  # see `sides`: k is a power of two then
        return np.asarray((columns * drawn(n)).ravel())

    def empty(self, rows: int) -> Tensor:
        """Vectors [rows, K] of zeros, for `add` and `add_query` to add to."""
        signs = next(iter(self._projections.values())).signs
        return signs.new_zeros(rows, self.settings.length)

    def add(self, vectors: Tensor, module: Module, a: Tensor, d: OutputGradients) -> None:
        """Add one module's part to the vectors v_m [b, K] of a batch's sequences.

        a [b, t, i] are the module's inputs without the bias's 1, d [b, t, o] its output gradients.
        """
        projection = self._projections[module.name]
        mixed_a = apply_inputs(a.to(projection.signs.dtype), projection.project_a, module.bias)
        mixed_d = d.to(projection.signs.dtype) @ projection.project_s.T
        # The outer product is formed of k mixed coordinates a side, never of o and i.
        x = torch.bmm(mixed_d.transpose(1, 2), mixed_a)
        self._sketch(vectors, x.flatten(1), projection)

    def query_vectors(self, coordinates: dict[str, Tensor]) -> Tensor:
        """v_q [q, K] of queries, from their C_q [q, o, i] by module name.

        A module that `coordinates` lacks has no part in the scores.
        """
        vectors = self.empty(len(next(iter(coordinates.values()))))
        for name, c in coordinates.items():
            self.add_query(vectors, name, c)
        return vectors

    def add_query(
        self, vectors: Tensor, name: str, c: Tensor, outputs: slice = slice(None)
    ) -> None:
        """Add one module's part to v_q [q, K], from its C_q [q, o, i] or a slice of its `outputs`.
        """
        projection = self._projections[name]
        # Divided by w_S w_Aᵀ where a sequence's side was multiplied by it: the split cancels, and
        # the scores are unbiased however badly it fits (Λ+λ)^−½.
        split = torch.outer(projection.w_s[outputs], projection.w_a)
        x = _mixing(projection.mix_s[:, outputs], c) @ (c / split) @ _mixing(projection.mix_a, c).T
        self._sketch(vectors, x.flatten(1), projection)

    def _sketch(self, vectors: Tensor, x: Tensor, projection: _Projection) -> None:
        """Add x [b, n] times its signs to vectors [b, K], each entry to its bucket."""
        x, signs = x.to(vectors.device), projection.signs.to(vectors.device)
        length, start = self.settings.length, projection.offset
        for first in range(0, x.shape[1], length):  # n may be several times K: once round
            last = min(first + length, x.shape[1])
            # in two contiguous pieces at most: up to the last bucket, and from the first one on
            middle = min(last, first + length - start)
            for bucket, one, end in ((start, first, middle), (0, middle, last)):
                vectors[:, bucket : bucket + end - one].addcmul_(x[:, one:end], signs[one:end])
            start = (start + self._turn) % length


def _mixing(signs: Tensor, like: Tensor) -> Tensor:
    """R [k, n] = signs / √k, in the dtype of `like`."""
    mixing: Tensor = signs.to(like.dtype) / len(signs) ** 0.5
    return mixing


def score_error(c: float, query_norm: float, norms: np.ndarray, length: int) -> np.ndarray:
    """σ_m = c ‖v_q‖ ‖v_m‖ / √K: the sd of code scores around the exact influence, float64 [n].

    `query_norm` is ‖v_q‖, `norms` [n] are ‖v_m‖, `length` is K, and c is about 1.25 to 1.4,
    calibrated for each index.

    >>> score_error(1.28, 2.0, np.array([1.0, 4.0]), 1024).round(4).tolist()
    [0.08, 0.32]
    """
    return np.asarray(c * query_norm * norms.astype(np.float64) / length**0.5)
