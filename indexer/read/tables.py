"""CSV and TSV → rows: every value is text, as it stands there.

The first row has the names of the columns, unless they are given. Values in double quotes may hold
separators and line ends. Tab-separated files come with quotes and without them; a sample tells.
"""

import contextlib
import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

from gradindex.errors import BadRowError, InputError
from indexer.read import rows
from indexer.read.compressed import bare_name, opened
from indexer.read.known_forms import form_of
from indexer.read.rows import Row

SAMPLE = 1 << 18  # characters by which separator and quotes are told
MOST_SWALLOWED = 20  # lines in one value, where a sample ends within quotes
SEPARATORS = ",;\t|"
# how Excel is told the separator, in a line before all others
SAID = re.compile(r'"?sep=(.)"?\r?\n')
# what a column is often called, beside the fields of known forms
USUAL = {"answer", "body", "category", "class", "comment", "content", "date", "id", "idx", "index",
         "label", "labels", "name", "prompt", "question", "rating", "response", "review", "score",
         "sentence", "sentiment", "source", "target", "text", "title", "url"}
_NUMBER = re.compile(r"\s*-?[\d.,]+\s*")
_NAME = re.compile(r"[^\W\d][\w-]*( [\w-]+){0,2}")


def table_rows(path: Path, names: Sequence[str] = ()) -> Iterator[Row | None]:
    """Rows of a table in text, None for a blank line; `names` are its columns' [the first row].

    Raises InputError.
    """
    with _text(path) as text:
        sample = text.read(SAMPLE)
    form = _form(sample, bare_name(path.name).endswith((".tsv", ".tab")))
    csv.field_size_limit(rows.LONGEST_LINE)  # of this process; the library's own is 128 KB
    header = list(names)
    if len(set(header)) < len(header):
        raise InputError(f"--columns {','.join(header)} has a name twice; name each column once.")
    with _text(path) as text:
        if SAID.match(sample):
            text.readline()
        reader = csv.reader(text, form)
        try:
            first = next((values for values in reader if values), None)
            if first is None:
                return
            said = None
            if not header or _folded(first) == _folded(header):
                said = first
                # under the names that were given, whatever letters the file has them in
                header = header or _header(path, first)
            elif len(first) != len(header):
                raise InputError(
                    f"{path} has {len(first)} columns in its first row; --columns names "
                    f"{len(header)} ({', '.join(header)}). Name each of them once.")
            elif _looks_like_names(first, header, _rows_of(sample, form)[1:]):
                raise InputError(
                    f"{path} begins with what looks like a header ({', '.join(first)}), but "
                    f"--columns names the columns of a table without one ({', '.join(header)}). "
                    "Leave --columns out and name the fields as the header does, or take that row "
                    "out; if it is a record, let another one stand first.")
            else:
                yield _row(header, first)
            for values in reader:
                # as cat leaves it between tables
                yield BadRowError("the header again") if values == said else \
                    _row(header, values) if values else None
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


def _folded(values: Sequence[str]) -> list[str]:
    return [value.strip().casefold() for value in values]


def _looks_like_names(values: list[str], names: Sequence[str], others: list[list[str]]) -> bool:
    """Whether a row, which was to be a record, looks like names of columns, as these are.

    `others` are rows behind it: above a column of numbers a name stands out.
    """
    found, given = _folded(values), set(_folded(names))
    if form_of(found) is not None or set(found) == given:
        return True
    if len(set(found)) < len(found) or not all(map(_NAME.fullmatch, found)):
        return False
    return not (USUAL | given).isdisjoint(found) or (
        len(others) > 1 and any(all(map(_NUMBER.fullmatch, column))
                                for column in zip(*others, strict=False)))


def _rows_of(sample: str, form: type[csv.Dialect]) -> list[list[str]]:
    """The first rows of how a table begins, as far as they can be read."""
    found: list[list[str]] = []
    with contextlib.suppress(csv.Error):
        found += filter(None, islice(csv.reader(io.StringIO(sample, newline=""), form), 50))
    return found


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


def first_row(sample: str, whole: bool) -> tuple[str, ...]:
    """The first row of a text that looks like a table: all rows have as many values, two or more.

    Of one whose columns are called as the fields of a known form, half of the rows will do. Empty
    for any other text. `sample` is how it begins, or the `whole`.

    >>> first_row("text;label\\nhello;1\\n", whole=True), first_row("Hello, world\\nBye", True)
    (('text', 'label'), ())
    """
    lines = io.StringIO(sample, newline="").readlines()
    # of what was cut, the last line is not whole
    reader = csv.reader(lines if whole else lines[:-1], _form(sample, False))
    found: list[list[str]] = []
    broken = False
    try:
        found += filter(None, reader)
    except csv.Error:
        broken = whole  # else a value may go on behind the sample
    if not found or found[0][0] == "" == found[0][-1]:  # a table of Markdown, in a text about it
        return ()
    first, others = found[0], found[1:]
    alike = sum(len(row) == len(first) for row in others)
    if len(first) == 1:  # a list of lines, unless the first can be nothing but a header
        return ("text",) if first == ["text"] and alike == len(others) > 0 else ()
    spaced = any(name.startswith(" ") for name in first) or not first[-1]  # as in prose
    if has_fields(first) and not spaced and (broken or (others and alike * 2 >= len(others))):
        return tuple(first)  # what is wrong with it is said where it is read
    if alike < len(others) or not others or broken or (spaced and not has_fields(first)):
        return ()
    return tuple(first)


def has_fields(names: Sequence[str], named: Collection[str] = ()) -> bool:
    """Whether names of columns are fields of records: of a known form, or those that are `named`.
    """
    called = {name.strip() for name in names}
    known = form_of(called) is not None or not called.isdisjoint(named) \
        or {"chosen", "rejected"} <= called
    return known and all(re.fullmatch(r"[\w-]*", name) for name in called - set(named))


def _form(sample: str, tabs: bool) -> type[csv.Dialect]:
    """Separator and quotes of a table, from how it begins."""
    separator = "\t" if tabs else _separator(sample)
    # without what is in quotes, which may be separators and spaces
    bare = re.sub(r'"[^"]*"', '""', sample)
    spaced = re.search(f'{re.escape(separator)} +"', bare) is not None and \
        f'{separator}"' not in bare
    described = {"delimiter": separator, "skipinitialspace": spaced}
    quoted = type("_Quoted", (_Quoted,), described)
    if separator != "\t" or _is_quoted(sample, quoted):
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
