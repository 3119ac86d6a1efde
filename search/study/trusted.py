"""A trusted set: queries whose answers are known to be right, which corrupted sequences harm."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradindex.errors import InputError
from gradindex.results import Query
from gradindex.storage.build_plan import Plan
from search.ask.make_query import make_query
from search.ask.query_files import QueryFile, make_queries, read_queries
from search.ask.question import Question
from search.ask.task_query import EXAMPLES
from search.rank.snapshot import Snapshot

FLAG = "--against"


def read_trusted(path: Path, plan: Plan) -> QueryFile:
    """The questions of a file, of which those that leave their answer to the model are problems."""
    query_file = read_queries(path, FLAG, plan.corpus)
    for name, question in list(query_file.questions.items()):
        if (why := _unanswered(question, plan.task)) is not None:
            query_file.blame(name, why)
            del query_file.questions[name]
    return query_file


def trusted_queries(
    snapshot: Snapshot, against: str | Path | Iterable[Query | Mapping[str, Any]]
) -> list[Query]:
    """The queries of a file or of a list. Raises InputError for one that can't be used."""
    if isinstance(against, (str, Path)):
        query_file = read_trusted(Path(against), snapshot.manifest.plan)
        queries = make_queries(snapshot, query_file, set())
        if query_file.problems:
            raise InputError(f"{FLAG}: {query_file.problems[0]}.")
        return queries
    queries = []
    for number, query in enumerate(against, 1):
        if isinstance(query, Query):
            queries.append(query)
            continue
        question = Question(**query)
        if (why := _unanswered(question, snapshot.manifest.task.name)) is not None:
            raise InputError(f"{FLAG}: query {number}: {why}.")
        queries.append(make_query(snapshot, question))
    return queries


def _unanswered(question: Question, task: str) -> str | None:
    """Why a question says nothing that could be trusted: it doesn't say what is right."""
    if task in ("reward", "preference"):
        return None if question.response is None else (
            "a trusted query says which of two answers is right, a prompt with --chosen and "
            "--rejected")
    missing = question.text is not None and question.label is None \
        if task == "classification" else \
        question.prompt is not None and question.completion is None
    return f"a trusted query says what is right, {EXAMPLES[task]}" if missing else None
