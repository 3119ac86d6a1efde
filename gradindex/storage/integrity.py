"""The files of an index, handed out only when they are what the manifest says.

None of LMDB, FAISS, safetensors and NumPy notices changed content, and LMDB may end the process
over it. So each file is found without following a link, must be a regular file of the stated size,
and is digested before any of them sees it: when it is first used, and again where it was touched
since.
"""

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from gradindex.errors import DamagedIndexError
from gradindex.storage import layout
from gradindex.storage.files import FileFacts
from gradindex.storage.os_errors import OF_THE_PATH, refusals
from gradindex.storage.tensors import NOT_OURS, parse_tensors
from gradindex.terminal import shell_word

SMALL = 1 << 14  # bytes: files up to this size are digested on every opening
# NONBLOCK: opening a pipe that lies where a file should would otherwise wait for ever.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK = 1 << 22


class CheckedFiles:
    """Reads the files of the index in folder `root`, by the relative names in `facts`.

    Every method raises DamagedIndexError for a file that is missing, a link, anything but a regular
    file, of another size, or of another content than `facts` says; and ResourceError where the
    system refuses to open or read it, which says nothing about the file.
    """

    def __init__(self, root: Path, facts: Mapping[str, FileFacts]):
        self.root = root
        self._facts = facts
        # name → what fstat said when it was last digested, and when it was mapped
        self._known: dict[str, tuple[int, ...]] = {}
        self._mapped: dict[str, tuple[int, ...]] = {}

    def check(self, name: str, digest: bool = False) -> None:
        """Check that a file is there and its size, and its content if it is small or `digest`."""
        descriptor = self._open(name)
        try:
            if digest or self._facts[name].size <= SMALL:
                self._digest(name, descriptor)
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        """A file's content, checked."""
        descriptor = self._open(name)
        try:
            content = _read_all(descriptor, self.root / name, self._facts[name].size)
            self._compare(name, len(content), hashlib.sha256(content).hexdigest())
        finally:
            os.close(descriptor)
        return content

    def map(self, name: str) -> mmap.mmap:
        """A file's content, checked and mapped: for files that memory doesn't hold."""
        descriptor = self._open(name)
        try:
            identity = _identity(descriptor)
            self._digest(name, descriptor)
            with refusals(self.root / name, "mapped"):
                mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            self._mapped[name] = identity
        finally:
            os.close(descriptor)
        mapping.madvise(mmap.MADV_SEQUENTIAL)  # scans read ahead
        return mapping

    def tensors(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a safetensors file on a device, read once and checked on the way."""
        path, descriptor = self.root / name, self._open(name)
        try:
            identity = _identity(descriptor)
            digest = None if self._known.get(name) == identity else hashlib.sha256()
            try:
                # what the system refuses says nothing about the file, so that is told first, inside
                with refusals(path), os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
                    found, _ = parse_tensors(file, digest.update if digest else bool, device)
            except NOT_OURS as error:
                os.lseek(descriptor, 0, os.SEEK_SET)
                self._digest(name, descriptor)  # which says so where it was changed
                raise DamagedIndexError(f"{path} can't be read: {str(error)[:120]}. Copy the index "
                                        "again, or build again.") from None
            if digest is not None:
                self._compare(name, self._facts[name].size, digest.hexdigest())
                self._known[name] = identity
        finally:
            os.close(descriptor)
        return found

    def check_mapped(self) -> None:
        """Check that no mapped file was touched since: one that was cut ends who reads it."""
        # A signal (SIGBUS) that no Python code can answer. A file that is cut within the scan that
        # follows still brings it; nothing less than a copy in memory would help against that.
        for name, identity in self._mapped.items():
            descriptor = self._open(name)
            try:
                if _identity(descriptor) != identity:
                    self._digest(name, descriptor)
                    self._mapped[name] = identity
            finally:
                os.close(descriptor)

    def path(self, name: str, check: Callable[[Path], None] | None = None) -> Path:
        """The path of a checked file, for libraries that open files themselves.

        `check` is called with the path where the content is new: at first, or touched since.
        """
        descriptor = self._open(name)
        try:
            identity = _identity(descriptor)
            if self._known.get(name) != identity:
                self._digest(name, descriptor)
                if check is not None:
                    check(self.root / name)
                self._known[name] = identity
        finally:
            os.close(descriptor)
        return self.root / name

    def _open(self, name: str) -> int:
        """A descriptor of a file of the right size. Whoever asks for it closes it."""
        descriptor = open_inside(self.root, name)
        size, expected = os.fstat(descriptor).st_size, self._facts[name].size
        if size != expected:
            os.close(descriptor)
            raise self.damaged(name, f"has {size:,} bytes, expected {expected:,}")
        return descriptor

    def _digest(self, name: str, descriptor: int) -> None:
        """Check a file's content, some of it in memory at a time."""
        digest, size = hashlib.sha256(), 0
        with refusals(self.root / name), os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        self._compare(name, size, digest.hexdigest())

    def _compare(self, name: str, size: int, digest: str) -> None:
        if (size, digest) != (self._facts[name].size, self._facts[name].sha256):
            raise self.damaged(name, "was changed after it was written (its SHA-256 differs)")

    def damaged(self, name: str, what: str) -> DamagedIndexError:
        """The error for the file of this name: "… `what`", and what to do."""
        return damaged(self.root, name, what)


def damaged(root: Path, name: str, what: str) -> DamagedIndexError:
    """The error for file `name` of the index in `root`: "… `what`", and what to do."""
    # Without one segment the rest can be searched; without another file nothing can.
    inside = PurePosixPath(name).parts[0] == layout.SEGMENTS
    rest = ", or search the other segments with --allow-damaged" if inside else ""
    wrong = f"{root / name} {what}"
    return DamagedIndexError(
        f"{wrong}. `gradindex verify {shell_word(root)}` says all that is damaged and what to do; "
        f"copying the index again may mend it{rest}.", wrong,
    )


def refuse_links(root: Path) -> None:
    """Raise DamagedIndexError where anything that is written to or removed below `root` is a link.
    """
    # An index from a stranger could lead its reader's appends and deletions to files of the
    # reader's that have nothing to do with it. An index holds no links.
    for folder in (root, root / layout.SEGMENTS, root / layout.DELETED, root / layout.CURVATURE,
                   root / layout.CURVATURE_PARTIAL, root / layout.REFERENCE_PARTIAL,
                   root / layout.REFERENCE_PARTIAL / layout.SEGMENTS,
                   *root.glob(f"{layout.SEGMENTS}/*{layout.PARTIAL}"),
                   *root.glob(f"{layout.REFERENCE_PARTIAL}/{layout.SEGMENTS}/*{layout.PARTIAL}")):
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise damaged(root, str(Path(entry.path).relative_to(root)),
                                  "is a link; an index holds none")


def read_inside(root: Path, name: str, most: int) -> bytes:
    """The content of the regular file `name` below `root`, found without following a link.

    Raises DamagedIndexError for a file that isn't there or has more than `most` bytes,
    ResourceError where the system refuses to read it.
    """
    descriptor = open_inside(root, name)
    try:
        # by its size and never by the bound: memory is taken for as many bytes as are asked for
        size = os.fstat(descriptor).st_size
        content = _read_all(descriptor, root / name, min(size, most))
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise damaged(root, name, f"is larger than {most:,} bytes")
    return content


def _read_all(descriptor: int, path: Path, size: int) -> bytes:
    """The content of an open file of `size` bytes; a byte more of one that has grown since."""
    with refusals(path), os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
        pieces, left = [], size + 1
        while left and (piece := file.read(left)):  # a call reads 2 GB at most
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# a link, in the middle of a path or at its end; a pipe's or a socket's end; a name no file can have
_OF_THE_NAME = (*OF_THE_PATH, errno.ENXIO, errno.ENAMETOOLONG)


def open_inside(root: Path, name: str) -> int:
    """A descriptor of the regular file `name` below `root`; no link is followed on the way.

    Raises DamagedIndexError where there is none, or something else, ResourceError where the system
    refuses to open it.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise damaged(root, layout.MANIFEST, f"names {name!r}, which lies outside the index")
    try:
        with refusals(root):
            folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Folder by folder from descriptors: O_NOFOLLOW minds only the last part of a path.
            for part in parts[:-1]:
                inner = os.open(part, _READ | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            descriptor = os.open(parts[-1], _READ, dir_fd=folder)
        finally:
            os.close(folder)
    except FileNotFoundError:
        raise damaged(root, name, "is missing") from None
    except OSError as error:
        if error.errno not in _OF_THE_NAME:
            with refusals(root / name):
                raise
        raise damaged(root, name, f"can't be opened without following links ({error.strerror})"
                      ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise damaged(root, name, "is not a regular file")
    return descriptor


def _identity(descriptor: int) -> tuple[int, ...]:
    """What changes when a file does. The time of change can't be set back, as that of writing can.
    """
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
