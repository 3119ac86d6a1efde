"""What a row is, and why one can't be used: the words that all readers of data share."""

from collections.abc import Callable
from typing import Any

from gradindex.errors import BadRowError

LONGEST_LINE = 64 << 20  # bytes; a longer record is taken for damage


Row = dict[str, Any] | BadRowError
Columns = Callable[[list[str]], list[str]]  # which of a table's columns to read


def as_object(content: Any) -> Row:
    """What a line holds as a row; a BadRowError where that is no JSON object."""
    if isinstance(content, dict):
        return content
    remedy = '; write it as {"text": …}' if isinstance(content, str) else (
        "; write its values with names" if isinstance(content, list) else "")
    return BadRowError(f"not an object (a {type(content).__name__}{remedy})")
