"""What a row is, and why one can't be used: the words that all readers of data share."""

from collections.abc import Callable, Mapping
from typing import Any

from gradindex.errors import BadRowError

LONGEST_LINE = 64 << 20  # bytes; a longer record is taken for damage
MOST_REASONS = 3  # that are named
NOTABLE = 0.1  # share of rows that are left out: said loudly from here on

Row = dict[str, Any] | BadRowError
Columns = Callable[[list[str]], list[str]]  # which of a table's columns to read


def as_object(content: Any) -> Row:
    """What a line holds as a row; a BadRowError where that is no JSON object."""
    if isinstance(content, dict):
        return content
    remedy = '; write it as {"text": …}' if isinstance(content, str) else (
        "; write its values with names" if isinstance(content, list) else "")
    return BadRowError(f"not an object (a {type(content).__name__}{remedy})")


def said_of_lost(lost: Mapping[str, int], rows: int, advice: str = "") -> str | None:
    """What to say where many of the rows were `lost`, counted by reason; None for few.

    >>> said_of_lost({"no label": 3}, 10, "Label them.")
    "warning: 3 of 10 rows (30%) can't be used and are left out: 3 × no label. Label them."
    """
    count = sum(lost.values())
    if count <= NOTABLE * rows:
        return None
    reasons = sorted(lost, key=lambda reason: -lost[reason])
    why = ", ".join(f"{lost[reason]:,} × {reason}" for reason in reasons[:MOST_REASONS])
    more = ", …" * (len(reasons) > MOST_REASONS)
    return (f"warning: {count:,} of {rows:,} rows ({count / rows:.0%}) can't be used and are left "
            f"out: {why}{more}" + (f". {advice}" if advice else ""))
