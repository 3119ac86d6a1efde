"""Several models in one index: the score is the weighted sum of what each one's own index says."""

import json
import re

import numpy as np
import pytest
import torch

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.errors import IndexMismatchError, InputError
from search.study.describe import describe, summary
from support.commands import run
from support.documents import small_documents
from support.indexes import QUESTION, SMALL, SMALL_FLAGS
from support.models import random_network

WEIGHTS = {"last": 1.0, "base": -0.5}


def another(network, seed, family="gpt_neox"):
    """A network of the same shape, with other weights."""
    torch.manual_seed(seed)
    other = type(network)(network.config).to(torch.float64).eval()
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours + 0.05 * torch.randn_like(ours))
    return other


def every(index, **controls):
    """All hits by id."""
    return {hit.id: hit for hit in index.rescore(**QUESTION, ids=range(len(index)), **controls)}


@pytest.fixture(scope="module")
def data():
    return small_documents()[:30]


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer([document["text"] for document in data], 300)


@pytest.fixture(scope="module")
def networks(tokenizer):
    first = random_network("gpt_neox", vocab_size=len(tokenizer))
    return {"last": first, "base": another(first, 1)}


@pytest.fixture(scope="module")
def singles(networks, data, tokenizer, tmp_path_factory):
    """The index of each model alone."""
    return {name: gradindex.build(network, data, tmp_path_factory.mktemp(name) / "i",
                                  tokenizer=tokenizer, modules="all", **SMALL)
            for name, network in networks.items()}


@pytest.fixture(scope="module")
def both(networks, data, tokenizer, tmp_path_factory):
    return gradindex.build(networks["last"], data, tmp_path_factory.mktemp("both") / "i",
                           also={"base": networks["base"]}, tokenizer=tokenizer, modules="all",
                           **SMALL)


@pytest.mark.parametrize("members", [None, "last=1,base=-0.5", "last", "base=2"])
@pytest.mark.parametrize("modules", [None, "mlp", "head"])
def test_the_score_is_the_weighted_sum_of_each_models_own(both, singles, members, modules):
    weights = {None: {"last": 0.5, "base": 0.5}, "last": {"last": 1.0}, "base=2": {"base": 2.0},
               "last=1,base=-0.5": WEIGHTS}[members]
    found = every(both, members=members, modules=modules)
    alone = {name: every(single, modules=modules) for name, single in singles.items()}
    assert len(found) > 20
    for number, hit in found.items():
        parts = {name: weight * alone[name][number].influence for name, weight in weights.items()}
        assert hit.influence == pytest.approx(sum(parts.values()), rel=1e-9, abs=1e-9)
        tokens = sum(weight * np.array(alone[name][number].token_influence)
                     for name, weight in weights.items())
        assert np.allclose(hit.token_influence, tokens, rtol=1e-6, atol=1e-9)
        assert hit.log_p == pytest.approx(alone["last"][number].log_p, rel=1e-12)
        by_member = {name: pytest.approx(part, rel=1e-6, abs=1e-9)
                     for name, part in parts.items()}
        assert hit.member_influence == by_member


@pytest.mark.parametrize("members", [None, "last=3,base=1"])
def test_sizes_are_those_of_the_weighted_kernel(both, singles, members):
    """K = Σ w_k K_k: the influence of a sequence on itself, the cosine, θ-RelatIF."""
    weights = {"last": 0.5, "base": 0.5} if members is None else {"last": 3.0, "base": 1.0}
    found = every(both, members=members, normalize="cosine")
    alone = {name: every(single, normalize="cosine") for name, single in singles.items()}
    own = {}  # ‖q̃‖² of each model, as its cosines have it
    for name, hits in alone.items():
        hit = max(hits.values(), key=lambda one: abs(one.influence))
        own[name] = (hit.influence / hit.cosine) ** 2 / hit.self_influence
    norm = sum(weights[name] * square for name, square in own.items())
    for number, hit in found.items():
        squares = {name: hits[number].self_influence for name, hits in alone.items()}
        steps = {name: (hits[number].influence / hits[number].relatif) ** 2
                 for name, hits in alone.items()}
        square, step = (sum(weights[name] * part[name] for name in weights)
                        for part in (squares, steps))
        assert hit.self_influence == pytest.approx(square, rel=1e-9)
        assert hit.cosine == pytest.approx(hit.influence / (norm * square) ** 0.5, rel=1e-6)
        assert hit.relatif == pytest.approx(hit.influence / step**0.5, rel=1e-6)


def test_codes_find_the_mean(networks, data, tokenizer, tmp_path):
    """The codes' scores are the exact ones but for their noise, which is calibrated for the sum."""
    index = gradindex.build(networks["last"], data, tmp_path / "i", tokenizer=tokenizer,
                            also={"base": networks["base"]}, **{**SMALL, "bits": 2048})
    facts = index.manifest.calibration
    assert 0.9 < facts["slope"] < 1.1 and 0.9 < facts["c"] < 2.0
    for members in (None, "last=1,base=-0.5", "base"):
        hits = every(index, members=members)
        exact, codes = (np.array([getattr(hit, name) for hit in hits.values()])
                        for name in ("influence", "code_score"))
        assert np.corrcoef(exact, codes)[0, 1] > 0.85
        assert np.sum(exact * codes) / np.sum(exact**2) == pytest.approx(1, abs=0.2)


def test_an_index_of_folders_from_build_to_verify(networks, data, tokenizer, tmp_path):
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    out, folders = tmp_path / "i", [str(tmp_path / name) for name in networks]
    how = {**SMALL, "dtype": "float64", "also": [folders[1]]}
    index = gradindex.build(folders[0], data, out, **how)
    assert index.manifest.also.keys() == {"base"}  # by the folder's own name
    before = every(index)
    assert gradindex.build(folders[0], data, out, **how) is not None  # nothing to do
    with pytest.raises(InputError, match=r"was begun with another command .*also"):
        gradindex.build(folders[0], data, out, **{**how, "also": ()})
    gradindex.append(out, small_documents()[30:32])
    assert gradindex.verify(out).sound
    again = every(gradindex.open(out))
    for number, hit in before.items():
        assert again[number].influence == pytest.approx(hit.influence, rel=1e-12)
    shown = summary(describe(out))
    assert f"\nalso        base ({folders[1]}, weights " in shown
    assert "shared out" not in shown

    # moved: said where it is, searches give the same; not said, the others answer
    moved = (tmp_path / "base").rename(tmp_path / "elsewhere")
    found = gradindex.open(out, model={"base": str(moved)}).search(**QUESTION, k=3)
    assert [hit.id for hit in found] == [hit.id for hit in index.search(**QUESTION, k=3)]
    alone = gradindex.open(out).search(**QUESTION, k=3)
    assert alone.controls["members"] == {"last": 1.0}
    assert any(line.startswith("the model base can't be loaded, and the score is without it: ")
               for line in alone.warnings)
    last = gradindex.open(out, model={"base": str(moved)}).search(**QUESTION, k=3, members="last")
    assert [hit.influence for hit in alone] == pytest.approx([hit.influence for hit in last])
    with pytest.raises(InputError, match="the model base of this index can't be loaded"):
        gradindex.open(out).search(**QUESTION, members="last=1,base=-1")
    with pytest.raises(InputError, match="the model base of this index isn't there"):
        gradindex.open(out).rescore(**QUESTION, ids=[0])
    assert any("the model base" in line for line in gradindex.verify(out).lines())
    with pytest.raises(IndexMismatchError, match="Pass --model base=… with"):
        gradindex.open(out, model={"base": folders[0]}).search(**QUESTION)


def test_on_the_command_line_and_in_every_form(networks, data, tokenizer, tmp_path, capsys):
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(document) + "\n" for document in data))
    out = tmp_path / "i"
    command = ("build", tmp_path / "last", rows, "-o", out, "--also", f"seed-1={tmp_path / 'base'}",
               *SMALL_FLAGS)
    priced = run("build", tmp_path / "last", rows, "-o", out, "--also",
                 f"seed-1={tmp_path / 'base'}", *SMALL_FLAGS, "--dry-run")
    assert priced.returncode == 0, priced.stderr
    assert "in each of 2 models (last, seed-1)" in priced.stdout
    built = run(*command)
    assert built.returncode == 0, built.stderr
    question = ("-p", QUESTION["prompt"], "-c", QUESTION["completion"], "-k", "2")
    people = run("search", out, *question)
    assert "the mean over the models last, seed-1" in " ".join(people.stdout.split())
    assert "from seed-1" in people.stdout
    as_json = run("search", out, *question, "--members", "last=1,seed-1=-0.5", "--format", "json")
    assert as_json.returncode == 0, as_json.stderr
    content = json.loads(as_json.stdout)
    assert content["controls"]["members"] == {"last": 1.0, "seed-1": -0.5}
    assert content["units"].endswith("log p too: 1 × last, -0.5 × seed-1.")
    assert content["hits"][0]["member_influence"].keys() == {"last", "seed-1"}
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    there = run("search", out, *question, "--model", f"seed-1={moved}", "--format", "json")
    assert json.loads(there.stdout)["controls"]["members"] == {"last": 0.5, "seed-1": 0.5}
    missing = run("search", out, *question)
    assert "the score is without it" in " ".join(missing.stdout.split())


@pytest.mark.parametrize("also, said", [
    ({"last": "b"}, "--also last=…: there is a model of this name"),
    ({"a/b": "b"}, "--also a/b=…: expected a name of letters"),
    (["x=b", "X=b"], "--also X=…: there is a model of this name"),
    (["early=nowhere/at/all"], "--also early: "), ([""], "--also: no model is given"),
    ({"a": None}, "--also a: no model is given"), ({"a": 3}, "--also a: the model is a int"),
    (3, "also=3: expected a mapping"), ({1: "b"}, "--also 1=…: expected a name"),
])
def test_names_and_places_are_checked_before_anything_is_read(also, said, networks, data,
                                                              tokenizer, tmp_path):
    with pytest.raises(InputError, match=re.escape(said)):
        gradindex.build(networks["last"], data, tmp_path / "i", tokenizer=tokenizer, also=also)
    assert not (tmp_path / "i").exists()


def test_models_come_in_also_and_weights_by_name(networks, data, tokenizer, both, tmp_path):
    with pytest.raises(InputError, match="the model is a mapping; expected the model itself"):
        gradindex.build(networks, data, tmp_path / "i", tokenizer=tokenizer)
    as_mapping = every(both, members={"last": 1.0, "base": -0.5})
    assert as_mapping == every(both, members="last=1,base=-0.5")


def test_a_model_of_another_kind_is_refused(networks, data, tokenizer, tmp_path):
    def refused(other, said):
        with pytest.raises(InputError, match=said):
            gradindex.build(networks["last"], data, tmp_path / "i", tokenizer=tokenizer,
                            also={"other": other}, **SMALL)

    refused(random_network("gpt_neox", vocab_size=len(tokenizer) + 8), r"--also other: it has \d+ "
            r"tokens and the model")
    refused(random_network("gpt_neox", vocab_size=len(tokenizer), intermediate_size=28),
            r"its map .* \[28, \d+\] is not the model's")
    refused(random_network("gpt_neox", vocab_size=len(tokenizer), num_hidden_layers=3),
            "its map .*layers.2.* is not the model's lm_head")
    refused(random_network("gpt_neox", torch.float32, vocab_size=len(tokenizer)),
            "it computes in float32, the model in float64")
    folder = tmp_path / "reordered"
    networks["base"].save_pretrained(folder)
    train_tokenizer(["another text altogether, of other words " * 20], 300).save_pretrained(folder)
    refused(str(folder), "its tokenizer has .* for the number")


@pytest.mark.parametrize("members, said", [
    ("early=1", "the index has no model 'early'; it has last, base"),
    ("last=0", "with a weight other than 0"), ("last=x", "with a weight"),
    ("last=1,last=2", "each model once"), ("", "no model ''"),
    ("last=nan", "with a weight"), ("last=inf", "with a weight"),
])
def test_weights_are_checked(both, members, said):
    with pytest.raises(InputError, match=said):
        both.search(**QUESTION, members=members)
    with pytest.raises(InputError, match="divides by sizes of gradients"):
        both.search(**QUESTION, members="last=1,base=-1", normalize="cosine")
