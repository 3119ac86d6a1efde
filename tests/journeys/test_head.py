"""The map to the vocabulary beside the MLPs: from a build to hits, the page's words and files."""

import json

import numpy as np
import peft
import pytest
import torch

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.results import Result
from search.show.output_forms import render_form
from search.show.task_words import layer_names, layers_of, numbered_apart
from search.study.describe import describe, summary
from support.documents import small_documents
from support.indexes import QUESTION, SMALL
from support.models import random_network


def every(index, **controls):
    """All hits by id."""
    return {hit.id: hit for hit in index.rescore(**QUESTION, ids=range(len(index)), **controls)}


@pytest.fixture(scope="module")
def documents():
    return small_documents()[:30]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer([document["text"] for document in documents], 300)


def built(tokenizer, documents, out, family="llama", network=None, **options):
    network = network or random_network(family, torch.float32, vocab_size=len(tokenizer),
                                        tie_word_embeddings=family == "llama")
    return gradindex.build(network, documents, out, tokenizer=tokenizer, **{**SMALL, **options})


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_one_index_serves_searches_with_and_without_it(family, tokenizer, documents, tmp_path):
    index = built(tokenizer, documents, tmp_path / "both.index", family)
    alone = built(tokenizer, documents, tmp_path / "mlp.index", family, modules="mlp")
    assert {module.kind for module in index.manifest.modules} == {"mlp", "head"}
    whole, mlp, head = (every(index, modules=choice) for choice in (None, "mlp", "head"))
    expected = {number: hit.influence for number, hit in every(alone).items()}
    assert len(whole) == len(expected) > 20
    for number, hit in whole.items():
        assert mlp[number].influence == pytest.approx(expected[number], rel=1e-4, abs=1e-3)
        assert hit.influence == pytest.approx(
            mlp[number].influence + head[number].influence, rel=1e-4, abs=1e-3)
        assert hit.kind_influence["head"] == pytest.approx(
            head[number].influence, rel=1e-4, abs=1e-3)
        assert sum(hit.layer_influence) == pytest.approx(hit.influence, rel=1e-4, abs=1e-3)
    gradindex.append(index.snapshot.path, small_documents()[30:32],
                     model=index.model.network, tokenizer=tokenizer)
    assert gradindex.verify(index.snapshot.path, index.model.network, tokenizer=tokenizer).sound


def test_it_has_a_name_among_the_layers(tokenizer, documents, tmp_path):
    index = built(tokenizer, documents, tmp_path / "all.index", "gpt_neox", modules="everything")
    result = index.search(**QUESTION, k=3)
    assert result.layers == [-1, 0, 1, 2]
    assert layer_names(result) == ["embeddings", "layer 0", "layer 1", "head"]
    assert layers_of(result) == "embeddings, layers 0 to 1 and head"
    assert numbered_apart(result) == "; -1 are the embeddings; 2 is the head"
    shown = " ".join(render_form(result, "auto").decode().split())
    assert "modules in embeddings, layers 0 to 1 and head, damping" in shown
    assert "embeddings, layers 0–1 and head" in shown
    again = Result.from_json(result.to_json())
    assert again.layers == result.layers
    assert again[0].kind_influence.keys() == {"mlp", "attention", "head", "embeddings"}
    assert "in 2 layers, the embeddings and the head, " in summary(describe(index.snapshot.path))
    one = index.search(**QUESTION, k=3, modules="head")
    assert layers_of(one) == "head" and one.layers == [2]


@pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
], ids=["in the blocks", "over the head", "the head in full"])
def test_over_adapters_it_is_the_weight_that_runs(settings, tokenizer, documents, tmp_path):
    network = peft.get_peft_model(
        random_network("llama", torch.float32, vocab_size=len(tokenizer),
                       tie_word_embeddings=False), peft.LoraConfig(r=2, **settings))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    index = built(tokenizer, documents, tmp_path / "a.index", network=network.eval(),
                  modules="mlp,head,adapter")
    [head] = [module for module in index.manifest.modules if module.kind == "head"]
    assert head.diagonal and head.d_out == len(tokenizer) and "original_module" not in head.name
    weight = index.model.network.get_submodule(head.name).weight
    query = index.search(**QUESTION, k=1).query

    # by autograd on that weight alone, its curvature being the mean square of drawn gradients
    curvature = index.snapshot.ekfac[head.name]
    p = _gradient(index.model.network, weight, query.tokens, query.labels) / \
        curvature.damped(index.manifest.plan.damping)
    for hit in index.rescore(**QUESTION, ids=range(5)):
        g = _gradient(index.model.network, weight, hit.token_ids, hit.token_ids)
        assert hit.kind_influence["head"] == pytest.approx(float((p * g).sum()), rel=1e-3, abs=1e-3)


def _gradient(network, weight, tokens, labels):
    weight.requires_grad_()
    ids = torch.tensor(tokens)
    said = network(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1]
    targets = torch.tensor(labels)[1:]
    total = said[targets >= 0].gather(1, targets[targets >= 0][:, None]).sum()
    [gradient] = torch.autograd.grad(total, weight)
    weight.requires_grad_(False)
    return gradient


def test_half_precision_gives_nearly_the_same(tokenizer, documents, tmp_path):
    network = random_network("llama", torch.float32, vocab_size=len(tokenizer),
                             tie_word_embeddings=True)
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    index, half = (gradindex.build(tmp_path / "model", documents, tmp_path / f"{dtype}.index",
                                   dtype=dtype, **SMALL) for dtype in ("float32", "bfloat16"))
    scores = [every(one, modules="head") for one in (index, half)]
    found, rounded = (np.array([one[number].influence for number in sorted(one)])
                      for one in scores)
    assert np.corrcoef(found, rounded)[0, 1] > 0.98
    settings = json.loads((index.snapshot.path / "manifest.json").read_text())
    assert settings["format"] == 7
    assert [module["diagonal"] for module in settings["modules"]].count(True) == 1
