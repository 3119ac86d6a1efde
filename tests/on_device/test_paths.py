"""Every path of the product gives on a device what it gives on the host."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradindex
from gradindex.cli import main_group
from gradindex.errors import ResourceError
from gradindex.storage.tensors import read_tensors
from indexer.dry_run.estimate import estimate
from indexer.upkeep.verify import verify
from support.indexes import APPLES, OTHER, QUESTION, SMALL, influences
from support.models import MIXTURES, SIZES, random_network
from support.pretend.ledger import LEDGER

WITHIN = 1e-5  # relative, of float32


def saved(folder: Path, like: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with the tokenizer of another."""
    tokenizer = AutoTokenizer.from_pretrained(like)
    tokenizer.save_pretrained(folder)
    random_network(family, dtype, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def curvature_of(index: Path) -> dict[str, torch.Tensor]:
    """All tensors of an index's curvature."""
    return {f"{file.name} {name}": tensor
            for file in sorted((index / "curvature").glob("*.safetensors"))
            for name, tensor in read_tensors(file, check=False)[0].items()}


def assert_close(found, expected, within=WITHIN, what=""):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= within, (what, error)


@pytest.fixture(scope="module")
def on_host(model_folder, data_file, tmp_path_factory):
    """The index of the small documents, built on the host."""
    out = tmp_path_factory.mktemp("host") / "small.index"
    gradindex.build(str(model_folder), data_file, out, device="cpu", modules="all", **SMALL)
    return out


@pytest.fixture(scope="module")
def on_device(model_folder, data_file, tmp_path_factory):
    """The same, built on the device."""
    out = tmp_path_factory.mktemp("device") / "small.index"
    LEDGER.forget()
    gradindex.build(str(model_folder), data_file, out, modules="all", **SMALL)
    assert LEDGER.devices == {0} and LEDGER.operations
    return out


def test_a_build_gives_the_same_numbers(on_host, on_device):
    host, device = gradindex.open(on_host, device="cpu"), gradindex.open(on_device)
    assert device.manifest.plan.device == "cuda" and device.model.device.type == "cuda"
    there = curvature_of(on_device)
    for name, tensor in curvature_of(on_host).items():
        assert_close(there[name], tensor, what=name)
    assert_close(device.snapshot.contents.rows["norm"], host.snapshot.contents.rows["norm"])
    codes, again = (one.snapshot.stored_codes(range(len(one))) for one in (host, device))
    assert (np.unpackbits(codes[:, :-8]) != np.unpackbits(again[:, :-8])).mean() < 1e-3
    assert_close(device.manifest.calibration["c"], host.manifest.calibration["c"])
    for name in ("vectors", "upper", "lower"):
        found, expected = (getattr(one.snapshot.tables.background_queries, name)
                           for one in (device, host))
        assert_close(found, expected, 1e-3, name)  # kept in float16
    a, b = influences(device), influences(host)
    assert_close(list(a.values()), list(b.values()))


CONTROLS = [{}, {"opponents": True}, {"normalize": "relatif"}, {"rank": 2}]
MORE = [
    {"shortlist": "all"}, {"recall": 0.9}, {"modules": "attention"}, {"modules": "0"},
    {"damping": 0.01}, {"normalize": "cosine"}, {"candidates": "tfidf"}, {"candidates": "code"},
    {"group_by": "place"}, {"time_limit": 100.0},
]


@pytest.mark.parametrize("control", [
    *CONTROLS, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)], ids=str)
def test_a_search_gives_the_same_hits(on_device, control):
    device, host = gradindex.open(on_device), gradindex.open(on_device, device="cpu")
    assert host.model.device.type == "cpu"
    found, expected = device.search(**APPLES, **control), host.search(**APPLES, **control)
    within = 1e-3 if "rank" in control else WITHIN  # a factorisation begins with other numbers
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    assert_close([hit.influence for hit in found], [hit.influence for hit in expected], within)
    assert_close(found.query.token_log_p, expected.query.token_log_p)
    for a, b in zip(found, expected, strict=True):
        if b.exact:
            assert_close(a.token_layer_influence, b.token_layer_influence, within)


def test_codes_are_scored_on_the_device(on_device):
    """As FAISS's are, but for its rounding of a query; without exact scores that is the result."""
    index = gradindex.open(on_device)
    vectors = np.random.default_rng(0).standard_normal((3, SMALL["bits"])).astype(np.float32)
    codes = index.snapshot.codes_at(range(len(index)))
    LEDGER.forget()
    found = index.snapshot.code_scores(vectors)
    assert any(line.startswith("influence/device_codes.py") for line in LEDGER.operations)
    assert_close(found, codes.many_scores(vectors))
    hits = index.search(**APPLES, rescore=False, k=5)
    assert [hit.influence for hit in hits] == sorted((hit.influence for hit in hits), reverse=True)


def test_other_questions_give_the_same_hits(on_device):
    device, host = gradindex.open(on_device), gradindex.open(on_device, device="cpu")
    three = [QUESTION, APPLES, OTHER]
    ids = [int(one) for one in host.snapshot.contents.ids[:4]]

    def answers(index):
        yield index.search(**APPLES, versus=" 9 sits by the hill.")
        yield index.search(token_ids=[5, 6, 7, 8], labels=[-100, -100, 7, 8])
        yield index.search(APPLES["prompt"])  # which the model goes on with
        yield from index.search_many(three, k=3)
        yield from index.search_many(three, k=3, rank=2)
        yield from index.search_many(three, k=3, aggregated=True)
        yield from index.compare(APPLES["prompt"], [" 3", " 4"]).results
        yield index.rescore(**APPLES, ids=ids, normalize="relatif")

    for number, (a, b) in enumerate(zip(answers(device), answers(host), strict=True)):
        assert [hit.id for hit in a] == [hit.id for hit in b], number
        assert_close([hit.influence for hit in a], [hit.influence for hit in b],
                     1e-3 if 6 <= number < 9 else WITHIN, number)


@pytest.mark.parametrize("kind", ["mixtral", *(
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("gpt2", "llama", "gpt_oss", "bfloat16", "float16"))])
def test_other_models_give_the_same_scores(kind, model_folder, data_file, tmp_path, monkeypatch):
    """Maps that are stored the other way round, experts, half precision; blocks of A and S."""
    dtype = getattr(torch, kind, torch.float32)
    family = "llama" if isinstance(dtype, torch.dtype) and kind.startswith(("b", "f")) else kind
    monkeypatch.setitem(SIZES, family, {**SIZES, **MIXTURES}[family])
    model = saved(tmp_path / "model", model_folder, family, dtype)
    built = gradindex.build(str(model), data_file, tmp_path / "index", modules="all",
                            covariance_blocks=2, **SMALL)
    assert built.model.device.type == "cuda" and built.model.dtype == dtype
    host = gradindex.open(tmp_path / "index", device="cpu")
    a, b = influences(built), influences(host)
    # in half precision even the order of a batch's sums shows
    assert_close(list(a.values()), list(b.values()),
                 WITHIN if dtype == torch.float32 else 0.02, kind)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_adapters_give_the_same_scores(model_folder, data_file, tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base", model_folder, "llama")
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(network, peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    built = gradindex.build(str(tmp_path / "adapter"), data_file, tmp_path / "index",
                            modules="mlp,adapter", **SMALL)
    host = gradindex.open(tmp_path / "index", device="cpu")
    a, b = influences(built), influences(host)
    assert_close(list(a.values()), list(b.values()))


def test_append_verify_and_rebuild(on_device, more_data, tmp_path):
    index = tmp_path / "index"
    shutil.copytree(on_device, index)
    longer = gradindex.append(index, more_data)
    assert longer.model.device.type == "cuda" and len(longer) > len(gradindex.open(on_device))
    a, b = influences(longer), influences(gradindex.open(index, device="cpu"))
    assert_close(list(a.values()), list(b.values()))
    for device in ("cuda", "cpu"):
        assert verify(index, device=device).sound
    codes = sorted(index.glob("segments/*/*.faiss"))[1]
    content = bytearray(codes.read_bytes())
    content[len(content) // 2] ^= 255
    codes.write_bytes(content)
    assert not verify(index).sound
    assert verify(index, rebuild=True).sound
    assert_close(list(influences(gradindex.open(index)).values()), list(b.values()))


@pytest.mark.slow
def test_eval_report_and_the_dry_run(on_device, model_folder, data_file, tmp_path):
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps(one) + "\n" for one in (QUESTION, APPLES)))
    for arguments in (["eval", on_device, "--queries", queries, "-o", tmp_path / "eval.json"],
                      ["report", on_device, "-o", tmp_path / "report.html"]):
        assert main_group.main([str(one) for one in arguments], standalone_mode=False) in (None, 0)
    found = estimate(str(model_folder), data_file, tmp_path / "dry", **SMALL)
    assert found.memory and LEDGER.devices == {0}


@pytest.mark.slow
def test_a_bound_on_memory_changes_no_number(model_folder, data_file, tmp_path, on_device):
    expected = influences(gradindex.open(on_device))
    gradindex.build(str(model_folder), data_file, tmp_path / "index", modules="all",
                    max_memory="700KB", **SMALL)
    bounded = gradindex.open(tmp_path / "index", max_memory="700KB")
    assert_close(list(influences(bounded).values()), list(expected.values()))
    with pytest.raises(ResourceError, match="--max-memory 100"):
        gradindex.build(str(model_folder), data_file, tmp_path / "other", max_memory="100KB",
                        **SMALL)


@pytest.mark.slow
def test_a_model_object_goes_where_it_is_asked_to(model_folder, data_file, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    moved = gradindex.build(network, data_file, tmp_path / "moved", tokenizer=tokenizer,
                            device="cuda:1", **SMALL)
    assert str(moved.model.device) == "cuda:1" and network.device.type == "cpu"
    there = gradindex.build(network.to("cuda"), data_file, tmp_path / "there", tokenizer=tokenizer,
                            **SMALL)
    assert str(there.model.device) == "cuda:0"
    half = gradindex.build(network, data_file, tmp_path / "half", tokenizer=tokenizer,
                           dtype="bfloat16", **SMALL)
    assert half.manifest.dtype == "bfloat16" and network.dtype == torch.float32
    assert_close(list(influences(there).values()), list(influences(moved).values()))
