"""LMDB, through its only door: what each sequence was and where it came from.

One file per segment, written once in key order in one transaction (the same records give the same
bytes), then only read. Key: row in the segment, 4 bytes big-endian. Value: CRC-32 of the rest,
length of the JSON, number of tokens (three little-endian uint32), JSON (id and parts; of a row with
two texts the border, of a classifier the label, of a pair the offset), token ids (little-endian
int32), loss mask (one bit a token).

liblmdb trusts what it maps: a damaged or hostile file can end the process. So a file is checked
page by page, outside liblmdb, before it is opened (`check_pages`).
"""

import contextlib
import errno
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import lmdb.verify
import numpy as np

from gradindex.errors import DamagedIndexError
from gradindex.storage.files import TEMPORARY, FileFacts, adopt, written
from gradindex.storage.os_errors import NO_MAPPING, refusal, refusals

_HEADER = struct.Struct("<III")
_KEY = struct.Struct(">I")
_PAGE, _PAGE_HEADER, _LARGEST_NODE = 4096, 16, 2038  # bytes, in liblmdb
_CHILDREN = (_PAGE - _PAGE_HEADER) // 14  # of a branch page
# py-lmdb refuses a second environment on the same file in one process, so readers take turns.
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Part:
    """The stretch of one document inside a sequence; packed sequences have several.

    `document` is the document's number, from 0; `row` is its line or row in `source`, from 1. The
    stretch goes from character `start` to `end` of the document's text (−1 where it came as
    tokens), and begins at position `token` of the sequence.
    """

    document: int
    source: str
    row: int
    start: int
    end: int
    token: int
    user_id: Any = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """A sequence: its id, token ids int32 [n], which of them were scored bool [n], and its parts.

    `border`, `label` and `offset` are what a task has besides (`objective/batch.py`).
    """

    id: int
    tokens: np.ndarray
    scored: np.ndarray
    parts: list[Part]
    border: int | None = None
    label: int | None = None
    offset: float = 0.0

    def task_facts(self) -> dict[str, int | float]:
        """What the task has of the sequence besides its tokens; nothing of a text alone."""
        facts = {"border": self.border, "label": self.label, "offset": self.offset or None}
        return {name: value for name, value in facts.items() if value is not None}


def write(path: Path, records: Iterable[Record]) -> FileFacts:
    """Write a segment's records, row by row, as one file. The same records give the same bytes.

    Raises ResourceError where the system refuses it.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # what a killed process left would be written into
    values = [_pack(record) for record in records]
    # Each value takes whole pages above about 2 KB: twice the bytes and a margin always suffices.
    map_size = 2 * sum(len(value) + 4096 for value in values) + (1 << 20)
    needed = file_bytes(map(len, values))
    with written(path, needed, temporary):
        try:
            with _lmdb_errors(path), \
                    _open(temporary, map_size=map_size, lock=False) as environment:
                # One transaction in the order of keys: LMDB's bytes depend on how they came about.
                with environment.begin(write=True) as transaction:
                    for row, value in enumerate(values):
                        # False, and no error, is how it drops a record that is out of order.
                        if not transaction.put(_KEY.pack(row), value, append=True):
                            raise AssertionError(f"LMDB refused row {row} out of order")
                whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            # `adopt` reads the facts back from the file, so a short one would pass: pages are
            # counted.
            if (size := temporary.stat().st_size) != whole:
                raise OSError(errno.EIO, f"{size} of {whole} bytes arrived")
        except OSError as error:
            if error.errno == errno.EIO:  # which LMDB says of a write that was cut, whatever for
                _write_on(temporary, needed)
            raise
        return adopt(temporary, path)


def _write_on(path: Path, size: int) -> None:
    """Write zeros to a file up to `size` bytes: on a full disk that says so. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        while (left := size - file.tell()) > 0:
            file.write(bytes(min(left, 1 << 20)))


def file_bytes(sizes: Iterable[int]) -> int:
    """The size of a segment's file in bytes, from those of its values (`value_bytes`), in order.

    >>> file_bytes([100] * 40)  # two pages for the root, two leaves, and the branch above them
    20480
    """
    leaves, overflow, room = 0, 0, 0
    # As liblmdb does: leaf pages are filled in order; a value of about half a page or more has
    # pages of its own, and 8 bytes in the leaf; branch pages have 14 bytes for each child.
    for size in sizes:
        node = 8 + _KEY.size + size
        if node > _LARGEST_NODE:
            overflow += -(-(_PAGE_HEADER + size) // _PAGE)
            node = 8 + _KEY.size + 8
        node += node % 2 + 2
        if node > room:
            leaves, room = leaves + 1, _PAGE - _PAGE_HEADER
        room -= node
    branches, level = 0, leaves
    while level > 1:
        level = -(-level // _CHILDREN)
        branches += level
    return (2 + leaves + overflow + branches) * _PAGE


def value_bytes(record: Record) -> int:
    """The size of a record's value in bytes."""
    return len(_pack(record))


@contextlib.contextmanager
def _lmdb_errors(path: Path) -> Iterator[None]:
    """Turn what the system refuses LMDB into the OSErrors that they stand for.

    Raises ResourceError where it refuses to map `path`.
    """
    try:
        yield
    except lmdb.Error as error:
        if error.code <= 0:  # LMDB's own numbers; the system's are positive
            raise
        refused = OSError(error.code, os.strerror(error.code))
        if error.code in NO_MAPPING and (told := refusal(refused, path, "mapped")) is not None:
            raise told from error
        raise refused from error


def check_pages(path: Path) -> None:
    """Check every page of a file of records, without liblmdb.

    Raises DamagedIndexError, and ResourceError where the system refuses to read it.
    """
    try:
        with refusals(path):
            faults = lmdb.verify.verify(str(path), subdir=False)
    except lmdb.verify.VerifyError as error:
        faults = [str(error)]
    if faults:
        raise DamagedIndexError(
            f"{path} is not a sound LMDB file ({str(faults[0])[:120]}). Copy the index again; if "
            "it comes from a stranger, don't trust it."
        )


def read(path: Path, rows: Sequence[int]) -> list[Record]:
    """The records of some rows, in that order, of a file that was written here or checked.

    Raises DamagedIndexError, and ResourceError where the system refuses to read it.
    """
    try:
        # Mapped as far as the file goes: address space may be limited.
        with _ONE_AT_A_TIME, refusals(path), _lmdb_errors(path), \
                _open(path, map_size=path.stat().st_size, readonly=True, lock=False) as records, \
                records.begin() as transaction:
            return [_unpack(transaction.get(_KEY.pack(row)), path, row) for row in rows]
    except (lmdb.Error, OSError) as error:  # OSError: no such file, or a folder in its place
        raise DamagedIndexError(f"{path} can't be read: {error}. Copy the index again.") from error


def _open(path: Path, **arguments: Any) -> lmdb.Environment:
    # as bytes: LMDB takes no text for a name that isn't UTF-8
    return lmdb.open(os.fsencode(path), subdir=False, **arguments)


def _pack(record: Record) -> bytes:
    """A record as a value, laid out as the module says."""
    about = json.dumps(
        {"id": record.id, "parts": [asdict(part) for part in record.parts],
         **record.task_facts()},
        ensure_ascii=False, separators=(",", ":"),
    ).encode("utf-8", errors="surrogatepass")  # a user's JSON may hold lone surrogates
    body = about + record.tokens.astype("<i4").tobytes() + np.packbits(record.scored).tobytes()
    lengths = _HEADER.pack(0, len(about), len(record.tokens))[4:]
    return struct.pack("<I", zlib.crc32(lengths + body)) + lengths + body


def _unpack(value: bytes | None, path: Path, row: int) -> Record:
    """The record of a value. Raises DamagedIndexError, whatever its bytes are."""
    if value is None or len(value) < _HEADER.size:
        raise DamagedIndexError(f"{path} has no record {row}. Copy the index again.")
    checksum, about_length, n = _HEADER.unpack_from(value)
    if zlib.crc32(value[4:]) != checksum:
        raise DamagedIndexError(f"{path}: record {row} is damaged. Copy the index again.")
    start = _HEADER.size + about_length
    # A checksum is easily made right, so everything after it is a stranger's as well.
    try:
        if len(value) != start + 4 * n + -(-n // 8):
            raise ValueError(f"{len(value)} bytes for {n} tokens")
        about = json.loads(value[_HEADER.size : start].decode("utf-8", errors="surrogatepass"))
        tokens = np.frombuffer(value, dtype="<i4", count=n, offset=start).astype(np.int32)
        mask = np.frombuffer(value, dtype=np.uint8, offset=start + 4 * n)
        scored = np.unpackbits(mask, count=n).astype(bool)
        record = Record(about.pop("id"), tokens, scored,
                        [Part(**part) for part in about.pop("parts")], **about)
        _check(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedIndexError(
            f"{path}: record {row} is not a sequence's ({str(error)[:120]}). Copy the index again."
        ) from None
    return record


def _check(record: Record) -> None:
    """Raise ValueError for a record that no writer of ours writes."""
    if type(record.id) is not int or not record.parts or not len(record.tokens):
        raise ValueError("no id, no part or no token")
    border, label, offset = record.border, record.label, record.offset
    if (border is not None and not (type(border) is int and 0 < border < len(record.tokens))) or \
            (label is not None and not (type(label) is int and label >= 0)) or \
            type(offset) is not float or not math.isfinite(offset):
        raise ValueError("a border, label or offset that can't be")
    for part in record.parts:
        numbers = (part.document, part.row, part.start, part.end, part.token)
        if any(type(number) is not int for number in numbers) or \
                not isinstance(part.source, str) or not isinstance(part.fields, dict):
            raise ValueError("a part of another form")
