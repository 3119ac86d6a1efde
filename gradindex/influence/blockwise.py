"""Block-diagonal covariances and eigenvectors, and products with them.

Grosse et al. 2023 (App. A) split large A and S in O = 2 blocks along the diagonal and leave out
what is between them: memory falls by O, eigendecompositions take 1/O² of the time. A matrix
[n, n] in O blocks is kept as its blocks of m = ⌈n/O⌉ rows each, one below the other: [n, m]. The
last block may have fewer rows; it then has as many columns fewer, and the rest of its rows is zero.
With O = 1, [n, m] is the plain matrix.

    [a b . .]                   [a b]
    [c d . .]   is kept as      [c d]   n = 4, O = 2, m = 2
    [. . e f]                   [e f]
    [. . g h]                   [g h]

Over the tokens of a vocabulary (`Module.diagonal`) neither A nor S is looked at: blocks of one row,
[n, 1], whose eigenvectors are ones. Λ is then the mean square of each weight's own gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gradindex.influence.gradients import gradient
from gradindex.influence.vocabulary import OutputGradients, OverVocabulary
from gradindex.modules import Module

# rows of a covariance that are added to at once; a GPU takes few large products, not many
STRIP = {"cpu": 192, "cuda": 2048}
LINE = 16  # numbers: 64 bytes in float32


def block_rows(n: int, blocks: int) -> int:
    """m, the rows of each of `blocks` blocks of a matrix [n, n].

    >>> block_rows(5, 2)  # the second has two
    3
    """
    return -(-n // blocks)


def square_shapes(module: Module, blocks: int) -> dict[str, tuple[int, int]]:
    """The shapes of a module's A, [i, m], and S, [o, m]; Q_A and Q_S have the same.

    >>> square_shapes(Module("m", 0, "mlp", d_out=2, d_in=3, bias=True), blocks=2)
    {'A': (4, 2), 'S': (2, 1)}
    >>> square_shapes(Module("lm_head", 1, "head", 50, 3, bias=False, diagonal=True), blocks=1)
    {'A': (3, 1), 'S': (50, 1)}
    """
    o, i = module.shape
    if module.diagonal:
        return {"A": (i, 1), "S": (o, 1)}
    return {"A": (i, block_rows(i, blocks)), "S": (o, block_rows(o, blocks))}


def square_entries(module: Module, blocks: int) -> int:
    """How many numbers a module's A and S have together; Q_A and Q_S have as many.

    >>> square_entries(Module("m", 0, "mlp", d_out=2, d_in=3, bias=True), blocks=2)  # 2·1 + 4·2
    10
    """
    return sum(n * m for n, m in square_shapes(module, blocks).values())


def covariance_shapes(modules: Sequence[Module], blocks: int) -> dict[str, tuple[int, int]]:
    """The shapes of every module's A, [i, m], and S, [o, m], by the names `name/A` and `name/S`.

    >>> covariance_shapes([Module("m", 0, "mlp", d_out=2, d_in=3, bias=False)], blocks=1)
    {'m/A': (3, 3), 'm/S': (2, 2)}
    """
    return {f"{module.name}/{side}": shape for module in modules
            for side, shape in square_shapes(module, blocks).items()}


def square_blocks(matrix: Tensor) -> list[Tensor]:
    """The square blocks of a matrix [n, m], as views: writing to one writes to the matrix.

    >>> square_blocks(torch.tensor([[1, 2], [3, 4], [5, 0]]))
    [tensor([[1, 2],
            [3, 4]]), tensor([[5]])]
    """
    return [rows[:, : len(rows)] for rows in matrix.split(matrix.shape[1])]


def identity(n: int, m: int, like: Tensor) -> Tensor:
    """The identity [n, n] in blocks of m rows: [n, m], of the dtype and device of `like`.

    >>> identity(3, 2, torch.zeros(1)).tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    if m == 1:  # a vocabulary has too many blocks to go through
        return like.new_ones(n, m)
    matrix = like.new_zeros(n, m)
    for block in square_blocks(matrix):
        block.fill_diagonal_(1)
    return matrix


def add_outer(sums: Tensor, rows: Tensor) -> None:
    """Add Σ x xᵀ over the rows x of [t, n] to sums [n, m]: upper triangles of the blocks alone.

    Rows [t, n − 1] are those of a map with a bias and stand for (x, 1). `symmetric` finishes a
    block; what `add_outer` leaves below a triangle means nothing.

    >>> sums = torch.zeros(2, 2)
    >>> add_outer(sums, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> symmetric(sums).tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """
    n, m = sums.shape
    if m == 1:
        squares = (rows * rows).sum(0)
        sums[:, 0] += squares if rows.shape[1] == n else functional.pad(
            squares, (0, 1), value=len(rows))
        return
    for first, block in zip(range(0, n, m), square_blocks(sums), strict=True):
        part = rows[:, first : first + m]
        width = part.shape[1]
        # Strip by strip, so that most of what lies below the triangle is never computed: up to
        # half of the arithmetic of the fit's first pass.
        strip = STRIP[sums.device.type]
        for start in range(0, width, strip):
            end = min(start + strip, width)
            block[start:end, start:width].addmm_(part[:, start:end].T, part[:, start:])
        if rows.shape[1] < n <= first + m:  # only the last block holds the bias
            block[:width, width] += part.sum(0)
            block[width, width] += len(part)


def symmetric(block: Tensor) -> Tensor:
    """The symmetric matrix [n, n] of which `add_outer` summed the upper triangle; a new one."""
    return block.triu().add_(block.triu(1).T)


def right(x: Tensor, q: Tensor, bias: bool = False) -> Tensor:
    """x Q [..., t, n] for x [..., t, n] and Q [n, n], which is kept in blocks [n, m].

    With a bias, x is [..., t, n − 1] and stands for (x, 1).

    >>> right(torch.tensor([[1.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), bias=True).tolist()
    [[2.0, 3.0]]
    """
    if q.shape[1] == 1:
        return functional.pad(x, (0, 1), value=1.0) * q[:, 0] if bias else x * q[:, 0]
    rows, (n, m) = x.flatten(0, -2), q.shape
    # The product's rows begin whole cache lines apart: into odd rows it takes a third longer.
    product = rows.new_empty(len(rows), -(-n // LINE) * LINE)[:, :n]
    for first, block in zip(range(0, n, m), square_blocks(q), strict=True):
        part, target = rows[:, first : first + m], product[:, first : first + m]
        if bias and first + m >= n:
            torch.addmm(block[-1], part, block[:-1], out=target)
        else:
            torch.mm(part, block, out=target)
    shaped: Tensor = product.unflatten(0, x.shape[:-1])
    return shaped


def right_transposed(x: Tensor, q: Tensor) -> Tensor:
    """x Qᵀ [..., t, n] for x [..., t, n] and Q [n, n], which is kept in blocks [n, m].

    >>> q = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    >>> right_transposed(torch.tensor([[1.0, 2.0]]), q).tolist()
    [[2.0, 3.0]]
    """
    if q.shape[1] == 1:
        return x * q[:, 0]
    return _beside([part @ block.T for part, block in
                    zip(x.split(q.shape[1], -1), square_blocks(q), strict=True)])


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # cat would copy the only one


def enter(g: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """Q_Sᵀ G Q_A [..., o, i] for G [..., o, i], Q_A [i, m] and Q_S [o, m] in blocks.

    >>> g, swap = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> enter(g, q_a=swap, q_s=torch.ones(1, 1)).tolist()
    [[2.0, 1.0]]
    """
    return right(right(g.mT, q_s).mT, q_a)


def leave(c: Tensor, q_a: Tensor, q_s: Tensor) -> Tensor:
    """Q_S C Q_Aᵀ [..., o, i], which undoes `enter`.

    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> bool(torch.allclose(leave(enter(g, turn, turn), turn, turn), g))
    True
    """
    return right_transposed(right_transposed(c.mT, q_s).mT, q_a)


LARGEST_BLOCK = 1 << 22  # numbers of a temporary tensor: 16 MB in float32
Rotate = Callable[[slice, slice], Tensor]  # of sequences and outputs, see `rotator`


def rotated(module: Module, a: Tensor, d: OutputGradients, q_a: Tensor, q_s: Tensor) -> Tensor:
    """Q_Sᵀ G Q_A of every sequence, [b, o, i]; the arguments are those of `rotator`."""
    return rotator(module, a, d, q_a, q_s)(slice(None), slice(None))


def rotator(
    module: Module, a: Tensor, d: OutputGradients, q_a: Tensor, q_s: Tensor
) -> Rotate:
    """A function from a piece of the batch to Q_Sᵀ G Q_A of its n sequences, [n, o, i].

    a [b, t, i] and d [b, t, o] are a batch's inputs and output gradients, without the bias's 1;
    Q_A [i, m] and Q_S [o, m] are in blocks, and the result has their dtype. A piece (`pieces`) is
    a slice of the batch, and one of the outputs: all of them, but where the module is diagonal.

    >>> m = Module("m", 0, "mlp", d_out=1, d_in=2, bias=False)
    >>> a, d = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.ones(1, 2, 1)
    >>> rotate = rotator(m, a, d, torch.eye(2), 2 * torch.ones(1, 1))
    >>> [rotate(*piece).tolist() for piece in pieces(m, 1)]
    [[[[2.0, 6.0]]]]
    """
    a = a.to(q_a.dtype)
    if isinstance(d, OverVocabulary):
        return partial(d.to(q_a.dtype).gradient, a)
    (o, i), wide = module.shape, d.to(q_a.dtype)
    if module.diagonal:  # both Q are I: of the outputs some may be had without the others
        a = functional.pad(a, (0, 1), value=1.0) if module.bias else a
        return lambda rows, outputs: wide[rows, :, outputs].mT @ a[rows]
    # Either the tokens are rotated, all at once, or the gradients, a slice at a time: whichever
    # takes less arithmetic. Few long sequences of a narrow module are better multiplied first.
    if a.shape[1] * (q_s.numel() + q_a.numel()) <= o * i * (q_s.shape[1] + q_a.shape[1]):
        turned, a = right(wide, q_s), right(a, q_a, module.bias)
        return lambda rows, _: turned[rows].mT @ a[rows]
    return lambda rows, _: enter(gradient(module, a[rows], wide[rows]), q_a, q_s)


def pieces(module: Module, sequences: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the sequences of a batch, and of outputs, whose gradients memory holds at once.

    The gradients [n, o, i] of a slice of sequences, of like sizes; of a vocabulary, whose gradient
    alone may be larger than the model, some outputs of one sequence at a time.

    >>> list(pieces(Module("m", 0, "mlp", d_out=1024, d_in=1024, bias=False), 6))
    [(slice(0, 3, None), slice(0, 1024, None)), (slice(3, 6, None), slice(0, 1024, None))]
    >>> list(pieces(Module("m", 0, "head", 4096, 2048, bias=False, diagonal=True), 1))
    [(slice(0, 1, None), slice(0, 2048, None)), (slice(0, 1, None), slice(2048, 4096, None))]
    """
    o, i = module.shape
    at_once = min(o, max(1, LARGEST_BLOCK // i)) if module.diagonal else o
    for rows in _even(sequences, max(1, LARGEST_BLOCK // (at_once * i))):
        for outputs in _even(o, at_once):
            yield rows, outputs


def _even(count: int, most: int) -> Iterator[slice]:
    """Slices of `count`, of like sizes, none larger than `most`."""
    size = -(-count // -(-count // most)) if count else 1  # 3 and 3, not 4 and 2
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
