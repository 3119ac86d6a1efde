"""A question carries the seven arguments of a query, and checks what needs no tokenizer."""

from dataclasses import fields

import pytest

from gradindex.errors import InputError
from search.ask.query_files import FIELDS
from search.ask.question import Question


def test_a_file_of_queries_takes_every_argument():
    assert {*FIELDS, "id"} == {field.name for field in fields(Question)}


def test_only_what_was_given_is_told_of_it():
    question = Question("a", " b", versus=" c", id=7)
    assert question.given() == {"prompt": "a", "completion": " b", "versus": " c"}
    assert question.other == Question("a", " c")
    assert Question(token_ids=[1, 2], labels=[-100, 2]).given() == {
        "token_ids": [1, 2], "labels": [-100, 2]}


@pytest.mark.parametrize("question", [
    Question("a"), Question(completion=" b"), Question("", " b"), Question("a", " b", versus=" c"),
    Question("a", " b", score_on="0-2,5"), Question(token_ids=[1, 2], labels=[-100, 2]),
    Question(token_ids=[]), Question(messages=[{"role": "user", "content": "hi"}]),
])
def test_what_is_in_order_so_far(question):
    question.check()


@pytest.mark.parametrize("question, message", [
    (Question(), "give one query"), (Question("a", token_ids=[1]), "give one query"),
    (Question("a", ""), "the completion is empty"),
    (Question("a", " b", versus=""), "--versus: the completion is empty"),
    (Question("a", " b", versus=" b"), "nothing to compare"),
    (Question("a", versus=" b"), "--versus compares two completions"),
    (Question("a", " b", versus="\ud800"), "--versus: the query is not valid UTF-8"),
    (Question("a", " b", score_on="2-1"), "--score-on '2-1': expected tokens"),
    (Question("a", " b", labels=[1]), "labels go with token_ids"),
    (Question("caf\udcff", "x"), r"not valid UTF-8 \(character 3: '\\udcff'\)"),
    (Question(messages=[{"role": "user", "content": "\ud800"}]), "not valid UTF-8"),
])
def test_what_is_refused(question, message):
    with pytest.raises(InputError, match=message):
        question.check()
