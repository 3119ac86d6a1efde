"""Rows of labelled texts and of pairs: fields, labels, tokens; what cannot be used is counted."""

import json

import numpy as np
import pytest

from gradindex.errors import BadRowError, InputError
from gradindex.model.class_labels import label_number
from gradindex.model.task_rows import encode_preferred, without_common
from gradindex.storage.build_plan import CorpusSettings
from gradindex.task import Task
from indexer.read.corpus import Corpus
from support.task_models import WORDS, tokenizer_of_texts

TOKENIZER = tokenizer_of_texts()
NUMBER = {word: 4 + number for number, word in enumerate(WORDS)}
CLS, SEP = 2, 3


def corpus(rows, task="classification", length=32, **settings):
    labels = ("negative", "positive") if task == "classification" else ()
    return Corpus([rows], TOKENIZER, CorpusSettings(
        length, task=task, **{"labels": labels, **settings}), vocabulary=40)


def ids(text):
    return [NUMBER[word] for word in text.split()]


@pytest.mark.parametrize("fields, given", [
    ({"text": "good film", "label": 1}, {}),
    ({"sentence": "good film", "label": "positive", "idx": 3}, {}),
    ({"review": "good film", "target": "1"}, {}),
    ({"body": "good film", "stars": 1.0}, {"text_field": "body", "label_field": "stars"}),
    ({"content": "good film", "labels": np.int64(1)}, {}),
])
def test_texts_and_labels_are_found(fields, given):
    [record] = corpus([fields], **given).sequences()
    assert record.tokens.tolist() == [CLS, *ids("good film"), SEP]
    assert record.scored.tolist() == [False, True, True, False]
    assert (record.label, record.border, record.offset) == (1, None, 0.0)
    assert (record.parts[0].start, record.parts[0].end) == (0, 9)


@pytest.mark.parametrize("names", [("sentence1", "sentence2"), ("premise", "hypothesis"),
                                   ("question", "sentence"), ("text", "text_b")])
def test_two_texts_have_a_border(names):
    row = {names[0]: "was it good", names[1]: "the film was bad", "label": 0}
    [record] = corpus([row]).sequences()
    first, second = ids("was it good"), ids("the film was bad")
    assert record.tokens.tolist() == [CLS, *first, SEP, *second, SEP]
    assert record.border == len(first) + 2 and record.label == 0


def test_the_longer_of_two_texts_is_cut_first():
    row = {"text": "good film", "text_b": " ".join(WORDS[:12]), "label": 0}
    found = corpus([row], length=9)
    [record] = found.sequences()
    assert record.tokens.tolist() == [CLS, *ids("good film"), SEP, *ids(" ".join(WORDS[:4])), SEP]
    assert "1 of 1 rows are longer than 9 tokens" in found.said_of_rows()[0]


@pytest.mark.parametrize("label, reason", [
    (-1, "unlabelled"), (None, "no label"), (2, "a label outside the model's classes"),
    ("neutral", "a label outside the model's classes"), ([0, 1], "a label that is no class"),
    (0.5, "a label that is no whole number"),
])
def test_labels_that_cannot_be_used_are_counted(label, reason):
    found = corpus([{"text": "good", "label": 1}, {"text": "bad film", "label": label}])
    assert len(list(found.sequences())) == 1
    assert found.facts.skipped == {reason: 1} and ":2: " in found.facts.examples[0]


def test_names_of_classes():
    assert label_number(" Positive ", ["negative", "positive"]) == 1
    assert label_number(True, ["no", "yes"]) == 1
    with pytest.raises(BadRowError, match=r"of classes that have none .found 'good', expected 0 to "
                       "4; a build's --labels names them"):
        label_number("good", [f"LABEL_{number}" for number in range(5)])
    with pytest.raises(InputError, match="expected a text and its label"):
        corpus([{"body": "good"}])
    with pytest.raises(InputError, match="holds no records"):
        Corpus([__file__], TOKENIZER, CorpusSettings(32, task="classification", labels=("a", "b")),
               vocabulary=40)


# ---- pairs


def preferred(content, task="reward", length=32):
    return encode_preferred(TOKENIZER, {"prompt": None, **content}, Task(task), length)


def test_pairs_of_a_reward_model():
    row = {"prompt": "why was it", "chosen": " good", "rejected": " not so good", "margin": 0.5,
           "place": "x"}
    [record] = corpus([row], "reward").sequences()
    one, other = ids("why was it good"), ids("why was it not so good")
    assert record.tokens.tolist() == [CLS, *one, SEP, CLS, *other, SEP]
    assert (record.border, record.offset, record.label) == (len(one) + 2, 0.5, None)


def test_whole_dialogues_have_the_prompt_that_both_begin_with():
    one = "\n\nHuman: why was it\n\nAssistant: so good"
    other = "\n\nHuman: why was it\n\nAssistant: so bad"
    prompt, answers = without_common([one, other])
    assert prompt.endswith("Assistant:") and answers == [" so good", " so bad"]
    assert without_common(["good", "bad"]) == ("", ["good", "bad"])


def test_answers_of_a_policy_begin_where_both_part_from_the_prompt():
    tokenizer = tokenizer_of_texts()
    tokenizer.eos_token = "[SEP]"
    made = encode_preferred(tokenizer, {
        "prompt": "why was it", "chosen": " good", "rejected": " not good",
        "ref_chosen_logps": -3.0, "ref_rejected_logps": -5.5}, Task("preference"), 32)
    assert made.offset == 2.5
    first = made.scored[: made.border]
    assert first.tolist() == [False] * 4 + [True] * (made.border - 4)


@pytest.mark.parametrize("content, reason", [
    ({"chosen": "good", "rejected": "good"}, "are the same"),
    ({"prompt": " ".join(WORDS), "chosen": "good", "rejected": "bad"}, "longer than 8 tokens"),
    ({"chosen": "", "rejected": "bad"}, "empty chosen"),
    ({"chosen": "good", "rejected": 3}, "rejected is not text"),
    ({"chosen": [{"role": "user", "content": "good"}], "rejected": "bad"},
     "some are texts and some messages"),
    ({"chosen": "good", "rejected": "bad", "margin": "much"}, "'margin' is no number"),
])
def test_pairs_that_cannot_be_used(content, reason):
    with pytest.raises(BadRowError, match=reason):
        preferred(content, length=8)


def test_a_pair_that_differs_only_beyond_the_context():
    same = " ".join(WORDS[:10])
    with pytest.raises(BadRowError, match="differ only beyond 8 tokens"):
        encode_preferred(TOKENIZER, {
            "prompt": None, "chosen": f"{same} good", "rejected": f"{same} bad",
            "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}, Task("preference"), 8)


def test_fields_of_pairs_may_have_other_names(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"ask": "why", "win": " good", "lose": " bad"}) + "\n")
    found = Corpus([path], TOKENIZER, CorpusSettings(
        32, task="reward", prompt_field="ask", chosen_field="win", rejected_field="lose"),
        vocabulary=40)
    assert len(list(found.sequences())) == 1
    with pytest.raises(InputError, match="expected a chosen and a rejected"):
        Corpus([path], TOKENIZER, CorpusSettings(32, task="reward"), vocabulary=40)
    with pytest.raises(InputError, match="--completion-field has no use with --task reward"):
        Corpus([path], TOKENIZER, CorpusSettings(
            32, task="reward", completion_field="win"), vocabulary=40)
