"""Files of tensors with their own digest, in the safetensors format.

They are written and read here and not by its library: that needs all of a file in memory twice, or
maps it, and a mapped file that is cut while it is used ends the process (SIGBUS).
"""

import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradindex.errors import DamagedIndexError
from gradindex.storage.files import FileFacts, Writer, atomic_write
from gradindex.storage.os_errors import refusals

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}
_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> FileFacts:
    """Write a safetensors file with its own digest. Raises ResourceError."""
    # By falling size of their numbers, so that each tensor lies aligned for those who map the file.
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
    """The metadata of a file, without a look at its tensors.

    Raises DamagedIndexError, and ResourceError where the system refuses to read it.
    """
    return _read(path, with_tensors=False)[1]


def read_tensors(path: Path, check: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in memory of their own, and the metadata of a file.

    Raises DamagedIndexError for a file that can't be read and, with `check`, for one that was
    changed after it was written; ResourceError where the system refuses to read it.
    """
    tensors, metadata = _read(path)
    digest = metadata.pop("digest", None)
    if check and digest != _digest(tensors, metadata):
        raise DamagedIndexError(
            f"{path} was changed after it was written (its own digest differs). Remove it, and run "
            "the build again."
        )
    return tensors, metadata


def _read(path: Path, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors [none] and the metadata of a file."""
    try:
        with refusals(path), path.open("rb") as file:
            tensors, metadata = _parse_header(file)
            return {name: _read_tensor(file, dtype, shape)
                    for name, (dtype, shape) in tensors.items() if with_tensors}, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # whatever the bytes are, these are all that comes of them
        raise DamagedIndexError(
            f"{path} can't be read: {str(error)[:120]}. Build again.") from error


def _parse_header(
    file: io.BufferedReader
) -> tuple[dict[str, tuple[torch.dtype, list[int]]], dict[str, str]]:
    """Each tensor's dtype and shape, in order, and the metadata. Raises ValueError among others.
    """
    # Nothing is believed: what the tensors will take in memory is what the file has.
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"its header would have {length:,} of {size:,} bytes")
    content = json.loads(file.read(length))
    metadata = content.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no text")
    tensors: dict[str, tuple[torch.dtype, list[int]]] = {}
    end = 0
    for name, about in sorted(content.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape = _OF_NAME[about["dtype"]], about["shape"]
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"{name} has the shape {shape}")
        first, end = end, end + dtype.itemsize * math.prod(shape)
        if about["data_offsets"] != [first, end]:
            raise ValueError(f"{name} is not where the tensor before it ends")
        tensors[name] = dtype, shape
    if 8 + length + end != size:
        raise ValueError(f"it has {size:,} bytes, expected {8 + length + end:,}")
    return tensors, metadata


def _read_tensor(file: io.BufferedReader, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The next tensor of a file. Raises ValueError where the file ends before it."""
    if 0 in shape:  # NumPy's has no strides that PyTorch takes
        return torch.empty(shape, dtype=dtype)
    # NumPy's memory: where there is none left it says so by MemoryError, PyTorch in words alone
    octets = np.empty(dtype.itemsize * math.prod(shape), dtype=np.uint8)
    if file.readinto(octets.data) != len(octets):
        raise ValueError("it was cut while it was read")
    return torch.from_numpy(octets).view(dtype).reshape(shape)
