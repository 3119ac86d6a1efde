"""What the sequences of an index are, as far as an audit asks before it scores any."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradindex.errors import InputError
from gradindex.progress import Progress
from gradindex.storage.records import Record
from gradindex.task import LABELS
from gradindex.terminal import json_text
from search.rank.snapshot import Snapshot
from search.study.texts import RECORDS_HELD
from search.study.truth import Truth, read_truth

MOST_VALUES = 1000  # of a field that says what is corrupted
PAIRS = "all"  # the one class of pairs
LARGEST_WHOLE = 1 << 63  # beyond, a whole number has no type in a table


@dataclass
class RowFacts:
    """Of every place: its `lengths` in tokens and the number of its class, int32 [N].

    `classes` are their names: a classifier's; of pairs all are of one. Otherwise there are none,
    and numbers are −1. `fields` are those that were kept, by name, with the one type that their
    values have or None.
    """

    lengths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] = ()
    fields: dict[str, type | None] = field(default_factory=dict)
    truth: Truth | None = None


def read_rows(
    snapshot: Snapshot, truth: str | None, truth_as: str | None, progress: Progress
) -> RowFacts:
    """Read every record once; `truth` is the field that says what is corrupted, by `truth_as`.

    Raises InputError for a field that was not kept, or says nothing of the kind.
    """
    if truth is not None:
        check_kept(snapshot, truth)
    total = len(snapshot)
    task, names = snapshot.manifest.task, snapshot.manifest.plan.labels
    numbers = np.full(total, 0 if task.of_pairs else -1, np.int32)
    facts = RowFacts(np.zeros(total, np.int32), numbers, (PAIRS,) if task.of_pairs else names)
    kinds: dict[str, set[type | None]] = {}
    values, said = _Values(truth), np.full(total, -1, np.int32)
    progress.start("records", total, "sequences")
    for first in range(0, total, RECORDS_HELD):
        records = snapshot.records(range(first, min(total, first + RECORDS_HELD)))
        for place, record in enumerate(records, first):
            facts.lengths[place] = len(record.tokens)
            if record.label is not None:
                facts.labels[place] = record.label
            # a table's columns, with their types, have to be known before its first row
            found = fields_of(record)
            for name, value in found.items():
                kinds.setdefault(name, set()).add(_kind(value))
            if truth is not None:
                said[place] = values.number(found.get(truth))
        progress.update(len(records))
    progress.finish()
    facts.fields = {name: _one_kind(kinds[name]) for name in sorted(kinds)}
    if truth is not None:
        facts.truth = read_truth(truth, values.values, said, names,
                                 facts.labels if task.name == "classification" else None,
                                 truth_as)
    return facts


def check_kept(snapshot: Snapshot, truth: str) -> None:
    """Raise InputError for a field that the index doesn't keep."""
    plan = snapshot.manifest.plan
    kept, labels = plan.record_fields, (plan.label_field,) if plan.label_field else LABELS
    if truth not in kept and plan.task == "classification" and truth in labels:
        raise InputError(
            f"--truth {truth} is the label that the model was trained on, which is what is "
            "audited. Give a field that says what is corrupted, or the true label, and was kept "
            f"at the build ({', '.join(kept) or 'none was'}).")
    if truth not in kept:
        available = f"kept were {', '.join(kept)}" if kept else "none was kept"
        raise InputError(f"--truth {truth}: expected a field that was kept at the build "
                         f"({available}). Keep it with build --keep-fields {truth}.")


def fields_of(record: Record) -> dict[str, Any]:
    """The kept fields of a sequence; of several documents with unlike values, a list of them."""
    if len(record.parts) == 1:
        return record.parts[0].fields
    found: dict[str, list[Any]] = {}
    for part in record.parts:
        for name, value in part.fields.items():
            several = found.setdefault(name, [])
            if value not in several:
                several.append(value)
    return {name: several[0] if len(several) == 1 else several for name, several in found.items()}


class _Values:
    """The different values of a field, and which one each sequence has."""

    def __init__(self, name: str | None):
        self._name = name
        self._numbers: dict[str, int] = {}
        self.values: list[Any] = []

    def number(self, value: Any) -> int:
        """The number of a value, −1 for none. Raises InputError for more than there may be."""
        if value is None:
            return -1
        text = json_text(value)
        if text not in self._numbers:
            if len(self.values) == MOST_VALUES:
                raise InputError(
                    f"--truth {self._name} has more than {MOST_VALUES:,} different values, such as "
                    f"{text[:60]}; expected marks of what is corrupted, or labels.")
            self._numbers[text] = len(self.values)
            self.values.append(value)
        return self._numbers[text]


def _kind(value: Any) -> type | None:
    """The type of a value as a column may have it; None where it has none or is too large."""
    kind = type(value)
    if kind is int and not -LARGEST_WHOLE <= value < LARGEST_WHOLE:
        return None
    return kind if kind in (bool, int, float, str, type(None)) else None


def _one_kind(kinds: set[type | None]) -> type | None:
    """The type that all of some values have, a value that is missing left out.

    >>> _one_kind({int, float}), _one_kind({str, type(None)}), _one_kind({str, int})
    (<class 'float'>, <class 'str'>, None)
    """
    there = kinds - {type(None)}
    if there == {int, float}:
        return float
    return next(iter(there)) if len(there) == 1 else None
