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


def test_a_file_of_messages_may_hold_what_stands_beside_them(tmp_path):
    chat = [{"role": "user", "content": "is water cold"}]
    file = tmp_path / "chat.json"
    row = {"messages": chat, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}
    for content, question in [
        (chat, Question(messages=chat)),
        ({**row, "id": 7}, Question(**row)),
        ({"messages": chat, "tools": None}, Question(messages=chat)),
    ]:
        file.write_text(json.dumps(content))
        assert read_question({**NOTHING, "messages": file}) == question
        question.check()
    file.write_text(json.dumps({"chat": chat}))
    with pytest.raises(click.UsageError, match="holds an object without messages"):
        read_question({**NOTHING, "messages": file})
    with pytest.raises(InputError, match="tools and chat_template_kwargs go with messages"):
        Question("a", "b", tools=[{"name": "f"}]).check()


def test_a_line_of_queries_may_hold_what_stands_beside_messages(tmp_path):
    chat = [{"role": "user", "content": "is water cold"}]
    row = {"messages": chat, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}
    file = tmp_path / "queries.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "chat_template_kwargs": [1]}))
    found = read_queries(file)
    assert found.questions == {1: Question(**row, id=1)}
    assert found.problems == [f"{file}:2: field 'chat_template_kwargs' is not an object"]
