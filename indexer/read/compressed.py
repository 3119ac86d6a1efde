"""Files that may be compressed, told by their first bytes and not by their names."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow

from gradindex.errors import InputError

ENDINGS = (".gz", ".zst", ".zstd", ".bz2", ".xz")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz",
          **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)}}

# what reading can raise; LZMAError and zlib.error are no OSErrors
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)


def compression(path: Path) -> str | None:
    """gzip, zstd, bz2 or xz where a file's first bytes say so, else None. Raises OSError."""
    with path.open("rb") as file:
        first = file.read(10)
    return next((name for magic, name in _MAGIC.items() if first.startswith(magic)), None)


def bare_name(name: str) -> str:
    """A file's name in lower case, without the ending that says how it is compressed.

    >>> bare_name("C4.JSON.gz"), bare_name("notes.txt")
    ('c4.json', 'notes.txt')
    """
    name = name.lower()
    return name[: name.rindex(".")] if name.endswith(ENDINGS) else name


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's content, decompressed as it is read. Raises InputError where it can't be."""
    try:
        kind = compression(path)
        with _open(path, kind) as file:
            yield file
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path} can't be read: {error.strerror}. See that it is there and may be "
                         "read.") from None
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged, cut short or can't be read: {error}. Write it "
                         "again.") from None


def _open(path: Path, kind: str | None) -> BinaryIO:
    if kind == "gzip":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if kind == "bz2":
        return bz2.open(path, "rb")  # type: ignore[return-value]
    if kind == "xz":
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if kind == "zstd":
        # Buffered, since an Arrow stream has no readline with a limit.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")
