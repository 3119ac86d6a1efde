"""What an index holds: its rows, which of them can be found, their records and codes.

A **row** is a sequence's place among all rows of all segments; a **place** is its place among the
live ones, in the same order. The deleted and the quarantined are rows, but not live. Ids ascend
with both, and have gaps once something was deleted and compacted away.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gradindex.storage import layout
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.manifest import Manifest, Segment
from gradindex.storage.records import Record
from gradindex.storage.row_file import ROW, digest_of, first_equal, parse_ids
from gradindex.storage.segments import SegmentReader


class Contents:
    """What some `segments` [all] of the index in folder `root` hold, read at first use.

    Whatever reads a file raises DamagedIndexError where it is not as it was written.
    """

    def __init__(self, root: Path, manifest: Manifest, segments: list[Segment] | None = None):
        self.root = root
        self.manifest = manifest
        self.segments = manifest.segments if segments is None else segments
        self.files = CheckedFiles(root, manifest.files)
        self.starts = np.cumsum([0, *(segment.rows for segment in self.segments)])

    def __len__(self) -> int:
        return len(self.places)

    def reader(self, segment: Segment) -> SegmentReader:
        """The reader of one of the segments."""
        return SegmentReader(self.files, f"{layout.SEGMENTS}/{segment.name}/", segment.rows)

    # ---- rows

    @cached_property
    def rows(self) -> np.ndarray:
        """All rows: row_file.ROW [rows]."""
        if not self.segments:
            return np.zeros(0, dtype=ROW)
        rows = np.concatenate([self.reader(segment).rows() for segment in self.segments])
        # Every look-up by id is a binary search, which would silently miss where ids don't ascend.
        if (np.diff(rows["id"]) <= 0).any() or rows["id"][-1] >= self.manifest.next_id:
            raise self.files.damaged(layout.segment_file(self.segments[-1].name, layout.ROWS),
                                     "has ids that don't follow those of the other segments")
        return rows

    @cached_property
    def deleted(self) -> np.ndarray:
        """The ids that were deleted and are still in a segment, ascending: int64 [n]."""
        name = self.manifest.deleted_file
        if name is None:
            return np.zeros(0, dtype=np.int64)
        return parse_ids(self.files.read(name), self.manifest.deleted, self.root / name)

    @cached_property
    def live(self) -> np.ndarray:
        """Which rows can be found: bool [rows]."""
        coded = ~np.isnan(self.rows["norm"])  # the quarantined have no norm
        return np.asarray(coded & ~np.isin(self.rows["id"], self.deleted))

    @cached_property
    def places(self) -> np.ndarray:
        """The row of every place: int64 [N]."""
        places = np.flatnonzero(self.live)
        # Every percentile and share is out of the manifest's number; with some segments left out
        # there is nothing to compare it with.
        if self.segments == self.manifest.segments and len(places) != self.manifest.sequences:
            raise self.files.damaged(
                layout.MANIFEST, f"counts {self.manifest.sequences:,} sequences where the segments "
                f"hold {len(places):,}")
        return places

    @cached_property
    def ids(self) -> np.ndarray:
        """The id of every place, ascending: int64 [N]."""
        return np.asarray(self.rows["id"][self.places])

    @cached_property
    def norms(self) -> np.ndarray:
        """‖v_m‖ of every place: float64 [N]."""
        return np.asarray(self.rows["norm"][self.places], dtype=np.float64)

    @cached_property
    def first_equal(self) -> np.ndarray:
        """The first place whose sequence has the same tokens and mask, for every place: int64 [N].
        """
        return first_equal(self.rows["digest"][self.places])

    @cached_property
    def _equal_order(self) -> np.ndarray:
        """The places, equal ones side by side and in order: int64 [N]."""
        return np.argsort(self.first_equal, kind="stable")

    def equal_to(self, place: int) -> np.ndarray:
        """The places of all sequences equal to the one at a place, it among them: int64 [n].

        They ascend.
        """
        # Sorted once, so that each hit's copies are found without a look at all N places.
        order = self._equal_order
        first = self.first_equal[place]
        low = np.searchsorted(self.first_equal, first, side="left", sorter=order)
        high = np.searchsorted(self.first_equal, first, side="right", sorter=order)
        return order[low:high]

    def place_of(self, sequence: int) -> int | None:
        """The place of the sequence with this id, None where no live one has it."""
        place = int(np.searchsorted(self.ids, sequence))
        return place if place < len(self.ids) and self.ids[place] == sequence else None

    # ---- files

    def codes_of(self, rows: np.ndarray, held: Sequence[CodeIndex] = ()) -> np.ndarray:
        """The codes of some rows as they are kept, in that order: uint8 [rows, bytes].

        `held` are those of all segments, where they were read already.
        """
        length = self.manifest.code["length"]
        codes = np.zeros((len(rows), layout.code_bytes(length)), np.uint8)
        numbers, inside = homes(self.starts, rows)
        # segment by segment, each read or mapped once, and put where it was asked for
        for number in np.unique(numbers).tolist():
            stored = held[number] if held else self.reader(self.segments[number]).codes(length)
            mine = numbers == number
            codes[mine] = stored.codes(inside[mine].tolist())
        return codes

    def records(self, rows: Sequence[int] | np.ndarray) -> list[Record]:
        """The records of some rows, in that order."""
        wanted = np.asarray(rows, dtype=np.int64)
        numbers, inside = homes(self.starts, wanted)
        by_row: dict[int, Record] = {}
        # Segment by segment, whatever the order: opening its file of records is what costs.
        for number in np.unique(numbers).tolist():
            segment, mine = self.segments[number], numbers == number
            records = self.reader(segment).records(inside[mine].tolist())
            for row, record in zip(wanted[mine].tolist(), records, strict=True):
                if wrong := _mismatch(record, self.rows[row], self.manifest):
                    raise self.files.damaged(
                        layout.segment_file(segment.name, layout.RECORDS), wrong)
                by_row[row] = record
        return [by_row[row] for row in wanted.tolist()]


def homes(starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of several runs of rows each row is in, and where in it: int64 [rows] each.

    `starts` [runs + 1] are the first row of each run, and the end of the last.

    >>> homes(np.array([0, 3, 5]), np.array([4, 0, 3]))
    (array([1, 0, 1]), array([1, 0, 0]))
    """
    numbers = np.searchsorted(starts, rows, side="right") - 1
    return numbers, rows - starts[numbers]


def _mismatch(record: Record, row: np.void, manifest: Manifest) -> str | None:
    """Why a record isn't that of a row, row_file.ROW, or no model can take it; None where it is."""
    if record.id != row["id"] or (digest_of(record) != row["digest"]).any():
        return f"has another sequence {row['id']} than {layout.ROWS.name}"
    # On a GPU, a token beyond the table of embeddings leaves the process unable to go on.
    n = len(record.tokens)
    longest = n if not manifest.task.of_pairs or record.border is None else \
        max(record.border, n - record.border)
    if longest > manifest.sequence_length or record.tokens.min() < 0 or \
            record.tokens.max() >= manifest.vocabulary:
        return f"has a sequence {record.id} that is too long or outside the vocabulary"
    task, label, labels = manifest.task, record.label, manifest.plan.labels
    labelled = label is None if not labels else label is not None and label < len(labels)
    if not labelled or (task.of_pairs and record.border is None):
        return f"has a sequence {record.id} that is no row of the task {task.name}"
    return None
