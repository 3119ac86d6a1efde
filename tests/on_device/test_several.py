"""A model that is spread over two devices, each map's curvature beside it."""

import gc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradindex
from gradindex.errors import InputError, ResourceError
from support.indexes import APPLES, SMALL, influences
from support.pretend.ledger import LEDGER


@pytest.fixture
def small_cards(monkeypatch, model_folder):
    """Devices of which one alone doesn't hold the model."""
    gc.collect()  # what an earlier test left is freed now, and not while this one counts on it
    weights = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    monkeypatch.setattr(LEDGER, "capacity", LEDGER.used[0] + int(0.75 * weights))
    yield
    monkeypatch.undo()


@pytest.mark.slow
def test_a_model_over_two_devices_gives_the_same_scores(model_folder, data_file, tmp_path):
    whole = gradindex.build(str(model_folder), data_file, tmp_path / "one", modules="all", **SMALL)
    network = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, device_map={
        "gpt_neox.embed_in": 0, "gpt_neox.rotary_emb": 0, "gpt_neox.layers.0": 0,
        "gpt_neox.layers.1": 1, "gpt_neox.final_layer_norm": 1, "lm_head": 1})
    LEDGER.forget()
    spread = gradindex.build(network, data_file, tmp_path / "two", modules="all",
                             tokenizer=AutoTokenizer.from_pretrained(model_folder), **SMALL)
    assert LEDGER.devices == {0, 1}
    places = {str(spread.model.device_of(module)) for module in spread.manifest.modules}
    assert places == {"cuda:0", "cuda:1"} == {
        str(curvature.eigenvalues.device) for curvature in spread.snapshot.ekfac.values()}
    a, b = influences(spread), influences(whole)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5, atol=1e-4)
    for control in ({}, {"normalize": "relatif"}, {"rank": 2}, {"opponents": True}):
        found, expected = spread.search(**APPLES, **control), whole.search(**APPLES, **control)
        assert [hit.id for hit in found] == [hit.id for hit in expected]
    assert [hit.id for hit in next(spread.search_many([APPLES], k=3))] == [
        hit.id for hit in next(whole.search_many([APPLES], k=3))]


def test_the_command_spreads_it(model_folder, data_file, tmp_path):
    built = gradindex.build(str(model_folder), data_file, tmp_path / "index", device_map="auto",
                            **SMALL)
    assert built.model.devices == {torch.device("cuda:0"), torch.device("cuda:1")}
    assert built.search(**APPLES).hits


def test_what_cannot_be_spread_is_refused(model_folder, data_file, tmp_path, small_cards):
    for wrong, message in (({"device_map": "even"}, "expected auto"),
                           ({"device_map": "auto", "device": "cuda:1"}, "Give one of the two")):
        with pytest.raises(InputError, match=message):
            gradindex.build(str(model_folder), data_file, tmp_path / "index", **wrong, **SMALL)
    with pytest.raises(ResourceError, match=r"free\. Use another GPU"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL)
