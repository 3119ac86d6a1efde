"""Mend an index: damaged segments are encoded again from their records, where those are sound."""

from pathlib import Path

import torch

from gradindex.errors import DamagedIndexError
from gradindex.influence.fitted_model import FittedModel
from gradindex.model.model_source import ModelSource
from gradindex.progress import Progress
from gradindex.storage import layout
from gradindex.storage.contents import Contents
from gradindex.storage.files import FileFacts
from gradindex.storage.manifest import Segment
from gradindex.storage.segments import SegmentFacts
from gradindex.terminal import shell_word
from indexer.encode import encode_segment
from indexer.read.ingest import sealed_files, write_partial
from indexer.upkeep.commit import commit_segments, refuse_unfinished, writing
from indexer.upkeep.damage import find_damage, sound_records


def rebuild(index: Path, source: ModelSource, progress: Progress) -> list[str]:
    """Encode damaged segments again from their records, in one commit; the names of those.

    `source` says where the model is now. Raises DamagedIndexError where a segment that can't be
    mended can't even be counted, InputError while an append is unfinished.
    """
    with writing(index, "gradindex verify --rebuild", progress, damaged=True) as contents:
        manifest = contents.manifest
        refuse_unfinished(index, manifest)  # whose segments have the numbers that are next

        # 1) what is damaged is found again, now that nobody else writes
        damage = find_damage(index, manifest, Progress())
        if damage.outside_segments:
            return []
        names = [name for name in sorted(damage.reasons) if sound_records(contents, name)]
        if not names:
            return []
        for name in sorted(set(damage.reasons) - set(names)):  # which stay as they are
            _check_countable(contents, name)

        # 2) each of them under a new name, in the same place
        fitted = FittedModel(manifest, contents.files, source)
        torch.set_num_threads(manifest.threads)  # as at the build: more give other bits
        order: list[Segment] = []
        files: dict[str, FileFacts] = {}
        number = manifest.next_segment
        rows = sum(segment.rows for segment in manifest.segments if segment.name in names)
        progress.start("rebuild", rows, "sequences")
        for segment in manifest.segments:
            if segment.name in names:
                new = Segment(layout.segment_name(number), segment.rows)
                facts = _encode_again(contents, fitted, segment, new, progress)
                files |= sealed_files(index, new, facts)
                segment, number = new, number + 1
            order.append(segment)
        progress.finish()

        # 3) one commit
        commit_segments(contents, order, set(contents.deleted.tolist()), files,
                        next_segment=number)
    return names


def _check_countable(contents: Contents, name: str) -> None:
    """Raise DamagedIndexError where not even a segment's rows can be read."""
    kept = [segment for segment in contents.manifest.segments if segment.name == name]
    try:
        _ = Contents(contents.root, contents.manifest, kept).rows
    except DamagedIndexError as error:
        raise DamagedIndexError(
            f"{error.wrong}, and its records are lost too, so nothing can be rebuilt beside it. "
            f"Take {layout.SEGMENTS}/{name} from a copy of the index, or give it up first: "
            f"`gradindex delete {shell_word(contents.root)} --segment {name}`."
        ) from None


def _encode_again(
    contents: Contents, fitted: FittedModel, segment: Segment, new: Segment, progress: Progress
) -> SegmentFacts:
    """Write and seal a new segment from an old one's records."""
    records = sound_records(contents, segment.name)
    folder = write_partial(contents.root, new.name, records)
    facts, seal_it = encode_segment(fitted.model, fitted.codes, records, folder,
                                    fitted.manifest.batch_tokens, progress)
    seal_it()
    return facts
