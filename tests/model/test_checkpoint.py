"""Saved models that can't be used, or not as what they are: refused with the reason, before data.

Models are saved by transformers and then changed as people's files are: cut, mixed, unfetched.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gradindex
from gradindex.errors import InputError
from gradindex.model.checkpoint import check_checkpoint
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from indexer.read.corpus import Corpus

SIZES = {
    "GPT2": dict(n_embd=8, n_layer=2, n_head=2, vocab_size=40, n_positions=16),
    "Llama": dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=2, vocab_size=40),
    "Bert": dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                 vocab_size=40),
    "T5": dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=40),
    "Bart": dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                 decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=40,
                 max_position_embeddings=16),
    "Mixtral": dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, vocab_size=40, num_local_experts=2),
}


@pytest.fixture(autouse=True)
def _quiet():
    quiet_transformers()


def saved(folder: Path, family: str, kind: str, **settings) -> Path:
    """A model of a family's class, by its name, with random weights."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES[family], **settings})
    getattr(transformers, f"{family}{kind}")(config).save_pretrained(folder)
    return folder


def changed(folder: Path, add=None, remove=(), config=None) -> Path:
    """A saved model with tensors added, by name and shape, or removed, and another config.json."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.zeros(shape) for name, shape in (add or {}).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name not in remove},
              folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    return folder


def refused(folder: Path, *parts: str, **options) -> None:
    """Looking at it and loading it both say all of `parts`, in one line."""
    source = ModelSource(str(folder), device="cpu", **options)
    for look in (check_checkpoint, LanguageModel.load):
        with pytest.raises(InputError) as caught:
            look(source)
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value), (look, str(caught.value))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family, kind", [
    ("GPT2", "ForSequenceClassification"), ("GPT2", "ForTokenClassification"),
    ("GPT2", "ForQuestionAnswering"), ("Llama", "ForSequenceClassification"),
    ("Llama", "ForTokenClassification"), ("Llama", "ForQuestionAnswering"),
    ("Bert", "ForSequenceClassification")])
def test_models_of_another_task(tmp_path, family, kind, tied):
    saved(tmp_path, family, kind, tie_word_embeddings=tied)
    refused(tmp_path, f"is a {family}{kind} (architectures in its config.json)",
            "--task classification or reward" if "Sequence" in kind else
            "Expected a causal language model")
    # as it is where config.json was lost and written anew
    if family != "Bert" and ("Question" not in kind or not tied):
        changed(tmp_path, config={"architectures": None})
        refused(tmp_path, *(("score.weight" if "Sequence" in kind or family == "Llama" else
                             "classifier.weight", "drops them. They are used by ") if tied else
                            ("lack", "They are those of ")), f"{family}{kind}")


def test_weights_that_the_class_would_drop(tmp_path):
    llama = saved(tmp_path / "llama", "Llama", "ForCausalLM", tie_word_embeddings=True)

    def copy(name: str) -> Path:
        return shutil.copytree(llama, tmp_path / name)

    refused(changed(copy("trl"), {"v_head.summary.weight": (1, 8), "v_head.summary.bias": (1,)}),
            "hold 2 tensors (v_head.summary.bias, v_head.summary.weight)",
            "LlamaForCausalLM, as which they would be loaded, drops them", "pretrained_model")
    refused(changed(copy("vision"), {"vision_tower.weight": (2, 8)},
                    config={"architectures": ["LlavaForConditionalGeneration"]}),
            "1 tensor (vision_tower.weight)", "belong to LlavaForConditionalGeneration")
    refused(changed(copy("fewer"), config={"num_hidden_layers": 1}),
            "hold 9 tensors (model.layers.1.", "config.json was changed")
    refused(changed(copy("more"), config={"num_hidden_layers": 3}),
            "lack 9 tensors (model.layers.2.")
    refused(changed(copy("wider"), config={"vocab_size": 50}),
            "model.embed_tokens.weight is [40, 8], expected [50, 8]", "don't fit its config.json")
    refused(saved(tmp_path / "two", "GPT2", "DoubleHeadsModel"),
            "multiple_choice_head.summary.weight", "belong to GPT2DoubleHeadsModel")
    refused(changed(tmp_path / "two", config={"architectures": None}),
            "They are used by GPT2DoubleHeadsModel (config.json names no architectures)")
    refused(saved(tmp_path / "bart", "Bart", "ForConditionalGeneration"),
            "saved by BartForConditionalGeneration", "(BartForCausalLM)")
    # tied embeddings would be taken for the head that it doesn't have
    for tied in (True, False):
        refused(saved(tmp_path / f"headless{tied}", "Llama", "Model", tie_word_embeddings=tied),
                "is a LlamaModel (architectures in its config.json), which has no head",
                "name LlamaForCausalLM there")
    refused(saved(tmp_path / "headless", "GPT2", "Model"), "name GPT2LMHeadModel there")
    trunk = transformers.LlamaModel(transformers.LlamaConfig(**SIZES["Llama"]))
    with pytest.raises(InputError, match=r"is a LlamaModel, which has no head.* writes it\.$"):
        LanguageModel.load(ModelSource(trunk))
    refused(saved(tmp_path / "t5", "T5", "ForConditionalGeneration"), "T5ForConditionalGeneration",
            "no causal language model")


def test_what_may_be_left_out(tmp_path):
    """Constants of older versions silently, layers that guess further tokens with their share."""
    llama = saved(tmp_path / "llama", "Llama", "ForCausalLM")
    changed(llama, {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)})
    gpt2 = saved(tmp_path / "gpt2", "GPT2", "LMHeadModel")
    changed(gpt2, {"transformer.h.0.attn.bias": (1, 1, 16, 16),
                   "transformer.h.0.attn.masked_bias": ()})
    trunk = saved(tmp_path / "trunk", "Llama", "Model", tie_word_embeddings=True)
    changed(trunk, config={"architectures": ["LlamaForCausalLM"]})  # which the user vouches for
    experts = saved(tmp_path / "experts", "Mixtral", "ForCausalLM")
    untied = saved(tmp_path / "untied", "Llama", "ForCausalLM", tie_word_embeddings=False)
    heads = load_file(untied / "model.safetensors")
    for folder in (llama, gpt2, trunk, experts, untied):
        source = ModelSource(str(folder), device="cpu")
        assert check_checkpoint(source) == []
        LanguageModel.load(source)
    # a head of its own is loaded though config.json says that it is tied
    changed(untied, config={"tie_word_embeddings": True})
    network = LanguageModel.load(ModelSource(str(untied), device="cpu")).network
    assert torch.equal(network.lm_head.weight, heads["lm_head.weight"])
    assert torch.equal(network.model.embed_tokens.weight, heads["model.embed_tokens.weight"])

    total = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    changed(llama, {"mtp.layers.0.proj.weight": (10, 8)})
    [line] = check_checkpoint(ModelSource(str(llama), device="cpu"))
    assert f"1 tensor (mtp.layers.0.proj.weight), {80 / (total + 80):.1%} of what" in line
    changed(llama, {"model.layers.2.mlp.up_proj.weight": (8, 8)}, ["mtp.layers.0.proj.weight"],
            {"num_nextn_predict_layers": 1})
    assert "model.layers.2.mlp.up_proj.weight" in check_checkpoint(ModelSource(str(llama)))[0]
    LanguageModel.load(ModelSource(str(llama), device="cpu"))


def test_files_that_are_missing_or_damaged(tmp_path):
    config = transformers.LlamaConfig(**SIZES["Llama"])
    whole = tmp_path / "whole"
    transformers.LlamaForCausalLM(config).save_pretrained(whole, max_shard_size="2KB")
    shards = sorted(path.name for path in whole.glob("*.safetensors"))
    assert check_checkpoint(ModelSource(str(whole))) == [] and len(shards) == 4
    last, numbers = shards[-1], "model.safetensors.index.json"

    def with_files(name: str, remove: list[str], **contents: bytes) -> Path:
        folder = shutil.copytree(whole, tmp_path / name)
        for file in remove:
            (folder / file).unlink()
        for file, content in contents.items():
            path = folder / file.replace("__", ".")
            path.write_bytes(content)
        return folder

    refused(with_files("one", [last]), f"1 of its 4 files of weights are missing: {last}")
    refused(with_files("no_list", [numbers]), f"neither model.safetensors nor {numbers}")
    refused(with_files("list", [], model__safetensors__index__json=b"[1]"), "(weight_map)")
    cut = with_files("cut", [])
    (cut / last).write_bytes((cut / last).read_bytes()[:-10])
    refused(cut, f"{last} is damaged or cut short")
    for name, content, said in (
        ("empty", b"", "is empty"), ("junk", b"x" * 99, "is damaged or cut short"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
         "is Git LFS's note of a file that wasn't fetched; expected a model's weights. Run git l")):
        refused(with_files(name, [], model__safetensors=content), f"model.safetensors {said}")
    none = [*shards, numbers]
    for name, file, said in (
        ("bin", "pytorch_model__bin", "are pickled (pytorch_model.bin)"),
        ("gguf", "model-q4__gguf", "in another form (model-q4.gguf)"),
        ("onnx", "model__onnx", "in another form (model.onnx)"),
        ("adapter", "adapter_model__safetensors", "without adapter_config.json"),
        ("zero", "zero_to_fp32__py", "a training checkpoint in pieces"),
        ("trainer", "optimizer__pt", "what a trainer goes on with (optimizer.pt), and no weights"),
        ("bare", "README__md", "it holds no weights. Expected a folder with config.json and")):
        refused(with_files(name, none, **{file: b"content"}), said)
    refused(with_files("note", none, pytorch_model__bin=b"version https://git-lfs"),
            "Git LFS's note", allow_pickle=True)
    refused(with_files("no_config", ["config.json"]), "its weights lie there without config.json")
    refused(with_files("rest", [*none, "config.json"], optimizer__pt=b"1"),
            "a trainer goes on with")
    refused(whole / last, "is a file; expected a folder")
    outer = tmp_path / "outer"
    shutil.copytree(whole, outer / "checkpoint-10")
    refused(outer, "its folders do (checkpoint-10). Give one of them")
    refused(tmp_path / "gone", "there is no such folder")


@pytest.mark.parametrize("family, kind, said", [
    ("T5", "ForConditionalGeneration", "no causal language model"),
    ("Bert", "ForMaskedLM", "BertLMHeadModel isn't causal"),
    ("GPT2", "ForTokenClassification", "is a GPT2ForTokenClassification")])
def test_a_model_that_cannot_be_used_is_refused_before_the_data(
        tmp_path, monkeypatch, family, kind, said):
    monkeypatch.setattr(Corpus, "sequences", lambda *_: pytest.fail("the data were read"))
    folder = saved(tmp_path / "model", family, kind)
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.ones((20, 8), np.int32))
    for run in (gradindex.build, gradindex.estimate):
        with pytest.raises(InputError, match=said):
            run(str(folder), tokens, tmp_path / "index", bits=512, device="cpu")
