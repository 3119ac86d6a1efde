"""Block-diagonal covariances and eigenvectors, and products with them.

Grosse et al. 2023 (App. A) split large A and S in O = 2 blocks along the diagonal and leave out
what is between them: memory falls by O, eigendecompositions take 1/O² of the time. A matrix
[n, n] in O blocks is kept as its blocks of m = ⌈n/O⌉ rows each, one below the other: [n, m]. The
last may have fewer rows, and as many columns fewer (those are zero). One block is the plain matrix.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradindex.influence.gradients import gradient
from gradindex.modules import Module

STRIP = 192  # rows of a covariance that are added to at once
LINE = 16  # numbers: 64 bytes in float32


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


def add_outer(sums: Tensor, rows: Tensor, bias: bool = False) -> None:
    """Add Σ x xᵀ over rows x [t, n], the upper triangle of its diagonal blocks, to sums [n, m].

    With a bias, x lacks its last entry, a 1. What lies below the triangle is unfinished, see
    `symmetric`: leaving it out saves up to half the arithmetic.
    """
    n, m = sums.shape
    for first, block in zip(range(0, n, m), square_blocks(sums), strict=True):
        part = rows[:, first : first + m]
        width = part.shape[1]
        for start in range(0, width, STRIP):
            end = min(start + STRIP, width)
            block[start:end, start:width].addmm_(part[:, start:end].T, part[:, start:])
        if bias and first + m >= n:
            block[:width, width] += part.sum(0)
            block[width, width] += len(part)


def symmetric(block: Tensor) -> Tensor:
    """A square block whose upper triangle `add_outer` summed, mirrored: a new matrix."""
    return block.triu().add_(block.triu(1).T)


def right(x: Tensor, q: Tensor, bias: bool = False) -> Tensor:
    """x Q for x [..., n], Q [n, n] in blocks as [n, m]. With a bias, x lacks its last entry, a 1.

    Rows of the result lie whole cache lines apart: products into odd rows take a third longer.
    """
    rows, (n, m) = x.flatten(0, -2), q.shape
    found = rows.new_empty(len(rows), -(-n // LINE) * LINE)[:, :n]
    for first, block in zip(range(0, n, m), square_blocks(q), strict=True):
        part, own = rows[:, first : first + m], found[:, first : first + m]
        if bias and first + m >= n:
            torch.addmm(block[-1], part, block[:-1], out=own)
        else:
            torch.mm(part, block, out=own)
    product: Tensor = found.unflatten(0, x.shape[:-1])
    return product


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
    """Q_Sᵀ G Q_A of each sequence, [b, o, i], see `rotator`."""
    return rotator(module, a, d, q_a, q_s)(slice(None))


def rotator(
    module: Module, a: Tensor, d: Tensor, q_a: Tensor, q_s: Tensor
) -> Callable[[slice], Tensor]:
    """What gives Q_Sᵀ G Q_A of some sequences, [n, o, i], in the dtype of the eigenvectors.

    Of a [b, t, i] and d [b, t, o]; Q_A [i, m] and Q_S [o, m] are in blocks. Either the tokens are
    rotated, all at once, or some sequences' gradients, whichever takes less arithmetic: few long
    sequences of a narrow module are better multiplied first.
    """
    (o, i), a, d = module.shape, a.to(q_a.dtype), d.to(q_a.dtype)
    if a.shape[1] * (q_s.numel() + q_a.numel()) <= o * i * (q_s.shape[1] + q_a.shape[1]):
        d, a = right(d, q_s), right(a, q_a, module.bias)
        return lambda rows: d[rows].mT @ a[rows]
    return lambda rows: enter(gradient(module, a[rows], d[rows]), q_a, q_s)
