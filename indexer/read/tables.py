"""CSV and TSV → rows: every value is text, as it stands there.

The first row has the names of the columns, unless they are given. Values in double quotes may hold
separators and line ends. Tab-separated files come with quotes and without them; a sample tells.
"""

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradindex.errors import InputError
from indexer.read import rows
from indexer.read.compressed import bare_name, opened
from indexer.read.rows import BadRowError, Row

SAMPLE = 1 << 18  # characters by which separator and quotes are told
MOST_SWALLOWED = 20  # lines in one value, where a sample ends within quotes
SEPARATORS = ",;\t|"
# how Excel is told the separator, in a line before all others
SAID = re.compile(r'"?sep=(.)"?\r?\n')


def table_rows(path: Path, names: Sequence[str] = ()) -> Iterator[Row | None]:
    """Rows of a table in text, None for a blank line; `names` are its columns' [the first row].

    Raises InputError.
    """
    with _text(path) as text:
        sample = text.read(SAMPLE)
    form = _form(sample, tabs=bare_name(path.name).endswith((".tsv", ".tab")))
    csv.field_size_limit(rows.LONGEST_LINE)  # of this process; the library's own is 128 KB
    header = list(names)
    with _text(path) as text:
        if SAID.match(sample):
            text.readline()
        reader = csv.reader(text, form)
        try:
            first = next((values for values in reader if values), None)
            if first is None:
                return
            if not header or first == header:
                header = _header(path, first)
            elif len(first) != len(header):
                raise InputError(
                    f"{path} has {len(first)} columns in its first row; --columns names "
                    f"{len(header)} ({', '.join(header)}). Name each of them once.")
            else:
                yield _row(header, first)
            for values in reader:
                yield _row(header, values) if values else None
        except csv.Error as error:
            raise InputError(
                f"{path} is no table at line {reader.line_num}: {error}. Expected values in double "
                "quotes where they hold a separator, a quote (written twice) or a line end. "
                "Correct it, or write the rows as JSON lines.") from None


@contextlib.contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    """A file as text, whose bytes that are no UTF-8 are halves of characters."""
    with opened(path) as file:
        yield io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")


def _header(path: Path, values: list[str]) -> list[str]:
    """The names of the columns in the first row. Raises InputError for two of one name."""
    # pandas leaves the column of row numbers without a name
    header = [name.strip() or f"column {number}" for number, name in enumerate(values, 1)]
    if twice := [name for name in header if header.count(name) > 1]:
        raise InputError(
            f"{path} has two columns {twice[0]!r} in its first row; expected the columns' names. "
            "Rename one, or name them with --columns if the table has no header.")
    if any(map(_bad_bytes, header)):
        raise InputError(f"{path} is not UTF-8 in its first row. Convert it: iconv -f CP1252 -t "
                         "UTF-8 OLD > NEW.")
    return header


def _row(header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        return BadRowError(f"another number of columns ({len(values)}, the first row has "
                           f"{len(header)})")
    if any(map(_bad_bytes, values)):
        return BadRowError("invalid UTF-8")
    return dict(zip(header, values, strict=True))


def _bad_bytes(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


# ---- separator and quotes


class _Quoted(csv.excel):
    """A table whose values may be in double quotes."""

    strict = True  # or a stray quote would swallow rows without a word


class _Unquoted(csv.excel):
    """A table in which a double quote is a character like others."""

    quoting = csv.QUOTE_NONE


def _form(sample: str, tabs: bool) -> type[csv.Dialect]:
    """Separator and quotes of a table, from how it begins."""
    separator = "\t" if tabs else _separator(sample)
    spaced = re.search(f'{re.escape(separator)} +"', sample) is not None and \
        f'{separator}"' not in sample
    described = {"delimiter": separator, "skipinitialspace": spaced}
    quoted = type("_Quoted", (_Quoted,), described)
    if not tabs or _is_quoted(sample, quoted):
        return quoted
    return type("_Unquoted", (_Unquoted,), described)


def _separator(sample: str) -> str:
    """What separates the values: as is said, or by the first line without what is in quotes."""
    if said := SAID.match(sample):
        return said[1]
    line = re.sub(r'"[^"]*"', "", sample).lstrip("\r\n").partition("\n")[0]
    return max(SEPARATORS, key=line.count)  # the comma where there is none


def _is_quoted(sample: str, form: type[csv.Dialect]) -> bool:
    """Whether the double quotes of a tab-separated sample enclose values."""
    lines = io.StringIO(sample, newline="").readlines()
    if len(sample) == SAMPLE:
        lines = lines[:-1]  # which was cut
    if not any('"' in line for line in lines):
        return False
    widths, reader = set(), csv.reader(lines, form)
    done = 0  # lines of whole rows
    try:
        for values in reader:
            widths.add(len(values))
            done = reader.line_num
    except csv.Error:
        # quotes may be open where the sample ends; a stray one would swallow much more
        if reader.line_num < len(lines) or len(lines) - done > MOST_SWALLOWED \
                or len(sample) < SAMPLE:
            return False
    return len(widths - {0}) == 1
