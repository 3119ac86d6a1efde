"""A segment on disk: a run of sequences with their texts, their codes, and how they were made.

    records.lmdb    what each sequence was (`records.py`)
    vectors.faiss   the codes; row i belongs to record i (`code_index.py`)
    rows.npy        each row's id, ‖v‖ and digest of its tokens (`row_file.py`)
    tokens.npz      which tokens each sequence holds (`token_file.py`)
    segment.json    SegmentFacts: written last before the folder gets its final name

While a segment is being made, its folder is called NNNNNN.partial, and its segment.json says how
far it has come: a writer that goes on after a kill repeats what was done and ends with the same
bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pydantic

from gradindex.errors import DamagedIndexError
from gradindex.storage import layout, records, sealed_json, token_file
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.files import FileFacts, atomic_write
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.layout import SegmentFile
from gradindex.storage.records import Record
from gradindex.storage.row_file import parse_rows


@dataclass
class SegmentFacts:
    """How a segment was made.

    `splits` are the batches that were halved because memory ran out, as (first row, rows).
    `quarantined` says, by id, why a sequence has no code. `files` are the facts of the files
    written so far.
    """

    rows: int
    splits: list[tuple[int, int]] = field(default_factory=list)
    quarantined: dict[int, str] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)


_ADAPTER: pydantic.TypeAdapter[SegmentFacts] = pydantic.TypeAdapter(SegmentFacts)


def write_facts(folder: Path, facts: SegmentFacts) -> FileFacts:
    """Write segment.json. Raises ResourceError."""
    # JSON's keys are strings, and would be sorted as such: 10 before 9.
    content = {**asdict(facts), "quarantined": {str(sequence): why for sequence, why in
                                                sorted(facts.quarantined.items())}}
    return atomic_write(folder / layout.NOTES.name, sealed_json.with_digest(content))


def parse_facts(content: bytes, where: Path) -> SegmentFacts:
    """What the content of a segment.json says. `where` is its path, for the message.

    Raises DamagedIndexError.
    """
    try:
        return _ADAPTER.validate_json(sealed_json.check(sealed_json.parse(content)))
    except ValueError as error:
        raise DamagedIndexError(
            f"{where} is not a segment's ({str(error).splitlines()[0][:120]}). Copy the index "
            "again, or empty the folder of an unfinished build and start it again."
        ) from None


def read_facts(folder: Path) -> SegmentFacts:
    """What the segment.json of a segment that is being made says. Raises DamagedIndexError."""
    return parse_facts((folder / layout.NOTES.name).read_bytes(), folder / layout.NOTES.name)


@dataclass(frozen=True)
class SegmentReader:
    """Reads the files of one segment of `count` rows, each checked before anything parses it.

    `files` are those of a whole index, or of the segment's folder alone; `within` is what the names
    of the segment's files begin with among them. Every method raises DamagedIndexError.
    """

    files: CheckedFiles
    within: str
    count: int

    def name(self, file: SegmentFile) -> str:
        """The name of one of the segment's files among `files`."""
        return f"{self.within}{file.name}"

    def rows(self) -> np.ndarray:
        """All rows: row_file.ROW [count]."""
        return parse_rows(self._read(layout.ROWS), self.count, self._where(layout.ROWS))

    def codes(self, length: int, mapped: bool = False) -> CodeIndex:
        """The codes of all rows, of K = `length` bits: in memory, or `mapped` from the disk."""
        # Mapped where memory doesn't hold all segments: FAISS scans codes where they lie.
        content = self.files.map(self.name(layout.CODES)) if mapped else self._read(layout.CODES)
        return CodeIndex.parse(content, length, self.count, self._where(layout.CODES))

    def tokens(self, sequence_length: int, vocabulary: int) -> token_file.Matrix:
        """Which tokens each sequence holds: [count, vocabulary].

        A sequence holds at most `sequence_length` tokens, all below `vocabulary`.
        """
        return token_file.parse(self._read(layout.TOKENS), self.count, sequence_length, vocabulary,
                                self._where(layout.TOKENS))

    def facts(self) -> SegmentFacts:
        """How the segment was made."""
        return parse_facts(self._read(layout.NOTES), self._where(layout.NOTES))

    def records(self, rows: Sequence[int]) -> list[Record]:
        """The records of some rows, in that order."""
        # checked page by page before liblmdb, which trusts what it maps, sees it
        return records.read(self.files.path(self.name(layout.RECORDS), records.check_pages), rows)

    def _read(self, file: SegmentFile) -> bytes:
        return self.files.read(self.name(file))

    def _where(self, file: SegmentFile) -> Path:
        return self.files.root / self.name(file)
