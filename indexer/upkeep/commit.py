"""The one writer of a finished index: what was left behind is removed, what is new is committed.

Whatever is done to an index is one commit: new files first, under names never used before, then the
manifest. Who reads keeps what the old manifest lists; `clean` removes it when no reader is left.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradindex.errors import DamagedIndexError, InputError
from gradindex.progress import Progress
from gradindex.storage import layout, row_file
from gradindex.storage.contents import Contents
from gradindex.storage.files import TEMPORARY, FileFacts, make_folder
from gradindex.storage.integrity import refuse_links
from gradindex.storage.layout import APPEND, BUILD, PARTIAL
from gradindex.storage.locks import free_of_readers, only_writer
from gradindex.storage.manifest import Manifest, Segment, problems
from gradindex.storage.manifest import commit as commit_manifest
from gradindex.storage.manifest import load as load_manifest
from gradindex.storage.os_errors import disk_errors
from gradindex.terminal import shell_word
from indexer.read.ingest import remove_any, remove_unsealed
from indexer.state import unfinished_append


@contextmanager
def writing(
    index: Path, doing: str, progress: Progress, damaged: bool = False, discard: bool = False
) -> Iterator[Contents]:
    """Be the one writer of a finished index, whose files are present and of the right size.

    Leftovers of killed writers are removed first; with `discard` what an unfinished append did,
    too. With `damaged`, the files that the manifest lists are not looked at.
    Raises InputError, DamagedIndexError (also for a link, which could lead a writer elsewhere),
    GradindexError while another process writes.
    """
    load_manifest(index)  # is it an index at all?
    with only_writer(index, doing), disk_errors(index):
        refuse_links(index)
        # read again: another writer may have committed before this one had the lock
        contents = Contents(index, load_manifest(index))
        if discard and _to_be_discarded(index, contents.manifest):
            (index / APPEND).unlink()
            remove_unsealed(index, contents.manifest.next_segment)
            progress.say(f"{index}: what an unfinished append did is dropped")
        if not damaged:
            for problem in problems(contents.files, contents.manifest):
                raise problem.error
        clean(index, contents.manifest, progress)
        yield contents


def _to_be_discarded(index: Path, manifest: Manifest) -> bool:
    """Whether there is an unfinished append, or something that can't be read as one."""
    try:
        return unfinished_append(index, manifest.next_id) is not None
    except DamagedIndexError:
        return True


def refuse_unfinished(index: Path, manifest: Manifest) -> None:
    """Raise InputError while an append is unfinished."""
    if unfinished_append(index, manifest.next_id):
        raise InputError(
            f"{index} has an unfinished append. Run its command again to finish it, or drop what "
            f"it did: gradindex append {shell_word(index)} --discard."
        )


def commit_segments(
    contents: Contents, segments: list[Segment], deleted: set[int],
    new_files: dict[str, FileFacts], rows: np.ndarray | None = None, **changes: Any,
) -> None:
    """Make the index consist of the `segments`, without the ids `deleted`; count it anew.

    `new_files` are the files of segments that are new. `rows` are all of theirs in order [read].
    Raises ResourceError.
    """
    index, manifest = contents.root, contents.manifest
    listed = {**manifest.files, **new_files}
    files = {name: facts for name, facts in listed.items()
             if name.startswith(f"{layout.CURVATURE}/") or name == layout.BACKGROUND}
    files |= {name: listed[name] for segment in segments
              for name in layout.segment_files(segment.name)}
    if rows is None:  # an append has read them already
        rows = Contents(index, replace(manifest, segments=segments, files=files, **changes)).rows
    # ids of rows that are gone for good, compacted away, needn't be remembered as deleted
    present = np.array(sorted(deleted & set(rows["id"].tolist())), dtype=np.int64)
    name = None
    if len(present):
        name = layout.deleted_file(manifest.generation + 1)
        if not (index / layout.DELETED).is_dir():
            make_folder(index / layout.DELETED)
        files[name] = row_file.write_ids(index / name, present)
    alive = ~np.isin(rows["id"], present)
    broken = np.isnan(rows["norm"])
    live = rows["digest"][alive & ~broken]
    commit_manifest(index, replace(
        manifest, generation=manifest.generation + 1, segments=segments, files=files,
        sequences=len(live), deleted=len(present), deleted_file=name,
        quarantined=int((alive & broken).sum()),
        duplicates=row_file.count_equal(live), **changes,
    ))


def clean(index: Path, manifest: Manifest, progress: Progress) -> None:
    """Remove what the manifest doesn't list: leftovers of killed writers, and old files.

    What an earlier manifest listed stays while a reader has the index open, and what an unfinished
    append made stays until that is finished. Only an append removes `append.json`: it says that the
    same command, run again, has nothing more to do.
    """
    (index / BUILD).unlink(missing_ok=True)
    shutil.rmtree(index / layout.CURVATURE_PARTIAL, ignore_errors=True)
    appending = unfinished_append(index, manifest.next_id) is not None
    if not appending:
        shutil.rmtree(index / layout.REFERENCE_PARTIAL, ignore_errors=True)
    for leftover in (*index.glob(f"*{TEMPORARY}"), *index.glob(f"{layout.DELETED}/*{TEMPORARY}")):
        leftover.unlink()
    listed = {segment.name for segment in manifest.segments}
    never: list[Path] = []  # listed by any manifest
    old: list[Path] = []  # listed by an earlier one
    for folder in (index / layout.SEGMENTS).iterdir():
        number = folder.name.removesuffix(PARTIAL)
        if folder.name in listed or not number.isdecimal():
            continue  # in use, or not ours
        # numbers are given once and in order: from the next on, no manifest had them yet
        (never if int(number) >= manifest.next_segment else old).append(folder)
    for folder in never:
        if not appending:
            remove_any(folder)
    old += [file for file in index.glob(f"{layout.DELETED}/*.npy")
            if f"{layout.DELETED}/{file.name}" != manifest.deleted_file]
    if not old:
        return
    with free_of_readers(index) as free:
        for path in old if free else ():
            remove_any(path)
    if not free:
        progress.say(f"{len(old)} old segments or lists stay on the disk while the index is open "
                     "elsewhere; the next append, delete or compact removes them")
