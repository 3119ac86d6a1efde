"""Rewrite segments that hold deleted sequences or are not full.

Records, codes and rows are copied as they are, so ids and answers stay the same; only the segments'
borders move.
"""

import shutil
from pathlib import Path

import numpy as np

from gradindex.errors import ResourceError
from gradindex.progress import Progress, size
from gradindex.storage import layout, records
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.files import FileFacts, make_folder
from gradindex.storage.manifest import Segment
from gradindex.storage.manifest import load as load_manifest
from gradindex.storage.segments import SegmentFacts
from indexer.encode import seal
from indexer.read.ingest import sealed_files
from indexer.upkeep.commit import clean, commit_segments, refuse_unfinished, writing


def compact(index: str | Path, progress: Progress | None = None) -> int:
    """Rewrite segments that hold deleted sequences or are not full; returns how many were.

    Ids, codes and answers stay the same; the text of deleted sequences is gone from the disk when
    no open searcher holds the old files any more. Raises ResourceError, InputError while an append
    is unfinished.
    """
    progress, folder = progress or Progress(), Path(index)
    with writing(folder, "gradindex compact", progress) as contents:
        manifest = contents.manifest
        # 1) what is to be rewritten; an unfinished append has the numbers that are next
        refuse_unfinished(folder, manifest)
        groups = _groups(contents)
        count = sum(map(len, groups))
        if not count:
            progress.say("nothing to compact: no segment holds deleted sequences or can be joined")
            return 0
        _check_room(contents, groups)

        # 2) each group of neighbours into new segments
        rows = sum(segment.rows for group in groups for segment in group)
        progress.start("compact", rows, "sequences")
        number = manifest.next_segment
        new_files: dict[str, FileFacts] = {}
        replacing: dict[str, list[Segment]] = {}  # by each old segment's name
        for group in groups:
            written, files = _rewrite(contents, group, number, progress)
            # the new ones stand where the first of the group stood: ids ascend throughout
            replacing |= {segment.name: [] for segment in group} | {group[0].name: written}
            new_files |= files
            number += len(written)
        progress.finish()

        # 3) one commit, then the old files can go
        order = [new for old in manifest.segments for new in replacing.get(old.name, [old])]
        commit_segments(contents, order, set(contents.deleted.tolist()), new_files,
                        next_segment=number)
        clean(folder, load_manifest(folder), progress)
    return count


def _groups(contents: Contents) -> list[list[Segment]]:
    """Neighbouring segments to be rewritten together: with deleted rows, or not full."""
    full = contents.manifest.plan.segment_size
    deleted = np.isin(contents.rows["id"], contents.deleted)
    groups: list[list[Segment]] = [[]]
    holding: set[str] = set()
    for number, segment in enumerate(contents.segments):
        start = int(contents.starts[number])
        if deleted[start : start + segment.rows].any():
            holding.add(segment.name)
        if segment.name in holding or segment.rows < full:
            groups[-1].append(segment)
        elif groups[-1]:
            groups.append([])
    # one that is not full and has no neighbour to join would only be copied
    return [group for group in groups
            if len(group) > 1 or any(segment.name in holding for segment in group)]


def _check_room(contents: Contents, groups: list[list[Segment]]) -> None:
    """Raise ResourceError where the disk hasn't room for old and new files at once."""
    # as if nothing were deleted: how much smaller the new ones are isn't known before
    needed = sum(contents.manifest.files[name].size for group in groups for segment in group
                 for name in layout.segment_files(segment.name))
    free = shutil.disk_usage(contents.root).free
    if needed > free:
        raise ResourceError(
            f"compacting writes at most {size(needed)} before the old files can go; "
            f"{contents.root} has {size(free)} free. Free some space and run it again."
        )


def _rewrite(
    contents: Contents, group: list[Segment], number: int, progress: Progress
) -> tuple[list[Segment], dict[str, FileFacts]]:
    """Copy what isn't deleted of neighbouring segments into new ones, numbered from `number`."""
    full = contents.manifest.plan.segment_size
    home = contents.segments.index(group[0])
    first, end = contents.starts[home], contents.starts[home + len(group)]
    rows_left = np.flatnonzero(~np.isin(contents.rows["id"][first:end], contents.deleted)) + first
    vocabulary = contents.manifest.vocabulary
    reasons = {sequence: why for segment in group
               for sequence, why in contents.reader(segment).facts().quarantined.items()}
    written: list[Segment] = []
    files: dict[str, FileFacts] = {}
    for start in range(0, len(rows_left), full):
        rows = rows_left[start : start + full]
        segment = Segment(layout.segment_name(number + len(written)), len(rows))
        folder = layout.partial_folder(contents.root, segment.name)
        make_folder(folder)
        kept = contents.records(rows)
        # a quarantined sequence is a row without a code, and its reason goes with it
        facts = SegmentFacts(len(rows), quarantined={
            record.id: reasons[record.id] for record in kept if record.id in reasons})
        facts.files[layout.RECORDS.name] = records.write(folder / layout.RECORDS.name, kept)
        codes = CodeIndex(contents.manifest.code["length"])
        codes.add(contents.codes_of(rows))
        seal(folder, facts, codes, contents.rows[rows], [record.tokens for record in kept],
             vocabulary)
        files |= sealed_files(contents.root, segment, facts)
        written.append(segment)
        progress.update(len(rows))
    return written, files
