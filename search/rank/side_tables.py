"""What a search reads of an index besides codes and records: words, and background queries."""

import numpy as np

from gradindex import draws
from gradindex.draws import Stream
from gradindex.model.tokenise import common_tokens
from gradindex.objective.batch import halves
from gradindex.storage import background_file, layout
from gradindex.storage.background_file import BackgroundQueries
from gradindex.storage.contents import Contents
from gradindex.storage.records import Record
from gradindex.storage.token_file import TokenMatrix
from search.rank.likeness import Wording

RANDOM_SAMPLE = 64  # sequences rescored with every query


class SideTables:
    """Tables of the sequences of an index, each read at first use.

    They know the contents and nothing else, least of all the snapshot: a circle would keep it,
    and its lock, until Python happens to look for circles. Reading raises DamagedIndexError.
    """

    def __init__(self, contents: Contents):
        self._contents = contents
        self._tokens: TokenMatrix | None = None
        self._wording: Wording | None = None
        self._two_texts: float | None = None
        self._opening: np.ndarray | None = None
        self._background_queries: BackgroundQueries | None = None

    @property
    def tokens(self) -> TokenMatrix:
        """Which tokens the sequence of each place holds."""
        if self._tokens is None:
            # of all rows, for the deleted are in a segment's table too; `live` leaves them out
            contents, manifest = self._contents, self._contents.manifest
            self._tokens = TokenMatrix(
                [contents.reader(segment).tokens(manifest.sequence_length, manifest.vocabulary)
                 for segment in contents.segments], contents.live)
        return self._tokens

    @property
    def wording(self) -> Wording:
        """How rare tokens are, told from the random sample."""
        # a sample is enough to tell rare from common; counting all would read every record
        if self._wording is None:
            rows = self._contents.places[random_sample(self._contents, len(self._contents))]
            self._wording = Wording([record.tokens for record in self._contents.records(rows)])
        return self._wording

    @property
    def two_texts(self) -> float:
        """Which share of the sequences has two texts, 0 to 1, told from the random sample."""
        if self._two_texts is None:
            sample = random_sample(self._contents, len(self._contents))
            records = self._contents.records(self._contents.places[sample])
            self._two_texts = sum(one.border is not None for one in records) / len(records)
        return self._two_texts

    @property
    def opening(self) -> np.ndarray:
        """The tokens that all texts of the random sample begin with, as a chat template's do."""
        if self._opening is None:
            sample = random_sample(self._contents, len(self._contents))
            texts = [text for record in self._contents.records(self._contents.places[sample])
                     for text in self._texts(record)]
            common = min(common_tokens(texts[0], text) for text in texts)
            # a whole text in common is none that others only begin with
            self._opening = texts[0][:common if common < min(map(len, texts)) else 0]
        return self._opening

    def _texts(self, record: Record) -> tuple[np.ndarray, ...]:
        """The texts of a sequence that the model read by themselves."""
        if record.border is None or not self._contents.manifest.task.of_pairs:
            return (record.tokens,)
        return halves(record.tokens, record.border)

    @property
    def background_queries(self) -> BackgroundQueries | None:
        """The background queries; None where an earlier version built the index."""
        facts = self._contents.manifest.background
        if self._background_queries is None and facts is not None:
            self._background_queries = background_file.load(
                self._contents.files.path(layout.BACKGROUND), facts["queries"],
                self._contents.manifest.code["length"])
        return self._background_queries


def random_sample(contents: Contents, total: int) -> list[int]:
    """Some of the `total` places, drawn at random once for all, ascending."""
    # by the index's own seed: whoever asks finds the same sample, and percentiles compare
    return draws.distinct(Stream.RANDOM_SAMPLE, contents.manifest.code["seed"], total,
                          RANDOM_SAMPLE)
