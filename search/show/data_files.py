"""A result as data: JSON lines, CSV and Parquet, and results that were saved as JSON read again.

Sign and units are said in each. Hidden characters of training data are made visible, and what a
spreadsheet would run as a formula is defused.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gradindex.errors import InputError
from gradindex.results import Hit, Result
from gradindex.terminal import json_text
from search.show import wording
from search.show.table_files import defuse, plain


def read_result(path: Path, number: int | None = None) -> Result:
    """A result that was written as JSON, the `number`-th from 1 of a file with one a line.

    Raises InputError for what is no result, or one of several where none is chosen.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}.") from None
    # not splitlines: texts in JSON may hold other characters that end a line to Python
    lines = [line for line in text.split("\n") if line.strip()]
    with contextlib.suppress(ValueError):  # one object over several lines
        lines = [json.dumps(json.loads(text))]
    if len(lines) > 1 and number is None:
        raise InputError(f"{path} holds {len(lines)} results; choose one with --query, from 1 on.")
    number = number or 1
    if not 1 <= number <= len(lines):
        raise InputError(f"--query {number}: {path} holds {len(lines)} results.")
    try:
        return Result.from_json(lines[number - 1])
    except ValueError as error:
        raise InputError(
            f"{path} is no result of `gradindex search --format json`: {error}") from None


def json_lines(hits: Iterable[Hit], units: str) -> str:
    """One JSON object a hit and line, each with what its numbers mean."""
    return "".join(json_text({**asdict(hit), "units": units}) + "\n" for hit in hits)


CSV_COLUMNS = (
    "rank", "id", "influence", "nats", "exact", "percentile", "lexical", "generic_rate", "cosine",
    "relatif", "self_influence", "code_score", "code_rank", "tfidf_rank", "source", "row",
    "document", "start", "end", "user_id", "duplicates", "near_duplicates", "near",
    "label", "log_p", "check", "layer_influence", "kind_influence", "member_influence", "text",
    "text_b", "chosen", "rejected", "units",
)
# of the hit's group, where groups were asked for: fields of a Group behind "group_"
GROUP_COLUMNS = ("value", "z", "unsure", "sequences", "influence", "standard_error", "excess",
                 "excess_error")


def csv_table(result: Result) -> str:
    """A table with a row a hit; text that a spreadsheet would run as a formula is defused.

    With groups each hit has its own's totals beside it: of a packed sequence's the first in order.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    # hits may have different fields: a column for each that any of them has
    fields = sorted({name for hit in result for name in hit.fields})
    groups = {hit: asdict(group) for group in reversed(result.groups) for hit in group.hits}
    columns = GROUP_COLUMNS if result.total is not None else ()
    writer.writerow([*CSV_COLUMNS, *(f"group_{name}" for name in columns),
                     *(defuse(f"field:{name}") for name in fields)])
    for rank, hit in enumerate(result.hits, 1):
        content = {**asdict(hit), "rank": rank, "units": result.units}
        if hit.nats is None:  # an empty cell would leave open why
            content["nats"] = wording.nats(hit, result)
        for name in ("duplicates", "near_duplicates", "layer_influence"):
            content[name] = " ".join(map(str, content[name]))
        own = [plain(groups[hit.id][name]) for name in columns]
        own += [plain(hit.fields.get(name)) for name in fields]
        writer.writerow([defuse(value) for value in
                         (*(plain(content[name]) for name in CSV_COLUMNS), *own)])
    return out.getvalue()


def parquet(result: Result) -> bytes:
    """A Parquet file with a row a hit; what isn't of a hit is in its metadata, as JSON.

    Ids, fields and parts, whose types are the user's, are JSON text.
    """
    import pyarrow.parquet

    # from the types, not the values: a column that is empty here must have the type of others
    schema = pyarrow.schema([("rank", pyarrow.int64()), *_columns(pyarrow)])
    rows = [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(result.hits, 1)]
    # what has no one type is JSON text in every row, whatever it is in this one
    plain = {name for name, kind in get_type_hints(Hit).items() if _inner(kind) is None}
    for row in rows:
        row.update((name, json_text(row[name])) for name in plain)
    about = {name: value for name, value in result.to_dict().items() if name != "hits"}
    table = pyarrow.Table.from_pylist(rows, schema=schema.with_metadata(
        {"gradindex": json_text(about)}))
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, out)
    return bytes(out.getvalue())


def _columns(pyarrow: Any) -> Iterator[tuple[str, Any]]:
    """Names and Arrow types of a hit's columns."""
    kinds = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_(),
             str: pyarrow.string()}
    for name, kind in get_type_hints(Hit).items():
        inner = _inner(kind)
        column = pyarrow.string() if inner is None else kinds[inner[0]]
        for _ in range(inner[1] if inner else 0):
            column = pyarrow.list_(column)
        yield name, column


def _inner(kind: Any) -> tuple[type, int] | None:
    """The scalar type inside lists (or optional), and how deep; None for what has no one type."""
    if kind in (int, float, bool, str):
        return kind, 0
    others = [part for part in get_args(kind) if part is not type(None)]
    # a dictionary, or a union of several types
    if len(others) != 1 or (inner := _inner(others[0])) is None:
        return None
    return inner[0], inner[1] + (get_origin(kind) is list)
