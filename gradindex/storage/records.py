"""LMDB, through its only door: what each sequence was and where it came from.

One file per segment, written once in key order in one transaction (the same records give the same
bytes), then only read. Key: row in the segment, 4 bytes big-endian. Value: CRC-32 of the rest,
length of the JSON, number of tokens (three little-endian uint32), JSON (id and parts), token ids
(little-endian int32), loss mask (one bit a token).

liblmdb trusts what it maps: a damaged or hostile file can end the process. So a file is audited
page by page, outside liblmdb, before it is opened (`audit`).
"""

import contextlib
import errno
import json
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
from gradindex.storage.files import BROKEN, FULL, TEMPORARY, FileFacts, adopt, disk_errors

_HEADER = struct.Struct("<III")
_KEY = struct.Struct(">I")
_PAGE, _PAGE_HEADER, _LARGEST_NODE = 4096, 16, 2038  # bytes, in liblmdb
_CHILDREN = (_PAGE - _PAGE_HEADER) // 14  # of a branch page
# py-lmdb refuses a second environment on the same file in one process, so readers take turns.
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Part:
    """The stretch of one document inside a sequence (packed sequences have several).

    `document` counts documents from 0; `row` is the line or row in `source`, from 1; `start` and
    `end` are characters of the document's text, −1 where it came as tokens; `token` is the
    position in the sequence where it starts.
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
    """A sequence: its id, tokens int32 [n], which of them were scored bool [n], and its parts."""

    id: int
    tokens: np.ndarray
    scored: np.ndarray
    parts: list[Part]


def write(path: Path, records: Iterable[Record]) -> FileFacts:
    """Write a segment's records as one sealed file, in key order and one transaction.

    The same records give the same bytes. Raises ResourceError on a full or failing disk.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    values = [_pack(record) for record in records]
    # Each value takes whole pages above about 2 KB: twice the bytes and a margin always suffices.
    map_size = 2 * sum(len(value) + 4096 for value in values) + (1 << 20)
    with disk_errors(path, map_size // 2, temporary):
        with _lmdb_errors(), _open(temporary, map_size=map_size, lock=False) as environment:
            with environment.begin(write=True) as transaction:
                for row, value in enumerate(values):
                    if not transaction.put(_KEY.pack(row), value, append=True):
                        raise AssertionError(f"LMDB refused row {row} out of order")
            whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if (found := temporary.stat().st_size) != whole:
            raise OSError(errno.EIO, f"{found} of {whole} bytes arrived")
        return adopt(temporary, path)


def file_bytes(sizes: Iterable[int]) -> int:
    """The size of a segment's file, from those of its values (`value_bytes`), in order.

    LMDB fills leaf pages in order; a value of about half a page or more has pages of its own.
    Two pages say where the tree's root is, and branch pages hold 14 bytes a child.
    """
    leaves, own, room = 0, 0, 0
    for size in sizes:
        node = 8 + _KEY.size + size
        if node > _LARGEST_NODE:
            own += -(-(_PAGE_HEADER + size) // _PAGE)
            node = 8 + _KEY.size + 8
        node += node % 2 + 2
        if node > room:
            leaves, room = leaves + 1, _PAGE - _PAGE_HEADER
        room -= node
    branches, level = 0, leaves
    while level > 1:
        level = -(-level // _CHILDREN)
        branches += level
    return (2 + leaves + own + branches) * _PAGE


def value_bytes(record: Record) -> int:
    """The size of a record as a value."""
    return len(_pack(record))


@contextlib.contextmanager
def _lmdb_errors() -> Iterator[None]:
    """LMDB's errors about the disk, as the OSError they stand for."""
    try:
        yield
    except lmdb.Error as error:
        for code in (*FULL, *BROKEN, errno.EACCES):
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise


def audit(path: Path) -> None:
    """Check a file's every page, without liblmdb. Raises DamagedIndexError."""
    try:
        found = lmdb.verify.verify(str(path), subdir=False)
    except lmdb.verify.VerifyError as error:
        found = [str(error)]
    if found:
        raise DamagedIndexError(
            f"{path} is not a sound LMDB file ({str(found[0])[:120]}). Copy the index again; if it "
            "comes from a stranger, don't trust it."
        )


def read(path: Path, rows: Sequence[int]) -> list[Record]:
    """The records of the given rows, in that order, of a file written here or audited.

    Raises DamagedIndexError.
    """
    try:
        with _ONE_AT_A_TIME, _open(path, readonly=True, lock=False) as environment, \
                environment.begin() as transaction:
            return [_unpack(transaction.get(_KEY.pack(row)), path, row) for row in rows]
    except lmdb.Error as error:
        raise DamagedIndexError(f"{path} can't be read: {error}. Copy the index again.") from error


def _open(path: Path, **arguments: Any) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=False, **arguments)


def _pack(record: Record) -> bytes:
    about = json.dumps(
        {"id": record.id, "parts": [asdict(part) for part in record.parts]},
        ensure_ascii=False, separators=(",", ":"),
    ).encode("utf-8", errors="surrogatepass")
    body = about + record.tokens.astype("<i4").tobytes() + np.packbits(record.scored).tobytes()
    lengths = _HEADER.pack(0, len(about), len(record.tokens))[4:]
    return struct.pack("<I", zlib.crc32(lengths + body)) + lengths + body


def _unpack(value: bytes | None, path: Path, row: int) -> Record:
    if value is None or len(value) < _HEADER.size:
        raise DamagedIndexError(f"{path} has no record {row}. Copy the index again.")
    checksum, about_length, n = _HEADER.unpack_from(value)
    if zlib.crc32(value[4:]) != checksum:
        raise DamagedIndexError(f"{path}: record {row} is damaged. Copy the index again.")
    start = _HEADER.size + about_length
    try:
        if len(value) != start + 4 * n + -(-n // 8):
            raise ValueError(f"{len(value)} bytes for {n} tokens")
        about = json.loads(value[_HEADER.size : start].decode("utf-8", errors="surrogatepass"))
        tokens = np.frombuffer(value, dtype="<i4", count=n, offset=start).astype(np.int32)
        mask = np.frombuffer(value, dtype=np.uint8, offset=start + 4 * n)
        scored = np.unpackbits(mask, count=n).astype(bool)
        record = Record(about["id"], tokens, scored, [Part(**part) for part in about["parts"]])
        _check(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedIndexError(
            f"{path}: record {row} is not a sequence's ({str(error)[:120]}). Copy the index again."
        ) from None
    return record


def _check(record: Record) -> None:
    """Raise ValueError for what no writer of ours writes."""
    if type(record.id) is not int or not record.parts or not len(record.tokens):
        raise ValueError("no id, no part or no token")
    for part in record.parts:
        numbers = (part.document, part.row, part.start, part.end, part.token)
        if any(type(number) is not int for number in numbers) or \
                not isinstance(part.source, str) or not isinstance(part.fields, dict):
            raise ValueError("a part of another form")
