"""EK-FAC curvature: eigenvectors, corrected eigenvalues, damping, and the preconditioner.

For a module with inputs a and output gradients d (George et al. 2018; Grosse et al. 2023, §2.3):
A = E_t[a aᵀ] = Q_A · Q_Aᵀ,  S = E_t[d dᵀ] = Q_S · Q_Sᵀ,  Λ = E_m[(Q_Sᵀ G_m Q_A)²], per sequence.
(G+λI)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) / (Λ+λ)] Q_Aᵀ  (eq. 21), λ = factor · mean(Λ) for each module.
Large A and S may be split in blocks (`blockwise.py`).
`indexer/fit` estimates them; here they are kept and applied.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from gradindex.errors import DamagedIndexError
from gradindex.influence.blockwise import block_rows, enter, leave, square_entries
from gradindex.modules import Module
from gradindex.storage.files import FileFacts, Writer, atomic_write

DAMPING = 0.1  # of mean(Λ), as in Grosse et al. 2023, §5
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}


@dataclass
class Curvature:
    """One module's eigenvectors Q_A [i, m] and Q_S [o, m] (columns) and eigenvalues Λ [o, i].

    The eigenvectors are in blocks of m rows; m = i, and m = o, where there is but one.
    """

    eigenvectors_a: Tensor
    eigenvectors_s: Tensor
    eigenvalues: Tensor

    def damped(self, factor: float) -> Tensor:
        """Λ + factor · mean(Λ)  [o, i]."""
        return self.eigenvalues + factor * self.eigenvalues.mean()

    def coordinates(self, gradient: Tensor, factor: float) -> Tensor:
        """C = (Q_Sᵀ G Q_A) / (Λ+λ)  [o, i]: the preconditioned gradient in the eigenbasis."""
        return enter(gradient, self.eigenvectors_a, self.eigenvectors_s) / \
            self.damped(factor)

    def leave_eigenbasis(self, coordinates: Tensor) -> Tensor:
        """Q_S C Q_Aᵀ  [o, i]."""
        return leave(coordinates, self.eigenvectors_a, self.eigenvectors_s)

    def effective_dimension(self, factor: float = DAMPING) -> float:
        """Σ Λ/(Λ+λ): how many directions the damping leaves."""
        return float((self.eigenvalues.double() / self.damped(factor).double()).sum())


Ekfac = Mapping[str, Curvature]  # by module name


def path_of(folder: Path, module: Module) -> Path:
    return folder / f"{module.name}.safetensors"


def save(folder: Path, module: Module, curvature: Curvature) -> FileFacts:
    """Write one module's curvature. Raises ResourceError."""
    return write_tensors(path_of(folder, module), {
        "eigenvectors_a": curvature.eigenvectors_a, "eigenvectors_s": curvature.eigenvectors_s,
        "eigenvalues": curvature.eigenvalues,
    })


def file_entries(module: Module, covariance_blocks: int) -> int:
    """How many numbers one module's curvature has, A and S in so many blocks."""
    o, i = module.shape
    return square_entries(module, covariance_blocks) + o * i


def file_bytes(module: Module, dtype: torch.dtype, covariance_blocks: int) -> int:
    """Bytes of one module's file, but for some digits of its header."""
    small = {name: torch.zeros(1, dtype=dtype)
             for name in ("eigenvectors_a", "eigenvectors_s", "eigenvalues")}
    entries = file_entries(module, covariance_blocks)
    return len(_header(small, {"digest": _digest(small, {})})) + entries * dtype.itemsize


class FiledEkfac(Mapping[str, Curvature]):
    """The curvature of some modules, each read from its file when it is asked for.

    `path` gives a module's file. On a CPU that is mapped, not copied. What was read is kept as long
    as all that is kept together takes at most `held` bytes [any number]; other modules are read
    again each time. Raises DamagedIndexError, at the first reading, for a missing or unreadable
    file, or one that is no curvature of A and S in so many blocks.
    """

    def __init__(
        self, path: Callable[[Module], Path], modules: Sequence[Module], device: torch.device,
        dtype: torch.dtype, covariance_blocks: int, held: int | None = None,
    ):
        self._path, self._device, self._dtype = path, device, dtype
        self._covariance_blocks = covariance_blocks
        self._modules = {module.name: module for module in modules}
        self._room = math.inf if held is None else held
        self._kept: dict[str, Curvature] = {}
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Curvature:
        if name in self._kept:
            return self._kept[name]
        module = self._modules[name]
        where = self._path(module)
        tensors = read_tensors(where, name not in self._checked)[0]
        if name not in self._checked:
            _check(module, self._covariance_blocks, tensors, where)
            self._checked.add(name)
        curvature = Curvature(
            **{name: tensor.to(self._device, self._dtype) for name, tensor in tensors.items()})
        size = file_entries(module, self._covariance_blocks) * self._dtype.itemsize
        if size <= self._room:
            self._room -= size
            self._kept[name] = curvature
        return curvature


def _check(module: Module, covariance_blocks: int, tensors: dict[str, Tensor], where: Path) -> None:
    """Raise DamagedIndexError for what is no curvature of the module."""
    o, i = module.shape
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"eigenvectors_a": (i, block_rows(i, covariance_blocks)),
                "eigenvectors_s": (o, block_rows(o, covariance_blocks)), "eigenvalues": (o, i)}
    if shapes != expected or not all(
            tensor.is_floating_point() and bool(tensor.isfinite().all())
            for tensor in tensors.values()) or bool((tensors["eigenvalues"] < 0).any()):
        raise DamagedIndexError(
            f"{where} holds {shapes}, expected finite {expected}. Copy the index again, or build "
            "again."
        )


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> FileFacts:
    """Write a safetensors file with its own digest. Raises ResourceError."""
    plain = {name: tensor.contiguous().cpu() for name, tensor in sorted(
        tensors.items(), key=lambda one: (-one[1].itemsize, one[0]))}  # so each lies aligned
    about = metadata or {}
    header = _header(plain, {**about, "digest": _digest(plain, about)})

    def write(file: Writer) -> None:
        file.write(header)
        for tensor in plain.values():
            file.write(_bytes(tensor))

    return atomic_write(path, write, len(header) + sum(one.nbytes for one in plain.values()))


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """What a safetensors file begins with. The library would need all of the file in memory, twice.
    """
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        content[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [first, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file alone, not checked. Raises DamagedIndexError."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedIndexError(f"{path} can't be read: {error}. Build again.") from error


def read_tensors(path: Path, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, mapped from it.

    Raises DamagedIndexError, where `check` is asked for also if it changed.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    digest = metadata.pop("digest", None)
    if check and digest != _digest(tensors, metadata):
        raise DamagedIndexError(
            f"{path} was changed after it was written (its own digest differs). Remove it, and run "
            "the build again."
        )
    return tensors, metadata
