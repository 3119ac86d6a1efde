"""What the flags of a question say: texts in files, chats with what stands beside them."""

import io
import json

import click
import pytest

from gradindex.errors import InputError
from search.ask.query_files import read_queries
from search.ask.question import Question
from search.query_flags import read_argument, read_question

NOTHING = {"prompt": None, "completion": None, "versus": None, "messages": None, "score_on": None}


@pytest.mark.parametrize(("content", "text"), [
    (b"water", "water"), (b"water\n", "water"), (b"water\r\n", "water"), (b"water\n\n", "water\n"),
    (b"a\r\nb\r\n", "a\r\nb"), (b"\n", ""), (b"", ""), (b" water \n", " water "),
    (b"water\r", "water\r"), ("\ufeffé\n".encode(), "é"),
])
def test_the_newline_that_an_editor_puts_behind_a_text_is_left_out(
    content, text, tmp_path, monkeypatch
):
    (tmp_path / "text").write_bytes(content)
    assert read_argument(f"@{tmp_path}/text") == text
    flags = {**NOTHING, "prompt": "a", "completion": f"@{tmp_path}/text"}
    assert read_question(flags).completion == text
    # what standard input gives as text has no byte order mark, nor \r of its own
    monkeypatch.setattr("sys.stdin", io.StringIO(content.decode("utf-8-sig"), newline=""))
    assert read_argument("-") == text


def test_a_text_of_the_command_line_itself_stays_as_it_is():
    assert [*map(read_argument, ("water\n", "@@a\n", None))] == ["water\n", "@a\n", None]


CHAT = [{"role": "user", "content": "is water cold"}, {"role": "assistant", "content": "yes"}]
TURNS = [{"from": "human", "value": "is water cold"}, {"from": "gpt", "value": "yes"}]
SYSTEM = {"role": "system", "content": "be cold"}
ROW = {"messages": CHAT, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}


@pytest.mark.parametrize(("content", "question"), [
    (CHAT, Question(messages=CHAT)), (TURNS, Question(messages=TURNS)),
    (CHAT[0], Question(messages=CHAT[0])),
    ({**ROW, "id": 7, "system": ""}, Question(**ROW)),
    ({"messages": CHAT, "tools": None, "functions": []}, Question(messages=CHAT)),
    ({"conversations": TURNS}, Question(messages=CHAT)),
    ({"system": "be cold", "messages": [SYSTEM, *CHAT]}, Question(messages=[SYSTEM, *CHAT])),
    ({"conversation": CHAT, "system": "be cold", "tools": "[1]"},
     Question(messages=[SYSTEM, *CHAT], tools="[1]")),
    ({"prompt": CHAT[:1], "completion": CHAT[1]}, Question(messages=CHAT)),
    ({"prompt": "a", "completion": "b", "url": "c"}, Question("a", "b")),
])
def test_a_file_of_messages_may_hold_a_row_of_data(content, question, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(content))
    assert read_question({**NOTHING, "messages": file}) == question
    question.check()


@pytest.mark.parametrize(("content", "reason"), [
    ({"chat": CHAT}, r"holds an object without messages \(its fields are chat\); expected a list"),
    ({"messages": None}, r"holds an object without messages \(its fields are messages\)"),
    ({}, r"without messages \(its fields are none\)"),
    ({"messages": CHAT, "system": "be cold"}, "field 'system' would not be read. Put it into"),
    ({"messages": CHAT, "functions": [{"name": "f"}]}, "field 'functions' would not be read"),
    ({"conversations": TURNS, "system_prompt": "be cold"}, "field 'system_prompt' would not be r"),
    ({"prompt": "a", "completion": "b", "context": "c"}, "field 'context' would not be read"),
    ({"prompt": "a", "completion": CHAT[1:]}, "of prompt and completion one is text"),
])
def test_a_file_of_messages_with_more_than_is_read_is_refused(content, reason, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(content))
    with pytest.raises(click.UsageError, match=reason):
        read_question({**NOTHING, "messages": file})


@pytest.mark.parametrize(("flags", "reason"), [
    ({"label": "good"}, "--label goes with --text, the text that a label is given to: give both"),
    ({"versus_label": "good"}, "--versus-label goes with --text"),
    ({"score_on": "0"}, "of a classifier --text, of pairs --chosen and --rejected"),
])
def test_flags_without_a_text_are_refused(flags, reason):
    with pytest.raises(click.UsageError, match=reason):
        read_question({**NOTHING, **flags})


def test_what_stands_beside_messages_goes_with_them():
    with pytest.raises(InputError, match="tools and chat_template_kwargs go with messages"):
        Question("a", "b", tools=[{"name": "f"}]).check()


def test_a_line_of_queries_may_hold_what_stands_beside_messages(tmp_path):
    chat = [{"role": "user", "content": "is water cold"}]
    row = {"messages": chat, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}
    file = tmp_path / "queries.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "chat_template_kwargs": [1]}))
    found = read_queries(file)
    assert found.questions == {1: Question(**row, id=1)}
    assert [str(problem) for problem in found.problems] == [
        f"{file}:2: field 'chat_template_kwargs' is not an object"]
