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
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.manifest import Manifest, Segment
from gradindex.storage.records import Record
from gradindex.storage.row_file import ROW, digest_of, first_equal, parse_ids
from gradindex.storage.segments import SegmentReader


class Contents:
    """The contents of `chosen` segments of the index in folder `root` [all], read at first use.

    Everything that reads raises DamagedIndexError for a file that is not what it was.
    """

    def __init__(self, root: Path, manifest: Manifest, chosen: list[Segment] | None = None):
        self.root = root
        self.manifest = manifest
        self.segments = manifest.segments if chosen is None else chosen
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
        """Every row, as row_file.ROW [rows]."""
        if not self.segments:
            return np.zeros(0, dtype=ROW)
        rows = np.concatenate([self.reader(segment).rows() for segment in self.segments])
        if (np.diff(rows["id"]) <= 0).any() or rows["id"][-1] >= self.manifest.next_id:
            raise self.files.damaged(layout.segment_file(self.segments[-1].name, layout.ROWS),
                                     "has ids that don't follow those of the other segments")
        return rows

    @cached_property
    def deleted(self) -> np.ndarray:
        """The ids that were deleted and are still in a segment, ascending: int64."""
        name = self.manifest.deleted_file
        if name is None:
            return np.zeros(0, dtype=np.int64)
        return parse_ids(self.files.read(name), self.manifest.deleted, self.root / name)

    @cached_property
    def live(self) -> np.ndarray:
        """Which rows can be found: bool [rows]."""
        coded = ~np.isnan(self.rows["norm"])
        return np.asarray(coded & ~np.isin(self.rows["id"], self.deleted))

    @cached_property
    def places(self) -> np.ndarray:
        """The row of every place: int64 [N]."""
        places = np.flatnonzero(self.live)
        if self.segments == self.manifest.segments and len(places) != self.manifest.sequences:
            raise self.files.damaged(
                "manifest.json", f"counts {self.manifest.sequences:,} sequences where the segments "
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
        """The first place whose sequence has the same tokens and mask: int64 [N]."""
        return first_equal(self.rows["digest"][self.places])

    @cached_property
    def _equal_order(self) -> np.ndarray:
        """Places, equal ones side by side and in order: int64 [N]."""
        return np.argsort(self.first_equal, kind="stable")

    def equal_to(self, place: int) -> np.ndarray:
        """The places of all sequences equal to that of a place, itself among them, ascending."""
        order = self._equal_order
        first = self.first_equal[place]
        low = np.searchsorted(self.first_equal, first, side="left", sorter=order)
        high = np.searchsorted(self.first_equal, first, side="right", sorter=order)
        return order[low:high]

    def place_of(self, one: int) -> int | None:
        """The place of an id, None where no live sequence has it."""
        place = int(np.searchsorted(self.ids, one))
        return place if place < len(self.ids) and self.ids[place] == one else None

    # ---- files

    def codes_of(self, rows: np.ndarray) -> np.ndarray:
        """The codes of some rows, which ascend: uint8 [rows, bytes]."""
        homes = np.searchsorted(self.starts, rows, side="right") - 1
        found = []
        for home in np.unique(homes).tolist():
            own = (rows[homes == home] - self.starts[home]).tolist()
            stored = self.reader(self.segments[home]).codes(self.manifest.code["length"])
            found.append(stored.codes(own))
        return np.concatenate(found)

    def records(self, rows: Sequence[int] | np.ndarray) -> list[Record]:
        """What the sequences of these rows are, in that order."""
        homes = np.searchsorted(self.starts, np.asarray(rows), side="right") - 1
        found: dict[int, Record] = {}
        for home in np.unique(homes).tolist():
            segment = self.segments[home]
            here = [int(row) for row, own in zip(rows, homes, strict=True) if own == home]
            read = self.reader(segment).records([row - int(self.starts[home]) for row in here])
            for row, record in zip(here, read, strict=True):
                _check(self, segment, row, record)
                found[row] = record
        return [found[int(row)] for row in rows]


def _check(contents: Contents, segment: Segment, row: int, record: Record) -> None:
    """Raise DamagedIndexError for a record that is not the row's, or that no model can take."""
    wrong = None
    if record.id != contents.rows["id"][row] or \
            (digest_of(record) != contents.rows["digest"][row]).any():
        wrong = f"has another sequence {contents.rows['id'][row]} than rows.npy"
    elif len(record.tokens) > contents.manifest.sequence_length or record.tokens.min() < 0 or \
            record.tokens.max() >= contents.manifest.vocabulary:
        wrong = f"has a sequence {record.id} that is too long or outside the vocabulary"
    if wrong:
        raise contents.files.damaged(layout.segment_file(segment.name, layout.RECORDS), wrong)
