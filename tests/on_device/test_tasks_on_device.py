"""A classifier and a reward model on a device: the numbers of the host.

All in float64: in float32 two directions of nearly equal curvature are turned by what is rounded.
"""

import numpy as np
import pytest
import torch

import gradindex
from gradindex.storage.tensors import read_tensors
from support.pretend.ledger import LEDGER
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

WITHIN = 1e-11  # relative
DOUBLE = {"modules": "all", "dtype": "float64", "eigen_dtype": "float64", **SMALL}
QUESTIONS = {
    "classification": [{"text": "a great plot", "label": "positive"}, {"text": "a bad plot"},
                       {"text": "so good", "label": 1, "versus_label": 0}],
    "reward": [{"prompt": "why was it", "chosen": " great", "rejected": " so bad"},
               {"prompt": "why was it", "response": " great"}]}


def assert_close(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= WITHIN * np.abs(expected).max()


@pytest.mark.parametrize("task", ["classification", "reward"])
def test_a_build_and_its_searches_give_the_same_numbers(task, tmp_path):
    rows = sentences(24) if task == "classification" else answers(26)
    network = network_of_texts("bert", 1 if task == "reward" else 2, torch.float64, **(
        NAMES if task == "classification" else {}))
    model = save(tmp_path / "model", network, tokenizer_of_texts())
    data = written(tmp_path / "rows.jsonl", rows)
    LEDGER.forget()
    there = gradindex.build(model, data, tmp_path / "device", **DOUBLE)
    assert LEDGER.devices == {0} and there.model.device.type == "cuda"
    host = gradindex.build(model, data, tmp_path / "host", device="cpu", **DOUBLE)
    for file in (tmp_path / "host" / "curvature").glob("*.safetensors"):
        found = read_tensors(tmp_path / "device" / "curvature" / file.name, check=False)[0]
        for name, tensor in read_tensors(file, check=False)[0].items():
            if name == "eigenvalues":  # eigenvectors have signs of their own
                assert_close(found[name], tensor)
    assert_close(there.snapshot.contents.rows["norm"], host.snapshot.contents.rows["norm"])
    for question in QUESTIONS[task]:
        found, expected = (one.search(**question, k=len(rows)) for one in (there, host))
        scores = {hit.id: hit for hit in expected}
        assert found.query.log_p == pytest.approx(expected.query.log_p, rel=WITHIN, abs=1e-12)
        assert_close([hit.influence for hit in found],
                     [scores[hit.id].influence for hit in found])
        assert_close([hit.log_p for hit in found], [scores[hit.id].log_p for hit in found])
        # an index of the device, read on the host
        again = gradindex.open(tmp_path / "device", device="cpu").search(**question, k=len(rows))
        assert [hit.id for hit in again][:3] == [hit.id for hit in found][:3]
        assert_close([hit.influence for hit in again][:3], [hit.influence for hit in found][:3])
    assert gradindex.verify(tmp_path / "device").sound
