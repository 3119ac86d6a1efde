"""The scan of one-bit codes on a GPU: the bits of every row times a few vectors, in one pass.

Row and vectors meet in whole numbers. A vector's entries are rounded to 31 bits and cut into four
limbs of 8, so that the product is one of bytes, which tensor cores add up without rounding: the
same sums come out on every device, in any order. Each byte of a row is read once; its eight bits
are taken out one after the other and meet the entries that they stand for, an eighth of a vector
each time (`limbs` lie in that order).
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, OCTETS = 128, 64  # of a program, at a time: each reads all limbs


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _bits_times_limbs(  # type: ignore[no-untyped-def]
    codes, limbs, sums, rows, octets, columns: tl.constexpr, rows_at_once: tl.constexpr,
    octets_at_once: tl.constexpr,
):
    row = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
    column = tl.arange(0, columns)
    total = tl.zeros((rows_at_once, columns), tl.int32)
    for first in range(0, octets, octets_at_once):
        octet = first + tl.arange(0, octets_at_once)
        inside = octet < octets
        # rows · octets may be beyond 2^31
        content = tl.load(codes + row[:, None].to(tl.int64) * octets + octet[None, :],
                          mask=(row < rows)[:, None] & inside[None, :], other=0)
        for bit in tl.static_range(8):
            bits = ((content >> bit) & 1).to(tl.int8)
            part = tl.load(limbs + (bit * octets + octet[:, None]) * columns + column[None, :],
                           mask=inside[:, None], other=0)
            total = tl.dot(bits, part, total, out_dtype=tl.int32)
    tl.store(sums + row[:, None].to(tl.int64) * columns + column[None, :], total,
             mask=(row < rows)[:, None])


def bits_times_limbs(codes: Tensor, limbs: Tensor) -> Tensor:
    """Σ over the set bits of each code of the limbs that they stand for: int32 [rows, c].

    `codes` uint8 [rows, K/8] have their lowest bit first. `limbs` int8 [8, K/8, c] are those of
    entry 8 j + s at [s, j]; c is a power of two, and 16 at least.
    """
    rows, octets = codes.shape
    sums = limbs.new_empty(rows, limbs.shape[2], dtype=torch.int32)
    # Triton launches on the current device, whichever its arguments are on
    on_cpu = codes.device.type == "cpu"  # in the interpreter
    with contextlib.nullcontext() if on_cpu else torch.cuda.device(codes.device):
        _bits_times_limbs[(triton.cdiv(rows, ROWS),)](
            codes, limbs, sums, rows, octets, limbs.shape[2], ROWS, OCTETS)
    return sums
