"""A classifier and a reward model on a Ray cluster: the bytes, and the answers, of one process."""

import pytest
import torch

import gradindex
from support.clusters import two_nodes
from support.indexes import files_of
from support.needed import library
from support.task_models import (
    NAMES,
    SMALL,
    answers,
    network_of_texts,
    save,
    sentences,
    tokenizer_of_texts,
    written,
)
from support.waiting import HANG

ray = library("ray")

CASES = {  # outputs, rows, and what is asked
    "classification": (2, sentences(30), [
        {"text": "a great plot", "label": "positive"},
        {"text": "a great plot", "label": "positive", "versus_label": "negative"}]),
    "reward": (1, answers(24), [
        {"prompt": "why was it", "chosen": " great", "rejected": " so bad"},
        {"prompt": "why was it", "response": " great"}]),
}


@pytest.fixture(scope="module")
def cluster():
    with two_nodes(num_cpus=2) as cluster:
        yield cluster
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "reward"])
def test_a_build_and_its_searches_over_ray(task, cluster, one_thread, tmp_path):
    outputs, rows, questions = CASES[task]
    network = network_of_texts("bert", outputs, torch.float32, **(NAMES if outputs == 2 else {}))
    model = save(tmp_path / "model", network, tokenizer_of_texts())
    data = written(tmp_path / "rows.jsonl", rows)
    alone = gradindex.build(model, data, tmp_path / "alone", **SMALL)
    gradindex.build(model, data, tmp_path / "index", ray=cluster.address, **SMALL)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "alone")
    shared = gradindex.open(tmp_path / "index", ray=cluster.address)
    shared.snapshot.pool.patience = shared.snapshot.pool.back = HANG
    for question in questions:
        found, expected = (one.search(**question, k=len(rows)) for one in (shared, alone))
        assert found.query.log_p == pytest.approx(expected.query.log_p, rel=1e-5)
        assert found.query.label_name == expected.query.label_name
        assert {hit.id: (hit.label, hit.border) for hit in found} == {
            hit.id: (hit.label, hit.border) for hit in expected}
        scores = {hit.id: hit for hit in expected}
        for hit in found:
            assert hit.influence == pytest.approx(scores[hit.id].influence, rel=1e-4, abs=1e-4)
            assert hit.log_p == pytest.approx(scores[hit.id].log_p, rel=1e-5)
