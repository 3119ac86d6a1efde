"""Classifiers, reward models and policies of preferences, from their data to a hit."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import InputError
from search.show.task_words import asked_of
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


def trained(network, tokenizer, rows):
    """A few steps on the labels, so that there is something to be found."""
    network.requires_grad_(True)
    steps = torch.optim.Adam(network.parameters(), 0.01)
    encoded = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] == "positive" for row in rows]).long()
    for _ in range(30):
        steps.zero_grad()
        network(**encoded, labels=labels).loss.backward()
        steps.step()
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("classifier"), tokenizer_of_texts()
    network = network_of_texts("bert", 2, torch.float32, **NAMES)
    return save(folder / "model", trained(network, tokenizer, sentences(40)), tokenizer)


@pytest.fixture(scope="module")
def classified(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classified")
    data = written(folder / "rows.jsonl", sentences(40))
    index = gradindex.build(classifier, data, folder / "index", keep_fields=["number"], **SMALL)
    assert index.manifest.task.name == "classification" and index.manifest.kind == "labelled"
    assert index.manifest.plan.labels == ("negative", "positive")
    return index


def test_a_classifier_says_which_rows_taught_a_label(classified):
    result = classified.search(text="the film was so great", label="positive", k=40)
    assert result.task == "classification" and result.query.label_name == "positive"
    assert result.query.log_p == pytest.approx(float(np.log(probability(
        classified, "the film was so great"))), abs=1e-4)
    assert [hit.label for hit in result[:5]] == ["positive"] * 5
    assert all(hit.log_p <= 0 and hit.fields["number"] % 2 == (hit.label == "positive")
               for hit in result)
    for hit in result:
        np.testing.assert_allclose(sum(hit.token_influence), hit.influence, rtol=1e-4, atol=1e-4)
        assert set(hit.kind_influence) == {"mlp", "head"}
    # of two classes, what makes one label likelier makes the other less so
    other = classified.search(text="the film was so great", label=0, k=40)
    assert [hit.id for hit in other[:5]] != [hit.id for hit in result[:5]]
    assert np.sign(other[0].influence) != np.sign(
        next(hit.influence for hit in result if hit.id == other[0].id))
    both = classified.search(text="the film was so great", label=1, versus_label="negative", k=40)
    assert both[0].id == result[0].id and both[0].influence > result[0].influence


def probability(index, text):
    encoded = index.snapshot.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return float(index.model.network(**encoded).logits.softmax(-1)[0, 1])


def test_without_a_label_the_models_own_is_explained(classified):
    result = classified.search(text="the film was so awful")
    assert result.query.generated and result.query.label_name == (
        "positive" if probability(classified, "the film was so awful") > 0.5 else "negative")


def run(*words):
    shown = CliRunner().invoke(main_group, [str(word) for word in words])
    assert shown.exit_code == 0, shown.output
    return shown


def test_the_command_line_classifies(classifier, tmp_path):
    data = written(tmp_path / "rows.jsonl", sentences(24))
    flags = ["--bits", 512, "--fit-sequences", 24, "--batch-tokens", 64, "--seq-len", 16]
    out = tmp_path / "index"
    run("build", classifier, data, "-o", tmp_path / "other", *flags, "--dry-run")
    said = run("build", classifier, data, "-o", out, *flags).stderr
    assert "task: classification" in said and "text and label" in said
    assert said.endswith(f'next: gradindex search {out} --text "TEXT"\n')
    shown = " ".join(run(
        "search", out, "--text", "a great plot", "--label", "positive", "-k", 2).stdout.split())
    assert "log p(positive) = " in shown and "its log p" in shown
    assert "make the label more likely" in shown
    with pytest.raises(InputError, match="no use with an index of the task classification"):
        gradindex.open(out).search("a great", " plot")
    queries = written(tmp_path / "queries.jsonl", [
        {"text": "a great plot", "label": "positive", "id": "one"}, {"text": "a bad plot"}])
    run("search", out, "--queries", queries, "-o", tmp_path / "r.jsonl")
    found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [one["query"]["id"] for one in found] == ["one", 2]
    again = gradindex.Result.from_json(json.dumps(found[0]))
    assert again.task == "classification" and again.query.label == 1
    run("verify", out)
    run("append", out, written(tmp_path / "more.jsonl", sentences(6, seed=5)))
    run("delete", out, "--ids", written(tmp_path / "ids.txt", [3]))
    run("compact", out)
    run("verify", out)
    run("rescore", out, "--text", "a great plot", "--ids", written(tmp_path / "some.txt", [4, 9]))
    run("eval", out, "--queries", queries)
    run("report", out, "-o", tmp_path / "report.html")
    assert "log p(its label)" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewarded")
    network = network_of_texts("bert", 1, torch.float32)
    model = save(folder / "model", network, tokenizer_of_texts())
    data = written(folder / "pairs.jsonl", answers(20))
    index = gradindex.build(model, data, folder / "index", **SMALL)
    assert index.manifest.task.name == "reward" and index.manifest.kind == "pairs"
    return index


def rewards(index, texts):
    tokenizer = index.snapshot.tokenizer
    with torch.no_grad():
        return [float(index.model.network(**tokenizer(text, return_tensors="pt")).logits[0, 0])
                for text in texts]


def test_a_reward_model_says_which_pairs_taught_a_preference(rewarded):
    asked = {"prompt": "why was it", "chosen": " a great film", "rejected": " an awful film"}
    result = rewarded.search(**asked, k=20)
    one, other = rewards(rewarded, ["why was it a great film", "why was it an awful film"])
    assert result.query.log_p == pytest.approx(-np.log1p(np.exp(other - one)), rel=1e-3)
    hit = result[0]
    assert hit.tokens[: hit.border][0] == hit.tokens[hit.border].strip() == "[CLS]"
    assert "log σ(r(chosen) − r(rejected) − margin)" in result.units
    np.testing.assert_allclose(sum(hit.token_influence), hit.influence, rtol=1e-4, atol=1e-4)
    # the difference of both answers' own rewards goes the same way
    single = {name: rewarded.search(prompt="why was it", response=asked[name], k=20)
              for name in ("chosen", "rejected")}
    assert single["chosen"].query.log_p == pytest.approx(one, rel=1e-3)
    influence = {name: {hit.id: hit.influence for hit in found} for name, found in single.items()}
    weight = 1 / (1 + np.exp(one - other))
    for hit in result:
        difference = influence["chosen"][hit.id] - influence["rejected"][hit.id]
        assert hit.influence == pytest.approx(weight * difference, rel=1e-2, abs=1e-2)


def test_a_policy_says_which_pairs_taught_a_preference(tmp_path):
    tokenizer = tokenizer_of_texts()
    tokenizer.eos_token = "[SEP]"
    model = save(tmp_path / "model", policy(torch.float32), tokenizer)
    data = written(tmp_path / "pairs.jsonl", answers(20))
    index = gradindex.build(model, data, tmp_path / "index", task="preference", beta=0.2, **SMALL)
    asked = {"prompt": "why was it", "chosen": " a great film", "rejected": " an awful film"}
    result = index.search(**asked, k=20)
    assert result.query.unit == "reward" and "∇[r(chosen) − r(rejected)]" in result.units
    assert asked_of(result.query, "preference") == (
        f"β log π(chosen) − β log π(rejected) = {result.query.log_p:.2g}")
    single = index.search(prompt="why was it", response=" a great film")
    assert "∇r(answer)" in single.units
    assert asked_of(single.query, "preference") == f"β log π = {single.query.log_p:.2f}"
    record = index.snapshot.records([0])[0]
    assert record.offset == -5.0 + 6.0 and 0 < record.border < len(record.tokens)
    missing = written(tmp_path / "bare.jsonl", [
        {"prompt": "why", "chosen": " yes", "rejected": " no"}])
    with pytest.raises(InputError, match="ref_chosen_logps"):
        gradindex.build(model, missing, tmp_path / "other", task="preference", **SMALL)


@pytest.mark.parametrize("family, outputs, task, message", [
    ("bert", 2, "reward", "has 2 outputs"),
    ("bert", 1, "classification", "has one output"),
    ("bert", 2, "causal", "--task classification or reward"),
    ("gpt2", 1, "causal", "--task classification or reward"),
])
def test_a_model_of_another_task_is_refused(family, outputs, task, message, tmp_path):
    model = save(tmp_path / "model", network_of_texts(family, outputs, torch.float32),
                 tokenizer_of_texts())
    data = written(tmp_path / "rows.jsonl", sentences(4))
    with pytest.raises(InputError, match=message):
        gradindex.build(model, data, tmp_path / "index", task=task, **SMALL)
    assert not (tmp_path / "index").exists()


def test_several_labels_and_regression_are_refused_by_name(tmp_path):
    for kind, message in (("multi_label_classification", "several labels"),
                          ("regression", "a text a number")):
        model = save(tmp_path / kind, network_of_texts("bert", 3, torch.float32,
                                                       problem_type=kind), tokenizer_of_texts())
        data = written(tmp_path / "rows.jsonl", sentences(4))
        with pytest.raises(InputError, match=message):
            gradindex.build(model, data, tmp_path / "index", **SMALL)


def test_a_model_without_padding_is_refused(tmp_path):
    tokenizer = tokenizer_of_texts()
    tokenizer.pad_token = None
    model = save(tmp_path / "model", network_of_texts("gpt2", 2, torch.float32, pad_token_id=None),
                 tokenizer)
    data = written(tmp_path / "rows.jsonl", sentences(4))
    with pytest.raises(InputError, match="names a token for padding"):
        gradindex.build(model, data, tmp_path / "index", labels=["negative", "positive"], **SMALL)
