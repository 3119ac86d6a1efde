"""A row's label → the number of its class, which is its place among the model's classes.

A label is a class's name or its number. Where the names are numbers themselves, other than the
places (1 to 5), a number is a name, whether it is written as text, as tables have it, or as 1 or
1.0. Whether all labels of some data fit that is seen once they are read (`label_names.py`).
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradindex.errors import BadRowError
from gradindex.model.row_values import plain, shown

UNLABELLED = -1
TRUTHS = {"true": 1, "false": 0}  # a label of two classes, as JSON and tables have it
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*")
_WITHOUT_NAME = re.compile(r"LABEL_\d+")  # what transformers calls classes without names

# why a row is left out; what stands behind it in brackets differs from row to row
FRACTION = "a label that is no whole number"
OUTSIDE = "a label outside the model's classes"
BY_NAME = "a label by name, of classes that have none"
UNMARKED = "unlabelled"


def label_number(value: Any, labels: Sequence[str], by_place: bool = False) -> int:
    """The number of a class, given by name or number; `by_place`, a number is no name.

    Raises BadRowError for one that isn't there.

    >>> label_number("good", ["bad", "good"]), label_number(1.0, ["bad", "good"])
    (1, 1)
    >>> names = ["1", "2"]
    >>> label_number("1", names), label_number(1.0, names), label_number(1, names, by_place=True)
    (0, 0, 1)
    """
    found = read_label(value)
    if found is None:
        raise BadRowError("no label")
    # a class may be called "1" or "true", and then it is meant
    raw = plain(value)
    for written in (raw, found):
        if isinstance(written, str) and (named := _named(written, labels)) is not None:
            return named
    numbers = None if by_place else called_by_numbers(labels)
    if isinstance(found, str):
        truth = TRUTHS.get(found)
        if truth is None or len(labels) != 2 or numbers:
            raise _no_name(found, labels)
        return truth
    if not isinstance(found, (int, float)):
        raise BadRowError(f"a label that is no class ({_kind(found)})")
    if found % 1 != 0 and found not in (numbers or ()):  # of infinity it is NaN
        raise BadRowError(f"{FRACTION} ({found:g})")
    if numbers:
        if numbers.count(found) == 1:
            return numbers.index(found)
        raise BadRowError(f"{OUTSIDE} (found {shown(found)}, expected {', '.join(labels)[:200]})")
    if found == UNLABELLED:
        raise BadRowError(f"{UNMARKED} (−1)")
    if not 0 <= found < len(labels):
        raise BadRowError(f"{OUTSIDE} (found {shown(found)}, expected 0 to {len(labels) - 1})")
    return int(found)


def read_label(value: Any) -> Any:
    """A label as Python has it: a text, a number, also where it is written as text; None for none.

    >>> read_label("1.0"), read_label("1.5"), read_label(True), read_label(" good ")
    (1, 1.5, 'true', 'good')
    """
    value = plain(value)
    if isinstance(value, bool):  # which tables write as text
        return str(value).lower()
    if isinstance(value, str):
        if not is_number(value):
            text = value.strip()
            return text.lower() if text.lower() in TRUTHS else text
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def shown_label(value: Any) -> str | None:
    """A label as it is shown, the same however it was written; None where it says nothing."""
    found = read_label(value)
    if isinstance(found, str):
        # half a character could be kept in no file
        return found[:60].encode(errors="backslashreplace").decode()
    if isinstance(found, (int, float)):
        return shown(found) if abs(found) > 1e15 else f"{found:.15g}"
    return None


def is_number(text: str) -> bool:
    """Whether a text is a number, as tables have labels."""
    return _NUMBER.fullmatch(text) is not None


def called_by_numbers(labels: Sequence[str]) -> list[float | None] | None:
    """The numbers that classes are called, where one of these isn't the class's place; else None.

    >>> called_by_numbers(["1", "2", "none"]), called_by_numbers(["0", "1"])
    ([1.0, 2.0, None], None)
    """
    numbers = [float(label) if is_number(label) else None for label in labels]
    apart = any(number not in (None, place) for place, number in enumerate(numbers))
    return numbers if apart else None


def _named(name: str, labels: Sequence[str]) -> int | None:
    """The number of the one class of this name, None for no one."""
    alike = [number for number, label in enumerate(labels) if label == name] or [
        number for number, label in enumerate(labels)
        if label.casefold() == name.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def _no_name(name: str, labels: Sequence[str]) -> BadRowError:
    """What to say of a name that no class has."""
    found = f"found {name!r:.60}"
    if all(map(_WITHOUT_NAME.fullmatch, labels)) and not _WITHOUT_NAME.fullmatch(name):
        return BadRowError(f"{BY_NAME} ({found}, expected 0 to {len(labels) - 1}; a build's "
                           "--labels names them in the model's order)")
    return BadRowError(f"{OUTSIDE} ({found}, expected {', '.join(labels)[:200]})")


def _kind(value: Any) -> str:
    several = ": several labels" if isinstance(value, (list, tuple, np.ndarray)) else ""
    return f"a {type(value).__name__}{several}"
