"""Which task a build is for, and how a model reads texts, where nobody has said it."""

import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import DamagedIndexError, InputError
from gradindex.model.config import context_length
from gradindex.progress import Progress
from gradindex.storage import layout, manifest, sealed_json
from gradindex.task import Task
from indexer.build_request import make_request
from indexer.cli import _has_two_texts
from search.show.terminal_text import render_terminal
from search.study.describe import describe, summary
from support.task_models import (
    NAMES,
    SMALL,
    answers,
    network_of_texts,
    policy,
    save,
    sentences,
    tokenizer_of_texts,
    written,
)

GOLDEN = Path(__file__).parent.parent / "golden"


def ended_tokenizer():
    tokenizer = tokenizer_of_texts()
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def test_pairs_with_what_a_reference_gives_them_are_a_policys(tmp_path):
    model = save(tmp_path / "model", policy(torch.float32), ended_tokenizer())
    pairs, texts = written(tmp_path / "pairs.jsonl", answers(6)), written(
        tmp_path / "texts.jsonl", [{"text": "good film"}])
    assert make_request(model, pairs, tmp_path / "i", **SMALL).plan.task == "preference"
    assert make_request(model, texts, tmp_path / "i", **SMALL).plan.task == "causal"
    without = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in answers(6)]
    with pytest.raises(InputError, match="--task preference, with --reference MODEL"):
        gradindex.build(model, without, tmp_path / "i", **SMALL)


@pytest.mark.parametrize("labels, message", [
    ("ab", "expected a list of names"), (["a", ""], "a name is empty"), (["a", "a"], "each once"),
])
def test_names_of_classes_that_cannot_be_meant(labels, message, tmp_path):
    model = save(tmp_path / "model", network_of_texts("bert", 2), tokenizer_of_texts())
    with pytest.raises(InputError, match=message):
        make_request(model, sentences(4), tmp_path / "i", labels=labels, **SMALL)


def test_classes_that_the_model_calls_alike(tmp_path):
    network = network_of_texts("bert", 2, id2label={0: "a", 1: "a"}, label2id={"a": 1})
    model = save(tmp_path / "model", network, tokenizer_of_texts())
    with pytest.raises(InputError, match=r"config\.json calls two classes alike"):
        make_request(model, sentences(4), tmp_path / "i", **SMALL)


def test_a_regression_is_no_reward_model_unless_that_is_said(tmp_path):
    network = network_of_texts("bert", 1, problem_type="regression")
    model = save(tmp_path / "model", network, tokenizer_of_texts())
    with pytest.raises(InputError, match=r"\(problem_type regression\).*--task reward"):
        make_request(model, answers(4), tmp_path / "i", **SMALL)
    assert make_request(model, answers(4), tmp_path / "i", task="reward", **SMALL).plan.labels == ()


def test_robertas_read_fewer_tokens_than_they_have_positions(tmp_path):
    network = network_of_texts("roberta", 2, torch.float32)
    assert context_length(network.config) == 32  # of 34 positions
    model = save(tmp_path / "model", network, tokenizer_of_texts())
    rows = [{"text": "so good " * 30, "label": number % 2} for number in range(8)]
    settings = {name: value for name, value in SMALL.items() if name != "seq_len"}
    index = gradindex.build(model, rows, tmp_path / "i", **settings)
    assert {len(record.tokens) for record in index.snapshot.records(range(len(index)))} == {32}


def test_sentences_are_told_apart_as_the_tokenizer_does(tmp_path):
    """Of two sentences, where its tokenizer gives types and where it gives none."""
    network = network_of_texts("bert", 2)
    rows = [{"text": "good film", "text_b": "bad plot", "label": 1},
            {"text": "bad film", "text_b": "good", "label": 0}]
    asked = {"text": "good film", "text_b": "bad plot", "label": "LABEL_1"}
    for types in (False, True):
        tokenizer = tokenizer_of_texts()
        if types:
            tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        index = gradindex.build(network, rows, tmp_path / str(types), tokenizer=tokenizer,
                                dtype="float64", damping=0.1, **SMALL)
        encoded = tokenizer("good film", "bad plot", return_tensors="pt")
        assert ("token_type_ids" in encoded) is types
        expected = network(**encoded).logits.log_softmax(-1)[0, 1].item()
        assert index.search(**asked).query.log_p == pytest.approx(expected, rel=1e-9)


def test_a_classifier_without_blocks_is_refused(tmp_path):
    config = transformers.SqueezeBertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, embedding_size=16, max_position_embeddings=32, q_groups=2, k_groups=2,
        v_groups=2, post_attention_groups=1, intermediate_groups=2, output_groups=2)
    network = transformers.SqueezeBertForSequenceClassification(config)
    model = save(tmp_path / "model", network, tokenizer_of_texts())
    with pytest.raises(InputError):
        gradindex.build(model, sentences(6), tmp_path / "i", **SMALL)


def test_a_manifest_of_no_task_is_damage(tmp_path):
    model = save(tmp_path / "model", network_of_texts("bert", 2), tokenizer_of_texts())
    rows = [{**row, "label": number % 2} for number, row in enumerate(sentences(8))]
    gradindex.build(model, rows, tmp_path / "i", **SMALL)
    content = json.loads((tmp_path / "i" / layout.MANIFEST).read_text())
    del content[sealed_json.KEY]
    for name, value in (("task", "poetry"), ("derive", ["nonsense"]), ("labels", [])):
        changed = {**content, "plan": {**content["plan"], name: value}}
        (tmp_path / "i" / layout.MANIFEST).write_bytes(sealed_json.with_digest(changed))
        with pytest.raises(DamagedIndexError, match="a task that can't be"):
            manifest.load(tmp_path / "i")


def test_names_in_another_order_are_said(tmp_path):
    network = network_of_texts("bert", 2, **NAMES)
    model, said = save(tmp_path / "model", network, tokenizer_of_texts()), io.StringIO()
    for labels, warned in ((["positive", "negative"], True), (["negative", "positive"], False),
                           (["bad", "good"], False), ([], False)):
        said = io.StringIO()
        make_request(model, [{"text": "good", "label": number % 2} for number in range(4)],
                     tmp_path / "i", labels=labels, progress=Progress(said), **SMALL)
        assert ("warning: config.json calls the classes negative,positive" in said.getvalue()) \
            is warned


def test_info_says_the_task_and_what_belongs_to_it():
    lines = {task: dict(line.split(maxsplit=1) for line in summary(describe(
        GOLDEN / "format-6" / task / "index")).splitlines() if " " in line)
        for task in ("classification", "preference")}
    assert lines["classification"]["task"] == "classification; classes negative, positive"
    assert lines["preference"]["task"] == \
        "preference; β 0.1, reference what the data say; derived longer-chosen"
    for one in lines.values():
        assert "both outcomes by their chances" in one["curvature"]
        assert one["N_train"].startswith("unknown, so no nats are told: --train-sequences says it")
        assert "scored" not in one["sequences"]
    about = describe(GOLDEN / "format-6" / "classification" / "index")
    assert about["beta"] is None and about["adapter"] is None
    assert set(about["kinds"]) == {"mlp", "head"} and "and the head, " in lines["classification"][
        "modules"]
    narrow = summary({**about, "adapter": "judge"}, 60)
    assert max(map(len, narrow.splitlines())) <= 60 and ", adapter judge," in " ".join(
        narrow.split())


def test_two_texts_of_a_query_are_no_continuation(tmp_path):
    rows = [{"text": "good film", "text_b": "bad plot", "label": 1},
            {"text": "bad film", "text_b": "good", "label": 0}]
    index = gradindex.build(network_of_texts("bert", 2), rows, tmp_path / "i",
                            tokenizer=tokenizer_of_texts(), **SMALL)
    assert _has_two_texts(tmp_path / "i", Task("classification"))
    assert not _has_two_texts(GOLDEN / "format-6" / "classification" / "index",
                              Task("classification"))
    found = index.search(text="good film", text_b="bad")
    assert found.query.generated
    for shown in (render_terminal(found), found._repr_html_()):
        assert "own continuation" not in shown and "model's own" in shown.replace("&#39;", "'")


@pytest.mark.parametrize("command, said", [
    ("search", ["of a classifier", "without --label its own label", "--chosen"]),
    ("rescore", ["one of the index's task", "--text"]),
    ("eval", ["Of a model of any task", "of the index's task"]),
    ("report", ["Of a model of any task", "of the index's task"]),
    ("audit", ["of pairs what all others do", "a classifier's true label", "with their answer"]),
    ("build", ["for a language model [no]", "--label-field", "--chosen-field"]),
])
def test_help_knows_every_task(command, said):
    shown = " ".join(CliRunner().invoke(main_group, [command, "--help"]).stdout.split())
    for words in said:
        assert words in shown
