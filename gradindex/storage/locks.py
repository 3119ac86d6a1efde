"""Locks on an index: it has one writer at a time, and readers keep the files that they read.

A writer holds an exclusive `flock` on the index folder; a reader holds a shared one on its
`segments` folder. The shards of a build share the lock on the index folder, and each holds an
exclusive one on a file of its own. The kernel releases locks when a process ends, however it ends.
A writer never waits for readers: it adds files and replaces the manifest. Only files that no
manifest lists any more wait until no reader is left (`free_of_readers`) before they are removed.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from gradindex.errors import GradindexError
from gradindex.storage.layout import SEGMENTS, SHARD, WRITER
from gradindex.storage.os_errors import OF_THE_PATH, refusals

FOLDER = os.O_RDONLY | os.O_DIRECTORY
# EBADF: NFS locks exclusively only what is open for writing, which a folder can't be
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@contextlib.contextmanager
def only_writer(index: Path, doing: str) -> Iterator[None]:
    """Within this, this process is the only one that writes to `index`.

    `doing` tells others what it is doing, such as "a build". Raises GradindexError where another
    process is writing, and names it.
    """
    with _locked(index, fcntl.LOCK_EX) as got:
        if got is False:  # None, where the file system has no locks, is let through
            raise GradindexError(
                f"another process is writing to {index}: {_who(index)}. Wait for it, or stop it "
                "first."
            )
        note = index / WRITER
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
            with note.open("x") as file:  # never through a link that lies there
                json.dump({
                    "pid": os.getpid(), "host": socket.gethostname(), "doing": doing,
                    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                }, file)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)


@contextlib.contextmanager
def one_of_writers(index: Path, number: int, group: str) -> Iterator[None]:
    """Within this, this process is shard `number` of those that write to `index` together.

    `group` says which these are, such as "one of 8 shards". Raises GradindexError where another
    process is that shard, belongs to another group, or is the only writer.
    """
    lock = index / f"{SHARD}{number}"
    with _locked(index, fcntl.LOCK_SH) as got:
        if got is False:
            raise GradindexError(
                f"another process is writing to {index}: {_who(index)}. Wait for it, or stop it "
                "first."
            )
        with refusals(lock, "written"):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with _held(descriptor, fcntl.LOCK_EX) as got:
            if got is False:
                raise GradindexError(
                    f"another process is shard {number} of the build in {index}: "
                    f"{_note_in(descriptor) or 'one that began just now'}. Every shard runs once; "
                    "stop one of the two."
                )
            # Its holder may have removed it between our opening and our lock: then we hold a lock
            # on a file that nobody else can find, and the next process would be this shard too.
            if not _has_name(descriptor, lock):
                raise GradindexError(f"another process ended just now as shard {number} of the "
                                     f"build in {index}. Run the same command again.")
            try:
                # Two groups would do the same units at once, each unaware of the other.
                _refuse_other_groups(index, lock, group)
                os.ftruncate(descriptor, 0)
                os.write(descriptor,
                         f"process {os.getpid()} on {socket.gethostname()}, {group}".encode())
                yield
            finally:
                with contextlib.suppress(OSError):
                    lock.unlink(missing_ok=True)


def _has_name(descriptor: int, lock: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _note_in(descriptor: int) -> str:
    """What the holder of a lock wrote into its file."""
    return os.pread(descriptor, 200, 0).decode(errors="replace")


def _refuse_other_groups(index: Path, lock: Path, group: str) -> None:
    """Raise GradindexError where a shard of another group is at work; `lock` is this one's file."""
    for path in index.iterdir():
        if not is_lock(path) or path == lock:
            continue
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            note = _note_in(descriptor)
            # Looked at without a lock: even a moment's lock would refuse a shard of this group
            # that starts just now.
            if not note or note.endswith(f", {group}"):
                os.close(descriptor)
                continue
            # Of another group; but a killed shard leaves its file behind, and holds no lock on it.
            with _held(descriptor, fcntl.LOCK_SH) as free:
                if free is False:
                    raise GradindexError(
                        f"{index} is being built by {note}; this is {group}. All shards must be "
                        "started with the same i/n; stop the others, or start this one like them."
                    )


def is_lock(path: Path) -> bool:
    """Whether this is a shard's lock, which a killed one leaves."""
    return path.name.startswith(SHARD) and path.name.removeprefix(SHARD).isdecimal()


def _who(index: Path) -> str:
    """Which processes are writing to an index, in words: as they say themselves, or the kernel."""
    holders = _holders(index)
    # A killed writer's note stays. Where the kernel knows the holder, it isn't to be believed.
    try:
        facts = json.loads((index / WRITER).read_text()[:1000])
        if not holders or int(facts["pid"]) in holders:
            return f"{facts['doing']} in process {int(facts['pid'])} on {facts['host']}, since " \
                   f"{facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shards = {path: _shard_note(path) for path in sorted(filter(is_lock, index.iterdir()))}
    if notes := [f"shard {path.name.removeprefix(SHARD)} of a build ({note})"
                 for path, note in shards.items() if note]:
        return "; ".join(notes)
    if holders:
        return "process " + " and ".join(map(str, sorted(holders))) + " of this machine"
    return "one on another machine or in another container, or one that began or ended just now"


def _shard_note(lock: Path) -> str:
    """What the process that holds a shard's lock says of itself; "" where nobody holds it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
        note = _note_in(descriptor)
        with _held(descriptor, fcntl.LOCK_SH) as free:
            return "" if free else note
    return ""


def _holders(folder: Path) -> set[int]:
    """The processes of this machine that hold a lock on a folder, where the kernel tells."""
    # 1: FLOCK  ADVISORY  WRITE 12345 fe:01:131077 0 EOF
    try:
        facts = folder.stat()
        place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return {int(words[4]) for words in held if words[1] == "FLOCK" and words[5] == place}
    except (OSError, ValueError, IndexError):
        return set()


def hold_for_reading(index: Path, reader: object) -> None:
    """Keep the files that the manifest lists now, for as long as the object `reader` lives.

    To be called before the manifest is read: in between, files that it lists could go.
    """
    # Where the file system has no locks there is nothing to hold; a writer there removes nothing.
    with refusals(index / SEGMENTS):
        try:
            descriptor = os.open(index / SEGMENTS, FOLDER | os.O_NOFOLLOW)
            weakref.finalize(reader, os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:  # a folder that isn't there, or is a link, is told of later
            if error.errno not in (*UNSUPPORTED, *OF_THE_PATH):
                raise


class Reader:
    """While it lives, the files that the manifest of `index` lists now are kept.

    See `hold_for_reading`.
    """

    def __init__(self, index: Path):
        hold_for_reading(index, self)


@contextlib.contextmanager
def free_of_readers(index: Path) -> Iterator[bool]:
    """Whether no reader has the index open. While this lasts, none can open it.

    Where the file system has no locks, that can't be known, and the answer is no.
    """
    with _locked(index / SEGMENTS, fcntl.LOCK_EX) as got:
        yield got is True


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool | None]:
    """Hold a lock on a folder, without waiting for it. Yields what `_held` does."""
    with refusals(folder):
        descriptor = os.open(folder, FOLDER)
    with _held(descriptor, how) as got:
        yield got


@contextlib.contextmanager
def _held(descriptor: int, how: int) -> Iterator[bool | None]:
    """Hold a lock on an open file, without waiting for it; the file is closed in the end.

    Yields whether the lock could be had; None where the file system has no locks.
    """
    try:
        got: bool | None = True
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            got = False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            got = None
        yield got
    finally:
        os.close(descriptor)
