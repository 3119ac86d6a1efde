"""Codes on a GPU: kept there where they fit, and scored for several queries in one pass.

A score is ⟨v_q, signs of the code⟩ times the code's scale, as FAISS's, which quantises the query
to a few bits where this rounds it to 31.
"""

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gradindex.storage.code_index import CodeIndex
from gradindex.transfers import Arriving, to_device

TOGETHER = 16  # queries that are scored in one pass
TILE = 1 << 28  # bytes of codes that are moved at once where not all are kept
LIMBS, LARGEST = 4, 1 << 30  # a query's entries are whole numbers up to this, of so many bytes
SMALLEST = 16  # columns that a product of tensor cores has at least
UNPACKED = 1 << 27  # bits unpacked at once where there is no kernel for them


class DeviceCodes:
    """The codes of some segments, of K = `length` bits, on a device: all, up to `room` bytes.

    >>> vectors = np.tile([[1, 1, 1, 1], [1, -1, 1, -1]], 16).astype(np.float32)
    >>> index = CodeIndex(64)
    >>> index.add(index.encode(vectors))
    >>> codes = DeviceCodes([index, index], 64, torch.device("cpu"), room=1000)
    >>> codes.scores(vectors[:1]).round().tolist()
    [[64.0, 0.0, 64.0, 0.0]]
    """

    def __init__(
        self, segments: Sequence[CodeIndex], length: int, device: torch.device, room: int
    ):
        self._segments, self._length, self._device = segments, length, device
        fits = sum(map(len, segments)) * length // 8 <= room
        self._kept = list(self._tiles()) if fits else None

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """The code scores of all rows for queries' vectors, float32 [q, K]: float32 [q, rows]."""
        asked = to_device(vectors.astype(np.float32, copy=False), self._device)
        groups = [RoundedQueries(group) for group in asked.split(TOGETHER)]
        # all groups of a tile before the next one: what isn't kept is moved once
        parts = [torch.cat([group.inner(signs).mul_(scales) for group in groups])
                 for signs, scales in self._kept or self._tiles()]
        [scores] = Arriving([torch.cat(parts, dim=1)]).arrays()
        return scores

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sign bits, uint8 [n, K/8], and scales, float32 [n], of rows that follow each other."""
        for parts in self._runs(max(1, TILE // (self._length // 8))):
            signs, scales = zip(*(segment.signs(rows) for segment, rows in parts), strict=True)
            # a copy from pinned memory: the next tile is read while this one is on its way
            yield (to_device(np.concatenate(signs), self._device),
                   to_device(np.concatenate(scales), self._device))

    def _runs(self, most: int) -> Iterator[list[tuple[CodeIndex, slice]]]:
        """Rows that follow each other, `most` of them but for the last, by segment."""
        run, room = list[tuple[CodeIndex, slice]](), most
        for segment in self._segments:
            first = 0
            while first < len(segment):
                end = min(len(segment), first + room)
                run.append((segment, slice(first, end)))
                room, first = room - (end - first), end
                if not room:
                    yield run
                    run, room = [], most
        if run:
            yield run


def many_scores(codes: CodeIndex, vectors: np.ndarray, device: torch.device) -> np.ndarray:
    """The code scores of all rows of a segment for many vectors, float32 [q, K]: float32 [q, rows].

    They are those of `CodeIndex.many_scores`, found on `device` where that is a GPU.
    """
    if device.type == "cpu":
        return codes.many_scores(vectors)
    return DeviceCodes([codes], vectors.shape[1], device, room=TILE).scores(vectors)


class RoundedQueries:
    """Queries' vectors [q, K] on a device, their entries rounded to whole numbers of four limbs.

    `limbs` are as `bits_times_limbs` takes them.

    >>> queries = RoundedQueries(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0]]))
    >>> queries.inner(torch.tensor([[0b11111111], [0b00000011]], dtype=torch.uint8)).tolist()
    [[20.0, -14.0]]
    """

    def __init__(self, vectors: Tensor):
        queries, length = vectors.shape
        self._count = queries
        # zero for a query of zeros; what isn't finite stays so, as the scan's caller expects
        self._step = vectors.abs().amax(1) / LARGEST
        whole = (vectors / self._step.where(self._step > 0, 1.0)[:, None]).nan_to_num(0).round().to(
            torch.int32)
        limbs = []
        for _ in range(LIMBS - 1):  # the lowest first, each from −128 to 127
            low = ((whole + 128) & 255) - 128
            limbs.append(low)
            whole = (whole - low) >> 8
        limbs.append(whole)
        stacked = torch.stack(limbs[::-1])  # [LIMBS, q, K]
        self._sums = stacked.sum(-1, dtype=torch.int32)
        width = max(SMALLEST, 1 << (LIMBS * queries - 1).bit_length())
        columns = torch.nn.functional.pad(
            stacked.flatten(0, 1), (0, 0, 0, width - LIMBS * queries)).to(torch.int8)
        # entry 8 j + s at [s, j]
        self.limbs = columns.unflatten(1, (length // 8, 8)).permute(2, 1, 0).contiguous()

    def inner(self, signs: Tensor) -> Tensor:
        """⟨v_q, s⟩ for sign bits uint8 [n, K/8], a set bit for 1, none for −1: float32 [q, n]."""
        sums = bits_times_limbs(signs, self.limbs)[:, : LIMBS * self._count]
        # of signs: twice that of bits, less the sum; whole numbers still, so nothing is lost
        signed = 2 * sums.T.unflatten(0, (LIMBS, self._count)) - self._sums[..., None]
        total: Tensor = signed[0].long()  # exact, so that nothing is lost where limbs cancel
        for limb in signed[1:]:
            total = total * 256 + limb
        return total.float() * self._step[:, None]


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether the kernel of `sign_kernel.py` runs on a device; says so where a GPU lacks something.

    PyTorch for CUDA brings Triton, which compiles for compute capability 8.0 and above, by the help
    of a C compiler.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    lacking = "Triton" if importlib.util.find_spec("triton") is None else \
        f"a card of compute capability 8.0 (it has {major}.{minor})" if major < 8 else \
        "a C compiler (gcc or clang)" if not (
            os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) else None
    if lacking is not None:
        warnings.warn(f"codes are scanned on {device} without their kernel, which needs {lacking}: "
                      "the same scores, more slowly", RuntimeWarning, stacklevel=2)
    return lacking is None


def bits_times_limbs(codes: Tensor, limbs: Tensor) -> Tensor:
    """As the function of `sign_kernel.py`, by it where it runs, else in PyTorch's operations."""
    if has_kernel(codes.device):
        from gradindex.influence import sign_kernel

        return sign_kernel.bits_times_limbs(codes, limbs)
    return plain_bits_times_limbs(codes, limbs)


def plain_bits_times_limbs(codes: Tensor, limbs: Tensor) -> Tensor:
    """The same in PyTorch's operations, some rows at a time."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None, None]
    entries = limbs.flatten(0, 1)
    # float32 has the sums of 2^17 bytes without rounding
    wide = torch.float32 if len(entries) <= 1 << 17 else torch.float64
    parts = [((some >> shifts) & 1).to(wide).permute(1, 0, 2).flatten(1) @ entries.to(wide)
             for some in codes.split(max(1, UNPACKED // (8 * codes.shape[1])))]
    return torch.cat(parts).to(torch.int32)
