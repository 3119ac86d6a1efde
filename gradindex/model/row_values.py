"""Values in the fields of a row, as Python has them: texts and numbers, whoever wrote them."""

import math
import re
from decimal import Decimal
from typing import Any

import numpy as np

from gradindex.errors import BadRowError

LARGEST = float(np.finfo(np.float32).max)  # of a number in a row: it has to stay one in float32
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


def plain(value: Any) -> Any:
    """A value as Python has it; None where it says nothing, as NaN and empty cells of tables do."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        value = None if value.is_nan() else float(value)
    empty = isinstance(value, str) and not value.strip()
    return None if empty or is_nan(value) else value


def is_nan(value: Any) -> bool:
    """Whether a value is what tables have for none."""
    return isinstance(value, float) and math.isnan(value)


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    # Python refuses to write integers of thousands of digits down
    return "a huge number" if isinstance(value, int) and abs(value) > LARGEST else f"{value!r:.60}"


def text_of(value: Any, name: str, empty: bool = False) -> str:
    """A field of that name, if it's text, which may be `empty`. Raises BadRowError."""
    if value is None or is_nan(value):
        raise BadRowError(f"no {name}")
    if not isinstance(value, str):
        raise BadRowError(f"{name} is not text (a {type(value).__name__})")
    if not value.strip() and not empty:
        raise BadRowError(f"empty {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"invalid UTF-8 (a lone surrogate in {name})") from None
    return value


def number_of(value: Any, name: str) -> float | None:
    """The number in a field of that name, None where it has none. Raises BadRowError."""
    value = plain(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):  # in tables every value is text
        value = float(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))
                              or abs(value) > LARGEST):
        raise BadRowError(f"field {name!r} is no number ({shown(value)})")
    return None if value is None else float(value)
