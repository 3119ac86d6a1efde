"""Which sequences are known to be corrupted, and how well a signal finds them.

A kept field tells: marks (true and false, 1 and 0), or of a classifier's sequences the true label,
which is compared with the one they have. Of two classes 0 and 1 may be either, which nothing in the
data can tell: of rare classes there are as few as of wrong labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from gradindex.errors import InputError
from gradindex.model.class_labels import TRUTHS, label_number
from gradindex.terminal import json_text

INSPECTED = (0.05, 0.1, 0.2, 0.3)  # shares of which is said how much they find
# in which ways a field may be read, and what is then said
READINGS = {"marks": "as marks of what is corrupted",
            "labels": "as true labels, compared with the sequences' own"}
MARKS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
MOST_STEPS = 150  # points of a curve


@dataclass
class Truth:
    """What a field says: `corrupted` bool [N], of the sequences for which it is `known` bool [N].

    `how` says in words how the field was read.
    """

    field: str
    corrupted: np.ndarray
    known: np.ndarray
    how: str


@dataclass
class Detection:
    """How well a signal tells the corrupted: larger values for more suspect ones.

    `found` are the shares of the corrupted among the first `INSPECTED`; of equal values each is as
    likely to be looked at.
    """

    signal: str
    auroc: float
    average_precision: float
    found: tuple[float, ...]


def read_truth(
    field: str, values: Sequence[Any], numbers: np.ndarray, labels: Sequence[str],
    rows_labels: np.ndarray | None, meant: str | None = None,
) -> Truth:
    """The truth that a field tells, read as is `meant`, one of READINGS [as can be told].

    The value of each sequence is the one of `values` that `numbers` [N] says, −1 where it has none.
    `labels` are the names of a classifier's classes and `rows_labels` [N] those of its sequences.
    Raises InputError where it can't be told, or is the same of all.

    >>> read_truth("swapped", ["1", "0"], np.array([1, 0, 1, -1]), (), None).corrupted.tolist()
    [False, True, False, False]
    """
    known = numbers >= 0
    # every way in which all values can be read; 0 and 1 may be marks and classes
    readings = {}
    marks = [_mark(value) for value in values]
    # a mark that all have may be a label of half of them; the name of a class is no mark
    if len(values) == 1 and (marks[0] is not None or _label(values[0], labels) is None):
        raise InputError(_constant(field, values[0], known))
    if values and None not in marks:
        readings["marks"] = _looked_up(marks, numbers)
    true_labels = [_label(value, labels) for value in values]
    if values and rows_labels is not None and None not in true_labels:
        readings["labels"] = known & (
            _looked_up(true_labels, numbers) != rows_labels)
    meant = _reading(field, readings, meant, known, values, labels)
    corrupted, how = readings[meant], READINGS[meant]
    found = int(corrupted.sum())
    if found in (0, int(known.sum())):
        raise InputError(
            f"--truth {field}: read {how}, {'none' if not found else 'every one'} of "
            f"{int(known.sum()):,} sequences is corrupted, so there is nothing to tell apart. "
            "Expected some of both" + (
                ": a field of true labels beside those that the model was trained on."
                if meant == "labels" else "."))
    return Truth(field, corrupted, known, how)


def _constant(field: str, value: Any, known: np.ndarray) -> str:
    """What is wrong with a field that has one value alone."""
    without = int((~known).sum())
    return (f"--truth {field} is {json_text(value)[:60]} for every one of the {int(known.sum()):,} "
            "sequences that have it, so there is nothing to tell apart. Expected some that are "
            "corrupted and some that aren't" + (
                f"; {without:,} have no value, which is not read as false." if without else "."))


def _looked_up(meanings: Sequence[Any], numbers: np.ndarray) -> np.ndarray:
    """What each sequence's value means; 0 of those that have none."""
    told = np.array(meanings)
    return np.asarray(np.where(numbers >= 0, told[numbers], 0).astype(told.dtype))


def _reading(
    field: str, readings: dict[str, np.ndarray], meant: str | None, known: np.ndarray,
    values: Sequence[Any], labels: Sequence[str],
) -> str:
    """In which way a field is read. Raises InputError where there is none, or no telling."""
    if not readings or (meant is not None and meant not in readings):
        shown = ", ".join(map(json_text, values[:4]))
        marks = "marks of what is corrupted (true and false, or 1 and 0)"
        classes = f"true labels (of {', '.join(labels[:8])})" if labels else None
        expected = marks if meant == "marks" or classes is None else classes \
            if meant == "labels" else f"{marks}, or {classes}"
        raise InputError(f"--truth {field} holds {shown or 'nothing'}"
                         f"{', …' if len(values) > 4 else ''}; expected {expected}.")
    if meant is not None:
        return meant
    if len(readings) > 1:
        told = "; ".join(f"{READINGS[one]}, {int(corrupted.sum()):,} would be corrupted"
                         for one, corrupted in readings.items())
        raise InputError(
            f"--truth {field} holds what may be marks or labels of {int(known.sum()):,} sequences "
            f"({told}). Say which: --truth-as marks or --truth-as labels.")
    return next(iter(readings))


def _mark(value: Any) -> bool | None:
    """Whether a value says that a sequence is corrupted; None for what is no mark.

    A sequence of several documents, whose values are a list, is corrupted where one of them is.
    """
    if isinstance(value, list):
        marks = [_mark(one) for one in value]
        return None if None in marks or not marks else any(marks)
    return MARKS.get(str(value).strip().lower()) if isinstance(
        value, (bool, int, float, str)) else None


def _label(value: Any, labels: Sequence[str]) -> int | None:
    """The number of the class that a value names; None for what names none."""
    if not labels or isinstance(value, bool):
        return None
    # true and false are marks, unless classes are called so
    if str(value).strip().lower() in TRUTHS.keys() - {label.casefold() for label in labels}:
        return None
    try:
        return label_number(value, labels)
    except (InputError, ValueError):
        return None


def detection(signal: str, values: np.ndarray, corrupted: np.ndarray) -> Detection:
    """How well values [n] tell which are corrupted, bool [n].

    >>> detection("loss", np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False]))
    Detection(signal='loss', auroc=0.75, average_precision=0.8333333333333333,
              found=(0.0, 0.0, 0.0, 0.5))
    """
    return Detection(
        signal, float(roc_auc_score(corrupted, values)),
        float(average_precision_score(corrupted, values)),
        tuple(found_among(values, corrupted, int(share * len(values) + 1e-9))
              for share in INSPECTED))


def found_among(values: np.ndarray, corrupted: np.ndarray, count: int) -> float:
    """The share of the corrupted among the `count` largest values, expected where some are equal.

    >>> found_among(np.zeros(4), np.array([True, False, False, False]), 2)
    0.5
    """
    if not count:
        return 0.0
    last = np.partition(values, -count)[-count]
    above, level = values > last, values == last
    chance = (count - above.sum()) / level.sum()
    return float((corrupted[above].sum() + chance * corrupted[level].sum()) / corrupted.sum())


def curve(values: np.ndarray, corrupted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares that are inspected, and what each of them finds: float64 [steps] both."""
    counts = np.unique(np.linspace(0, len(values), MOST_STEPS).round().astype(int))
    return counts / len(values), np.array(
        [found_among(values, corrupted, int(count)) for count in counts])
