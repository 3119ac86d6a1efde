"""EK-FAC curvature: eigenvectors, corrected eigenvalues, damping, and the preconditioner.

For a module with inputs a and output gradients d (George et al. 2018; Grosse et al. 2023, §2.3):
A = E_t[a aᵀ] = Q_A · Q_Aᵀ,  S = E_t[d dᵀ] = Q_S · Q_Sᵀ,  Λ = E_m[(Q_Sᵀ G_m Q_A)²], per sequence.
(G+λI)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) / (Λ+λ)] Q_Aᵀ  (eq. 21), λ = factor · mean(Λ) for each module.
Large A and S may be split in blocks (`blockwise.py`).
`indexer/fit` estimates them; here they are kept and applied.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gradindex.errors import DamagedIndexError
from gradindex.influence.blockwise import enter, leave, square_entries, square_shapes
from gradindex.memory import available, threads
from gradindex.model.devices import free_on
from gradindex.modules import Module
from gradindex.storage.files import FileFacts
from gradindex.storage.layout import module_file
from gradindex.storage.tensors import header_bytes, write_vouched

MOST_THREADS = 8  # that read curvature at once


@dataclass
class Curvature:
    """One module's eigenvectors Q_A [i, m] and Q_S [o, m] (columns) and eigenvalues Λ [o, i].

    The eigenvectors are in blocks of m rows (`blockwise.py`); where there is one block, Q_A is
    [i, i] and Q_S is [o, o]. `factor` is the damping in units of mean(Λ): λ = factor · mean(Λ).

    >>> curvature = Curvature(torch.eye(2), torch.eye(1), torch.tensor([[1.0, 3.0]]))
    >>> curvature.damped(0.5)
    tensor([[2., 4.]])
    >>> curvature.coordinates(torch.tensor([[4.0, 4.0]]), 0.5)
    tensor([[2., 1.]])
    >>> round(curvature.effective_dimension(0.5), 4)  # 1/2 + 3/4
    1.25
    """

    eigenvectors_a: Tensor
    eigenvectors_s: Tensor
    eigenvalues: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether the eigenvectors are the axes themselves, as of a head: blocks of one row."""
        return self.eigenvectors_a.shape[1] == 1 and self.eigenvectors_s.shape[1] == 1

    @cached_property
    def _mean(self) -> Tensor:
        return self.eigenvalues.mean()

    def damped(self, factor: float, outputs: slice = slice(None)) -> Tensor:
        """Λ + λ  [o, i], a new tensor, or of a slice of the outputs."""
        # Never in place: a second search with another damping would find the first one's λ in Λ.
        return self.eigenvalues[outputs] + factor * self._mean

    def coordinates(self, gradient: Tensor, factor: float) -> Tensor:
        """C = (Q_Sᵀ G Q_A) / (Λ+λ)  [..., o, i]: a preconditioned gradient, in the eigenbasis."""
        rotated = gradient if self.is_diagonal else enter(
            gradient, self.eigenvectors_a, self.eigenvectors_s)
        return self.divided(rotated, factor)

    def divided(self, rotated: Tensor, factor: float, outputs: slice = slice(None)) -> Tensor:
        """R / (Λ+λ)  [..., o, i], of a gradient R in the eigenbasis already, or of some outputs."""
        return rotated / self.damped(factor, outputs)

    def leave_eigenbasis(self, coordinates: Tensor) -> Tensor:
        """Q_S C Q_Aᵀ  [..., o, i]: coordinates in the eigenbasis as a gradient again."""
        if self.is_diagonal:
            return coordinates
        return leave(coordinates, self.eigenvectors_a, self.eigenvectors_s)

    def effective_dimension(self, factor: float) -> float:
        """Σ Λ/(Λ+λ): how many directions the damping leaves."""
        # in float64: up to millions of terms between 0 and 1
        return float((self.eigenvalues.double() / self.damped(factor).double()).sum())


Ekfac = Mapping[str, Curvature]  # by module name


def save(folder: Path, module: Module, curvature: Curvature) -> FileFacts:
    """Write one module's curvature, and return the file's facts. Raises ResourceError."""
    return write_vouched(folder / module_file(module), {
        "eigenvectors_a": curvature.eigenvectors_a, "eigenvectors_s": curvature.eigenvectors_s,
        "eigenvalues": curvature.eigenvalues,
    })


def file_entries(module: Module, covariance_blocks: int) -> int:
    """How many numbers Q_A, Q_S and Λ of a module have, A and S being in so many blocks.

    >>> file_entries(Module("m", 0, "mlp", d_out=2, d_in=3, bias=False), 1)  # 9 + 4 + 6
    19
    """
    return square_entries(module, covariance_blocks) + module.size


def file_bytes(module: Module, dtype: torch.dtype, covariance_blocks: int) -> int:
    """Bytes of one module's file, exact but for some digits in its header."""
    # Of one number each: only the names count, and a tensor's shape and offsets are those digits.
    small = {name: torch.zeros(1, dtype=dtype)
             for name in ("eigenvectors_a", "eigenvectors_s", "eigenvalues")}
    entries = file_entries(module, covariance_blocks)
    return header_bytes(small) + entries * dtype.itemsize


ReadTensors = Callable[[Module, torch.device], dict[str, Tensor]]  # a module's tensors, on a device


class FiledEkfac(Mapping[str, Curvature]):
    """The curvature of some modules by name, read from their files when it is asked for.

    `read` gives the tensors of a module's file, `device_of` says where they are to be. Modules are
    kept in memory up to `bound` bytes in all [half of what there is], and all of those are read, by
    several threads, when the first is asked for; the others are read again each time. Raises
    DamagedIndexError, when a module is first asked for, for a file that is missing, unreadable or
    no curvature of A and S in so many blocks.
    """

    def __init__(
        self, read: ReadTensors, modules: Sequence[Module],
        device_of: Callable[[Module], torch.device],
        dtype: torch.dtype, covariance_blocks: int, bound: int | None = None,
    ):
        self._read, self._device_of, self._dtype = read, device_of, dtype
        self._covariance_blocks = covariance_blocks
        self._modules = {module.name: module for module in modules}
        if bound is None:
            gpus = {device for module in modules if (device := device_of(module)).type == "cuda"}
            bound = (sum(map(free_on, gpus)) if gpus else available()) // 2
        self._room: int | None = bound  # None: it is taken
        self._starting = threading.Lock()
        # of those that are kept: never dropped, for every batch asks for all, in one order
        self._keep: set[str] = set()
        self._reading: dict[str, Future[Curvature]] = {}
        self._cache: dict[str, Curvature] = {}
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Curvature:
        module = self._modules[name]
        with self._starting:  # which two threads of a server may do at once
            if self._room is not None:
                self._start_reading(self._room)
                self._room = None
        if name in self._reading:
            try:
                return self._reading[name].result()
            except Exception:
                # what failed may not fail again: memory comes back, and so do disks
                self._reading.pop(name, None)
                raise
        curvature = self._cache.get(name) or self._load(module)
        if name in self._keep:
            self._cache[name] = curvature
        return curvature

    def _start_reading(self, room: int) -> None:
        """Settle which modules are kept, and begin to read those in threads of their own."""
        for name, module in self._modules.items():
            size = file_entries(module, self._covariance_blocks) * self._dtype.itemsize
            if size <= room:
                room -= size
                self._keep.add(name)
        count = threads(MOST_THREADS)
        if count == 1 or len(self._keep) < 2:
            return
        # a digest goes through 2 GB a second at most: of a large model several files at once
        pool = ThreadPoolExecutor(count)
        self._reading = {name: pool.submit(self._load, self._modules[name])
                         for name in self._modules if name in self._keep}
        pool.shutdown(wait=False)  # its threads end when all is read

    def _load(self, module: Module) -> Curvature:
        tensors = self._read(module, self._device_of(module))
        if module.name not in self._checked:
            _check(module, self._covariance_blocks, tensors)
            self._checked.add(module.name)
        return Curvature(**{name: tensor.to(self._dtype) for name, tensor in tensors.items()})


def _check(module: Module, covariance_blocks: int, tensors: dict[str, Tensor]) -> None:
    """Raise DamagedIndexError unless these tensors are a curvature of the module."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    squares = square_shapes(module, covariance_blocks)
    expected = {"eigenvectors_a": squares["A"], "eigenvectors_s": squares["S"],
                "eigenvalues": module.shape}
    if shapes != expected or not all(
            tensor.is_floating_point() and bool(tensor.isfinite().all())
            for tensor in tensors.values()) or bool((tensors["eigenvalues"] < 0).any()):
        raise DamagedIndexError(
            f"the curvature of {module.name}, {module_file(module)}, holds {shapes}, expected "
            f"finite {expected}. Copy the index again, or build again."
        )
