"""How bytes reach the disk, and how a file's content is recognised.

A file of an index is either absent or whole. It is written under another name, synced, measured and
renamed by `atomic_write`, the only writer of ours (LMDB writes its own file, which goes the same
way through `adopt`). So a process killed at any moment leaves at worst a `.tmp` file that nobody
reads.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gradindex.errors import ResourceError
from gradindex.storage.os_errors import refusal, refusals

TEMPORARY = ".tmp"
SETTLED = 1_000_000_000  # ns since a file's last change: before, its digest isn't remembered


@dataclass(frozen=True)
class FileFacts:
    """What a file is known by: its size in bytes, and the SHA-256 of its content in hex."""

    size: int
    sha256: str


def atomic_write(
    path: Path, content: bytes | Callable[["Writer"], object], needed: int | None = None
) -> FileFacts:
    """Write `content` as `path`, all of it or nothing.

    `content` is bytes, or a function that is called with a Writer; `needed` is then its size in
    bytes, for the error's message. Raises ResourceError where the system refuses it.
    """
    return _write(path, content, needed, digest=True)


def atomic_write_undigested(
    path: Path, content: Callable[["Writer"], object], needed: int | None = None
) -> None:
    """As `atomic_write`, for a file with a digest of its own inside: it isn't digested again."""
    _write(path, content, needed, digest=False)


def _write(
    path: Path, content: bytes | Callable[["Writer"], object], needed: int | None, digest: bool
) -> FileFacts:
    temporary = path.with_name(path.name + TEMPORARY)
    needed = len(content) if isinstance(content, bytes) else needed
    with written(path, needed, temporary):
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that lies there
            writer = Writer(file, digest)
            if isinstance(content, bytes):
                writer.write(content)
            else:
                content(writer)
            file.flush()
        return adopt(temporary, path, writer.facts)


class Writer:
    """A file being written. Its `facts` are those of what it was given, not of what arrived.

    Without `digest` they have no SHA-256.
    """

    def __init__(self, file: BinaryIO, digest: bool):
        self._file, self._size = file, 0
        self._digest = hashlib.sha256() if digest else None

    def write(self, content: bytes | memoryview) -> int:
        """Write more, and return how many bytes that were."""
        self._file.write(content)
        if self._digest is not None:
            self._digest.update(content)
        self._size += len(content)
        return len(content)

    @property
    def facts(self) -> FileFacts:
        """The facts of everything written so far."""
        return FileFacts(self._size, "" if self._digest is None else self._digest.hexdigest())


def adopt(temporary: Path, path: Path, facts: FileFacts | None = None) -> FileFacts:
    """Sync a written file, check that all of it is there, and give it its name.

    `facts` are those of what was written [read back from the file]. Raises OSError.
    """
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        facts = facts or facts_of(temporary)
        # Some writers report success on a full disk; the size tells.
        if (size := os.fstat(descriptor).st_size) != facts.size:
            raise OSError(errno.EIO, f"{size} of {facts.size} bytes arrived")
    finally:
        os.close(descriptor)
    # Renamed after the sync, or a power cut could leave the name with an empty file behind it; and
    # the folder synced after that, or the name itself could be lost.
    temporary.replace(path)
    sync_folder(path.parent)
    return facts


def make_folder(folder: Path) -> None:
    """Make a folder and sync the one that holds it. Raises ResourceError."""
    with refusals(folder, "written"):
        folder.mkdir()
        sync_folder(folder.parent)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it where they are missing. Raises ResourceError."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        make_folder(parent)


def rename_folder(partial: Path, final: Path) -> None:
    """Seal a folder: its entries are synced, then it gets its final name. Raises ResourceError."""
    with refusals(final, "written"):
        sync_folder(partial)
        partial.rename(final)
        sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written(path: Path, needed: int | None, temporary: Path) -> Iterator[None]:
    """Turn what the system refuses, while `path` is written as `temporary`, into ResourceError.

    `needed` bytes are named in it; the file `temporary` is removed.
    """
    try:
        yield
    except (OSError, ResourceError) as error:
        # First of all, to give its space back: on a full disk it is what others now lack. That it
        # can't be removed must not hide why.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        told = refusal(error, path, "written", needed) if isinstance(error, OSError) else None
        if told is not None:
            raise told from error
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def facts_of(path: Path) -> FileFacts:
    """The facts of a file, read from it."""
    return FileFacts(path.stat().st_size, sha256(path))


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def digest_of_files(files: Iterable[Path], lines: Iterable[str] = ()) -> str:
    """SHA-256 in hex over the names and SHA-256s of some files, and over further `lines`."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.name) + f" {_cached_sha256(file)}\n".encode())
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _cached_sha256(file: Path) -> str:
    """A file's SHA-256, remembered by its path and all that changes with its content."""
    # Every search digests the model's weights, and 14 GB of them take 10 s.
    home = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    cache = home / "gradindex" / "digests.json"
    key, known = _state(file), _known_digests(cache)
    if key not in known:
        known[key] = sha256(file)
        # a file that changes now could do so again within a tick of the disk's clock
        settled = abs(time.time_ns() - file.stat().st_ctime_ns) > SETTLED and _state(file) == key
        with contextlib.suppress(OSError, ResourceError):  # a read-only home only costs time
            if settled:
                cache.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(cache, json.dumps(known, indent=0).encode())
    return known[key]


def _state(file: Path) -> str:
    """Where a file is, and all that changes with its content."""
    facts = file.stat()
    # size and mtime can be put back (`cp -p`, `touch -r`); ctime can't
    return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} " \
           f"{facts.st_dev} {facts.st_ino}"


def _known_digests(cache: Path) -> dict[str, str]:
    """What the cache of digests holds; nothing where it isn't such a file."""
    try:
        content = json.loads(cache.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: digest for key, digest in content.items() if isinstance(digest, str)
            and re.fullmatch("[0-9a-f]{64}", digest)} if isinstance(content, dict) else {}


def _home() -> Path:
    """The user's own folder; for a user without one, a place where nothing can be."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a number that belongs to no user, as in containers
        return Path(os.devnull)
