"""Rows of chats, in every form that files give them, and what stands beside their messages."""

import functools

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

import gradindex
from gradindex.errors import InputError
from gradindex.progress import Progress
from support.chats import CALLED, CHATS, RESULT, TOOLS, assistant, user
from support.corpora import decoded, make_corpus, read, scored_texts
from support.models import random_network
from support.tokenizers import ANSWER, CHAT, LOOP, PLAIN_TEMPLATE, byte_tokenizer

TOLD = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ style }}" + \
    LOOP.replace("BODY", "{{ m.content }}{% for call in m.tool_calls or [] %}"
                 "({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor %}"
                 "{% if m.name is defined %}={{ m.name }}{% endif %}"
                 "{{ m.reasoning_content or '' }}<|end|>") + ANSWER
ROWS = [
    {"messages": [user("hello"), assistant("", tool_calls=CALLED), RESULT, assistant("yes")],
     "tools": TOOLS, "chat_template_kwargs": {"style": "cold"}, "other": 1},
    {"messages": CHAT[:2], "tools": None, "chat_template_kwargs": None, "other": 2},
]
TEXTS = ['[multiply]cold<|user|>hello<|end|>\n<|assistant|>(multiply {"a": 2, "b": 3})<|end|>\n'
         "<|tool|>6=multiply<|end|>\n<|assistant|>yes<|end|>\n",
         "<|user|>is water cold<|end|>\n<|assistant|> yes <|end|>\n"]
SCORED = ['(multiply {"a": 2, "b": 3})<|end|>\nyes<|end|>\n', " yes <|end|>\n"]


@functools.cache
def chat_network():
    return random_network("llama", torch.float32, num_hidden_layers=1, vocab_size=340,
                          max_position_embeddings=128)


def parquet(rows, folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    return str(folder / "data.parquet")


def json_columns(rows, folder):
    """As datasets stores objects that have other fields in every row."""
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(folder / "saved")
    return str(folder / "saved")


def json_parquet(rows, folder):
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(folder / "x.parquet")
    return str(folder / "x.parquet")


def saved(rows, folder):
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("store", [parquet, json_columns, json_parquet, saved])
def test_a_table_is_read_as_the_rows_that_it_was_made_of(store, tmp_path):
    tokenizer = byte_tokenizer(template=TOLD)
    for data in (ROWS, store(ROWS, tmp_path)):
        made = make_corpus(data, tokenizer=tokenizer, sequence_length=99)
        records = list(made.sequences())
        assert decoded(records) == TEXTS and scored_texts(records) == SCORED
        assert made.facts.skipped == {}


def test_columns_of_json_may_have_other_fields_in_every_row(tmp_path):
    other = [{"type": "function", "function": {"name": "f", "arguments": {"c": "yes"}}}]
    rows = [ROWS[0], {"messages": [user("hello"), assistant(None, tool_calls=other)]}]
    tokenizer = byte_tokenizer(template=TOLD)
    expected = decoded(read(rows, tokenizer=tokenizer, sequence_length=99))
    assert '(f {"c": "yes"})' in expected[1] and "null" not in "".join(expected)
    found = decoded(read(json_columns(rows, tmp_path), tokenizer=tokenizer, sequence_length=99))
    assert found == expected


@pytest.mark.parametrize("store", [list, lambda rows: datasets.Dataset.from_list(rows)])
def test_prompts_and_completions_may_be_messages(store):
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:2]},
            {"prompt": CHAT[:3], "completion": CHAT[3:]}]
    tokenizer = byte_tokenizer(template=PLAIN_TEMPLATE)
    made = make_corpus(store(rows), tokenizer=tokenizer, sequence_length=99)
    assert made.kind == "completion"
    assert scored_texts(made.sequences()) == [" yes <|end|>\n", "no<|end|>\n"]
    with pytest.raises(InputError, match=r"field prompt.*no chat template.*--chat-template"):
        read(rows)


def test_the_dictionary_of_lists_that_older_datasets_make():
    row = {"messages": {"role": ["user", "assistant"], "content": ["is water cold", " yes "]}}
    assert decoded(read([row], tokenizer=byte_tokenizer(template=PLAIN_TEMPLATE),
                        sequence_length=99)) == [TEXTS[1]]


def test_rows_that_cannot_be_rendered_are_left_out_and_the_true_reason_ends_a_build_of_none(
    tmp_path
):
    first = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer = byte_tokenizer(template=first + PLAIN_TEMPLATE)
    rows = [{"messages": CHAT[1:]}, {"messages": CHAT}]
    made = make_corpus(rows, tokenizer=tokenizer, sequence_length=99)
    assert len(list(made.sequences())) == 1
    assert made.facts.skipped == {"the chat template refuses the messages": 1}
    with pytest.raises(InputError, match=r"2 × the chat template refuses .*\(user first\)"):
        gradindex.build(chat_network(), [rows[0]] * 2, tmp_path / "x", tokenizer=tokenizer,
                        seq_len=64, bits=512)


# ---- the template that is given


def test_a_template_is_kept_for_appends_and_searches(tmp_path):
    own = byte_tokenizer(template="{{ raise_exception('not this one') }}")
    template = tmp_path / "training.jinja"
    template.write_text(TOLD)
    rows = [{"messages": messages, "tools": tools} for messages, tools in CHATS.values()]
    index, network = tmp_path / "x", chat_network()
    searcher = gradindex.build(network, rows, index, tokenizer=own, chat_template=template,
                               seq_len=128, bits=512, batch_tokens=512)
    template.unlink()
    assert searcher.manifest.plan.chat_template == TOLD
    again = gradindex.open(index, model=network, tokenizer=own)
    question = {**ROWS[0], "other": None}
    query = again.make_query(**{name: value for name, value in question.items() if value})
    pieces = "".join(query.token_texts)
    assert pieces == TEXTS[0] and query.completion == "yes"
    assert "".join(piece for piece, label in zip(query.token_texts, query.labels, strict=True)
                   if label >= 0) == "yes<|end|>\n"
    hit = again.search(messages=rows[0]["messages"], k=1).hits[0]
    assert hit.row == 1
    appended = gradindex.append(index, [{"messages": CHAT}], model=network, tokenizer=own)
    assert len(appended) == len(again) + 1
    record = appended.snapshot.records([len(again)])[0]
    assert own.decode(record.tokens.tolist()).startswith("<|user|>is water cold<|end|>")


def test_another_template_is_another_build_and_the_difference_is_shown_in_short(tmp_path):
    own = byte_tokenizer(template=PLAIN_TEMPLATE)
    said = []

    class Said(Progress):
        def say(self, line):
            said.append(line)

    options = dict(tokenizer=own, seq_len=64, bits=512)
    gradindex.build(chat_network(), ROWS[1:] * 3, tmp_path / "x", progress=Said(), **options)
    assert any("no {% generation %} marks" in line and "--chat-template" in line for line in said)
    long = PLAIN_TEMPLATE + "{# " + "x" * 500 + " #}"
    with pytest.raises(InputError, match=r"chat_template: None before, .*… \(\d+ characters\) now"):
        gradindex.build(chat_network(), ROWS[1:] * 3, tmp_path / "x", chat_template=long, **options)


def test_what_the_template_does_not_show_is_said_and_the_rest_indexed():
    rows = [{"messages": CHAT[:2]}, {"messages": CHAT[:2], "tools": TOOLS},
            {"messages": [user("hello"), assistant("yes", tool_calls=CALLED)], "tools": TOOLS}]
    made = make_corpus(rows, tokenizer=byte_tokenizer(template=PLAIN_TEMPLATE), sequence_length=64)
    assert len(list(made.sequences())) == 3 and not made.facts.skipped
    [line] = made.said_of_rows()
    assert line.startswith("warning: the chat template doesn't show the tools (2 × from the data "
                           "given:2 on), tool_calls (1 × from the data given:3 on); these rows")
    list(made.sequences())  # another reading counts anew
    assert made.said_of_rows() == [line]
