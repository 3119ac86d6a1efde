"""Block-diagonal covariances and eigenvectors, and products with them.

Grosse et al. 2023 (App. A) split large A and S in O = 2 blocks along the diagonal and leave out
what is between them: memory falls by O, eigendecompositions take 1/O² of the time. A matrix
[n, n] in O blocks is kept as its blocks of m = ⌈n/O⌉ rows each, one below the other: [n, m]. The
last may have fewer rows, and as many columns fewer (those are zero). One block is the plain matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradindex.gradients import apply_inputs, gradient
from gradindex.modules import Module


def block_rows(n: int, blocks: int) -> int:
    """m, the rows of a block of a matrix [n, n]."""
    return -(-n // blocks)


def square_entries(module: Module, blocks: int) -> int:
    """How many numbers A and S of a module have, or Q_A and Q_S."""
    return sum(n * block_rows(n, blocks) for n in module.shape)


def covariance_shapes(modules: Sequence[Module], blocks: int) -> dict[str, tuple[int, int]]:
    """The shapes of A [i, m] and S [o, m] by `name/A` and `name/S`."""
    shapes = {}
    for module in modules:
        o, i = module.shape
        shapes[f"{module.name}/A"] = (i, block_rows(i, blocks))
        shapes[f"{module.name}/S"] = (o, block_rows(o, blocks))
    return shapes


def square_blocks(matrix: Tensor) -> list[Tensor]:
    """The square blocks of a matrix [n, m], to read or to write."""
    return [rows[:, : len(rows)] for rows in matrix.split(matrix.shape[1])]


def identity(n: int, m: int, like: Tensor) -> Tensor:
    """The identity [n, n] in blocks of m rows: [n, m], of the dtype and device of `like`."""
    made = like.new_zeros(n, m)
    for block in square_blocks(made):
        block.fill_diagonal_(1)
    return made


def add_outer(sums: Tensor, rows: Tensor) -> None:
    """Add Σ x xᵀ over rows x [t, n], its diagonal blocks, to sums [n, m]."""
    for block, part in zip(square_blocks(sums), rows.split(sums.shape[1], -1), strict=True):
        block.addmm_(part.T, part)


def right(x: Tensor, q: Tensor, bias: bool = False) -> Tensor:
    """x Q for x [..., n], Q [n, n] in blocks as [n, m]. With a bias, x lacks its last entry, a 1.
    """
    found = square_blocks(q)
    sizes = [len(block) for block in found]
    parts = x.split([*sizes[:-1], sizes[-1] - bias], -1)
    return _beside([
        apply_inputs(part, block.T, bias and block is found[-1])
        for part, block in zip(parts, found, strict=True)
    ])


def right_transposed(x: Tensor, q: Tensor) -> Tensor:
    """x Qᵀ for x [..., n], Q [n, n] in blocks as [n, m]."""
    return _beside([part @ block.T for part, block in
                    zip(x.split(q.shape[1], -1), square_blocks(q), strict=True)])


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def enter(g: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """Q_Sᵀ G Q_A for G [..., o, i], Q_A [i, m] and Q_S [o, m] in blocks."""
    return right(right(g.mT, q_s).mT, q_a)


def leave(c: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """Q_S C Q_Aᵀ for C [..., o, i], Q_A [i, m] and Q_S [o, m] in blocks."""
    return right_transposed(right_transposed(c.mT, q_s).mT, q_a)


def rotated(module: Module, a: Tensor, d: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """Q_Sᵀ G Q_A of each sequence, [b, o, i], in the dtype of the eigenvectors.

    Of a [b, t, i] and d [b, t, o]; Q_A [i, m] and Q_S [o, m] are in blocks. Either the tokens are
    rotated or their gradient, whichever takes less arithmetic: few long sequences of a narrow
    module are better multiplied first.
    """
    (o, i), a, d = module.shape, a.to(q_a.dtype), d.to(q_a.dtype)
    if a.shape[1] * (q_s.numel() + q_a.numel()) <= o * i * (q_s.shape[1] + q_a.shape[1]):
        return right(d, q_s).mT @ right(a, q_a, module.bias)
    return enter(gradient(module, a, d), q_a, q_s)
