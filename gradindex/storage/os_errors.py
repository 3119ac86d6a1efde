"""What the operating system refuses, in true sentences: of the machine, and not of the index.

A full disk, a missing right or a limit says nothing about the files: what is told here is a
ResourceError, never damage. Whoever reads or writes files of an index does so within `refusals`.
"""

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from gradindex.errors import ResourceError
from gradindex.progress import size

FULL = (errno.ENOSPC, errno.EDQUOT)
# of a path, not of the machine: no such file, a link, a folder in the place of a file
OF_THE_PATH = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
               errno.ENOTEMPTY)

_MAPPED = (
    "its file system doesn't map files into memory, which LMDB needs", "Copy the index to a disk "
    "of this machine (some network, FUSE and 9p mounts can't do it), and use it there.")
_RIGHT = ("this user has no right to it", "Run as its owner, or change the rights of the file and "
          "of the folders above it (`ls -ld` shows them).")
_DISK = ("the disk failed, or the mount that it lies on", "Check these (`dmesg` may say more), "
         "then {again}")
# What is wrong, and what to do.
_WORDS: dict[int, tuple[str, str]] = {
    errno.EACCES: _RIGHT, errno.EPERM: _RIGHT,
    errno.EROFS: ("its file system is mounted read-only", "Mount it for writing, or use a folder "
                  "elsewhere."),
    errno.ENODEV: _MAPPED,
    errno.EIO: _DISK, errno.ENXIO: _DISK, errno.ENOTCONN: _DISK, errno.EHOSTDOWN: _DISK,
    errno.ETIMEDOUT: _DISK, errno.EHOSTUNREACH: _DISK,
    errno.ESTALE: ("the server of its file system no longer knows it", "Mount the file system "
                   "again, then {again}"),
    errno.ETXTBSY: ("it is in use as a program or as swap space", "End what uses it, or use a "
                    "folder elsewhere."),
    errno.EBUSY: ("another process or the system holds it", "End what uses it, then {again}"),
    errno.ENAMETOOLONG: ("its path is too long for the system", "Use a folder with a shorter "
                         "path."),
    errno.ENOLCK: ("the system has no lock left", "End processes that hold many, then {again}"),
    errno.EMLINK: ("the folder above it has too many entries", "Use a folder elsewhere."),
    errno.ENFILE: ("as many files are open on this machine as it allows", "End processes that "
                   "hold many, then {again}"),
}
# where a file system maps no files into memory
NO_MAPPING = (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def refusal(
    error: OSError, path: Path, doing: str = "read", needed: int | None = None
) -> ResourceError | None:
    """The ResourceError that an OSError stands for; None where it says something of the path.

    It happened while `path` was `doing` ("read", "written", "mapped", "used"), for which `needed`
    bytes were needed.

    >>> error = refusal(OSError(errno.EROFS, "Read-only file system"), Path("/x/y"), "written")
    >>> print(error)  # doctest: +NORMALIZE_WHITESPACE
    /x/y could not be written: its file system is mounted read-only (Read-only file system).
    Nothing committed before was touched. Mount it for writing, or use a folder elsewhere.
    """
    code = error.errno
    if code is None or code in OF_THE_PATH:
        return None
    reason = error.strerror or os.strerror(code)
    reading = doing in ("read", "mapped")
    again = "run the same command again" + (
        "." if reading else "; it goes on from the last committed part.")
    could = f"{path} could not be {doing}"
    if code in FULL:
        needs = "" if needed is None else f", which needs {needed:,} bytes"
        free = "" if path.is_char_device() else f"{free_on(path)} free; "
        full = "the disk is full" if code == errno.ENOSPC else "your quota of the disk is used up"
        return ResourceError(f"{full}: {could}{needs} ({free}{reason}). Free some space, "
                             f"then {again}")
    wrong, do = _MAPPED if doing == "mapped" and code in NO_MAPPING else \
        _limit(code, needed) or _WORDS.get(code) or ("the system refused it", "See to that, then "
                                                     "{again}")
    kept = "Nothing says that it is damaged." if reading else \
        "Nothing committed before was touched."
    return ResourceError(f"{could}: {wrong} ({reason}). {kept} {do.format(again=again)}")


def _limit(code: int, needed: int | None) -> tuple[str, str] | None:
    """What is said of a limit of this process that was reached; None for other errors."""
    if code == errno.ENOMEM:
        return f"memory ran out; {memory_limit()}", \
            "Allow more, end other processes, or use a machine with more."
    if code == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process has as many files open as it may, {limit}", \
            f"Allow more (`ulimit -n {max(1024, 4 * limit)}`), then {{again}}"
    if code == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        most = "the file system allows" if limit == resource.RLIM_INFINITY else \
            f"this process may write, {limit:,} bytes (`ulimit -f`)"
        needs = "" if needed is None else f" of {needed:,} bytes"
        return f"a file{needs} is larger than {most}", "Allow larger files, then {again}"
    return None


def memory_limit() -> str:
    """What bounds this process's memory, in words."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "the bound is the machine's, or its container's" if limit == resource.RLIM_INFINITY \
        else f"the bound of its address space is {size(limit)} (`ulimit -v`)"


def free_on(path: Path) -> str:
    """How much space is left on the disk of `path`, in words."""
    try:
        return size(shutil.disk_usage(path.parent).free)
    except OSError:
        return "unknown bytes"


@contextlib.contextmanager
def refusals(path: Path, doing: str = "read") -> Iterator[None]:
    """Turn what the system refuses while `path` is `doing` into ResourceError.

    Errors that say something of a path (no such file, a link) stay as they are.
    """
    try:
        yield
    except OSError as error:
        if (told := refusal(error, path, doing)) is not None:
            raise told from error
        raise
    except MemoryError as error:
        raise memory_ran_out(path, doing) from error


# of a disk that is written to: such errors need not name a file
OF_DISKS = (*FULL, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


@contextlib.contextmanager
def disk_errors(index: Path) -> Iterator[None]:
    """Turn what the system refuses a whole command that writes to `index` into ResourceError.

    Errors that may have nothing to do with a file, as those of a network, stay as they are.
    """
    try:
        yield
    except OSError as error:
        path = index if error.filename is None else Path(os.fsdecode(error.filename))
        known = error.errno in OF_DISKS if error.filename is None else is_known(error)
        if known and (told := refusal(error, path, "used")) is not None:
            raise told from error
        raise


def is_known(error: OSError) -> bool:
    """Whether an error about a file is one that has words of its own here."""
    code = error.errno
    return code is not None and (code in FULL or code in _WORDS or _limit(code, None) is not None)


def memory_ran_out(path: Path, doing: str = "read") -> ResourceError:
    """The error for memory that ran out while `path` was `doing`."""
    told = refusal(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), path, doing)
    assert told is not None
    return told
