"""The one meaning of "code": gradient → vector, query gradient → query vector, and its error.

The influence ⟨C_q, Q_Sᵀ G_m Q_A⟩ is a sum over every pair of eigen-coordinates of every module:
far too many to store. It is estimated without bias in two steps that both sides share.

1. Two-sided mixing. R_S [k, o] and R_A [k, i] have independent entries ±1/√k, so for any Y and Z
   E⟨R_S Y R_Aᵀ, R_S Z R_Aᵀ⟩ = ⟨Y, Z⟩. On the sequence's side Y = w_S w_Aᵀ ∘ (Q_Sᵀ G_m Q_A), where
   w_S w_Aᵀ is the separable matrix nearest to (Λ+λ)^−½ (least squares in the logarithm): whitening
   spreads the energy evenly, which is what a few bits per coordinate can carry. Because it is
   separable, everything is applied to tokens before the outer product:
   X = Σ_t (P_S d_t)(P_A a_t)ᵀ,  P_S = R_S diag(w_S) Q_Sᵀ,  P_A = R_A diag(w_A) Q_Aᵀ.
   On the query's side Z = C_q / (w_S w_Aᵀ) takes back what the split left out, so damping, the set
   of modules and Λ itself belong to the query alone.
2. Count sketch (Charikar et al. 2002). The k² entries of each X get random signs and are added up
   in K buckets, all modules in the same K.

FAISS then keeps the K signs and one scale (`code_file.py`). The error of the resulting score is
Gaussian with sd σ = c ‖v_q‖ ‖v_m‖ / √K.

The bucket of entry j of a module is (offset + j) mod K, its sign random. Signs alone make the
sketch unbiased and the entries are mixed already, so buckets need not be random: contiguous pieces
are added where a hash would scatter, and sums come out in the same order on every device.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradindex import draws
from gradindex.draws import Stream
from gradindex.influence.blockwise import right_transposed
from gradindex.influence.curvature import Curvature, Ekfac
from gradindex.influence.gradients import apply_inputs
from gradindex.modules import Module


@dataclass(frozen=True)
class CodeSettings:
    """K `length` (bits a sequence), k `width` (mixed coordinates a side), the seed, the damping."""

    length: int
    width: int
    seed: int
    damping: float


def default_length(sequence_length: int) -> int:
    """K: the power of two at or above 256 bits a token, at least 16,384."""
    return max(16384, 1 << (256 * sequence_length - 1).bit_length())


def default_width(length: int, modules: int) -> int:
    """k such that modules · k² ≈ 16 K, a multiple of 16 between 32 and 256."""
    return int(min(256, max(32, 16 * round((16 * length / modules) ** 0.5 / 16))))


def whitening(curvature: Curvature, damping: float) -> tuple[Tensor, Tensor]:
    """w_S [o] and w_A [i] with w_S w_Aᵀ nearest to (Λ+λ)^−½ by least squares in the logarithm."""
    logarithm = -0.5 * curvature.damped(damping).double().log()
    mean = logarithm.mean()
    w_s = (logarithm.mean(1) - mean / 2).exp()
    w_a = (logarithm.mean(0) - mean / 2).exp()
    dtype = curvature.eigenvalues.dtype
    return w_s.to(dtype), w_a.to(dtype)


@dataclass
class _Side:
    """What one module contributes: its mixing matrices, whitening, projections and signs."""

    mix_s: Tensor  # ±1, int8 [k, o]: R_S = mix_s / √k
    mix_a: Tensor  # ±1, int8 [k, i]
    w_s: Tensor  # [o]
    w_a: Tensor  # [i]
    project_s: Tensor  # P_S [k, o]
    project_a: Tensor  # P_A [k, i]
    signs: Tensor  # [k_S · k_A]
    offset: int


class Codes:
    """Gradients → vectors [b, K], for one set of modules, one curvature and one seed."""

    def __init__(self, modules: list[Module], ekfac: Ekfac, settings: CodeSettings):
        self.settings = settings
        self.modules = modules
        self._sides: dict[str, _Side] = {}
        digest = hashlib.sha256()
        offset = 0
        # Offsets go round the buckets in a random order of modules, so that modules of one kind
        # (a model has few kinds, in a fixed cycle) don't pile up in the same buckets.
        order = draws.order(Stream.CODE_OFFSETS, settings.seed, len(modules))
        for module in (modules[int(index)] for index in order):
            side, drawn = self._make_side(module, ekfac[module.name], offset)
            digest.update(drawn)
            offset = (offset + side.signs.numel()) % settings.length
            self._sides[module.name] = side
        self.digest = digest.hexdigest()

    def _make_side(
        self, module: Module, curvature: Curvature, offset: int
    ) -> tuple[_Side, bytes]:
        o, i = module.shape
        k = min(self.settings.width, o, i)
        like = curvature.eigenvalues
        drawn = {
            part: draws.signs(self.settings.seed, f"{module.name}/{part}", count)
            for part, count in (("output", k * o), ("input", k * i), ("bucket", k * k))
        }
        mix_s = torch.from_numpy(drawn["output"]).view(k, o).to(like.device, torch.int8)
        mix_a = torch.from_numpy(drawn["input"]).view(k, i).to(like.device, torch.int8)
        w_s, w_a = whitening(curvature, self.settings.damping)
        side = _Side(
            mix_s, mix_a, w_s, w_a,
            project_s=right_transposed(_mixing(mix_s, like) * w_s, curvature.eigenvectors_s),
            project_a=right_transposed(_mixing(mix_a, like) * w_a, curvature.eigenvectors_a),
            signs=torch.from_numpy(drawn["bucket"]).to(like), offset=offset,
        )
        content = hashlib.sha256(module.name.encode())
        for array in drawn.values():
            content.update(array.tobytes())
        return side, content.digest()

    def empty(self, rows: int) -> Tensor:
        """Vectors [rows, K] to add to."""
        signs = next(iter(self._sides.values())).signs
        return signs.new_zeros(rows, self.settings.length)

    def add(self, vectors: Tensor, module: Module, a: Tensor, d: Tensor) -> None:
        """Add one module's part to vectors [b, K], from a [b, t, i] and d [b, t, o]."""
        side = self._sides[module.name]
        mixed_a = apply_inputs(a.to(side.signs.dtype), side.project_a, module.bias)
        mixed_d = d.to(side.signs.dtype) @ side.project_s.T
        x = torch.bmm(mixed_d.transpose(1, 2), mixed_a)
        _sketch(vectors, x.flatten(1), side.signs, side.offset)

    def query_vectors(self, coordinates: dict[str, Tensor]) -> Tensor:
        """v_q [q, K] from C_q [q, o, i] per module; modules left out are left out of the score."""
        vectors = self.empty(len(next(iter(coordinates.values()))))
        for name, c in coordinates.items():
            self.add_query(vectors, name, c)
        return vectors

    def add_query(self, vectors: Tensor, name: str, c: Tensor) -> None:
        """Add one module's part to v_q [q, K], from its C_q [q, o, i]."""
        side = self._sides[name]
        x = _mixing(side.mix_s, c) @ (c / torch.outer(side.w_s, side.w_a)) @ \
            _mixing(side.mix_a, c).T
        _sketch(vectors, x.flatten(1), side.signs, side.offset)


def _mixing(signs: Tensor, like: Tensor) -> Tensor:
    """R [k, n] = signs / √k, in the dtype of `like`."""
    mixing: Tensor = signs.to(like.dtype) / len(signs) ** 0.5
    return mixing


def _sketch(vectors: Tensor, x: Tensor, signs: Tensor, offset: int) -> None:
    """Add x [b, n] · signs [n] to vectors [b, K] from bucket `offset` on, round and round."""
    length = vectors.shape[1]
    done = 0
    while done < x.shape[1]:
        start = (offset + done) % length
        n = min(length - start, x.shape[1] - done)
        vectors[:, start : start + n].addcmul_(x[:, done : done + n], signs[done : done + n])
        done += n


def score_error(c: float, query_norm: float, norms: np.ndarray, length: int) -> np.ndarray:
    """σ_m = c ‖v_q‖ ‖v_m‖ / √K: the sd of a code's score around the exact influence [n]."""
    return np.asarray(c * query_norm * norms.astype(np.float64) / length**0.5)
