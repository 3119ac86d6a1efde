"""Rows and lists of ids, as NumPy files: what is known of each sequence without its text."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradindex.errors import DamagedIndexError
from gradindex.storage.files import FileFacts, atomic_write
from gradindex.storage.os_errors import memory_ran_out
from gradindex.storage.records import Record

# A row: its id; ‖v‖, NaN where the sequence is quarantined; and the first 128 bits of the SHA-256
# of its tokens, loss mask and what its task has besides, equal for equal sequences.
ROW = np.dtype([("id", "<i8"), ("norm", "<f4"), ("digest", "<u8", (2,))])


def digest_of(record: Record) -> np.ndarray:
    """uint64 [2]: the same for sequences of equal tokens, mask and task facts, and for no others.

    >>> record = Record(7, np.array([5, 6], np.int32), np.array([True, True]), [])
    >>> again = Record(8, np.array([5, 6], np.int32), np.array([True, True]), [])
    >>> masked = Record(9, np.array([5, 6], np.int32), np.array([False, True]), [])
    >>> [bool((digest_of(other) == digest_of(record)).all()) for other in (again, masked)]
    [True, False]
    """
    content = record.tokens.astype("<i4").tobytes() + record.scored.astype(np.uint8).tobytes()
    if facts := record.task_facts():
        content += json.dumps(facts).encode()
    return np.frombuffer(hashlib.sha256(content).digest()[:16], dtype="<u8")


def make_rows(records: Sequence[Record], norms: np.ndarray) -> np.ndarray:
    """The rows of sequences, ROW [n], from their records and ‖v‖ [n]."""
    rows = np.zeros(len(records), dtype=ROW)
    rows["id"] = [record.id for record in records]
    rows["norm"] = norms
    rows["digest"] = [digest_of(record) for record in records]
    return rows


def first_equal(digests: np.ndarray) -> np.ndarray:
    """The number of the first row with an equal digest, for digests uint64 [n, 2]: int64 [n].

    >>> first_equal(np.array([[1, 1], [2, 2], [1, 1]], dtype=np.uint64)).tolist()
    [0, 1, 0]
    """
    # By the first 64 bits, which is faster than by all 128 and nearly always enough.
    order = np.argsort(digests[:, 0], kind="stable")  # stable: equal ones stay in order
    same = digests[order[1:]] == digests[order[:-1]]
    if (same[:, 0] & ~same[:, 1]).any():  # 64 bits were not enough to tell all apart
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        same = digests[order[1:]] == digests[order[:-1]]
    new = np.ones(len(digests), dtype=bool)
    new[1:] = ~same.all(axis=1)
    first = np.empty(len(digests), dtype=np.int64)
    first[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return first


def count_equal(digests: np.ndarray) -> int:
    """How many rows equal an earlier one, for digests uint64 [n, 2].

    >>> count_equal(np.array([[1, 1], [2, 2], [1, 1]], dtype=np.uint64))
    1
    """
    return int((first_equal(digests) != np.arange(len(digests))).sum())


def write_rows(path: Path, rows: np.ndarray) -> FileFacts:
    """Write the file of rows, ROW [n]. Raises ResourceError."""
    return atomic_write(path, array_bytes(rows))


def parse_rows(content: bytes, count: int, where: Path) -> np.ndarray:
    """The rows of a file, ROW [count]. `where` is its path, for the message.

    Raises DamagedIndexError unless ids ascend and every ‖v‖ is finite or NaN.

    >>> rows = np.zeros(2, dtype=ROW)
    >>> rows["id"] = [4, 9]
    >>> parse_rows(array_bytes(rows), 2, Path("rows.npy"))["id"].tolist()
    [4, 9]
    """
    rows = parse_array(content, ROW, where)
    norms = rows["norm"]
    if rows.shape != (count,) or (np.diff(rows["id"]) <= 0).any() or rows["id"][0] < 0 or \
            np.isinf(norms).any() or (norms < 0).any():
        raise DamagedIndexError(
            f"{where} doesn't hold {count} rows with ascending ids. Copy the index again."
        )
    return rows


def write_ids(path: Path, ids: np.ndarray) -> FileFacts:
    """Write a list of ids, int64 [n], which ascend. Raises ResourceError."""
    return atomic_write(path, array_bytes(ids.astype("<i8")))


def parse_ids(content: bytes, count: int, where: Path) -> np.ndarray:
    """The ids of a file, int64 [count]. `where` is its path, for the message.

    Raises DamagedIndexError for anything but ascending ids.

    >>> parse_ids(array_bytes(np.array([4, 9])), 2, Path("000001.npy")).tolist()
    [4, 9]
    """
    ids = parse_array(content, np.dtype("<i8"), where)
    if ids.shape != (count,) or (np.diff(ids) <= 0).any():
        raise DamagedIndexError(
            f"{where} doesn't hold {count} ascending ids. Copy the index again.")
    return ids


def array_bytes(array: np.ndarray) -> bytes:
    """The content of a NumPy file that holds an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_array(content: bytes, dtype: np.dtype, where: Path) -> np.ndarray:
    """The array [n] of a NumPy file's content. `where` is its path, for the message.

    Raises DamagedIndexError for anything but an array of one dimension and this dtype.
    """
    buffer = io.BytesIO(content)
    try:
        # The header alone: a hostile one could ask NumPy for all of the memory.
        version = np.lib.format.read_magic(buffer)
        if version != (1, 0):
            raise ValueError(f"it has version {version} of the format")
        shape, _, found = np.lib.format.read_array_header_1_0(buffer)
        count = (len(content) - buffer.tell()) // dtype.itemsize
        # An equal array has equal bytes: with more behind it, another file would pass as this one.
        if found == dtype and len(shape) == 1 and \
                (shape[0], len(content)) != (count, buffer.tell() + count * dtype.itemsize):
            raise ValueError(f"it has room for {count:,} entries, expected {shape[0]:,}")
    except MemoryError:
        raise memory_ran_out(where) from None
    except Exception as error:  # hostile bytes make NumPy's header parser raise anything
        raise DamagedIndexError(f"{where} can't be read: {error}. Copy the index again.") from None
    if found != dtype or len(shape) != 1:
        raise DamagedIndexError(f"{where} holds no list of {dtype}. Copy the index again.")
    return np.frombuffer(content, dtype, offset=buffer.tell()).copy()
