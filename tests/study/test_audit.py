"""An audit's numbers against autograd and dense inverses, and whom it scores."""

import json

import numpy as np
import pytest
import torch

import gradindex
from gradindex.errors import InputError
from gradindex.progress import Progress
from search.ask.controls import Controls
from search.ask.settings import settle
from search.study import audit as audits
from search.study import audit_table, class_means
from search.study.audit import audit
from search.study.trusted import read_trusted
from support.dense import gram
from support.task_models import (
    answers,
    network_of_texts,
    policy,
    save,
    sentences,
    tokenizer_of_texts,
    written,
)

SMALL = {"bits": 512, "fit_sequences": 20, "batch_tokens": 64, "segment_size": 7, "seq_len": 16,
         "covariance_blocks": 1, "dtype": "float64"}
CLASSES = ["bad", "fine", "good"]
NAMES = {"id2label": dict(enumerate(CLASSES)), "label2id": {c: n for n, c in enumerate(CLASSES)}}


def labelled():
    """Rows of two classes, and one of a third."""
    rows = sentences(24)
    for number, row in enumerate(rows):
        row["label"] = "fine" if number == 9 else {"negative": "bad", "positive": "good"}[
            row["label"]]
        row["flipped"] = number % 6 == 0
    return rows


def build(folder, network, rows, task, **options):
    tokenizer = tokenizer_of_texts()
    tokenizer.eos_token = "[SEP]"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return gradindex.build(save(folder / "model", network, tokenizer), folder / "rows.jsonl",
                           folder / "index", task=task, **{**SMALL, **options})


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    return build(tmp_path_factory.mktemp("classified"), network_of_texts("bert", 3, **NAMES),
                 labelled(), "classification", keep_fields=["number", "flipped"])


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory):
    return build(tmp_path_factory.mktemp("rewarded"), network_of_texts("bert", 1), answers(12),
                 "reward")


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    rows = [{"text": row["sentence"], "number": row["number"]} for row in sentences(16)]
    return build(tmp_path_factory.mktemp("causal"), policy(), rows, "causal",
                 keep_fields=["number"])


@pytest.fixture(params=["classified", "rewarded", "causal"])
def index(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def truth(classified):
    return gram(classified, classified.snapshot.records(range(24)), "classification")


# ---- values


def test_sizes_and_losses_are_those_of_plain_gradients(index):
    records = index.snapshot.records(range(len(index)))
    influence, log_p, norms = gram(index, records, index.manifest.task.name)
    found = index.audit()
    assert found.places.tolist() == list(range(len(index))) and not found.interrupted
    np.testing.assert_allclose(found.self_influence, influence.diagonal(), rtol=1e-8)
    np.testing.assert_allclose(found.loss, -log_p, rtol=1e-9)
    np.testing.assert_allclose(found.gradient_norm, norms, rtol=1e-9)
    signals = found.signals()
    np.testing.assert_allclose(signals["self-influence per gradient"],
                               influence.diagonal() / norms**2, rtol=1e-8)
    predictions = np.array([len(record.tokens) - 1 if index.manifest.task.name == "causal" else 1
                            for record in records])
    np.testing.assert_allclose(signals["self-confidence"], 1 - np.exp(log_p / predictions),
                               rtol=1e-9)
    if index.manifest.task.name == "causal":
        assert found.ranked_by == "self-influence" and found.by_class is None
        assert found.order.tolist() == np.argsort(-influence.diagonal()).tolist()


def test_what_all_other_pairs_say(rewarded):
    records = rewarded.snapshot.records(range(len(rewarded)))
    influence, _, _ = gram(rewarded, records, "reward")
    found, n = rewarded.audit(), len(records)
    others = (influence.sum(1) - influence.diagonal()) / (n - 1)
    np.testing.assert_allclose(found.by_class, others[:, None], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.signals()["all others"], -others, rtol=1e-7, atol=1e-9)
    weighted = influence / rewarded.snapshot.norms  # of each of the others, as the code knows it
    np.fill_diagonal(weighted, 0)
    expected = -weighted.sum(1) / (n - 1) / np.sqrt(influence.diagonal())
    assert found.ranked_by == "all others, cosine"
    np.testing.assert_allclose(found.suspicion, expected, rtol=1e-6, atol=1e-9)
    assert "cosine_from_all" in found.to_list()[0]


def means_of_others(influence, labels, weights=None):
    """By the definition, one by one."""
    expected = np.full((len(labels), len(CLASSES)), np.nan)
    weights = np.ones(len(labels)) if weights is None else weights
    for row in range(len(labels)):
        for label in range(len(CLASSES)):
            others = [n for n in range(len(labels)) if labels[n] == label and n != row]
            if others:
                expected[row, label] = np.mean([influence[row, n] * weights[n] for n in others])
    return expected


def test_classes_say_what_their_other_sequences_do(classified, truth):
    influence, _, _ = truth
    labels = np.array([record.label for record in classified.snapshot.records(range(24))])
    found = classified.audit()
    expected = means_of_others(influence, labels)
    np.testing.assert_allclose(found.by_class, expected, rtol=1e-7, atol=1e-9)
    # the only sequence of its class has no others there
    assert np.isnan(found.by_class).nonzero()[0].tolist() == [9] and labels[9] == 1
    cosines = means_of_others(influence, labels, 1 / classified.snapshot.norms) / np.sqrt(
        influence.diagonal())[:, None]
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-7, atol=1e-9)
    for means, suffix in ((np.nan_to_num(expected), ""), (np.nan_to_num(cosines), ", cosine")):
        own = means[range(24), labels]
        counts = np.bincount(labels) - np.eye(3)[labels]  # of the others
        everyone = (means * counts).sum(1) / 23
        other = [max(np.delete(row, label)) for row, label in zip(means, labels, strict=True)]
        for name, values in (
                ("all others", -everyone), ("own class", -own), ("least class", -means.min(1)),
                ("best other class", other - own)):
            np.testing.assert_allclose(found.signals()[name + suffix], values, rtol=1e-6,
                                       atol=1e-9)
    assert (found.suspicion == found.signals()[found.ranked_by]).all()
    assert found.order.tolist() == np.argsort(-found.suspicion, kind="stable").tolist()


def test_harm_is_minus_the_mean_influence_on_the_trusted(classified, truth):
    """Two of its own sequences are trusted, so that the influence on them is known."""
    influence, _, _ = truth
    rows = labelled()
    asked = [{"text": rows[place]["sentence"], "label": rows[place]["label"]} for place in (4, 7)]
    found = classified.audit(against=asked)
    np.testing.assert_allclose(found.harm, -influence[:, [4, 7]].mean(1), rtol=1e-7, atol=1e-8)
    sizes = np.sqrt(influence.diagonal())
    cosines = influence / np.outer(sizes, sizes)
    np.testing.assert_allclose(found.harm_cosine, -cosines[:, [4, 7]].mean(1), rtol=1e-6, atol=1e-8)
    assert found.suspicion is found.signals()["harm, cosine"] is found.harm_cosine
    assert found.trusted == found.trusted_inside == 2
    assert found.by_class is not None
    # the codes' estimate is of the same: noise of so short codes has a known size
    assert np.corrcoef(found.harm_by_code, found.harm)[0, 1] > 0.5
    assert np.corrcoef(found.harm_cosine_by_code, found.harm_cosine)[0, 1] > 0.5
    elsewhere = classified.audit(against=[{"text": "good end", "label": "good"}])
    assert elsewhere.trusted_inside == 0


def test_harm_of_pairs_and_texts(rewarded, causal):
    row = answers(3)[2]
    pair = {name: row[name] for name in ("prompt", "chosen", "rejected", "margin")}
    influence = gram(rewarded, rewarded.snapshot.records(range(12)), "reward")[0]
    found = rewarded.audit(against=[pair])
    np.testing.assert_allclose(found.harm, -influence[:, 2], rtol=1e-7, atol=1e-8)
    assert found.trusted_inside == 1
    query = causal.make_query("good film", " was great")
    found = causal.audit(against=[query])
    hits = causal.rescore("good film", " was great", ids=range(16))
    np.testing.assert_allclose(found.harm, [-hit.influence for hit in hits], rtol=1e-7)


def test_damping_and_modules_are_those_asked_for(classified):
    part = classified.audit(modules="head", damping=0.5)
    hits = classified.rescore(text="bad", label="bad", ids=range(24), modules="head", damping=0.5,
                              normalize="cosine")
    np.testing.assert_allclose(part.self_influence, [hit.self_influence for hit in hits],
                               rtol=1e-9)


# ---- in parts, and again


def same(found, expected):
    for name in ("self_influence", "loss", "gradient_norm", "by_class", "cosines", "harm",
                 "harm_cosine"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9,
                                   atol=1e-9, err_msg=name)
    assert found.order.tolist() == expected.order.tolist()


ASKED = [{"text": "a good film", "label": "good"}, {"text": "bad end", "label": "bad"}]


def test_parts_of_modules_and_of_classes_add_up(classified, monkeypatch):
    expected = classified.audit(against=ASKED)
    together, stages = audits.together, []
    monkeypatch.setattr(audits, "together", lambda snapshot, modules: (
        part for module in modules for part in together(snapshot, [module])))
    monkeypatch.setattr(audits, "LARGEST_IN_FULL", 0)  # a class at a time
    monkeypatch.setattr(audits, "RECORDS_HELD", 5)
    monkeypatch.setattr(Progress, "start", lambda self, stage, *rest, **more: stages.append(stage))
    same(classified.audit(against=ASKED), expected)
    parts = 3 * len(classified.manifest.modules)
    assert stages == ["records", *(f"{stage} {part}/{parts}" for part in range(1, parts + 1)
                                   for stage in ("what others say", "exact"))]


def test_a_batch_that_runs_out_of_memory_is_not_added_up_twice(classified, monkeypatch):
    expected, calls = classified.audit(against=ASKED), []

    def gradient(*arguments):
        calls.append(1)
        if len(calls) == 7:  # in the middle of a batch, some of whose modules are done
            raise MemoryError
        return original(*arguments)

    original = class_means.gradient
    monkeypatch.setattr(class_means, "gradient", gradient)
    same(classified.audit(against=ASKED), expected)
    assert len(calls) > 7


# ---- who is scored


def settings_of(index):
    return settle(Controls(), index.manifest)


def test_beyond_so_many_those_with_the_largest_norms_are_scored(classified):
    everything, some = classified.audit(), classified.audit(exact=7)
    norms = classified.snapshot.norms
    assert some.places.tolist() == sorted(np.argsort(-norms, kind="stable")[:7].tolist())
    np.testing.assert_allclose(some.self_influence, everything.self_influence[some.places],
                               rtol=1e-9)
    order = some.order.tolist()
    assert sorted(order) == list(range(24)) and set(order[:7]) == set(some.places.tolist())
    assert (np.diff(some.suspicion[np.searchsorted(some.places, order[:7])]) <= 0).all()
    assert (np.diff(norms[order[7:]]) <= 0).all()
    rows = some.to_list()
    assert [row["exact"] for row in rows] == [True] * 7 + [False] * 17
    assert [row["id"] for row in rows] == classified.snapshot.contents.ids[order].tolist()
    assert all(row["self_influence_by_code"] > 0 and row["self_influence"] is None
               for row in rows[7:])
    # off by one factor, codes are put right by what was scored
    ratios = some.self_by_code[some.places] / some.self_influence
    assert np.median(ratios) == pytest.approx(1)


def test_not_all_are_added_up_then_but_of_each_class_alike(classified, truth):
    found = classified.audit(exact=9)
    labels = np.array([record.label for record in classified.snapshot.records(range(24))])
    settings = settings_of(classified)
    rows = audits.read_rows(classified.snapshot, None, None, Progress())
    summed = audits._added_up(classified.snapshot, rows, 9)
    assert np.bincount(labels[summed]).tolist() == [3, 1, 3] and found.summed == 7
    influence, weights = truth[0], np.zeros(24)
    weights[summed] = 1
    for number, place in enumerate(found.places):
        for label in range(3):
            others = [n for n in summed if labels[n] == label and n != place]
            expected = influence[place, others].mean() if others else np.nan
            np.testing.assert_allclose(found.by_class[number, label], expected, rtol=1e-7)
    assert audits._added_up(classified.snapshot, rows, 24).tolist() == list(range(24))
    assert settings.modules == classified.manifest.modules


def test_against_a_trusted_set_the_most_harmful_by_code_are_scored(classified):
    found = classified.audit(against=ASKED, exact=6)
    best = np.argsort(-found.harm_cosine_by_code, kind="stable")[:6]
    assert found.places.tolist() == sorted(best.tolist())
    assert (np.diff(found.harm_cosine_by_code[found.order[6:]]) <= 0).all()


class Interrupting(Progress):
    """A progress at which Ctrl-C strikes, at the end of the n-th batch of a stage."""

    def __init__(self, stage, batch):
        super().__init__()
        self.wanted, self.left = stage, batch

    def update(self, n, total=None):
        super().update(n, total)
        self.left -= self._stage == self.wanted
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupt_while_scoring_keeps_what_is_exact(classified):
    expected = classified.audit()
    found = audit(classified.snapshot, settings_of(classified), 64, progress=Interrupting(
        "exact", 2))
    assert found.interrupted and 0 < len(found.places) < 24
    np.testing.assert_allclose(found.by_class, expected.by_class[found.places], rtol=1e-9)
    assert len(found.to_list()) == len(found.order) == 24
    with pytest.raises(KeyboardInterrupt):
        audit(classified.snapshot, settings_of(classified), 64, progress=Interrupting(
            "what others say", 2))


def test_rows_are_read_in_pieces(classified, monkeypatch):
    expected = classified.audit().to_list()
    monkeypatch.setattr(audit_table, "RECORDS_HELD", 5)
    assert classified.audit().to_list() == expected


def test_a_deleted_sequence_is_not_audited(tmp_path):
    index = build(tmp_path, network_of_texts("bert", 3, **NAMES), labelled(), "classification")
    gradindex.delete(tmp_path / "index", ids=[4])
    index = gradindex.open(tmp_path / "index")
    found = index.audit()
    assert len(found) == 23 and 4 not in [row["id"] for row in found.to_list()]
    labels = [record.label for record in index.snapshot.records(range(23))]
    influence = gram(index, index.snapshot.records(range(23)), "classification")[0]
    np.testing.assert_allclose(found.by_class, means_of_others(influence, labels), rtol=1e-7,
                               atol=1e-9)


@pytest.mark.parametrize("arguments, message", [
    ({"exact": 0}, "^exact 0: expected a number above 0, or None for all"),
    ({"against": []}, "^against: there is no query to audit against; give one or more"),
    ({"against": [{"text": "a good film"}]}, "a trusted query says what is right"),
    ({"against": [{"prompt": "a", "completion": "b"}]}, "no use with an index of the task"),
    ({"against": [{"text": "a", "label": "good"}, {"text": "a good film"}]}, "query 2: a trusted"),
    ({"modules": "99"}, "^modules"), ({"damping": -1.0}, "^damping"),
    ({"truth": "nothing"}, "kept were number, flipped"),
])
def test_what_can_not_be_audited_is_refused(classified, arguments, message):
    with pytest.raises(InputError, match=message):
        classified.audit(**arguments)


def test_one_answer_says_nothing_that_could_be_trusted(rewarded, tmp_path):
    single = {"prompt": "why", "response": " good"}
    with pytest.raises(InputError, match="query 1: a trusted query says which of two answers is"):
        rewarded.audit(against=[single])
    pair = {"prompt": "why", "chosen": " good", "rejected": " bad"}
    found = read_trusted(written(tmp_path / "rows.jsonl", [pair, single]), rewarded.manifest.plan)
    assert list(found.questions) == [1]
    assert "which of two answers is right" in found.complaints()[0]


def test_gradients_are_formed_on_their_own_maps_alone(classified):
    """Hooks are gone, and the network needs no gradient, when an audit ends."""
    classified.audit(exact=3)
    network = classified.model.network
    assert not any(module._forward_hooks for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert torch.is_grad_enabled()
