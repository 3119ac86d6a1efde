"""Take sequences out of every answer, or give up segments that are damaged.

Nothing is rewritten: a list of deleted ids, and a manifest that names it, is all that is new.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradindex.errors import InputError
from gradindex.progress import Progress
from gradindex.storage.contents import Contents
from gradindex.storage.row_file import first_equal
from gradindex.terminal import shell_word
from indexer.upkeep.commit import commit_segments, writing


@dataclass(frozen=True)
class Deleted:
    """What a delete did.

    `deleted` ids were taken out, and `already` of those asked for were out before; `equal_left` are
    the ids of equal sequences that are still in.
    """

    deleted: int
    already: int
    equal_left: list[int]

    def lines(self, index: Path) -> list[str]:
        """What is said of it, in lines."""
        already = f", {self.already:,} were deleted before" if self.already else ""
        lines = [f"{self.deleted:,} sequences deleted{already}"]
        # who deletes a text for its content wants its copies gone as well
        if self.equal_left:
            shown = ", ".join(map(str, self.equal_left[:10])) + ", …" * (len(self.equal_left) > 10)
            lines.append(f"warning: {len(self.equal_left)} sequences with the same tokens stay: "
                         f"{shown}")
        if self.deleted:
            lines.append(f"their text is on the disk until: gradindex compact {shell_word(index)}")
        return lines


def delete(
    index: str | Path, ids: Iterable[int] = (), user_ids: Collection[str] = (),
    progress: Progress | None = None,
) -> Deleted:
    """Take sequences out of every answer, by id, or by the user's own id of a document in them.

    Their text stays in the index's files until `compact`. Searchers that are open already keep
    finding them. Raises InputError, deleting nothing, for an id that no sequence ever had, and
    ResourceError.
    """
    progress = progress or Progress()
    with writing(Path(index), "gradindex delete", progress) as contents:
        manifest, rows = contents.manifest, contents.rows
        requested = {*map(int, ids), *_of_users(contents, set(map(str, user_ids)), progress)}
        if unknown := sorted(sequence for sequence in requested
                             if not 0 <= sequence < manifest.next_id):
            raise InputError(f"no sequence has the id {unknown[0]}; expected 0 to "
                             f"{manifest.next_id - 1}. Nothing was deleted.")
        # ids without a row were deleted and compacted away: like those listed, out already
        gone = set(contents.deleted.tolist())
        new = set(rows["id"][np.isin(rows["id"], list(requested))].tolist()) - gone
        if not new:
            return Deleted(0, len(requested), [])
        equal_left = _equal_left(rows, new, gone)  # said, not deleted: the user may want them
        commit_segments(contents, manifest.segments, gone | new, {})
    return Deleted(len(new), len(requested) - len(new), equal_left)


def _of_users(contents: Contents, user_ids: set[str], progress: Progress) -> set[int]:
    """Ids of the sequences that hold a document of these user ids. Raises InputError."""
    if not user_ids:
        return set()
    ids: set[int] = set()
    seen: set[str] = set()
    progress.start("look up", len(contents.rows), "sequences")
    # users' ids are in the records alone, so all of them are read
    for number, segment in enumerate(contents.segments):
        start = int(contents.starts[number])
        for record in contents.records(range(start, start + segment.rows)):
            held = {str(part.user_id) for part in record.parts if part.user_id is not None}
            if held & user_ids:
                ids.add(record.id)
                seen |= held & user_ids
        progress.update(segment.rows)
    progress.finish()
    if missing := sorted(user_ids - seen):
        raise InputError(
            f"no document has the id {missing[0]!r} of your own. Nothing was deleted. Was the "
            "index built with --id-field?")
    return ids


def _equal_left(rows: np.ndarray, new: set[int], gone: set[int]) -> list[int]:
    """Ids of rows that equal one of `new` and stay."""
    out = np.isin(rows["id"], list(new | gone))
    first = first_equal(rows["digest"])
    equal = np.isin(first, first[np.isin(rows["id"], list(new))])
    return [int(sequence) for sequence in rows["id"][equal & ~out]]


def give_up(index: str | Path, names: Collection[str], progress: Progress | None = None) -> int:
    """Give up damaged segments, so that the index is whole without them; returns their rows.

    Raises InputError for a name that is no segment's.
    """
    progress = progress or Progress()
    with writing(Path(index), "gradindex delete", progress, damaged=True) as contents:
        manifest = contents.manifest
        known = [segment.name for segment in manifest.segments]
        if unknown := sorted(set(names) - set(known)):
            raise InputError(f"--segment {unknown[0]}: no such segment; expected one of "
                             f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}.")
        # what is deleted of the others stays deleted
        kept = [segment for segment in manifest.segments if segment.name not in names]
        commit_segments(contents, kept, set(contents.deleted.tolist()), {})
    return sum(segment.rows for segment in manifest.segments if segment.name in names)
