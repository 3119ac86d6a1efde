"""An index after its build: delete sequences, compact segments, drop or rebuild damaged ones.

Each is one commit: new files first, under names never used before, then the manifest. Who reads
keeps what the old manifest lists; `clean` removes it when no reader is left.
"""

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradindex.errors import DamagedIndexError, InputError, ResourceError
from gradindex.progress import Progress, size
from gradindex.storage import layout, manifest, records, row_file
from gradindex.storage.code_file import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.files import TEMPORARY, FileFacts, disk_errors, make_folder
from gradindex.storage.integrity import refuse_links
from gradindex.storage.layout import APPEND, BUILD, PARTIAL, segment_folder
from gradindex.storage.locks import free_of_readers, only_writer
from gradindex.storage.manifest import Manifest, Segment
from gradindex.storage.segments import SegmentFacts
from indexer.encode import seal
from indexer.read.ingest import remove_any, remove_unsealed, sealed_files
from indexer.state import unfinished_append


@contextmanager
def writing(
    index: Path, doing: str, say: Progress, damaged: bool = False, discard: bool = False
) -> Iterator[Contents]:
    """Be the one writer of a finished index, whose files are present and of the right size.

    Leftovers of killed writers are removed first; with `discard` what an unfinished append did,
    too. With `damaged`, the files that the manifest lists are not looked at.
    Raises InputError, DamagedIndexError (also for a link, which could lead a writer elsewhere),
    GradindexError while another process writes.
    """
    manifest.load(index)  # is it an index at all?
    with only_writer(index, doing), disk_errors(index):
        refuse_links(index)
        contents = Contents(index, manifest.load(index))
        if discard and _to_be_discarded(index, contents.manifest):
            (index / APPEND).unlink()
            remove_unsealed(index, contents.manifest.next_segment)
            say.say(f"{index}: what an unfinished append did is dropped")
        if not damaged:
            for problem in manifest.problems(contents.files, contents.manifest):
                raise problem.error
        clean(index, contents.manifest, say)
        yield contents


def _to_be_discarded(index: Path, facts: Manifest) -> bool:
    """Whether there is an unfinished append, or something that can't be read as one."""
    try:
        return unfinished_append(index, facts.next_id) is not None
    except DamagedIndexError:
        return True


# ---- delete


@dataclass(frozen=True)
class Deleted:
    """What a delete did: how many ids it took out, how many were out already, and the ids of equal
    sequences that are still in."""

    deleted: int
    already: int
    equal_left: list[int]


def delete(
    index: str | Path, ids: Iterable[int] = (), user_ids: Collection[str] = (),
    progress: Progress | None = None,
) -> Deleted:
    """Take sequences out of every answer, by id, or by the user's own id of a document in them.

    Their text stays in the index's files until `compact`. Searchers that are open already keep
    finding them. Raises InputError, deleting nothing, for an id that no sequence ever had, and
    ResourceError.
    """
    say = progress or Progress()
    folder = Path(index)
    with writing(folder, "gradindex delete", say) as contents:
        facts, rows = contents.manifest, contents.rows
        wanted = {int(one) for one in ids} | _of_users(contents, set(map(str, user_ids)), say)
        if never := sorted(one for one in wanted if not 0 <= one < facts.next_id):
            raise InputError(f"no sequence has the id {never[0]}; expected 0 to "
                             f"{facts.next_id - 1}. Nothing was deleted.")
        gone = set(contents.deleted.tolist())
        new = set(rows["id"][np.isin(rows["id"], list(wanted))].tolist()) - gone
        if not new:
            return Deleted(0, len(wanted), [])
        equal_left = _equal_left(rows, new, gone)
        commit(contents, facts.segments, gone | new, {})
    return Deleted(len(new), len(wanted) - len(new), equal_left)


def _of_users(contents: Contents, wanted: set[str], say: Progress) -> set[int]:
    """Ids of the sequences that hold a document of these user ids. Raises InputError."""
    if not wanted:
        return set()
    found: set[int] = set()
    seen: set[str] = set()
    say.start("look up", len(contents.rows), "sequences")
    for number, segment in enumerate(contents.segments):
        start = int(contents.starts[number])
        for record in contents.records(range(start, start + segment.rows)):
            own = {str(part.user_id) for part in record.parts if part.user_id is not None}
            if own & wanted:
                found.add(record.id)
                seen |= own & wanted
        say.update(segment.rows)
    say.finish()
    if missing := sorted(wanted - seen):
        raise InputError(
            f"no document has the id {missing[0]!r} of your own. Nothing was deleted. Was the "
            "index built with --id-field?")
    return found


def _equal_left(rows: np.ndarray, new: set[int], gone: set[int]) -> list[int]:
    """Ids of rows that equal one of `new` and stay."""
    out = np.isin(rows["id"], list(new | gone))
    first = row_file.first_equal(rows["digest"])
    equal = np.isin(first, first[np.isin(rows["id"], list(new))])
    return [int(one) for one in rows["id"][equal & ~out]]


# ---- compact


def compact(index: str | Path, progress: Progress | None = None) -> int:
    """Rewrite segments that hold deleted sequences or are not full; returns how many were.

    Ids, codes and answers stay the same; the text of deleted sequences is gone from the disk when
    no open searcher holds the old files any more. Raises ResourceError, InputError while an append
    is unfinished.
    """
    say = progress or Progress()
    folder = Path(index)
    with writing(folder, "gradindex compact", say) as contents:
        facts = contents.manifest
        refuse_unfinished(folder, facts)
        groups = _groups(contents)
        count = sum(map(len, groups))
        if not count:
            say.say("nothing to compact: no segment holds deleted sequences or can be joined")
            return 0
        _check_room(contents, groups)
        say.start("compact", sum(one.rows for group in groups for one in group), "sequences")
        number = facts.next_segment
        new_files: dict[str, FileFacts] = {}
        lists: dict[str, list[Segment]] = {}  # by the name of a group's first segment
        for group in groups:
            written, own = _rewrite(contents, group, number, say)
            lists[group[0].name] = written
            new_files |= own
            number += len(written)
        say.finish()
        rewritten = {one.name for group in groups for one in group}
        order = [one for segment in facts.segments for one in (
            lists.get(segment.name, []) if segment.name in rewritten else [segment])]
        commit(contents, order, set(contents.deleted.tolist()), new_files, next_segment=number)
        clean(folder, manifest.load(folder), say)
    return count


def refuse_unfinished(index: Path, facts: Manifest) -> None:
    """Raise InputError while an append is unfinished."""
    if unfinished_append(index, facts.next_id):
        raise InputError(
            f"{index} has an unfinished append. Run its command again to finish it, or drop what "
            f"it did: gradindex append {index} --discard."
        )


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
    return [group for group in groups
            if len(group) > 1 or any(one.name in holding for one in group)]


def _check_room(contents: Contents, groups: list[list[Segment]]) -> None:
    needed = sum(contents.manifest.files[name].size
                 for group in groups for one in group
                 for name in layout.segment_files(one.name))
    free = shutil.disk_usage(contents.root).free
    if needed > free:
        raise ResourceError(
            f"compacting writes at most {size(needed)} before the old files can go; "
            f"{contents.root} has {size(free)} free. Free some space and run it again."
        )


def _rewrite(
    contents: Contents, group: list[Segment], number: int, say: Progress
) -> tuple[list[Segment], dict[str, FileFacts]]:
    """Copy what isn't deleted of neighbouring segments into new ones, numbered from `number`."""
    full = contents.manifest.plan.segment_size
    place = contents.segments.index(group[0])
    first, end = contents.starts[place], contents.starts[place + len(group)]
    kept = np.flatnonzero(~np.isin(contents.rows["id"][first:end], contents.deleted)) + first
    vocabulary = contents.manifest.vocabulary
    reasons = {one: why for segment in group
               for one, why in contents.reader(segment).facts().quarantined.items()}
    written: list[Segment] = []
    files: dict[str, FileFacts] = {}
    for start in range(0, len(kept), full):
        rows = kept[start : start + full]
        segment = Segment(f"{number + len(written):06d}", len(rows))
        folder = segment_folder(contents.root, segment.name + PARTIAL)
        make_folder(folder)
        here = contents.records(rows)
        facts = SegmentFacts(len(rows), quarantined={
            record.id: reasons[record.id] for record in here if record.id in reasons})
        facts.files["records.lmdb"] = records.write(folder / "records.lmdb", here)
        codes = CodeIndex(contents.manifest.code["length"])
        codes.add(contents.codes_of(rows))
        seal(folder, facts, codes, contents.rows[rows], [record.tokens for record in here],
             vocabulary)
        files |= sealed_files(contents.root, segment, facts)
        written.append(segment)
        say.update(len(rows))
    return written, files


# ---- the commit


def commit(
    contents: Contents, chosen: list[Segment], deleted: set[int],
    new_files: dict[str, FileFacts], rows: np.ndarray | None = None, **changes: Any,
) -> None:
    """Make the index consist of the segments `chosen`, without the ids `deleted`; count it anew.

    `new_files` are the files of segments that are new. `rows` are all of theirs in order [read].
    Raises ResourceError.
    """
    index, facts = contents.root, contents.manifest
    listed = {**facts.files, **new_files}
    files = {name: one for name, one in listed.items()
             if name.startswith("curvature/") or name == layout.BACKGROUND}
    files |= {name: listed[name] for segment in chosen
              for name in layout.segment_files(segment.name)}
    if rows is None:
        rows = Contents(index, replace(facts, segments=chosen, files=files, **changes)).rows
    here = np.array(sorted(deleted & set(rows["id"].tolist())), dtype=np.int64)
    name = None
    if len(here):
        name = f"deleted/{facts.generation + 1:06d}.npy"
        if not (index / "deleted").is_dir():
            make_folder(index / "deleted")
        files[name] = row_file.write_ids(index / name, here)
    alive = ~np.isin(rows["id"], here)
    broken = np.isnan(rows["norm"])
    live = rows["digest"][alive & ~broken]
    manifest.commit(index, replace(
        facts, generation=facts.generation + 1, segments=chosen, files=files,
        sequences=len(live), deleted=len(here), deleted_file=name,
        quarantined=int((alive & broken).sum()),
        duplicates=row_file.count_equal(live), **changes,
    ))


# ---- what nobody needs any more


def clean(index: Path, facts: Manifest, say: Progress) -> None:
    """Remove what the manifest doesn't list: leftovers of killed writers, and old files.

    What an earlier manifest listed stays while a reader has the index open, and what an unfinished
    append made stays until that is finished. Only an append removes `append.json`: it says that the
    same command, run again, has nothing more to do.
    """
    (index / BUILD).unlink(missing_ok=True)
    shutil.rmtree(index / "curvature.partial", ignore_errors=True)
    for leftover in (*index.glob(f"*{TEMPORARY}"), *index.glob(f"deleted/*{TEMPORARY}")):
        leftover.unlink()
    appending = unfinished_append(index, facts.next_id) is not None
    never, old = [], []
    for folder in (index / "segments").iterdir():
        if folder.name in {segment.name for segment in facts.segments}:
            continue
        number = folder.name.removesuffix(PARTIAL)
        if not number.isdecimal():
            continue  # not ours
        if int(number) >= facts.next_segment:
            never.append(folder)
        else:
            old.append(folder)
    for folder in never:
        if not appending:
            remove_any(folder)
    old += [file for file in index.glob("deleted/*.npy")
            if f"deleted/{file.name}" != facts.deleted_file]
    if not old:
        return
    with free_of_readers(index) as free:
        for path in old if free else ():
            remove_any(path)
    if not free:
        say.say(f"{len(old)} old segments or lists stay on the disk while the index is open "
                "elsewhere; the next append, delete or compact removes them")


def remove(index: str | Path, names: Collection[str], progress: Progress | None = None) -> int:
    """Give up damaged segments, so that the index is whole without them; returns their rows.

    Raises InputError for a name that is no segment's.
    """
    say = progress or Progress()
    with writing(Path(index), "gradindex delete", say, damaged=True) as contents:
        facts = contents.manifest
        known = [segment.name for segment in facts.segments]
        if unknown := sorted(set(names) - set(known)):
            raise InputError(f"--segment {unknown[0]}: no such segment; expected one of "
                             f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}.")
        left = [segment for segment in facts.segments if segment.name not in names]
        commit(contents, left, set(contents.deleted.tolist()), {})
    return sum(segment.rows for segment in facts.segments if segment.name in names)


