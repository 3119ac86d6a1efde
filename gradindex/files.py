"""How bytes reach the disk: written beside, synced, renamed; and how they are recognised again.

A file of an index is either absent or whole. `atomic_write` is the only writer, so a process
killed at any moment leaves at worst a `.tmp` file that nobody reads.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from gradindex.errors import ResourceError


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content` (bytes, or a function that writes to the open file) as `path`, or nothing.

    Raises ResourceError when the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def rename_folder(partial: Path, final: Path) -> None:
    """Seal a folder: its entries are synced, then it gets its final name."""
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> Exception:
    """ResourceError if the disk (or quota) is full, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk is full: {path} could not be written. Free some space and run the same "
            "command again; it goes on from the last committed part."
        )
    return error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
