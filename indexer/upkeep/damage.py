"""What is damaged in an index, found without its model.

Every file, record, row and code is looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gradindex.errors import DamagedIndexError
from gradindex.influence.curvature import FiledEkfac
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.storage import background_file, layout, records
from gradindex.storage.background_file import BackgroundQueries
from gradindex.storage.contents import Contents
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.layout import SegmentFile, curvature_file
from gradindex.storage.manifest import Manifest, Segment
from gradindex.storage.records import Record


@dataclass
class Damage:
    """What is wrong in an index, and how many files, bytes and records were looked at.

    `reasons` goes by the name of a segment, or of a file outside all segments.
    """

    reasons: dict[str, list[str]] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0
    records: int = 0

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Note a DamagedIndexError that comes out of here, under a name."""
        try:
            yield
        except DamagedIndexError as error:
            self.reasons.setdefault(name, []).append(error.wrong)

    @property
    def outside_segments(self) -> bool:
        """Whether something is damaged that every search needs."""
        return any(not name.isdecimal() for name in self.reasons)


def find_damage(index: Path, manifest: Manifest, progress: Progress) -> Damage:
    """Digest every file; where all that a search needs is sound, compare the segments' files."""
    damage = Damage()
    _check_files(index, manifest, damage, progress)
    if not damage.outside_segments:
        _check_rows(index, manifest, damage, progress)
    return damage


def _check_files(index: Path, manifest: Manifest, damage: Damage, progress: Progress) -> None:
    """Digest every file, and read the curvature and the background queries."""
    files = Contents(index, manifest).files
    progress.start("digest", len(manifest.files), "files")
    modules = {curvature_file(module): module for module in manifest.modules}
    for name in sorted(manifest.files):
        with damage.noting(layout.segment_of(name) or name):
            if name in modules:  # with the right digest it can still hold what no build writes
                _check_curvature(files, modules[name], manifest)
            else:
                files.check(name, digest=True)
        damage.files += 1
        damage.bytes += manifest.files[name].size
        progress.update(1)
    progress.finish()
    if manifest.background is not None and layout.BACKGROUND not in damage.reasons:
        with damage.noting(layout.BACKGROUND):
            read_background_queries(index / layout.BACKGROUND, manifest)


def _check_curvature(files: CheckedFiles, module: Module, manifest: Manifest) -> None:
    """Read the curvature of a module, and digest it on the way. Raises DamagedIndexError."""
    _ = FiledEkfac(
        lambda one, device: files.tensors(curvature_file(one), device), [module],
        lambda _: torch.device("cpu"), torch.float32,
        manifest.plan.covariance_blocks)[module.name]


def read_background_queries(path: Path, manifest: Manifest) -> BackgroundQueries:
    """The background queries of an index that has some. Raises DamagedIndexError."""
    assert manifest.background is not None
    return background_file.load(path, manifest.background["queries"], manifest.code["length"])


def _check_rows(index: Path, manifest: Manifest, damage: Damage, progress: Progress) -> None:
    """Compare each segment's files with each other: records, rows, codes, tokens."""
    # a list that can't be read would bring the deleted back: every search needs it
    with damage.noting(str(manifest.deleted_file)):
        _ = Contents(index, manifest).deleted
    progress.start("records", manifest.rows, "sequences")
    last = -1
    for segment in manifest.segments:
        if segment.name not in damage.reasons:
            with damage.noting(segment.name):
                last = _check_segment(Contents(index, manifest, [segment]), segment, last)
                damage.records += segment.rows
        progress.update(segment.rows)
    progress.finish()
    if not damage.reasons:  # only of whole segments can be said whether the manifest counts right
        with damage.noting(layout.MANIFEST):
            _ = Contents(index, manifest).places


def _check_segment(contents: Contents, segment: Segment, last: int) -> int:
    """Raise DamagedIndexError where a segment's files contradict each other; its last id.

    `last` is that of the segment before.
    """
    def wrong(file: SegmentFile, what: str) -> DamagedIndexError:
        return contents.files.damaged(layout.segment_file(segment.name, file), what)

    reader = contents.reader(segment)
    rows, facts = contents.rows, reader.facts()
    if rows["id"][0] <= last:
        raise wrong(layout.ROWS, "has ids that don't follow those of the segment before")
    # files that a stranger sealed have the right digests; only together they show a lie
    stored = contents.records(range(segment.rows))  # checks each checksum, id and digest
    broken = set(rows["id"][np.isnan(rows["norm"])].tolist())
    if facts.rows != segment.rows or set(facts.quarantined) != broken:
        raise wrong(layout.NOTES, "doesn't say why each row without a code has none")
    codes = reader.codes(contents.manifest.code["length"])
    if not np.isfinite(codes.scales()).all():
        raise wrong(layout.CODES, "has a scale that is not finite")
    matrix = reader.tokens(contents.manifest.sequence_length, contents.manifest.vocabulary)
    for row, record in enumerate(stored):
        tokens = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
        if not np.array_equal(np.sort(tokens), np.unique(record.tokens)):
            raise wrong(layout.TOKENS, f"has other tokens than record {row}")
    return int(rows["id"][-1])


def sound_records(contents: Contents, name: str) -> list[Record]:
    """A segment's records by themselves, [] where they are damaged or the segment is gone."""
    rows = next((one.rows for one in contents.manifest.segments if one.name == name), 0)
    try:
        # without rows.npy, which may be what is damaged: each record has a checksum of its own
        path = contents.files.path(layout.segment_file(name, layout.RECORDS), records.check_pages)
        return records.read(path, range(rows))
    except DamagedIndexError:
        return []
