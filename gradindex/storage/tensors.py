"""Files of tensors with their own digest, in the safetensors format.

They are written and read here and not by its library: that needs all of a file in memory twice, or
maps it, and a mapped file that is cut while it is used ends the process (SIGBUS).
"""

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradindex.errors import DamagedIndexError
from gradindex.memory import in_threads
from gradindex.storage.files import (
    FileFacts,
    Writer,
    atomic_write,
    atomic_write_undigested,
)
from gradindex.storage.os_errors import refusals

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}
HOST = torch.device("cpu")
PIECE = 1 << 24  # bytes that are read, digested and moved at a time
_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with its own digest. Raises ResourceError."""
    plain, others = _plain(tensors), metadata or {}
    header = _header(plain, {**others, "digest": _digest(plain, others)})
    atomic_write_undigested(path, partial(_write, header, plain), _size(header, plain))


def write_vouched(path: Path, tensors: dict[str, Tensor]) -> FileFacts:
    """Write a safetensors file, and return its facts, which are to vouch for it.

    It has no digest of its own: it is digested once, as it is written. Raises ResourceError.
    """
    plain = _plain(tensors)
    header = _header(plain, {})
    return atomic_write(path, partial(_write, header, plain), _size(header, plain))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host as they are written: by falling size of their numbers."""
    # so that each tensor lies aligned for those who map the file
    return {name: tensor.contiguous().cpu() for name, tensor in sorted(
        tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))}


def _size(header: bytes, tensors: dict[str, Tensor]) -> int:
    return len(header) + sum(tensor.nbytes for tensor in tensors.values())


def _write(header: bytes, tensors: dict[str, Tensor], file: Writer) -> None:
    file.write(header)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def header_bytes(tensors: dict[str, Tensor]) -> int:
    """The bytes of the header of a vouched file of such tensors, but for some digits of offsets."""
    return len(_header(tensors, {}))


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
    """SHA-256 in hex over metadata, and over every tensor's name, dtype, shape and own SHA-256."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    names = sorted(tensors)

    def own(name: str) -> str:
        return hashlib.sha256(_bytes(tensors[name])).hexdigest()

    # each by itself, so that several threads can: of a large model this is most of a commit
    digests = in_threads(own, names, torch.get_num_threads())
    for name, found in zip(names, digests, strict=True):
        digest.update(
            f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} {found}\n".encode())
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
    # what the system refuses says nothing about the file, so that is told first, inside
    with _unreadable(path), refusals(path), path.open("rb", buffering=0) as file:
        return parse_tensors(file) if with_tensors else ({}, _parse_header(file, _unheard)[1])


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Turn what comes of a file that isn't one of ours into DamagedIndexError."""
    try:
        yield
    except NOT_OURS as error:
        raise DamagedIndexError(
            f"{path} can't be read: {str(error)[:120]}. Build again.") from error


# whatever the bytes of a file are, these are all that comes of them
NOT_OURS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _unheard(_: memoryview | bytes) -> None: ...


def parse_tensors(
    file: io.RawIOBase | io.FileIO, seen: Callable[[memoryview | bytes], object] = _unheard,
    device: torch.device = HOST,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an open file, on a device, and its metadata; read once.

    `seen` is called with every piece of the file, in order. Raises one of NOT_OURS for what is no
    such file.
    """
    tensors, metadata = _parse_header(file, seen)
    return {name: _read_tensor(file, dtype, shape, seen, device)
            for name, (dtype, shape) in tensors.items()}, metadata


def _parse_header(
    file: io.RawIOBase | io.FileIO, seen: Callable[[memoryview | bytes], object]
) -> tuple[dict[str, tuple[torch.dtype, list[int]]], dict[str, str]]:
    """Each tensor's dtype and shape, in order, and the metadata. Raises ValueError among others.
    """
    # Nothing is believed: what the tensors will take in memory is what the file has.
    size = os.fstat(file.fileno()).st_size
    begin = _read_exactly(file, np.empty(8, dtype=np.uint8))
    seen(begin.data)
    length = int.from_bytes(begin.tobytes(), "little")
    if length > size - 8:
        raise ValueError(f"its header would have {length:,} of {size:,} bytes")
    header = _read_exactly(file, np.empty(length, dtype=np.uint8))
    seen(header.data)
    content = json.loads(header.tobytes())
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


def _read_tensor(
    file: io.RawIOBase | io.FileIO, dtype: torch.dtype, shape: list[int],
    seen: Callable[[memoryview | bytes], object], device: torch.device,
) -> Tensor:
    """The next tensor of a file. Raises ValueError where the file ends before it."""
    if 0 in shape:  # NumPy's has no strides that PyTorch takes
        return torch.empty(shape, dtype=dtype, device=device)
    count = dtype.itemsize * math.prod(shape)
    if device.type == "cpu":
        # NumPy's memory: where there is none left it says so by MemoryError, PyTorch in words alone
        octets = np.empty(count, dtype=np.uint8)
        for first in range(0, count, PIECE):  # digested while it is in the cache
            seen(_read_exactly(file, octets[first : first + PIECE]).data)
        return torch.from_numpy(octets).view(dtype).reshape(shape)
    # Two pieces of pinned memory take turns: one is read and digested while the other is copied.
    target = torch.empty(count, dtype=torch.uint8, device=device)
    pieces = [torch.empty(min(count, PIECE), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copied: list[torch.cuda.Event | None] = [None, None]
    for turn, first in enumerate(range(0, count, PIECE)):
        if (event := copied[turn % 2]) is not None:
            event.synchronize()
        piece = pieces[turn % 2][: min(PIECE, count - first)]
        seen(_read_exactly(file, piece.numpy()).data)
        target[first : first + len(piece)].copy_(piece, non_blocking=True)
        event = copied[turn % 2] = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
    return target.view(dtype).reshape(shape)


def _read_exactly(file: io.RawIOBase | io.FileIO, target: np.ndarray) -> np.ndarray:
    """Fill an array of bytes from a file. Raises ValueError where the file ends before."""
    done = 0
    while done < len(target):  # a call reads 2 GB at most
        got = file.readinto(target[done:].data)
        if not got:
            raise ValueError("it was cut while it was read")
        done += got
    return target
