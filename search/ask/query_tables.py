"""Rows of queries in tables: CSV, TSV and Parquet."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from gradindex.errors import InputError

SEPARATORS = ",;\t|"
TABLES = (".csv", ".tsv", ".parquet")  # by the ends of their names

QueryRow = dict[str, Any] | ValueError


def table_rows(path: Path, flag: str) -> Iterator[tuple[int, QueryRow]]:
    """The rows of a table, from 1 on, each with the fields that say something.

    One that can't be used is a ValueError. Raises InputError for what is no table.
    """
    rows = _parquet_rows if path.suffix.lower() == ".parquet" else _text_rows
    try:
        for number, row in enumerate(rows(path), 1):
            yield number, row if isinstance(row, ValueError) else {
                name: value for name, value in row.items() if not _is_nothing(value)}
    except (OSError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"{flag} {path} can't be read as a table: {error}. Give its rows as JSON "
                         "lines.") from None


def _is_nothing(value: Any) -> bool:
    # an empty cell of a table has no value, and pandas writes NaN for it
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _parquet_rows(path: Path) -> Iterator[QueryRow]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _text_rows(path: Path) -> Iterator[QueryRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        file.seek(0)
        separator = "\t" if path.suffix.lower() == ".tsv" else max(SEPARATORS, key=first.count)
        rows = filter(None, csv.reader(file, delimiter=separator, strict=True))
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) < len(header):
            raise csv.Error("its first row has a name twice")
        for values in rows:
            if len(values) != len(header):
                yield ValueError(f"another number of columns ({len(values)}, the first row has "
                                 f"{len(header)})")
            elif any("\udc80" <= letter <= "\udcff" for value in values for letter in value):
                yield ValueError("invalid UTF-8")
            else:
                yield dict(zip(header, values, strict=True))
