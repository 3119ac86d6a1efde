"""Many queries from a file: what each line asks, and results that are written as they come.

A results file holds one JSON result a line. Run again with the same file, a search skips what is
answered there, so a killed run goes on.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradindex.errors import InputError
from gradindex.results import Query, Result
from search.controls import Controls, settle
from search.engine import Searcher, Stage

FIELDS = ("prompt", "completion", "messages", "token_ids", "labels", "versus", "score_on")


@dataclass
class QueryFile:
    """The queries of a file by id (a line's own, else its number), and what was wrong in it."""

    queries: dict[Any, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_queries(path: Path) -> QueryFile:
    """Read JSON lines: prompt and completion (or messages, …), versus, score_on, id.

    A line that can't be used becomes a problem; the others are kept. Raises InputError where the
    file can't be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--queries {path}: {error.strerror}. A JSON lines file is read "
                         "there.") from None
    read = QueryFile()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            query = _parse(line)
            own = query.pop("id", number)
            if own in read.queries:
                raise ValueError(f"the id {own!r} was there before")
            read.queries[own] = query
        except ValueError as error:
            read.problems.append(f"{path}:{number}: {error}")
    return read


def _parse(line: bytes) -> dict[str, Any]:
    try:
        query = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(query, dict):
        raise ValueError("expected an object with a prompt and a completion")
    unknown = [name for name in query if name not in (*FIELDS, "id")]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; expected some of {', '.join(FIELDS)}, id")
    if not query.keys() & {"prompt", "completion", "messages", "token_ids"}:
        raise ValueError("expected a prompt and a completion, messages, or token_ids")
    for name in ("prompt", "completion", "versus", "score_on"):
        if not isinstance(query.get(name, ""), str):
            raise ValueError(f"field {name!r} is not text")
    if not isinstance(query.get("id", 0), (int, str)):
        raise ValueError("the id is neither text nor a number")
    return query


def make_queries(searcher: Searcher, read: QueryFile, done: set[Any]) -> list[Query]:
    """The queries not yet `done`, tokenised; one that can't be scored becomes a problem."""
    made = []
    for own, arguments in read.queries.items():
        if own not in done:
            try:
                made.append(searcher.make_query(**arguments, id=own))
            except InputError as error:
                read.problems.append(f"query {own!r}: {error}")
    return made


def answer(
    searcher: Searcher, queries: list[Query], controls: Controls
) -> Iterator[Stage]:
    """The stages of all queries, a group at a time."""
    for first in range(0, len(queries), searcher.group_size):
        yield from searcher.stages(queries[first : first + searcher.group_size], controls)


class ResultsFile:
    """A results file being written, or gone on with.

    `done` are the ids it answers already. Raises InputError where it holds something else, or
    results of other controls, another index or other queries.
    """

    def __init__(
        self, path: Path, searcher: Searcher, controls: Controls, queries: dict[Any, dict[str, Any]]
    ):
        self.path = path
        self.done: set[Any] = set()
        whole = 0
        facts = {"index": searcher.index.digest, **settle(controls, searcher.manifest).facts()}
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                break  # cut off by a kill
            self.done.add(self._check(line, facts, queries))
            whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)

    def _check(
        self, line: bytes, facts: dict[str, Any], queries: dict[Any, dict[str, Any]]
    ) -> Any:
        try:
            content = json.loads(line)
            own = content["query"]["id"]
            found = {**content["controls"], "index": content["index"]}
            texts = {name: content["query"][name] for name in ("prompt", "completion")}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"-o {self.path} exists and holds something else than results. Give "
                             "another file, or remove it.") from None
        expected = json.loads(json.dumps(facts))
        for name, now in expected.items():
            if found.get(name) != now:
                raise InputError(
                    f"-o {self.path} holds results of another search ({name}: {found.get(name)} "
                    f"there, {now} now). Give another file, or remove it."
                )
        asked = queries.get(own, {})
        for name, text in texts.items():
            if asked.get(name, text) != text:
                raise InputError(
                    f"-o {self.path} answers another query {own!r} ({name}: {text!r} there, "
                    f"{asked[name]!r} now). Give another file, or remove it."
                )
        return own

    def write(self, result: Result) -> None:
        """Add a result; it is on disk when this returns."""
        self._file.write(result.to_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
