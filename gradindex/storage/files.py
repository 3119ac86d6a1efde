"""How bytes reach the disk: written beside, synced, measured, renamed; and how they are recognised.

A file of an index is either absent or whole. `atomic_write` is the only writer of ours (LMDB writes
its own file, which goes the same way through `adopt`), so a process killed at any moment leaves at
worst a `.tmp` file that nobody reads.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gradindex.errors import ResourceError
from gradindex.progress import size as readable

TEMPORARY = ".tmp"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class FileFacts:
    """What a file's content is: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


def atomic_write(
    path: Path, content: bytes | Callable[["Writer"], object], needed: int | None = None
) -> FileFacts:
    """Write `content` as `path`, or nothing: bytes, or a function that is handed a Writer.

    `needed` is its size in bytes, for the error's sake, where a function writes it.
    Raises ResourceError when the disk is full or fails.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    needed = len(content) if isinstance(content, bytes) else needed
    with disk_errors(path, needed, temporary):
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that lies there
            writer = Writer(file)
            if isinstance(content, bytes):
                writer.write(content)
            else:
                content(writer)
            file.flush()
        return adopt(temporary, path, writer.facts)


class Writer:
    """A file being written, which knows the facts of what it was given."""

    def __init__(self, file: BinaryIO):
        self._file, self._size, self._digest = file, 0, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)
        return len(content)

    @property
    def facts(self) -> FileFacts:
        return FileFacts(self._size, self._digest.hexdigest())


def adopt(temporary: Path, path: Path, facts: FileFacts | None = None) -> FileFacts:
    """Sync a written file, check that all of it is there, and give it its name.

    `facts` are what was written; without them they are read back. Raises OSError.
    """
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        facts = facts or facts_of(temporary)
        if (found := os.fstat(descriptor).st_size) != facts.size:
            raise OSError(errno.EIO, f"{found} of {facts.size} bytes arrived")
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)
    return facts


def make_folder(folder: Path) -> None:
    """Make a folder and sync the one that holds it. Raises ResourceError."""
    with disk_errors(folder):
        folder.mkdir()
        sync_folder(folder.parent)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it where they are missing. Raises ResourceError."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        make_folder(one)


def rename_folder(partial: Path, final: Path) -> None:
    """Seal a folder: its entries are synced, then it gets its final name. Raises ResourceError."""
    with disk_errors(final):
        sync_folder(partial)
        partial.rename(final)
        sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(
    path: Path, needed: int | None = None, temporary: Path | None = None
) -> Iterator[None]:
    """Say what could not be written, and what that needs; a failed temporary file is removed.

    Raises ResourceError where the disk is full or fails, other errors as they are.
    """
    try:
        yield
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if error.errno in FULL:
            needs = "" if needed is None else f", which needs {needed:,} bytes"
            raise ResourceError(
                f"the disk is full: {path} could not be written{needs} ({_free(path)} free; "
                f"{os.strerror(error.errno)}). Free some space and run the same command again; it "
                "goes on from the last committed part."
            ) from error
        if error.errno in BROKEN:
            raise ResourceError(
                f"the disk failed: {path} could not be written ({error.strerror}). Nothing "
                "committed before was touched. Check the disk, then run the same command again."
            ) from error
        raise


def _free(path: Path) -> str:
    try:
        return readable(shutil.disk_usage(path.parent).free)
    except OSError:
        return "unknown bytes"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def facts_of(path: Path) -> FileFacts:
    """A file's facts, read from it."""
    return FileFacts(path.stat().st_size, sha256(path))


def digest_of_files(files: Iterable[Path], also: Iterable[str] = ()) -> str:
    """SHA-256 over the files' names and own SHA-256s, and over the lines of `also`."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_cached_sha256(file)}\n".encode())
    for line in also:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _cached_sha256(file: Path) -> str:
    """A file's SHA-256, remembered by path, size, time and inode (a 14 GB model takes 10 s)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "gradindex" / "digests.json"
    facts = file.stat()
    key = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
    if key not in known:
        known[key] = sha256(file)
        with contextlib.suppress(OSError, ResourceError):  # a read-only home only costs time
            cache.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(cache, json.dumps(known, indent=0).encode())
    return known[key]
