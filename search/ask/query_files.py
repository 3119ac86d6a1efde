"""Many queries from a file: what each line asks, and results that are written as they come.

A results file holds one JSON result a line. Run again with the same file, a search skips what is
answered there, so a killed run goes on.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradindex.errors import InputError
from gradindex.influence.fitted_model import FittedModel
from gradindex.model.label_numbers import check_numbers, note_label
from gradindex.results import Query, Result
from gradindex.storage.build_plan import CorpusSettings
from gradindex.storage.os_errors import refusals
from gradindex.task import label_field, text_fields
from gradindex.terminal import json_text
from search.ask.make_query import make_query
from search.ask.naming import as_arguments
from search.ask.query_tables import TABLES, QueryRow, table_rows
from search.ask.question import Question
from search.ask.settings import Settings
from search.ask.task_query import ASKED, EXAMPLES, check_task

FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str, list), "completion": (str,), "messages": (list,), "tools": (list,),
    "chat_template_kwargs": (dict,), "token_ids": (list,), "labels": (list,), "versus": (str,),
    "score_on": (str,), "text": (str,), "text_b": (str,), "label": (str, int, float),
    "versus_label": (str, int, float), "chosen": (str, list), "rejected": (str, list),
    "response": (str, list), "margin": (int, float, str),
}
# as errors call them
KINDS: dict[type, str] = {
    str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # how gzip and Zstandard begin
OPENING = b'{"asked": "'  # of every line of results
NUMBERS_SHOWN, KINDS_SHOWN = 5, 3  # of rows that can't be used, of what is wrong with them


@dataclass
class BadQuery:
    """A row of a file of queries that can't be used: its number, why, and its query's id if any."""

    path: Path
    number: int
    why: str
    query: Any = None

    def __str__(self) -> str:
        # a query without an id is called by its row, which has been said
        of = "" if self.query in (None, self.number) else f"query {self.query!r}: "
        return f"{self.path}:{self.number}: {of}{self.why}"


@dataclass
class QueryFile:
    """The questions of a file by id (a row's own, else its number), and what was wrong in it.

    `numbers` say in which row each stands, `unread` which fields of rows of data are no part of a
    question.
    """

    path: Path
    questions: dict[Any, Question] = field(default_factory=dict)
    problems: list[BadQuery] = field(default_factory=list)
    numbers: dict[Any, int] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def blame(self, name: Any, why: str) -> None:
        """Note what is wrong with a question."""
        # as the file calls what is wrong: by the names of fields
        self.problems.append(BadQuery(self.path, self.numbers[name], as_arguments(why), name))

    def complaints(self) -> list[str]:
        """What is wrong, each thing once, with the rows that it is wrong with."""
        alike: dict[str, list[BadQuery]] = {}
        for problem in sorted(self.problems, key=lambda problem: problem.number):
            alike.setdefault(problem.why, []).append(problem)
        return [str(some[0]) if len(some) == 1 else f"{_several(some)}: {why}"
                for why, some in alike.items()]


def _several(problems: list[BadQuery]) -> str:
    """Where problems of one kind stand, the first few by number."""
    numbers = ", ".join(str(problem.number) for problem in problems[:NUMBERS_SHOWN])
    return f"{problems[0].path}: {len(problems):,} rows ({numbers}" + \
        f"{', …' * (len(problems) > NUMBERS_SHOWN)})"


def read_queries(
    path: Path, flag: str = "--queries", settings: CorpusSettings | None = None
) -> QueryFile:
    """Read queries from JSON lines, or a table (CSV, TSV, Parquet), a row each.

    `flag` is what named the file, for messages. A row has a prompt and completion (or messages,
    tools, …), versus, score_on, id; or is one of the data of another task, whose fields are called
    as the `settings` of the build have them, or as usual. One that can't be used becomes a problem;
    the others are kept. Raises InputError where the file can't be read, or no row of it be used.
    """
    query_file = QueryFile(path)
    for number, row in _rows(path, flag):
        try:
            question, unread = _question(row, number, settings)
            if question.id in query_file.questions:
                raise ValueError(f"the id {question.id!r} was there before (a line without an id "
                                 "has its number)")
            query_file.questions[question.id] = question
            query_file.numbers[question.id] = number
            query_file.unread += [name for name in unread if name not in query_file.unread]
        except ValueError as error:
            query_file.problems.append(BadQuery(path, number, str(error)))
    task = "" if settings is None else settings.task
    for name, question in list(query_file.questions.items() if task else ()):
        try:
            check_task(task, question)
        except InputError as error:
            del query_file.questions[name]
            query_file.blame(name, str(error).rstrip("."))
    if not query_file.questions and not query_file.problems:
        raise InputError(f"{flag} {path} holds no query; expected JSON lines with "
                         f"{EXAMPLES[task or 'causal']}.")
    # before a model is loaded, and not only said: the file may be one for another index
    if not query_file.questions:
        raise InputError(f"{flag}: no row of {path} can be used. "
                         + "; ".join(query_file.complaints()[:KINDS_SHOWN]) + ".")
    return query_file


def _rows(path: Path, flag: str) -> Iterator[tuple[int, QueryRow]]:
    """The rows of a file that aren't blank, with their numbers from 1."""
    if path.suffix.lower() in TABLES:
        yield from table_rows(path, flag)
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}. A JSON lines file is read "
                         "there.") from None
    if content.startswith(COMPRESSED):
        raise InputError(f"{flag} {path} is compressed; expected JSON lines. Unpack it (gunzip, "
                         "unzstd).")
    # not splitlines(): JSON text may hold U+2028 and the like, which end no line of the file
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> QueryRow:
    """The object of a line."""
    try:
        row = json.loads(line.decode("utf-8"))
    # brackets without end make the parser recurse until Python stops it
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON in UTF-8 ({error})")
    return row if isinstance(row, dict) else ValueError(
        "expected an object with a prompt and a completion")


def _question(
    row: QueryRow, number: int, settings: CorpusSettings | None
) -> tuple[Question, list[str]]:
    """What a row asks, and which of its fields are no part of that. Raises ValueError.

    Without an id of its own it has its number.
    """
    if isinstance(row, ValueError):
        raise row
    query, unread = _of_data(row, settings or CorpusSettings(1, task=""))
    unknown = [name for name in query if name not in (*FIELDS, "id")]
    if unknown:  # more likely a row for another index than one with too much
        known = [name for name in FIELDS if settings is None or name in ASKED[settings.task]]
        raise ValueError(f"unknown field {unknown[0]!r}; expected some of {', '.join(known)}, id")
    if not query.keys() & {"prompt", "completion", "messages", "token_ids", "text", "chosen",
                           "response"}:
        raise ValueError("expected a prompt and a completion, messages, or token_ids; of a "
                         "classifier a text, of pairs chosen and rejected")
    for name, value in query.items():
        if name == "id":
            _check_id(value)
        elif not isinstance(value, FIELDS[name]):
            expected = " or ".join(dict.fromkeys(KINDS[kind] for kind in FIELDS[name]))
            raise ValueError(f"field {name!r} is not {expected}")
    return Question(**{"id": number, **query}), unread


def _of_data(row: dict[str, Any], settings: CorpusSettings) -> tuple[dict[str, Any], list[str]]:
    """A row of data of another task as a question, and its fields that are no part of one.

    Any other row is as it was. Raises ValueError for a text whose label is called otherwise.
    """
    fields: dict[str, str] = {}  # of a question: as the row calls them
    if settings.task in ("", "classification"):
        texts = text_fields(row, settings.text_field, settings.text_b_field)
        label = label_field(row, settings.label_field)
        if texts:
            fields = dict(zip(("text", "text_b"), texts, strict=False))
        if texts and label:
            fields["label"] = label
        elif stray := [name for name in row if name not in (*(texts or ()), "id", "versus_label")]:
            if texts and settings.task and FIELDS.keys().isdisjoint(stray):
                raise ValueError(f"a text without a label, and a field {stray[0]!r}: a label that "
                                 f"is misspelt? Call it {settings.label_field or 'label'}, or "
                                 "leave it out to ask about the model's own")
            fields = {}
    if settings.task != "classification" and not fields:
        called = {name: getattr(settings, f"{name}_field", None) or name
                  for name in ("chosen", "rejected", "prompt", "margin")}
        if called["chosen"] in row and called["rejected"] in row:
            fields = {name: field for name, field in called.items() if field in row}
    if not fields or settings.task == "causal":
        return row, []
    if settings.task == "preference":  # as in training
        fields.pop("margin", None)
    # one file may hold pairs and single responses; a row with both is refused as the flags are
    others = ("versus_label",) if settings.task == "classification" else ("response",)
    fields |= {name: name for name in (*others, "id") if name in row}
    # a value that is missing is none that was given: the model's own label, no margin
    question = {name: row[field] for name, field in fields.items() if row[field] is not None}
    return question, [name for name in row if name not in fields.values()]


def _check_id(value: Any) -> None:
    """Raise ValueError for an id that couldn't be written, or found again."""
    # True would be the same key as 1
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"the id {value!r} is neither text nor a whole number")
    str(value).encode()  # a lone surrogate can't be written: a UnicodeEncodeError, a ValueError too


def make_queries(fitted: FittedModel, query_file: QueryFile, done: set[Any]) -> list[Query]:
    """The queries not yet `done`, tokenised; one that can't be scored becomes a problem.

    Raises InputError or IndexMismatchError where the model or its tokenizer can't be had.
    """
    _check_labels(query_file, fitted.manifest.plan.labels)
    unanswered = [question for question in query_file.questions.values()
                  if question.id not in done]
    if unanswered:
        _ = fitted.tokenizer  # what is wrong with it is no query's fault
    if any(question.prompt is not None and not {"completion", "chosen", "response"} & set(
            question.given()) for question in unanswered):
        _ = fitted.model  # which continues a prompt
    queries = []
    for question in unanswered:
        try:
            queries.append(make_query(fitted, question))
        except InputError as error:
            query_file.blame(question.id, str(error))
    return queries


def _check_labels(query_file: QueryFile, labels: Sequence[str]) -> None:
    """Raise InputError where numbers of classes would be taken for others, as an append does."""
    found: dict[str, int] = {}
    for question in query_file.questions.values():
        note_label(found, question.label)
    try:
        check_numbers(found, labels, settled=True)
    except InputError as error:
        raise InputError(f"{query_file.path}: {error}") from None


class ResultsFile:
    """A results file being written, or gone on with.

    Each line is a result, with the digest of the query's line in front. `done` are the ids it
    answers already. `index_digest` is that of the snapshot that is searched. Raises InputError, and
    changes nothing, where it holds something else, or results of other controls, another index or
    other queries.
    """

    def __init__(
        self, path: Path, index_digest: str, settings: Settings, questions: dict[Any, Question]
    ):
        self.path = path
        self.done: set[Any] = set()
        self._digests = {name: _digest(question) for name, question in questions.items()}
        expected = {"index": index_digest, **settings.facts()}
        # a device or a pipe can be written to, but has no lines to go on from
        self._regular = path.is_file() or not path.exists()
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for line in lines[:-1]:
            self.done.add(self._check(line, expected))
        cut_off = lines[-1]  # by a kill, if it isn't empty
        if not (cut_off.startswith(OPENING) or OPENING.startswith(cut_off)):
            raise self._foreign()
        # only now is anything changed: a file that is not ours stays as it was
        with refusals(path, "written"):
            self._file = path.open("ab")
        if self._regular:
            self._file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def _foreign(self) -> InputError:
        """The error for a file that holds no results."""
        return InputError(f"-o {self.path} exists and holds something else than results. Give "
                          "another file, or remove it.")

    def _check(self, line: bytes, expected: dict[str, Any]) -> Any:
        """The id that a line answers. Raises InputError for a result of something else."""
        try:
            content = json.loads(line)
            name, digest = content["query"]["id"], content["asked"]
            facts = {**content["controls"], "index": content["index"]}
        except (ValueError, KeyError, TypeError):
            raise self._foreign() from None
        # through JSON, which has lists for tuples and no infinities
        for control, now in json.loads(json.dumps(expected)).items():
            if facts.get(control) != now:
                raise InputError(
                    f"-o {self.path} holds results of another search ({control}: "
                    f"{facts.get(control)} there, {now} now). Give another file, or remove it."
                )
        if self._digests.get(name) != digest:
            raise InputError(
                f"-o {self.path} answers a query {name!r} that is not, or no longer the same, in "
                "the file of queries. Give another file, or remove it."
            )
        return name

    def write(self, result: Result) -> None:
        """Add a result; it is on disk when this returns."""
        # in front, so that a line that a kill cut short is known by its beginning
        content = {"asked": self._digests[result.query.id], **result.to_dict()}
        with refusals(self.path, "written"):
            self._file.write(json_text(content).encode() + b"\n")
            self._file.flush()
            if self._regular:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing can be written any more."""
        self._file.close()


def _digest(question: Question) -> str:
    """Sixteen digits that tell a question from every other."""
    return hashlib.sha256(json.dumps(question.given(), sort_keys=True).encode()).hexdigest()[:16]
