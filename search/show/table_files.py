"""A table of any rows as data: CSV, JSON, JSON lines and Parquet, written as its rows come.

What belongs to one row is a dictionary by column; a value that isn't there is None. A column has
the one type of its values; one without is JSON text in Parquet, and in CSV where it has parts.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from gradindex.terminal import json_text, visible_lines

ROWS_AT_ONCE = 4096  # of Parquet, held together
FORMS = ("csv", "parquet", "json", "jsonl")


class Sink(Protocol):
    """What takes bytes: a file, or a writer of one."""

    def write(self, content: bytes, /) -> int: ...


@dataclass
class Table:
    """A table that is made row by row: `rows()` begins anew each time.

    `columns` are bool, int, float or str by name, None for a column whose values have no one type.
    `about` is what is to be said of all of it, as plain JSON types.
    """

    columns: dict[str, type | None]
    rows: Callable[[], Iterator[dict[str, Any]]]
    about: dict[str, Any] = field(default_factory=dict)


def write_table(table: Table, form: str, sink: Sink) -> None:
    """Write a table in one of FORMS."""
    {"csv": _csv, "parquet": _parquet, "json": _json, "jsonl": _json_lines}[form](table, sink)


def _csv(table: Table, sink: Sink) -> None:
    sink.write(_line(map(defuse, table.columns)))
    for row in table.rows():
        sink.write(_line(defuse(plain(row.get(name))) for name in table.columns))


def _line(cells: Iterator[Any]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode()


def _json_lines(table: Table, sink: Sink) -> None:
    for row in table.rows():
        sink.write(_object(table, row).encode() + b"\n")


def _json(table: Table, sink: Sink) -> None:
    sink.write(json_text(table.about)[:-1].encode())  # but for its last brace
    between = (', ' if table.about else '') + '"rows": [\n'
    for row in table.rows():
        sink.write(between.encode() + _object(table, row).encode())
        between = ",\n"
    sink.write(b"\n]}\n" if between == ",\n" else f"{between}]}}\n".encode())


def _object(table: Table, row: dict[str, Any]) -> str:
    return json_text({name: _finite(row.get(name)) for name in table.columns})


def _parquet(table: Table, sink: Sink) -> None:
    import pyarrow.parquet

    kinds: dict[type | None, Any] = {
        int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_(),
        str: pyarrow.string(), None: pyarrow.string()}
    # from what is known of the columns, not the first rows: all files of a kind are alike
    schema = pyarrow.schema(
        [(name, kinds[kind]) for name, kind in table.columns.items()],
        metadata={"gradindex": json_text(table.about)})
    rows = table.rows()
    with pyarrow.parquet.ParquetWriter(pyarrow.PythonFile(_File(sink), mode="w"), schema) as file:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            file.write_table(pyarrow.Table.from_pydict({
                name: [_cell(row.get(name), kind) for row in some]
                for name, kind in table.columns.items()}, schema=schema))


def _cell(value: Any, kind: type | None) -> Any:
    """A value as a column of Parquet has it."""
    if value is None:
        return None
    if kind is None:
        return json_text(value)
    return visible_lines(value) if isinstance(value, str) else kind(value)


class _File(io.RawIOBase):
    """A sink as a file that is only written to, as pyarrow wants it."""

    def __init__(self, sink: Sink):
        super().__init__()
        self._sink, self._size = sink, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, content: Any) -> int:
        raw = bytes(content)
        self._sink.write(raw)
        self._size += len(raw)
        return len(raw)


def plain(value: Any) -> Any:
    """A number or text as it is, anything else as JSON."""
    return json_text(value) if isinstance(value, (dict, list)) else value


def defuse(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula, and no terminal obeys."""
    if not isinstance(value, str):
        return value
    # spreadsheets run what begins so, and show what stands behind an apostrophe
    value = visible_lines(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _finite(value: Any) -> Any:
    """A value that JSON has: it knows no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
