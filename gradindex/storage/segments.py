"""A segment on disk: a run of sequences, what they were, their codes, and how they were made.

    records.lmdb    what each sequence was (`records.py`)
    vectors.faiss   the codes; row i belongs to record i (`code_file.py`)
    rows.npy        each row's id, ‖v‖ and digest of its tokens, see ROW
    tokens.npz      which tokens each sequence holds (`token_file.py`)
    segment.json    SegmentFacts: written last before the folder gets its final name

While a segment is being made its folder is called NNNNNN.partial and its segment.json says how far
it came, so that a killed writer repeats what it did and ends with the same bytes.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pydantic

from gradindex.errors import DamagedIndexError
from gradindex.storage import sealed_json
from gradindex.storage.files import FileFacts, atomic_write
from gradindex.storage.records import Record

FILES = ("records.lmdb", "vectors.faiss", "rows.npy", "tokens.npz", "segment.json")
NAME = "segment.json"
PARTIAL = ".partial"

# A row: its id; ‖v‖, NaN where the sequence is quarantined; and the first 128 bits of the SHA-256
# of its tokens and loss mask, equal for equal sequences.
ROW = np.dtype([("id", "<i8"), ("norm", "<f4"), ("digest", "<u8", (2,))])


@dataclass
class SegmentFacts:
    """How a segment was made.

    `splits` are batches that were halved because memory ran out, as (first row, rows); replaying
    them gives the same bytes. `quarantined` says of ids why they have no code. `files` are the
    facts of the files written so far.
    """

    rows: int
    splits: list[tuple[int, int]] = field(default_factory=list)
    quarantined: dict[int, str] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)


_ADAPTER: pydantic.TypeAdapter[SegmentFacts] = pydantic.TypeAdapter(SegmentFacts)


def write_facts(folder: Path, facts: SegmentFacts) -> FileFacts:
    """Write segment.json. Raises ResourceError."""
    content = {**asdict(facts), "quarantined": {str(one): why for one, why in
                                                sorted(facts.quarantined.items())}}
    return atomic_write(folder / NAME, sealed_json.sign(content))


def parse_facts(content: bytes, where: Path) -> SegmentFacts:
    """What segment.json says. Raises DamagedIndexError."""
    try:
        return _ADAPTER.validate_json(sealed_json.check(sealed_json.parse(content)))
    except ValueError as error:
        raise DamagedIndexError(
            f"{where} is not a segment's ({str(error).splitlines()[0][:120]}). Copy the index "
            "again, or empty the folder of an unfinished build and start it again."
        ) from None


def read_facts(folder: Path) -> SegmentFacts:
    """What the segment.json of a folder under way says. Raises DamagedIndexError."""
    return parse_facts((folder / NAME).read_bytes(), folder / NAME)


def digest_of(record: Record) -> np.ndarray:
    """uint64 [2]: the same for sequences of equal tokens and mask, and for no others."""
    content = record.tokens.astype("<i4").tobytes() + record.scored.astype(np.uint8).tobytes()
    return np.frombuffer(hashlib.sha256(content).digest()[:16], dtype="<u8")


def make_rows(records: Sequence[Record], norms: np.ndarray) -> np.ndarray:
    """ROW [n] of sequences and their ‖v‖ [n]."""
    rows = np.zeros(len(records), dtype=ROW)
    rows["id"] = [record.id for record in records]
    rows["norm"] = norms
    rows["digest"] = [digest_of(record) for record in records]
    return rows


def first_equal(digests: np.ndarray) -> np.ndarray:
    """The place of the first row of equal digest, for digests uint64 [n, 2]: int64 [n]."""
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
    """How many rows equal an earlier one, for digests uint64 [n, 2]."""
    return int((first_equal(digests) != np.arange(len(digests))).sum())


def write_rows(path: Path, rows: np.ndarray) -> FileFacts:
    """Write ROW [n]. Raises ResourceError."""
    return atomic_write(path, array_bytes(rows))


def parse_rows(content: bytes, count: int, where: Path) -> np.ndarray:
    """ROW [count], ids ascending and every ‖v‖ finite or NaN. Raises DamagedIndexError."""
    rows = parse_array(content, ROW, where)
    norms = rows["norm"]
    if rows.shape != (count,) or (np.diff(rows["id"]) <= 0).any() or rows["id"][0] < 0 or \
            np.isinf(norms).any() or (norms < 0).any():
        raise DamagedIndexError(
            f"{where} doesn't hold {count} rows with ascending ids. Copy the index again."
        )
    return rows


def write_ids(path: Path, ids: np.ndarray) -> FileFacts:
    """Write a list of ids, int64 ascending. Raises ResourceError."""
    return atomic_write(path, array_bytes(ids.astype("<i8")))


def parse_ids(content: bytes, count: int, where: Path) -> np.ndarray:
    """A list of `count` ids, int64 ascending. Raises DamagedIndexError."""
    ids = parse_array(content, np.dtype("<i8"), where)
    if ids.shape != (count,) or (np.diff(ids) <= 0).any():
        raise DamagedIndexError(
            f"{where} doesn't hold {count} ascending ids. Copy the index again.")
    return ids


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_array(content: bytes, dtype: np.dtype, where: Path) -> np.ndarray:
    """An array of one dimension and the given dtype. Raises DamagedIndexError."""
    buffer = io.BytesIO(content)
    try:
        array = np.load(buffer, allow_pickle=False)
        if buffer.read(1):
            raise ValueError("it goes on after the array")
    except Exception as error:  # hostile bytes make NumPy's header parser raise anything
        raise DamagedIndexError(f"{where} can't be read: {error}. Copy the index again.") from None
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        raise DamagedIndexError(f"{where} holds no list of {dtype}. Copy the index again.")
    return array
