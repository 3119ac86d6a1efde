"""Rows → sequences: which fields, how they are cut and packed, what is scored and skipped."""

import datetime
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gradindex.errors import InputError
from gradindex.storage.build_plan import CorpusSettings
from indexer.read import rows
from indexer.read.corpus import Corpus
from support.corpora import (
    ROWS,
    VOCABULARY,
    decoded,
    jsonl,
    make_corpus,
    read,
    scored_texts,
    write_lines,
)
from support.tokenizers import (
    CHAT,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    REWRITING,
    byte_tokenizer,
    plain_ids,
)

# ---- which fields


PAIR = {"prompt": "hello", "completion": " world"}


@pytest.mark.parametrize(("row", "flags", "task", "found"), [
    ({"text": "yes and no"}, {}, "text", "yes and no"),
    ({"text": "yes and no", **PAIR}, {}, "text", "yes and no"),
    (PAIR, {}, "completion", "hello world"),
    ({"messages": CHAT[:2]}, {}, "messages",
     "<|user|>is water cold<|end|>\n<|assistant|> yes <|end|>\n"),
    ({"body": "yes and no", "text": "no"}, {"text_field": "body"}, "text", "yes and no"),
    ({"q": "hello", "a": " yes"}, {"prompt_field": "q", "completion_field": "a"}, "completion",
     "hello yes"),
    ({**PAIR, "text": "no"}, {"prompt_field": "prompt"}, "completion", "hello world"),
    ({"prompt": "hello", "a": " yes"}, {"completion_field": "a"}, "completion", "hello yes"),
    ({"chat": CHAT[1:2], "text": "no"}, {"messages_field": "chat"}, "messages",
     "<|assistant|> yes <|end|>\n"),
])
def test_fields_are_recognised_or_named(row, flags, task, found, tmp_path):
    tokenizer = byte_tokenizer(template=PLAIN_TEMPLATE)
    made = make_corpus([row], tokenizer=tokenizer, sequence_length=99, **flags)
    assert made.kind == task
    assert decoded(made.sequences()) == [found]
    parquet = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), parquet)
    assert decoded(read(parquet, tokenizer=tokenizer, sequence_length=99, **flags)) == [found]


@pytest.mark.parametrize("flags", [
    {"text_field": "a", "messages_field": "b"}, {"prompt_field": "a", "text_field": "b"},
    {"completion_field": "a", "messages_field": "b"},
])
def test_flags_of_two_kinds_exclude_each_other(flags):
    with pytest.raises(InputError, match="--text-field, --prompt-field/--completion-field and "):
        make_corpus(ROWS, **flags)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "rows"])
def test_unknown_fields_are_shown_with_the_flags(form, tmp_path):
    row = {"body": "x", "prompt" if form == "rows" else "title": "y", "url": "a"}
    data = tmp_path / f"data.{form}"
    if form == "rows":
        data = [row]
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), data)
    else:
        data.write_bytes(b"\nno JSON\n" + jsonl(row))
    (tmp_path / "0.jsonl").touch()
    with pytest.raises(InputError) as error:
        make_corpus(tmp_path / "0.jsonl", data, id_field="url")
    source = "the data given" if form == "rows" else str(data)
    assert f"record of {source} has the fields {', '.join(row)}; expected te" in str(error.value)
    for flag in ("--text-field", "--prompt-field", "--completion-field", "--messages-field"):
        assert flag in str(error.value)


# ---- rows that can't be used


BAD_TEXT = [
    (b'{"text": "cut', "invalid JSON", "Unterminated string"),
    (b"[" * 100_000, "invalid JSON", "recursion"),
    (b'{"text": "\xff"}', "invalid UTF-8", "byte 10"),
    (b'{"text": "\\ud83d"}', "invalid UTF-8", "a lone surrogate in 'text'"),
    (b'{"body": "hello"}', "missing field 'text'", ""),
    (b'{"text": " \\n"}', "empty text", ""),
    (b'{"text": 5}', "field 'text' is not text", "a int"),
    (b'{"text": null}', "field 'text' is not text", "a NoneType"),
    (b'["hello"]', "not an object", "a list"),
    (b"null", "not an object", "a NoneType"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_TEXT)
def test_a_bad_line_is_skipped_and_counted_or_fatal(line, reason, detail, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(ROWS[0]) + line + b"\n" + jsonl(ROWS[1]))
    made = make_corpus(path)
    assert decoded(made.sequences()) == ["hello world", "naïve 😀"]
    assert made.facts.skipped == {reason: 1}
    [example] = made.facts.examples
    assert example.startswith(f"{path}:2: {reason}")
    assert detail in example
    with pytest.raises(InputError, match=r"data\.jsonl:2: .*\. Correct it, or leave out --strict"):
        read(path, strict=True)


LONE = "\ud83d"


@pytest.mark.parametrize(("row", "good", "reason"), [
    ({"prompt": "a"}, PAIR, "missing field 'completion'"),
    ({"completion": "a"}, PAIR, "missing field 'prompt'"),
    ({"prompt": "a", "completion": " "}, PAIR, "empty completion"),
    ({"prompt": 5, "completion": "b"}, PAIR, "field 'prompt' is not text"),
    ({"prompt": CHAT[:1], "completion": "b"}, PAIR,
     "of 'prompt' and 'completion' one is text and one messages"),
    ({"prompt": ["a"], "completion": ["b"]}, PAIR,
     "field 'prompt' is not a list of messages with a role and a content"),
    ({"prompt": LONE, "completion": "b"}, PAIR, "invalid UTF-8"),
    ({"text": "a"}, {"messages": CHAT}, "missing field 'messages'"),
    *(({"messages": messages}, {"messages": CHAT}, reason) for messages, reason in [
        ("a", "field 'messages' is not a list of messages with a role and a content"),
        ([], "field 'messages' is not a list of messages with a role and a content"),
        ([{"role": "user"}], "a message without content or tool calls"),
        ([{"role": "assistant", "content": 5}], "content is neither text nor parts"),
        (CHAT[:1], "no assistant message"),
        ([CHAT[0], {**CHAT[1], "weight": 0}], "every assistant message has weight 0"),
        ([CHAT[0], {**CHAT[1], "weight": 0.5}], "weight is neither 0 nor 1"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, CHAT[1]],
         "a part of the content is not text"),
        ([{"role": "assistant", "content": LONE}], "invalid UTF-8"),
        ([{"role": "oracle", "content": "a"}, CHAT[1]], "the chat template refuses the messages"),
    ]),
    ("hello", ROWS[0], "not an object"),
    (None, ROWS[0], "not an object"),
])
def test_bad_records(row, good, reason):
    no_oracles = "{% if messages[0].role == 'oracle' %}{{ raise_exception('no (x)') }}{% endif %}"
    tokenizer = byte_tokenizer(template=no_oracles + PLAIN_TEMPLATE)
    made = make_corpus([good, row], tokenizer=tokenizer, sequence_length=99)
    [record] = made.sequences()
    assert record.parts[0].row == 1
    assert made.facts.skipped == {reason: 1}
    with pytest.raises(InputError, match=f"^the data given:2: {reason}"):
        read([good, row], tokenizer=tokenizer, sequence_length=99, strict=True)


def test_a_missing_id_is_a_bad_row():
    made = make_corpus(ROWS, id_field="year")
    assert [record.parts[0].user_id for record in made.sequences()] == [1]
    assert made.facts.skipped == {"missing field 'year'": 1}


def test_invalid_utf8_in_a_text_file_and_a_table(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello\xff")
    strings = pyarrow.array([b"hello world", b"\xff", b"yes no"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "b.parquet")
    made = make_corpus(tmp_path / "a.txt", tmp_path / "b.parquet")
    assert decoded(made.sequences()) == ["hello world", "yes no"]
    assert made.facts.skipped == {"invalid UTF-8": 2}
    assert made.facts.examples == [f"{tmp_path / 'a.txt'}:1: invalid UTF-8 (byte 5; if it is "
                                   "CP1252 or Latin-1: iconv -f CP1252 -t UTF-8 OLD > NEW)",
                                   f"{tmp_path / 'b.parquet'}:2: invalid UTF-8 (byte 0)"]


def test_a_line_too_long_is_one_bad_row(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "LONGEST_LINE", 30)
    path = write_lines(tmp_path, ROWS[0] | {"year": "x" * 100}, {"text": "hello world"})
    made = make_corpus(path)
    [record] = made.sequences()
    assert record.parts[0].row == 2
    assert made.facts.examples == [f"{path}:1: line longer than 30 bytes"]


def test_bom_crlf_and_blank_lines_are_harmless(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + jsonl(*ROWS).replace(b"\n", b"\r\n\r\n  \r\n").rstrip())
    made = make_corpus(path, strict=True)
    records = list(made.sequences())
    assert decoded(records) == ["hello world", "naïve 😀"]
    assert [record.parts[0].row for record in records] == [2, 5]
    assert made.facts.skipped == {}


def test_only_the_first_examples_are_kept_and_all_counted():
    made = make_corpus([{"text": ""}] * 30 + ROWS)
    examples = [f"the data given:{row}: empty text" for row in range(1, 21)]
    for _ in range(2):  # reading again starts anew
        assert decoded(made.sequences()) == ["hello world", "naïve 😀"]
        assert made.facts.skipped == {"empty text": 30}
        assert made.facts.examples == examples
        assert made.facts.documents == 2


def test_limit_counts_documents():
    made = make_corpus([{"text": ""}, {"text": "hello world " * 9}, *ROWS], limit=2)
    parts = [record.parts[0] for record in made.sequences()]
    assert [part.row for part in parts] == [2, 2, 3]
    assert made.facts.documents == 2


def test_metadata_is_what_json_can_hold():
    row = {"text": "hello world", "a": float("nan"), "b": datetime.date(2020, 1, 2),
           "c": [np.int64(3), (np.float32(0.5),)], "d": {1: b"x"}}
    [record] = read([row], keep_fields=tuple("abcd"), id_field="c")
    fields = {"a": "nan", "b": "2020-01-02", "c": [3, [0.5]], "d": {"1": "b'x'"}}
    assert record.parts[0].fields == json.loads(json.dumps(fields))
    assert record.parts[0].user_id == [3, [0.5]]


# ---- windows


@pytest.mark.parametrize("trim", [False, True])
def test_a_long_document_becomes_consecutive_windows(trim):
    long = "the  water is cold \n\n and fire, " * 3
    tokenizer = byte_tokenizer(trim=trim)
    ids = plain_ids(tokenizer, long)
    made = make_corpus([{"text": "yes and no"}, {"text": long}, {"text": "no"}, {"text": "yes no"}],
                       tokenizer=tokenizer, sequence_length=5)
    records = list(made.sequences())
    windows = records[1:-1]
    assert [record.id for record in records] == list(range(len(records)))
    assert [record.parts[0].document for record in records] == [0, *[1] * len(windows), 3]
    assert [record.tokens.tolist() for record in windows] == [
        ids[start : start + 5] for start in range(0, len(ids), 5)]
    slices = [long[record.parts[0].start : record.parts[0].end] for record in windows]
    assert slices == decoded(windows)
    assert "".join(slices) == long
    assert made.facts.skipped == {"sequence without a scored token": 1}  # "no", one token
    assert made.facts.documents == 4


def test_rows_without_a_scored_token_are_named_and_end_a_strict_build(tmp_path):
    rows = [{"text": "yes and no"}, {"text": "no"}, {"text": ""}]
    path = write_lines(tmp_path, *rows)
    made = make_corpus(path)
    assert len(list(made.sequences())) == 1
    assert made.facts.examples == [f"{path}:2: sequence without a scored token (its first token is "
                                   "never predicted)", f"{path}:3: empty text"]
    with pytest.raises(InputError, match=r":2: sequence without a scored token .* leave out --str"):
        read(path, strict=True)
    assert len(read(rows[:2], strict=True, pack=True)) == 1  # the end token is scored
    # a window without one is a part of a row that has one
    assert len(read([{"prompt": "the water is cold and", "completion": " fire and no"}],
                    sequence_length=3, strict=True)) == 2
    np.save(tmp_path / "stream.npy", np.arange(10, 17))
    assert len(read(tmp_path / "stream.npy", sequence_length=3, strict=True)) == 2
    with pytest.raises(InputError, match=r":1: no scored token before the cut\. Correct"):
        read([{"prompt": "the water is cold and", "completion": " fire"}], sequence_length=3,
             strict=True, truncate=True)


def test_windows_that_split_a_character_both_show_it():
    records = read([{"text": "the 😀𝄞 no"}], sequence_length=4)
    assert decoded(records) == ["the 😀�", "�� no"]
    parts = [record.parts[0] for record in records]
    assert ["the 😀𝄞 no"[part.start : part.end] for part in parts] == ["the 😀𝄞", "𝄞 no"]


def test_special_tokens_stand_at_the_ends_of_the_document():
    tokenizer = byte_tokenizer("<b> $A <e>")
    made = make_corpus([{"text": "yes and no"}], tokenizer=tokenizer, sequence_length=2)
    records = list(made.sequences())
    assert decoded(records) == ["<b>yes", " and no"]
    assert [(r.parts[0].start, r.parts[0].end) for r in records] == [(0, 3), (3, 10)]
    assert made.facts.skipped == {"sequence without a scored token": 1}  # <e> alone


def test_windows_of_the_prompt_alone_are_dropped():
    made = make_corpus([{"prompt": "the water is cold and", "completion": " fire and no"}],
                       sequence_length=3)
    records = list(made.sequences())
    assert decoded(records) == [" cold and fire", " and no"]
    assert scored_texts(records) == [" fire", " and no"]
    assert [record.id for record in records] == [0, 1]
    assert made.facts.skipped == {"sequence without a scored token": 1}
    assert made.facts.documents == 1


# ---- packing


def test_documents_are_joined_by_the_end_token_and_cut_into_full_windows():
    rows = [{"text": string, "url": place} for place, string in enumerate(
        ["yes and no", "the water", "fire", "is cold and the world is cold"])]
    records = read(rows, sequence_length=6, pack=True, id_field="url")
    assert decoded(records) == [
        "yes and no<e>the water", "<e>fire<e>is cold", " and the world is cold<e>"]
    found = [[(part.document, part.row, part.user_id, part.token, part.start, part.end)
              for part in record.parts] for record in records]
    assert found == [
        [(0, 1, 0, 0, 0, 10), (1, 2, 1, 4, 0, 9)],
        [(1, 2, 1, 0, 9, 9), (2, 3, 2, 1, 0, 4), (3, 4, 3, 4, 0, 7)],
        [(3, 4, 3, 0, 7, 29)],
    ]
    assert all(record.scored.all() for record in records)


def test_packing_adds_no_second_end_token():
    records = read([{"text": "yes"}, {"text": "no<e>"}], pack=True,
                   tokenizer=byte_tokenizer("<b> $A <e>"))
    assert decoded(records) == ["<b>yes<e><b>no<e>"]


def test_packed_pairs_score_completions_and_their_end():
    rows = [PAIR, {"prompt": "is fire cold", "completion": " no"}]
    [record] = read(rows, pack=True)
    assert decoded([record]) == ["hello world<e>is fire cold no<e>"]
    assert scored_texts([record]) == [" world<e> no<e>"]


def test_packing_needs_an_end_token():
    with pytest.raises(InputError, match=r"--pack joins .* the tokenizer has none. Use --no-pack"):
        Corpus([ROWS], byte_tokenizer(), CorpusSettings(16, pack=True), VOCABULARY, None)


# ---- loss masks


@pytest.mark.parametrize(("row", "settings", "text", "scored"), [
    ({"text": "yes and no"}, {}, "<b>yes and no<e>", "<b>yes and no<e>"),
    (PAIR, {}, "<b>hello world", " world"),
    ({"messages": CHAT[:2]}, {"template": PLAIN_TEMPLATE},
     "<|user|>is water cold<|end|>\n<|assistant|> yes <|end|>\n", " yes <|end|>\n"),
    ({"messages": CHAT[:2]}, {"template": MARKED_TEMPLATE},
     "<|user|>is water cold<|end|><|assistant|> yes <|end|>", " yes <|end|>"),
])
def test_what_is_scored(row, settings, text, scored):
    tokenizer = byte_tokenizer("<b> $A <e>", **settings)
    records = read([row], tokenizer=tokenizer, sequence_length=99)
    assert decoded(records) == [text]
    assert scored_texts(records) == [scored]


def test_a_chat_that_the_template_hides_is_counted_and_the_others_are_read(tmp_path):
    path = write_lines(tmp_path, {"messages": CHAT[1:2]}, {"messages": CHAT})
    made = make_corpus(path, tokenizer=byte_tokenizer(template=REWRITING), sequence_length=99)
    assert scored_texts(made.sequences()) == [" yes \n"]
    [(reason, count)] = made.facts.skipped.items()
    assert "has no {% generation %} marks, hides which words are the assistant's" in reason
    assert count == 1 and "data.jsonl:2: " in made.facts.examples[0]


def test_a_missing_chat_template_is_an_error_before_anything_is_read():
    with pytest.raises(InputError, match=r"field chat.* no chat template.*--chat-template"):
        make_corpus([{"chat": CHAT}], messages_field="chat")
