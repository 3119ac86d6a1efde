"""Files of tensors with their own digest (safetensors, through its only door)."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from gradindex.errors import DamagedIndexError
from gradindex.storage.files import FileFacts, Writer, atomic_write

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> FileFacts:
    """Write a safetensors file with its own digest. Raises ResourceError."""
    # By falling size of their numbers, so that each tensor lies aligned in the mapped file.
    plain = {name: tensor.contiguous().cpu() for name, tensor in sorted(
        tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))}
    others = metadata or {}
    header = _header(plain, {**others, "digest": _digest(plain, others)})

    def write(file: Writer) -> None:
        file.write(header)
        for tensor in plain.values():
            file.write(_bytes(tensor))

    return atomic_write(path, write, len(header) + sum(tensor.nbytes for tensor in plain.values()))


def header_bytes(tensors: dict[str, Tensor]) -> int:
    """The bytes of the header of a file of such tensors, but for some digits of its offsets."""
    return len(_header(tensors, {"digest": _digest(tensors, {})}))


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """What a safetensors file of these tensors begins with."""
    # Written here, because the library would need all of the file in memory, twice.
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
    return tensor.reshape(-1).view(torch.uint8).numpy().data  # NumPy has no bfloat16


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 in hex over metadata, and over every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without a look at its tensors. Raises DamagedIndexError.
    """
    with _open(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedIndexError(f"{path} can't be read: {error}. Build again.") from error


def read_tensors(path: Path, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, mapped, and the metadata of a safetensors file.

    Raises DamagedIndexError for a file that can't be read and, with `check`, for one that was
    changed after it was written.
    """
    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    digest = metadata.pop("digest", None)
    if check and digest != _digest(tensors, metadata):
        raise DamagedIndexError(
            f"{path} was changed after it was written (its own digest differs). Remove it, and run "
            "the build again."
        )
    return tensors, metadata
