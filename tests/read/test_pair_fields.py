"""Pairs of answers with fields of their own names, with more beside them, or of another task."""

import pytest

from gradindex.errors import InputError
from gradindex.storage.build_plan import CorpusSettings
from indexer.build_request import make_request
from indexer.read.corpus import Corpus
from indexer.read.ingest import check_read
from support.task_models import network_of_texts, tokenizer_of_texts

PAIR = {"prompt": "why was it", "chosen": " good", "rejected": " bad"}
ASKED = [{"role": "user", "content": "why"}]
GOOD, BAD = ([{"role": "assistant", "content": word}] for word in ("good", "bad"))
CHAT = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
OWN = {"ask": "why", "win": " good", "lose": " bad", "gap": 0.5}
NAMED = {"prompt_field": "ask", "chosen_field": "win", "rejected_field": "lose",
         "margin_field": "gap"}
TEMPLATE = ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant {% endif %}")


def corpus(*rows, task="reward", **settings):
    return Corpus([list(rows)], tokenizer_of_texts(), CorpusSettings(
        32, task=task, **settings), vocabulary=40)


def why_not(row, good=PAIR, **settings):
    """Why the second of two rows is left out."""
    found = corpus(good, row, **settings)
    assert len(list(found.sequences())) == 1
    [said] = found.facts.examples
    return said.removeprefix("the data given:2: ")


@pytest.mark.parametrize("changes, reason", [
    ({"win": ""}, "empty win"), ({"lose": None}, "no lose"),
    ({"lose": 3}, "lose is not text (a int)"), ({"ask": 5}, "ask is not text (a int)"),
    ({"gap": "wide"}, "field 'gap' is no number ('wide')"),
    ({"lose": " good"}, "win and lose are the same"),
    ({"win": GOOD}, "of ask, win and lose some are texts and some messages"),
    ({"win": ["good"]}, "field 'win' is not a list of messages with a role and a content (a str "
     "among them)"),
])
def test_reasons_have_the_fields_own_names(changes, reason):
    assert why_not({**OWN, **changes}, OWN, **NAMED) == reason


def test_texts_have_their_own_names():
    found = Corpus([[{"sentence": "good", "kind": 1}, {"sentence": " ", "kind": 1},
                     {"sentence": 5, "kind": 0}]], tokenizer_of_texts(), CorpusSettings(
        32, task="classification", labels=("a", "b"), label_field="kind"), vocabulary=40)
    assert len(list(found.sequences())) == 1
    assert found.facts.skipped == {"empty sentence": 1, "sentence is not text": 1}


@pytest.mark.parametrize("beside", [
    {"tools": [{"name": "x"}]}, {"tools": '[{"name": "x"}]'}, {"chat_template_kwargs": {"a": 1}}])
def test_what_templates_are_told_has_no_place_beside_texts(beside):
    [name] = beside
    assert why_not({**PAIR, **beside}) == (
        f"field {name!r} has no place beside texts (put it into the prompt, give messages, or take "
        "it out)")
    empty = corpus({**PAIR, name: None}, {**PAIR, name: "[]"})
    assert len(list(empty.sequences())) == 2


@pytest.mark.parametrize("name", ["system", "context", "history", "input"])
def test_what_the_model_was_told_beside_a_prompt(name):
    row = {**PAIR, name: "be good"}
    assert why_not(row) == (f"field {name!r} has no place in the form pairs (put it into the "
                            f"prompt; --keep-fields {name} keeps it beside the pair)")
    kept = corpus(row, {**PAIR, name: ""}, keep_fields=(name,))
    assert [record.parts[0].fields for record in kept.sequences()] == [
        {name: "be good"}, {name: ""}]


@pytest.mark.parametrize("name", ["question", "instruction", "messages", "conversations"])
def test_a_prompt_by_another_name(name):
    row = {name: "why", "chosen": " good", "rejected": " bad"}
    with pytest.raises(InputError, match=f"field '{name}', which looks like one.*--prompt-field "
                       f"{name}, or.*--keep-fields {name}"):
        corpus(row)
    [asked] = corpus(row, prompt_field=name).sequences()
    [whole] = corpus(row, keep_fields=(name,)).sequences()
    assert len(asked.tokens) > len(whole.tokens)


def test_a_prompt_that_whole_chats_begin_with_anyway():
    whole = {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]}
    [one] = corpus(whole, chat_template=TEMPLATE).sequences()
    [other] = corpus({**whole, "prompt": "why"}, chat_template=TEMPLATE).sequences()
    assert one.tokens.tolist() == other.tokens.tolist()
    assert "some are texts and some messages" in why_not(
        {**whole, "prompt": "so"}, whole, chat_template=TEMPLATE)


@pytest.mark.parametrize("field, value, reason", [
    ("chosen", ["good", "bad"], "(a str among them)"), ("rejected", [], "(an empty list)"),
    ("prompt", [5], "(a int among them)"), ("chosen", "", "empty chosen"),
])
def test_lists_that_are_no_messages(field, value, reason):
    assert reason in why_not({**PAIR, field: value})
    chat = why_not({**CHAT, field: value}, CHAT, chat_template=TEMPLATE)
    assert (f"field {field!r} is not a list of messages" if isinstance(value, list) else
            "some are texts and some messages") in chat
    with pytest.raises(InputError, match="is not a list of messages"):  # not: no chat template
        found = corpus({"chosen": ["good"], "rejected": ["bad"]})
        list(found.sequences())
        check_read(found)


def test_an_answer_of_no_token():
    blank = {**CHAT, "rejected": [{"role": "assistant", "content": ""}]}
    bare = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert why_not(blank, CHAT, chat_template=bare) == "rejected without a token of its own"


@pytest.mark.parametrize("task", ["reward", "preference"])
def test_chats_without_a_template_are_refused_at_once(task):
    told = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    with pytest.raises(InputError, match=r"hold messages .field win. but the tokenizer has no chat "
                       "template.*--chat-template FILE, or the prompts and both answers as text"):
        corpus({"win": GOOD, "lose": BAD, "prompt": ASKED, **told}, task=task, chosen_field="win",
               rejected_field="lose")


def test_a_chat_template_beside_texts_is_refused():
    asked = {"tokenizer": tokenizer_of_texts(), "chat_template": TEMPLATE, "seq_len": 16}
    with pytest.raises(InputError, match=r"--chat-template is for chats, .* pairs of texts"):
        make_request(network_of_texts("bert", 1), [PAIR], "nowhere", **asked)
    request = make_request(network_of_texts("bert", 1), [CHAT], "nowhere", **asked)
    assert request.plan.chat_template == TEMPLATE


# ---- rows of another task


@pytest.mark.parametrize("outputs, row, message", [
    (3, PAIR, r"pairs of answers, which a reward model learns \(--task reward, with one output; "
     r"this model has 3\), or a policy \(--task preference\)"),
    (1, {"text": "good", "label": 1}, "labelled texts, which a classifier learns .--task "
     "classification.; a model with one output, as this is, learns numbers.*regression"),
])
def test_rows_of_another_task_are_named(outputs, row, message):
    with pytest.raises(InputError, match=message):
        make_request(network_of_texts("bert", outputs), [row], "nowhere", seq_len=16,
                     tokenizer=tokenizer_of_texts())
