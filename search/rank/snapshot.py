"""What a search reads: the manifest at once, model, curvature, codes and records at first use."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from gradindex import memory
from gradindex.errors import DamagedIndexError
from gradindex.influence.device_codes import DeviceCodes
from gradindex.influence.exact import Exact, Rescorer, rescore
from gradindex.influence.fitted_model import FittedModel
from gradindex.influence.preconditioned import Preconditioned
from gradindex.model.chat_template import has_chat_template
from gradindex.model.devices import free_on
from gradindex.model.model_source import ModelSource
from gradindex.model.tokenise import common_tokens, encode, pieces
from gradindex.results import Query
from gradindex.storage import code_index, layout, locks
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.manifest import Manifest, digest_of, problems
from gradindex.storage.manifest import load as load_manifest
from gradindex.storage.records import Record
from gradindex.terminal import shell_word
from search.rank.coverage import Coverage, LostError
from search.rank.grouping import Grouping, read_grouping
from search.rank.ranking import CodeRanking, Ranking
from search.rank.side_tables import SideTables, random_sample

OPENING_SHOWN = 60  # letters of what every chat begins with


@dataclass(frozen=True)
class SegmentSubset:
    """Some segments of an index, by name, and the manifest that they are listed in."""

    manifest: Manifest
    segments: tuple[str, ...]


class Snapshot(FittedModel):
    """What a search reads of an index folder: what it holds, and the model it belongs to.

    It keeps seeing what was there when it was opened: appending, deleting and compacting leave the
    files it reads. Small files are digested at once, each other one when it is first used;
    with `allow_damaged` all are at once, and segments with a damaged file are left out. With a
    `subset` it is as if the index held no more. Raises DamagedIndexError for missing or changed
    files, InputError where there is no index.
    """

    def __init__(
        self, path: Path, source: ModelSource, allow_damaged: bool = False,
        subset: SegmentSubset | None = None,
    ):
        self.path = path
        # before the manifest is read, or a compaction could take away what it lists
        locks.hold_for_reading(path, self)
        manifest = load_manifest(path) if subset is None else subset.manifest
        self.digest = digest_of(manifest)[:16]
        self.contents, self.coverage = _some(path, subset) if subset is not None else \
            _undamaged(path, manifest) if allow_damaged else _all(path, manifest)
        super().__init__(replace(manifest, sequences=self.coverage.sequences), self.contents.files,
                         source)
        self.tables = SideTables(self.contents)
        self._segments: list[CodeIndex] | None = None
        self._device_codes: DeviceCodes | None = None
        self._groupings: dict[str, Grouping] = {}

    def without(self, lost: LostError) -> Self:
        """This snapshot but for the segments that were lost; it has the same model.

        Raises LostError where no sequence is left.
        """
        names = {segment.name for segment in self.contents.segments}
        contents = Contents(self.path, self.contents.manifest, [
            segment for segment in self.contents.segments if segment.name not in lost.segments])
        contents.files = self.contents.files  # which knows what was digested
        why = "; ".join(filter(None, [self.coverage.why, lost.why]))
        if not contents.segments or not len(contents):
            raise LostError(lost.segments, f"nothing is left to search: {why}")
        # a copy, which has the same model and curvature: they need not be read again
        rest = copy.copy(self)
        rest.contents, rest.coverage = contents, replace(
            self.coverage, sequences=len(contents), why=why,
            lost=(*self.coverage.lost, *sorted(names & lost.segments)))
        rest.manifest = replace(self.manifest, sequences=len(contents))
        # what was read of all segments is not what these hold
        rest.tables, rest._segments, rest._groupings = SideTables(contents), None, {}
        rest._device_codes = None
        return rest

    def load(self) -> None:
        """Read the model, the curvature and the codes now."""
        _ = self.codes, self.segments(), self.norms

    def __len__(self) -> int:
        """N: the sequences that are searched."""
        return self.coverage.sequences

    # ---- codes

    def segments(self) -> list[CodeIndex]:
        """The codes of every segment, read at first use; mapped where they would fill memory."""
        if self._segments is None:
            length = self.manifest.code["length"]
            # in memory a scan is faster, but never at the price of what searches need besides
            total = layout.code_bytes(length) * int(self.contents.starts[-1])
            mapped = total > self.allowance.part(1 / 4, memory.available() // 2)
            self._segments = memory.in_threads(
                lambda segment: self.contents.reader(segment).codes(length, mapped),
                self.contents.segments, torch.get_num_threads())
        self.contents.files.check_mapped()
        return self._segments

    def code_scores(self, vectors: np.ndarray) -> np.ndarray:
        """The code score of every place for query vectors [q, K]: float32 [q, N]."""
        device, segments = self.model.device, self.segments()  # checked again for every search
        if device.type == "cpu":
            scores = code_index.scan(segments, vectors, max(1, torch.get_num_threads()))
        else:
            if self._device_codes is None:
                room = self.allowance.part(1 / 4, free_on(device) // 2)
                self._device_codes = DeviceCodes(
                    segments, self.manifest.code["length"], device, room)
            scores = self._device_codes.scores(vectors)
        finite(scores, self.path)
        rows = self.contents.places
        # rows are places where nothing is deleted, and then nothing is copied
        return scores if len(rows) == scores.shape[1] else scores[:, rows]

    def rankings(self, vectors: np.ndarray, sign: float, by_norm: bool) -> Sequence[Ranking]:
        """The order of every place by code for each of the query vectors [q, K].

        `sign` is −1 for opponents; `by_norm` orders by score / ‖v_m‖.
        """
        return [CodeRanking(scores, self.norms, sign, by_norm)
                for scores in self.code_scores(vectors)]

    def codes_at(self, places: Sequence[int]) -> CodeIndex:
        """The codes at these places, in that order."""
        codes = CodeIndex(self.manifest.code["length"])
        codes.add(self.stored_codes(places))
        return codes

    def stored_codes(self, places: Sequence[int]) -> np.ndarray:
        """The codes at these places as they are kept, in that order: uint8 [places, bytes]."""
        rows = self.contents.places[np.asarray(places, dtype=np.int64)]
        return self.contents.codes_of(rows, self.segments())

    @property
    def norms(self) -> np.ndarray:
        """‖v_m‖ of every place: float64 [N]."""
        return self.contents.norms

    # ---- sequences

    def records(self, places: Sequence[int]) -> list[Record]:
        """What the sequences at these places are, in that order."""
        return self.contents.records(self.contents.places[np.asarray(places, dtype=np.int64)])

    def copies(self, place: int) -> list[int]:
        """The ids of the other sequences equal to that of a place, ascending."""
        equal = self.contents.equal_to(place)
        return [int(self.contents.ids[other]) for other in equal if other != place]

    def random_sample(self) -> list[int]:
        """Places of a fixed random sample of the index."""
        return random_sample(self.contents, len(self))

    def grouping(self, by: str) -> Grouping:
        """Which sequences belong to which document, source or value of a field."""
        if by not in self._groupings:
            self._groupings[by] = read_grouping(self.contents, self.segments(), by)
        return self._groupings[by]

    def rescore(
        self, by: Rescorer, preconditioned: Preconditioned, places: Sequence[int],
        sizes: bool = False, terms: bool = False,
    ) -> Iterator[list[tuple[int, Exact]]]:
        """Yield, batch by batch, (place, score), the first places first; see `exact.rescore`."""
        for batch in rescore(by, preconditioned, self.records(places), sizes, terms):
            yield [(places[number], exact) for number, exact in batch]


def unlike(snapshot: Snapshot, query: Query) -> str | None:
    """What to say of a query's text that is of another form than the index's sequences."""
    if snapshot.manifest.task.name != "classification":
        return _begun_otherwise(snapshot, query)
    two, share = query.border is not None, snapshot.tables.two_texts
    if 0 < share < 1 or two == (share == 1):
        return None
    return ("the query has two texts, and the sequences of this index have one: so was its model "
            "trained, most likely. Leave the second out" if two else
            "the query has one text, and the sequences of this index have two: the model reads it "
            "as it was not trained to. Give the second, text_b")


def _begun_otherwise(snapshot: Snapshot, query: Query) -> str | None:
    """What to say of a query without what a chat template puts in front of every sequence."""
    if snapshot.tokenizer is None or not has_chat_template(snapshot.tokenizer):
        return None
    opening = snapshot.tables.opening
    # beyond what any text begins with; all of it no chat with another system message has
    plain = common_tokens(encode(snapshot.tokenizer, "").tokens, opening)
    if len(opening) == plain or common_tokens(np.array(query.tokens), opening) > plain:
        return None
    text = "".join(pieces(snapshot.tokenizer, opening.tolist()))
    text = text if len(text) <= OPENING_SHOWN else f"{text[:OPENING_SHOWN]}…"
    how = "messages (--messages FILE)" if snapshot.manifest.task.is_causal else \
        "a prompt and answers that are lists of messages, on a command line as JSON"
    return (f"the sequences of this index begin with {text!r}, as chats do, and the query doesn't: "
            f"the model reads it as it was not trained to. Ask with {how}")


def finite(scores: np.ndarray, path: Path) -> np.ndarray:
    """These code scores. Raises DamagedIndexError for what no code encoded here gives."""
    if not np.isfinite(scores).all():  # in a file that is rightly digested
        raise DamagedIndexError(
            f"the codes of {path} give scores that are not finite. `gradindex verify "
            f"{shell_word(path)}` says which segment; don't trust it if it comes from a stranger."
        )
    return scores


def _some(path: Path, subset: SegmentSubset) -> tuple[Contents, Coverage]:
    """Some segments, whose files are checked when they are read."""
    chosen = [segment for segment in subset.manifest.segments if segment.name in subset.segments]
    # a worker doesn't look at files of others, which may be gone
    contents = Contents(path, subset.manifest, chosen)
    return contents, Coverage(len(contents), len(contents), ())


def _all(path: Path, manifest: Manifest) -> tuple[Contents, Coverage]:
    """Everything. Raises DamagedIndexError for the first file that is missing or changed."""
    contents = Contents(path, manifest)
    for problem in problems(contents.files, manifest):
        raise problem.error
    return contents, Coverage(manifest.sequences, manifest.sequences, ())


def _undamaged(path: Path, manifest: Manifest) -> tuple[Contents, Coverage]:
    """Every segment without a damaged file.

    Raises DamagedIndexError where none is left, or a file is damaged that every search needs.
    """
    whole = Contents(path, manifest)
    damaged = set()
    for problem in problems(whole.files, manifest, digest=True):
        # the curvature, say: without it no segment can be searched
        if problem.segment is None:
            raise problem.error
        damaged.add(problem.segment)
    sound = [segment for segment in manifest.segments if segment.name not in damaged]
    if not sound:
        raise DamagedIndexError(
            f"every segment of {path} is damaged. `gradindex verify {shell_word(path)}` says what "
            "to do."
        )
    contents = Contents(path, manifest, sound)
    return contents, Coverage(len(contents), manifest.sequences, tuple(sorted(damaged)))
