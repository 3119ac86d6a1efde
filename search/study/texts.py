"""What the sequences of an index are: where they come from, how long they are."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gradindex.model import tokenise
from gradindex.progress import Progress
from gradindex.storage.records import Record
from gradindex.terminal import json_text
from search.rank.snapshot import Snapshot
from search.show.task_words import PAIR, SECOND_TEXT

RECORDS_HELD = 4096  # in memory at once
MOST_VALUES = 1000  # of a kept field, beyond which they aren't told apart
EXCERPT = 400  # letters of a text


@dataclass
class Amount:
    """How much of the live index comes from somewhere: a source, or a value of a kept field.

    A sequence packed from several documents counts for each; its tokens are divided.
    """

    name: str
    documents: int
    sequences: int
    token_count: int


@dataclass
class FieldAmounts:
    """A kept field by value, most sequences first; None where there are more than MOST_VALUES."""

    name: str
    values: list[Amount] | None


@dataclass
class TextSurvey:
    """What the live sequences are: by source and field, and lengths [N] in tokens, int32.

    `full` of them have as many tokens as a sequence may have, of a pair one of its texts.
    """

    sources: list[Amount]
    fields: list[FieldAmounts]
    lengths: np.ndarray
    full: int
    scored: int


@dataclass
class ShownSequence:
    """A sequence that is shown, and how many others equal it.

    `texts` are its texts, each with its name where it has two; `label` is its class.
    """

    id: int
    where: str
    user_id: Any
    token_count: int
    texts: list[tuple[str, str]]
    label: str | None
    copies: int


class _Tally:
    """Counts of documents, sequences and tokens by name."""

    def __init__(self) -> None:
        self._documents: dict[str, set[int]] = {}
        self._sequences: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._documents)

    def add(self, parts: list[tuple[str, int, int]]) -> None:
        """A sequence's parts, as (name, document, tokens)."""
        for name, document, tokens in parts:
            self._documents.setdefault(name, set()).add(document)
            self._tokens[name] += tokens
        # a sequence counts once for a name, however many of its parts bear it
        self._sequences.update({name for name, _, _ in parts})

    def amounts(self) -> list[Amount]:
        """Most sequences first, then by name."""
        return sorted((Amount(name, len(documents), self._sequences[name], self._tokens[name])
                       for name, documents in self._documents.items()),
                      key=lambda amount: (-amount.sequences, amount.name))


def read_texts(snapshot: Snapshot, progress: Progress) -> TextSurvey:
    """Read every live record."""
    sources, fields = _Tally(), dict[str, _Tally | None]()
    lengths, full, scored = np.zeros(len(snapshot), dtype=np.int32), 0, 0
    of_pairs = snapshot.manifest.task.of_pairs  # whose texts are bounded each
    progress.start("records", len(snapshot), "sequences")
    for place, record in enumerate(_records(snapshot, range(len(snapshot)))):
        lengths[place] = len(record.tokens)
        border = record.border if of_pairs and record.border is not None else 0
        full += max(border, len(record.tokens) - border) == snapshot.manifest.sequence_length
        scored += snapshot.objective.predictions(record)
        starts = [part.token for part in record.parts] + [len(record.tokens)]
        tokens = [end - start for start, end in pairwise(starts)]
        documents = [part.document for part in record.parts]
        sources.add(list(zip([part.source for part in record.parts], documents, tokens,
                             strict=True)))
        for name in {name for part in record.parts for name in part.fields}:
            tally = fields.setdefault(name, _Tally())
            if tally is None:
                continue
            tally.add([(_as_text(part.fields[name]), document, count) for part, document, count in
                       zip(record.parts, documents, tokens, strict=True) if name in part.fields])
            # a field of ids has a value a document: its counts would fill memory and say nothing
            if len(tally) > MOST_VALUES:
                fields[name] = None
        if (place + 1) % RECORDS_HELD == 0 or place + 1 == len(snapshot):
            progress.update(place % RECORDS_HELD + 1)
    progress.finish()
    return TextSurvey(
        sources.amounts(), [FieldAmounts(name, tally.amounts() if tally else None)
                            for name, tally in sorted(fields.items())], lengths, full, scored)


def _records(snapshot: Snapshot, places: Sequence[int]) -> Iterator[Record]:
    """The records of places, RECORDS_HELD of them in memory at once."""
    for first in range(0, len(places), RECORDS_HELD):
        yield from snapshot.records(places[first : first + RECORDS_HELD])


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json_text(value)


def shown_sequences(snapshot: Snapshot, places: list[int]) -> list[ShownSequence]:
    """The sequences at some places as they are shown, in that order."""
    shown = []
    for place, record in zip(places, snapshot.records(places), strict=True):
        pieces = tokenise.pieces(snapshot.tokenizer, record.tokens.tolist())
        names = ("",) if record.border is None else \
            PAIR if snapshot.manifest.task.of_pairs else SECOND_TEXT
        texts = ("".join(pieces),) if record.border is None else \
            tokenise.two_texts(pieces, record.border)
        first, labels = record.parts[0], snapshot.manifest.plan.labels
        shown.append(ShownSequence(
            record.id, f"{first.source}:{first.row}", first.user_id, len(record.tokens),
            [(name, _excerpt(text, EXCERPT // len(texts)))
             for name, text in zip(names, texts, strict=True)],
            None if record.label is None else labels[record.label], len(snapshot.copies(place)),
        ))
    return shown


def _excerpt(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
