"""The forms of records that people have: recognised, said, and read as trainers read them."""

import json

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from gradindex.errors import InputError
from gradindex.model.messages import read_chat
from indexer.read.known_forms import FORMS
from support.chats import TOOLS
from support.corpora import decoded, jsonl, make_corpus, read, scored_texts, write_lines
from support.tokenizers import CHAT, PLAIN_TEMPLATE, byte_tokenizer

TURNS = [{"from": "human", "value": "is water cold"}, {"from": "gpt", "value": " yes "}]
CHAT_TEXT = "<|user|>is water cold<|end|>\n<|assistant|> yes <|end|>\n"
NO_CHAT = "is not a list of messages with a role and a content"
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\nhello\n\n### Response:\n")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nhello\n\n### Input:\nworld {0}\n\n### Response:\n")


def corpus(*data, **settings):
    return make_corpus(*data, tokenizer=byte_tokenizer(template=PLAIN_TEMPLATE),
                       sequence_length=settings.pop("sequence_length", 400), **settings)


def read_forms(*data, **settings):
    """The texts of some data, and what of them is scored."""
    records = list(corpus(*data, **settings).sequences())
    return decoded(records), scored_texts(records)


@pytest.mark.parametrize(("row", "form", "text", "scored"), [
    ({"conversations": TURNS}, "sharegpt", CHAT_TEXT, " yes <|end|>\n"),
    ({"conversations": CHAT[:2]}, "sharegpt", CHAT_TEXT, " yes <|end|>\n"),
    ({"conversation": TURNS}, "conversation", CHAT_TEXT, " yes <|end|>\n"),
    ({"messages": TURNS}, "messages", CHAT_TEXT, " yes <|end|>\n"),
    ({"system": "no", "conversations": TURNS}, "sharegpt", "<|system|>no<|end|>\n" + CHAT_TEXT,
     " yes <|end|>\n"),
    ({"system": "no", "system_prompt": "no", "conversations": [
        {"from": "System", "value": "no"}, *TURNS]}, "sharegpt",
     "<|system|>no<|end|>\n" + CHAT_TEXT, " yes <|end|>\n"),
    ({"system": "no", "messages": [{"role": "system", "content": "no"}, *CHAT[:2]]}, "messages",
     "<|system|>no<|end|>\n" + CHAT_TEXT, " yes <|end|>\n"),
    ({"text": "hello yes", "label": True}, "text", "hello yes", "hello yes"),
    ({"instruction": "hello", "input": "world {0}", "output": " yes"}, "alpaca",
     ALPACA_INPUT + " yes", " yes"),
    ({"instruction": "hello", "input": "", "output": "yes"}, "alpaca", ALPACA + "yes", "yes"),
    ({"instruction": "hello", "input": None, "output": "yes"}, "alpaca", ALPACA + "yes", "yes"),
    ({"instruction": "hello", "output": "yes"}, "alpaca", ALPACA + "yes", "yes"),
    ({"instruction": "hello", "context": "world {0}", "response": "yes"}, "dolly",
     ALPACA_INPUT + "yes", "yes"),
    ({"prompt": "hello", "response": " yes"}, "prompt-response", "hello yes", " yes"),
    ({"question": "hello", "answer": " yes"}, "question-answer", "hello yes", " yes"),
    ({"question": "hello", "response": " yes"}, "question-response", "hello yes", " yes"),
    ({"query": "hello", "response": " yes"}, "query-response", "hello yes", " yes"),
    ({"problem": "hello", "solution": " yes"}, "problem-solution", "hello yes", " yes"),
    ({"input": "hello", "output": " yes"}, "input-output", "hello yes", " yes"),
    ({"content": "hello yes"}, "content", "hello yes", "hello yes"),
])
def test_known_forms_are_read_and_said(row, form, text, scored, tmp_path):
    made = corpus([{"url": "a", **row}], id_field="url")
    assert [note.split()[1].strip(";,") for note in made.notes] == [form]
    [record] = made.sequences()
    assert (decoded([record]), scored_texts([record])) == ([text], [scored])
    assert record.parts[0].user_id == "a"
    assert read_forms([row], rows=form) == ([text], [scored])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"url": "a", "image": b"x", **row}]),
                                path)
    assert decoded(corpus(path).sequences()) == [text]


def test_roles_and_calls_of_sharegpt():
    turns = [("system", "a"), ("human", "b"), ("function_call", '{"name": "f", "arguments": {}}'),
             ("observation", "c"), ("gpt", "d"), ("user", "e"), ("assistant", "f"), ("tool", "g"),
             ("function_call", "no JSON")]
    assert read_chat([{"from": who, "value": said} for who, said in turns]).messages == [
        {"role": "system", "content": "a"}, {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"},
        {"role": "tool", "content": "g"}, {"role": "assistant", "content": "no JSON"}]
    [message] = read_chat([{"from": "gpt", "value": "a", "weight": 0}]).messages
    assert message == {"role": "assistant", "content": "a", "weight": 0}


def test_turns_under_a_name_of_their_own():
    assert read_forms([{"chat": TURNS}], messages_field="chat") == ([CHAT_TEXT], [" yes <|end|>\n"])


@pytest.mark.parametrize(("bad", "reason"), [
    ({"conversations": [{"from": "oracle", "value": "a"}]}, "a turn from nobody known"),
    ({"conversations": "a"}, f"field 'conversations' {NO_CHAT}"),
    ({"conversations": None}, f"field 'conversations' {NO_CHAT}"),
    ({"conversations": [{"who": "a"}]}, f"field 'conversations' {NO_CHAT}"),
    ({"conversations": TURNS, "system": 5}, "field 'system' is not text"),
    ({"conversations": [{"from": "system", "value": "a"}, *TURNS], "system": "b"},
     "field 'system' says something else than the system's message"),
    ({"text": "a b"}, "missing field 'conversations'"),
])
def test_rows_of_a_form_that_cant_be_used(bad, reason):
    made = corpus([{"conversations": TURNS}, bad])
    assert decoded(made.sequences()) == [CHAT_TEXT]
    assert made.facts.skipped == {reason: 1}


@pytest.mark.parametrize(("row", "reason"), [
    ({"messages": CHAT, "system": "c"}, "field 'system' has no place in the form messages"),
    ({"messages": CHAT, "functions": [{"name": "f"}]}, "field 'functions' has no place in the f"),
    ({"conversations": TURNS, "system_prompt": "c"}, "field 'system_prompt' has no place in the f"),
    ({"prompt": "a", "completion": "b", "system": "c"}, "field 'system' has no place in the form"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:2], "system": "c"}, "field 'system' has no place"),
    ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "field 'tools' has no place"),
    ({"prompt": json.dumps(CHAT[:1]), "completion": json.dumps(CHAT[1:2])},
     "field 'prompt' is messages as JSON text"),
    ({"prompt": "a", "completion": "b", "label": True}, "a preference, true or false as 'label'"),
    ({"messages": CHAT, "kto_tag": "false"}, "a preference, true or false as 'kto_tag'"),
    ({"instruction": "a", "output": "b", "system": "c"}, "field 'system' has no place in the form"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history' has no place"),
    ({"question": "a", "answer": "b", "context": "c"}, "field 'context' has no place in the form"),
    ({"question": "a", "response": "b", "system_prompt": "c"}, "field 'system_prompt' has no pl"),
    ({"question": "a", "answer": None}, "field 'answer' is not text"),
    ({"instruction": "a", "input": 5, "output": "b"}, "field 'input' is not text"),
    ({"content": 5}, "field 'content' is not text"),
])
def test_nothing_of_a_record_is_dropped_unsaid(row, reason):
    # behind a row that has nothing of it, or only what tables have for nothing
    plain = {name: value for name, value in row.items() if f"'{name}'" not in reason}
    first = {"system": " ", "history": [], "context": float("nan"), "functions": pandas.NA, **plain}
    usable = len(plain) < len(row) and "is not text" not in reason and "JSON" not in reason
    made = corpus([first, row] if usable else [row])
    assert len(list(made.sequences())) == usable
    [found] = made.facts.skipped
    assert found.startswith(reason) and made.facts.skipped[found] == 1


@pytest.mark.parametrize(("rows", "flags", "told", "others"), [
    ([{"chat": TURNS}, {"chat": CHAT[:2], "system": "no", "functions": [1], "n": None, "k": 1,
                        "tools": TOOLS}], {"messages_field": "chat"}, "functions, system", "k"),
    ([{"q": "yes", "a": "no"}, {"q": "yes", "a": "no", "system": "s", "tools": "f", "b": 1, "c": 2,
                                "d": 3, "e": 4}],
     {"prompt_field": "q", "completion_field": "a", "id_field": "q"}, "system, tools",
     "b, c, d and 1 more"),
    ([{"q": CHAT[:1], "a": CHAT[1:2]}, {"q": CHAT[:1], "a": CHAT[1:2], "tools": TOOLS, "b": 1}],
     {"prompt_field": "q", "completion_field": "a"}, "", "b"),
    ([{"text": "yes no"}, {"text": "yes no", "system": "s", "k": 1}], {}, "system", "k"),
])
def test_fields_without_use_are_said_wherever_they_come(rows, flags, told, others, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([rows[1]]), tmp_path / "a.parquet")
    said = f"{told} (which training may have shown to the model); {others}" if told else others
    for data in (rows, write_lines(tmp_path, *rows)):
        made = corpus(data, **flags)
        assert made.said_of_rows() == []
        assert len(list(made.sequences())) == 2
        assert made.said_of_rows()[0] == f"rows: not read: {said}"
    table = corpus(tmp_path / "a.parquet", **flags)
    assert len(list(table.sequences())) == 1
    assert all(name in f"{table.said_of_rows()}{table.notes}" for name in told.split(", "))


def test_rows_of_another_form_are_counted_and_named():
    made = corpus([{"text": "hello world"}, {"instruction": "a", "output": "b"},
                   {"messages": CHAT}, {"other": 1}])
    assert decoded(made.sequences()) == ["hello world"]
    assert made.facts.skipped == {"missing field 'text'": 3}
    assert [example.split(": ", 1)[1] for example in made.facts.examples] == [
        "missing field 'text' (a record of the form alpaca)",
        "missing field 'text' (a record of the form messages)", "missing field 'text'"]


def test_files_of_several_forms(tmp_path):
    chats = write_lines(tmp_path, {"conversations": TURNS}, name="a.jsonl")
    others = write_lines(tmp_path, {"messages": CHAT[:2]}, name="b.jsonl")
    made = corpus(tmp_path)
    assert decoded(made.sequences()) == [CHAT_TEXT] * 2
    assert made.notes == [
        f"files: 2 read ({chats}, {others})",
        f"rows: sharegpt (conversations), read as chat messages; in {chats}",
        f"rows: messages; in {others}"]
    write_lines(tmp_path, {"text": "hello"}, name="c.jsonl")
    with pytest.raises(InputError, match=r"several kinds: messages \(.*a\.jsonl\), text \(.*c\."):
        corpus(tmp_path)
    (tmp_path / "c.jsonl").write_bytes(jsonl({"body": "hello"}))
    with pytest.raises(InputError, match=r"first record of \S*c\.jsonl has the fields body; expec"):
        corpus(tmp_path)


def test_what_else_records_could_be_is_said():
    row = {"instruction": "hello", "input": "", "output": "yes", "text": "yes no"}
    made = corpus([row])
    assert decoded(made.sequences()) == ["yes no"]
    assert made.notes == ["rows: text; not read: instruction, input, output; they could be read as "
                          "alpaca (--rows)"]
    assert read_forms([row], rows="alpaca") == ([ALPACA + "yes"], ["yes"])


@pytest.mark.parametrize(("row", "flags"), [
    ({"prompt": "a", "chosen": "b", "rejected": "c"},
     {"prompt_field": "prompt", "completion_field": "chosen"}),
    ({"chosen": CHAT, "rejected": CHAT}, {"messages_field": "chosen"}),
    ({"prompt": "is water cold", "chosen": CHAT[:2], "rejected": CHAT[:2]},
     {"messages_field": "chosen"}),
    ({"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": CHAT[1:2]},
     {"prompt_field": "prompt", "completion_field": "chosen"}),
    ({"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]},
     {"prompt_field": "conversations", "completion_field": "chosen"}),
    ({"messages": CHAT[:3], "chosen": CHAT[3], "rejected": CHAT[3]},
     {"prompt_field": "messages", "completion_field": "chosen"}),
    ({"chosen": "yes no", "rejected": "no"}, {"text_field": "chosen"}),
    ({"system": "", "question": "a", "chosen": "b", "rejected": "c"},
     {"prompt_field": "question", "completion_field": "chosen"}),
    ({"prompt": "a", "completion": "b", "label": False}, {"rows": "prompt-completion"}),
    ({"prompt": "a", "completion": "b", "label": "True"}, {"rows": "prompt-completion"}),
    ({"prompt": "a", "completion": "b", "label": 1}, {"rows": "prompt-completion"}),
    ({"question": "a", "answer": "b", "label": "0"}, {"rows": "question-answer"}),
    ({"messages": CHAT, "label": True}, {"rows": "messages"}),
    ({"conversations": TURNS, "kto_tag": False}, {"rows": "sharegpt"}),
    ({"prompt": "a", "response": "b", "label": "undesirable"}, {"rows": "prompt-response"}),
])
def test_preferences_are_refused_by_name(row, flags, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    said = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
    for data in ([row], tmp_path / "a.parquet", write_lines(tmp_path, row)):
        with pytest.raises(InputError, match=rf"holds preferences \(.*{said}\."):
            corpus(data)
        assert len(list(corpus(data, **flags).sequences())) == 1


def test_what_the_flags_for_a_preference_leave_out_is_said():
    row = {"system": "s", "question": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(InputError, match=r"question --completion-field chosen \(which leave sys"):
        corpus([row])
    for prompt, chosen, said in (
            ("a", CHAT[1:2], "prompt is text, chosen is messages"),
            (CHAT[:1], "a", "prompt is messages, chosen is text"),
            (json.dumps(CHAT[:1]), CHAT[1], "prompt is messages as JSON text, chosen is messages"),
            ("a", {"text": "b"}, "prompt is text, chosen is a dict")):
        with pytest.raises(InputError, match=rf"write prompt and chosen both as .* \({said}\)\."):
            corpus([{"prompt": prompt, "chosen": chosen, "rejected": chosen}])
    assert len(read_forms([{"prompt": "a", "completion": "b", "label": label} for label in (
        "good", 0, 1, "1")])[0]) == 4  # classes


@pytest.mark.parametrize(("row", "hint"), [
    ({"title": "a", "body": "longer", "n": 1}, "Perhaps --text-field body or --text-field title"),
    ({"dialog": CHAT, "n": 1}, "Perhaps --messages-field dialog"),
    ({"dialog": TURNS}, "Perhaps --messages-field dialog"),
    ({"input_ids": [1, 2], "labels": [1, 2]}, r"from \.npy files: save input_ids"),
    ({"version": 1, "data": [{"text": "a"}]}, r"what 'data' holds, .*: jq -c '\.data\[\]' OLD"),
    ({"1": {"text": "a"}, "2": {"text": "b"}}, r"records are its values: jq -c '\.\[\]' OLD\.json"),
])
def test_unknown_fields_come_with_what_may_be_meant(row, hint, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    for data in ([row], tmp_path / "a.json"):
        with pytest.raises(InputError, match=rf"has the fields .*; expected text.*{hint}"):
            corpus(data)


@pytest.mark.parametrize("columns", [
    {"text": ["yes no", "no fire"]}, {"text": {"0": "yes no", "1": "no fire"}, "n": {"0": 1}},
    {"prompt": ["yes"], "completion": ["no"]}, {"messages": [CHAT, CHAT[:2]]},
    {"body": ["yes no", "no fire"]}, {"body": {"0": "yes no"}},
])
def test_columns_in_one_object_are_told_from_a_record(columns, tmp_path):
    for name, indent in (("a.json", 1), ("b.jsonl", None)):
        (tmp_path / name).write_text(json.dumps(columns, indent=indent))
        with pytest.raises(InputError, match=r"(?i)columns.* turn them: .*read_json\('OLD") as said:
            corpus(tmp_path / name)
        assert ("holds columns" in str(said.value)) == ("body" not in columns)
    pandas.read_json(tmp_path / "a.json").to_json(
        tmp_path / "c.jsonl", orient="records", lines=True)
    assert len(list(corpus(tmp_path / "c.jsonl", text_field="body" if "body" in columns else None)
                    .sequences())) == len(next(iter(columns.values())))


def test_names_of_forms():
    assert len({form.name for form in FORMS}) == len(FORMS)
    with pytest.raises(InputError, match=r"--rows nonsense: expected one of text, pr"):
        corpus([{"text": "a"}], rows="nonsense")
    with pytest.raises(InputError, match=r"--rows alpaca and fields that are named exclude each"):
        corpus([{"text": "a"}], rows="alpaca", text_field="text")
    with pytest.raises(InputError, match=r"--rows alpaca needs the fields instruction and output"):
        corpus([{"text": "a"}], rows="alpaca")


def test_texts_have_no_form(tmp_path):
    (tmp_path / "a.txt").write_text("yes no")
    with pytest.raises(InputError, match=r"--rows content is a form of records; .* holds texts"):
        corpus(tmp_path / "a.txt", rows="content")
    (tmp_path / "a.jsonl").touch()
    assert corpus(tmp_path / "a.jsonl", rows="alpaca").kind == "completion"


# ---- truncated


def test_what_is_behind_the_length_is_cut_off():
    rows = [{"text": "the water is cold and fire"}, {"text": "yes no"}]
    made = make_corpus(rows, sequence_length=4, truncate=True)
    records = list(made.sequences())
    assert decoded(records) == ["the water is cold", "yes no"]
    assert [(one.parts[0].start, one.parts[0].end) for one in records] == [(0, 17), (0, 6)]
    assert made.facts.documents == made.facts.sequences == 2
    assert made.said_of_rows() == ["1 of 2 documents is longer than 4 tokens: cut there, what is "
                                   "behind is left out"]
    windows = make_corpus(rows * 2, sequence_length=4)
    assert len(list(windows.sequences())) == 6
    assert windows.said_of_rows() == [
        "2 of 4 documents are longer than 4 tokens: cut into windows; --truncate drops what is "
        "behind, as trainers do"]
    windows = make_corpus(rows, sequence_length=6)
    assert len(list(windows.sequences())) == 2 and windows.said_of_rows() == []


def test_a_prompt_that_fills_the_length_leaves_nothing():
    made = make_corpus([{"prompt": "the water is cold", "completion": " and no"}],
                       sequence_length=4, truncate=True)
    assert list(made.sequences()) == []
    assert made.facts.skipped == {"no scored token before the cut": 1}
    assert made.facts.examples == ["the data given:1: no scored token before the cut"]


def test_truncation_and_packing_exclude_each_other():
    with pytest.raises(InputError, match=r"--pack joins .* --truncate does; give one"):
        read([{"text": "a"}], pack=True, truncate=True)
