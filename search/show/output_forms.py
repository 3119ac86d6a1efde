"""The forms in which a result is shown or written, and which of them a file's name asks for."""

from pathlib import Path

from gradindex.results import Result
from search.show.data_files import csv_table, json_lines, parquet
from search.show.html import document
from search.show.terminal_text import render_terminal

FORM_OF_SUFFIX = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet",
                  ".html": "html"}


def form_of(path: Path) -> str | None:
    """The form that a file's name ends in, or None."""
    return FORM_OF_SUFFIX.get(path.suffix.lower())


def render_form(result: Result, form: str, color: bool = False) -> bytes:
    """A result in one of the forms, or in "auto", text for people (with `color`, if it may be)."""
    # the only one that isn't text
    if form == "parquet":
        return parquet(result)
    text = render_terminal(result, color=color) + "\n" if form == "auto" else \
        result.to_json() + "\n" if form == "json" else \
        json_lines(result.hits, result.units) if form == "jsonl" else \
        csv_table(result) if form == "csv" else document(result)
    return text.encode()
