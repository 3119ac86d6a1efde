"""What a search reads: the manifest at once, model, curvature, codes and records at first use."""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from gradindex import draws, memory
from gradindex.draws import Stream
from gradindex.errors import DamagedIndexError, GradindexError
from gradindex.influence.exact import Exact, Rescorer, rescore
from gradindex.influence.fitted import FittedModel
from gradindex.influence.queries import Preconditioned
from gradindex.model.source import ModelSource
from gradindex.storage import background_file, code_file, layout, locks, manifest, token_file
from gradindex.storage.background_file import BackgroundQueries
from gradindex.storage.contents import Contents
from gradindex.storage.manifest import Manifest
from gradindex.storage.records import Record
from search.rank.groups import Grouping, read_grouping
from search.rank.likeness import Wording
from search.rank.ranking import CodeRanking, Ranking

BACKGROUND = 64  # random sequences rescored with every query


class LostError(GradindexError):
    """Segments can't be reached any more, by name, and `why`; the others can be searched."""

    def __init__(self, segments: frozenset[str], why: str):
        super().__init__(f"{why}. Try again, when it is back.")
        self.segments, self.why = segments, why


@dataclass(frozen=True)
class Coverage:
    """How much of an index is searched, where damaged or lost segments are left out."""

    sequences: int
    of_sequences: int  # the index's, when it was whole
    damaged: tuple[str, ...]  # the names of the segments left out
    lost: tuple[str, ...] = ()  # the names of those that can't be reached, see LostError
    why: str = ""

    @property
    def share(self) -> float:
        return self.sequences / self.of_sequences if self.of_sequences else 1.0

    @property
    def whole(self) -> bool:
        return not (self.damaged or self.lost)

    def __str__(self) -> str:
        """What to say of it where it isn't all."""
        left_out = [f"{_named(names)} {'is' if len(names) == 1 else 'are'} {what} and left out"
                    for names, what in ((self.damaged, "damaged"),
                                        (self.lost, f"out of reach ({self.why})")) if names]
        return (f"coverage {self.share:.1%}: {self.sequences:,} of {self.of_sequences:,} sequences "
                f"are searched; {', '.join(left_out)}, and the recall statement is about the rest")


def _named(segments: tuple[str, ...]) -> str:
    shown = ", ".join(segments[:3]) + ", …" * (len(segments) > 3)
    return f"{'segment' if len(segments) == 1 else 'segments'} {shown}"


@dataclass(frozen=True)
class Part:
    """Some segments of an index, by name, and the manifest that they are listed in."""

    manifest: Manifest
    segments: tuple[str, ...]


class OpenIndex(FittedModel):
    """An index folder, what it holds, and the model it belongs to.

    It keeps seeing what was there when it was opened: appending, deleting and compacting leave the
    files it reads. Small files are digested at once, each other one when it is first used;
    with `allow_damaged` all are at once, and segments with a damaged file are left out. With `part`
    it is as if the index held no more. Raises DamagedIndexError for missing or changed files,
    InputError where there is no index.
    """

    def __init__(
        self, path: Path, source: ModelSource, allow_damaged: bool = False,
        part: Part | None = None,
    ):
        self.path = path
        locks.hold_for_reading(path, self)
        facts = manifest.load(path) if part is None else part.manifest
        self.digest = manifest.digest_of(facts)[:16]
        self.contents, self.coverage = _part(path, part) if part is not None else \
            _undamaged(path, facts) if allow_damaged else _whole(path, facts)
        super().__init__(replace(facts, sequences=self.coverage.sequences), self.contents.files,
                         source)
        self._background_queries: BackgroundQueries | None = None
        self._read_nothing()

    def _read_nothing(self) -> None:
        """Forget what was read of the segments."""
        self._segments: list[code_file.CodeIndex] | None = None
        self._tokens: token_file.TokenMatrix | None = None
        self._wording: Wording | None = None
        self._groupings: dict[str, Grouping] = {}

    def without(self, lost: LostError) -> Self:
        """This index but for the segments that were lost; it has the same model.

        Raises LostError where no sequence is left.
        """
        left = [segment for segment in self.contents.segments if segment.name not in lost.segments]
        contents = Contents(self.path, self.contents.manifest, left)
        contents.files = self.contents.files  # which knows what was digested
        why = "; ".join(filter(None, [self.coverage.why, lost.why]))
        if not left or not len(contents):
            raise LostError(lost.segments, f"nothing is left to search: {why}")
        rest = copy.copy(self)
        gone = {segment.name for segment in self.contents.segments} & lost.segments
        rest.contents, rest.coverage = contents, replace(
            self.coverage, sequences=len(contents), lost=(*self.coverage.lost, *sorted(gone)),
            why=why)
        rest.manifest = replace(self.manifest, sequences=len(contents))
        rest._read_nothing()
        return rest

    def load(self) -> None:
        """Read the model, the curvature and the codes now."""
        _ = self.codes, self.segments(), self.norms

    def __len__(self) -> int:
        """N: the sequences that are searched."""
        return self.coverage.sequences

    def segments(self) -> list[code_file.CodeIndex]:
        """The codes of every segment, read at first use; mapped where they would fill memory."""
        if self._segments is None:
            width = layout.code_bytes(self.manifest.code["length"])
            every = width * int(self.contents.starts[-1])
            mapped = every > self.allowance.part(1 / 4, memory.available() // 2)
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                self._segments = list(pool.map(
                    lambda segment: self.contents.reader(segment).codes(
                        self.manifest.code["length"], mapped), self.contents.segments))
        return self._segments

    def code_scores(self, queries: np.ndarray) -> np.ndarray:
        """The code score of every place for query vectors [q, K]: float32 [q, N]."""
        scores = self._finite(
            code_file.scan(self.segments(), queries, max(1, torch.get_num_threads())))
        places = self.contents.places
        return scores if len(places) == scores.shape[1] else scores[:, places]

    def rankings(self, queries: np.ndarray, sign: float, by_norm: bool) -> Sequence[Ranking]:
        """The order of every place by code for each of the query vectors [q, K].

        `sign` is −1 for opponents; `by_norm` orders by score / ‖v_m‖.
        """
        return [CodeRanking(scores, self.norms, sign, by_norm)
                for scores in self.code_scores(queries)]

    def code_scores_at(self, places: Sequence[int], query: np.ndarray) -> np.ndarray:
        """The code scores of some places for one query vector [K]: float32 [places]."""
        return self._finite(self.codes_at(places).scores(query))

    def _finite(self, scores: np.ndarray) -> np.ndarray:
        """These code scores. Raises DamagedIndexError for what no code encoded here gives."""
        if not np.isfinite(scores).all():  # in a file that is rightly digested
            raise DamagedIndexError(
                f"the codes of {self.path} give scores that are not finite. `gradindex verify "
                f"{self.path}` says which segment; don't trust it if it comes from a stranger."
            )
        return scores

    @property
    def norms(self) -> np.ndarray:
        """‖v_m‖ of every place: float64 [N]."""
        return self.contents.norms

    @property
    def tokens(self) -> token_file.TokenMatrix:
        """Which tokens the sequence of each place holds."""
        if self._tokens is None:
            contents = self.contents
            self._tokens = token_file.TokenMatrix(
                [contents.reader(segment).tokens(self.manifest.sequence_length,
                                                 self.manifest.vocabulary)
                 for segment in contents.segments], contents.live)
        return self._tokens

    def grouping(self, by: str) -> Grouping:
        """Which sequences belong to which document, source or value of a field."""
        if by not in self._groupings:
            self._groupings[by] = read_grouping(self.contents, self.segments(), by)
        return self._groupings[by]

    @property
    def background_queries(self) -> BackgroundQueries | None:
        """The background queries, read at first use; None where an earlier version built this."""
        facts = self.manifest.background
        if self._background_queries is None and facts is not None:
            self._background_queries = background_file.load(
                self.contents.files.path(layout.BACKGROUND), facts["queries"],
                self.manifest.code["length"])
        return self._background_queries

    def codes_at(self, places: Sequence[int]) -> code_file.CodeIndex:
        """The codes at these places, in that order."""
        codes = code_file.CodeIndex(self.manifest.code["length"])
        codes.add(self.stored_codes(places))
        return codes

    def stored_codes(self, places: Sequence[int]) -> np.ndarray:
        """The codes at these places as they are kept, in that order: uint8 [places, bytes]."""
        rows = self.contents.places[np.asarray(places, dtype=np.int64)]
        homes = np.searchsorted(self.contents.starts, rows, side="right") - 1
        found = np.zeros((len(rows), layout.code_bytes(self.manifest.code["length"])), np.uint8)
        for home in np.unique(homes).tolist():
            own = rows[homes == home] - self.contents.starts[home]
            found[homes == home] = self.segments()[home].codes(own.tolist())
        return found

    def rescore(
        self, by: Rescorer, preconditioned: Preconditioned, places: Sequence[int],
        sizes: bool = False, terms: bool = False,
    ) -> Iterator[list[tuple[int, Exact]]]:
        """Yield, batch by batch, (place, score), the first places first; see `rescore.rescore`."""
        for found in rescore(by, preconditioned, self.records(places), sizes, terms):
            yield [(places[number], one) for number, one in found]

    def records(self, places: Sequence[int]) -> list[Record]:
        """What the sequences at these places are, in that order."""
        return self.contents.records(self.contents.places[np.asarray(places, dtype=np.int64)])

    def copies(self, place: int) -> list[int]:
        """The ids of the other sequences equal to that of a place, ascending."""
        equal = self.contents.equal_to(place)
        return [int(self.contents.ids[one]) for one in equal if one != place]

    def background(self) -> list[int]:
        """Places of a fixed random sample of the index."""
        return draws.distinct(Stream.BACKGROUND_SAMPLE, self.manifest.code["seed"], len(self),
                              BACKGROUND)

    @property
    def wording(self) -> Wording:
        """How rare tokens are, told from the background sample."""
        if self._wording is None:
            self._wording = Wording([one.tokens for one in self.records(self.background())])
        return self._wording


def _part(path: Path, part: Part) -> tuple[Contents, Coverage]:
    """Some segments, whose files are checked when they are read."""
    chosen = [one for one in part.manifest.segments if one.name in part.segments]
    contents = Contents(path, part.manifest, chosen)
    return contents, Coverage(len(contents), len(contents), ())


def _whole(path: Path, facts: Manifest) -> tuple[Contents, Coverage]:
    """Everything. Raises DamagedIndexError for the first file that is missing or changed."""
    contents = Contents(path, facts)
    for problem in manifest.problems(contents.files, facts):
        raise problem.error
    return contents, Coverage(facts.sequences, facts.sequences, ())


def _undamaged(path: Path, facts: Manifest) -> tuple[Contents, Coverage]:
    """Every segment without a damaged file.

    Raises DamagedIndexError where none is left, or a file is damaged that every search needs.
    """
    whole = Contents(path, facts)
    damaged = set()
    for problem in manifest.problems(whole.files, facts, digest=True):
        if problem.segment is None:
            raise problem.error
        damaged.add(problem.segment)
    left = [segment for segment in facts.segments if segment.name not in damaged]
    if not left:
        raise DamagedIndexError(
            f"every segment of {path} is damaged. `gradindex verify {path}` says what to do."
        )
    contents = Contents(path, facts, left)
    return contents, Coverage(len(contents), facts.sequences, tuple(sorted(damaged)))
