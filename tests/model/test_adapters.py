"""LoRA by peft: loading, which modules are whose, their gradients, identity, build and search."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import gradindex
from gradindex.errors import IndexMismatchError, InputError
from gradindex.influence.gradients import backward, gradient
from gradindex.model.identity import files_digest, tensors_digest
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import parameter_share, tracked_modules
from support.indexes import SMALL
from support.models import VOCABULARY, labels_of, random_network
from support.reference import sequence_gradient

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {"gpt_neox": ["query_key_value", "dense_h_to_4h"], "gpt2": ["c_attn", "c_fc"],
           "llama": ["q_proj", "gate_proj"], "qwen3": ["q_proj", "gate_proj"]}
RANK = 2


def with_adapter(network: Any, family: str = "gpt_neox", seed: int = 5, **settings: Any) -> Any:
    """A PeftModel whose adapter matters: lora_B begins at zero, so both maps are drawn anew."""
    config = peft.LoraConfig(**{
        "r": RANK, "lora_alpha": 3, "lora_dropout": 0.1, "target_modules": TARGETS[family],
        "fan_in_fan_out": family == "gpt2", "task_type": "CAUSAL_LM", **settings})
    wrapped = peft.get_peft_model(network, config, autocast_adapter_dtype=False)
    draw(wrapped, seed)
    return wrapped.to(network.dtype).eval()


def draw(network: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def names_of(network: Any, choice: str) -> list[str]:
    return [module.name for module in tracked_modules(network, choice)]


@pytest.fixture(scope="module")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `model_folder`, as PeftModel.save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("adapter")
    base = LanguageModel.load(ModelSource(str(model_folder), device="cpu"))
    with_adapter(base.network).save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors"}
    assert not (folder / "config.json").exists()
    return folder


def test_gradients_equal_autograds(family, sequences):
    """Adapter's and base's maps together, of sequences of different lengths in one batch."""
    wrapped = with_adapter(random_network(family), family)
    model = LanguageModel.load(ModelSource(wrapped))
    assert model.dtype == torch.float64 and not wrapped.base_model.model.training
    modules = tracked_modules(model.network, "all,adapter")
    names = [module.name for module in modules]
    assert sum("lora_" in name for name in names) == 8
    found = {}
    backward(model, modules, model.batch(sequences),
             lambda module, a, d: found.update({module.name: gradient(module, a, d)}))
    # GPT-2 computes in float64 throughout; the others round rotary angles to float32.
    exact = dict(rtol=1e-8, atol=1e-10) if family == "gpt2" else dict(rtol=1e-5, atol=1e-6)
    for row, (ids, scored, *_) in enumerate(sequences):
        truth = sequence_gradient(model.network, names, torch.from_numpy(ids).long(),
                                  labels_of(ids, scored))
        for module in modules:
            assert truth[module.name].shape == module.shape
            torch.testing.assert_close(found[module.name][row], truth[module.name], **exact)
            assert row != 1 or found[module.name][row].abs().max() > 1e-6, module.name


def test_which_modules_and_what_share():
    network = with_adapter(random_network("gpt_neox")).base_model.model
    block = "gpt_neox.layers.{}."
    mlp = ["mlp.dense_h_to_4h.base_layer", "mlp.dense_4h_to_h"]
    attention = ["attention.query_key_value.base_layer", "attention.dense"]
    own = ["attention.query_key_value.lora_A.default", "attention.query_key_value.lora_B.default",
           "mlp.dense_h_to_4h.lora_A.default", "mlp.dense_h_to_4h.lora_B.default"]
    # [o, i] with biases: 12 → 20 → 12 in the MLP, 12 → 36 and 12 → 12 in attention
    size = {"mlp": 20 * 13 + 12 * 21, "attention": 36 * 13 + 12 * 13,
            "adapter": RANK * (12 + 36) + RANK * (12 + 20)}
    norms = 2 * 2 * 12
    total = 2 * (sum(size.values()) + norms) + 2 * 12 + 2 * VOCABULARY * 12
    for choice, wanted, count in (
        ("mlp", mlp, size["mlp"]), ("attention", attention, size["attention"]),
        ("all", mlp + attention, size["mlp"] + size["attention"]),
        ("adapter", own, size["adapter"]),
        ("mlp,adapter", mlp + own, size["mlp"] + size["adapter"]),
        ("adapter, all", mlp + attention + own, sum(size.values())),
        (r"lora_B\.default$", own[1::2], RANK * (36 + 20)),
        (r"4h\.lora_[A,B]", own[2:], RANK * (12 + 20)),  # a comma in a regular expression
    ):
        modules = tracked_modules(network, choice)
        expected = {block.format(layer) + name for layer in (0, 1) for name in wanted}
        if "all" in choice:
            expected.add("lm_head")
        assert {module.name for module in modules} == expected, choice
        assert len(modules) == len(expected)
        assert [m.layer for m in modules] == sorted(m.layer for m in modules)
        for module in modules:
            assert module.kind == ("head" if module.name == "lm_head" else
                                   "adapter" if "lora" in module.name else
                                   "attention" if "attention" in module.name else "mlp")
        head = VOCABULARY * 12 * ("all" in choice)
        assert parameter_share(network, modules) == pytest.approx(
            (2 * count + head) / total, rel=1e-12)


def test_modules_of_every_family_and_of_a_peft_model(family):
    """GPT-2's maps are Conv1D; a PeftModel's modules have longer names and the same order."""
    wrapped = with_adapter(random_network(family), family)
    inside = wrapped.base_model.model
    for choice in ("mlp", "all", "adapter"):
        assert names_of(wrapped, choice) == [
            f"base_model.model.{name}" for name in names_of(inside, choice)]
    plain = random_network(family)
    assert [name.replace(".base_layer", "") for name in names_of(inside, "all")] == \
        names_of(plain, "all")
    assert len(names_of(inside, "adapter")) == 8


def test_only_what_runs_is_tracked():
    wrapped = with_adapter(random_network("gpt_neox"))
    inside = wrapped.base_model.model
    wrapped.add_adapter("attn", peft.LoraConfig(r=3, target_modules=["dense_4h_to_h"]))
    assert {name.rpartition(".")[2] for name in names_of(inside, "adapter")} == {"default"}
    assert not any("lora" in name for name in names_of(inside, "mlp"))
    digest = tensors_digest(inside)
    wrapped.set_adapter("attn")
    assert names_of(inside, "adapter") == [
        f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.lora_{side}.attn"
        for layer in (0, 1) for side in "AB"]
    assert {module.kind for module in tracked_modules(inside, "adapter")} == {"adapter"}
    assert tensors_digest(inside) != digest  # the same tensors, another network
    with wrapped.disable_adapter():
        with pytest.raises(InputError, match=r"no LoRA map .* runs \(merged, disabled"):
            tracked_modules(inside, "mlp,adapter")
        assert len(names_of(inside, "mlp")) == 4
        with pytest.raises(InputError, match="matches none of the linear modules"):
            tracked_modules(inside, r"lora_A")
    wrapped.merge_adapter()
    with pytest.raises(InputError, match=r"no LoRA map .* runs \(merged, disabled"):
        tracked_modules(inside, "adapter")


def test_a_fully_trained_copy_takes_its_originals_place(sequences):
    wrapped = with_adapter(random_network("gpt_neox"), modules_to_save=["dense_4h_to_h"])
    inside = wrapped.base_model.model
    copy = "gpt_neox.layers.0.mlp.dense_4h_to_h.modules_to_save.default"
    original = "gpt_neox.layers.0.mlp.dense_4h_to_h.original_module"
    assert copy in names_of(inside, "mlp") and original not in names_of(inside, "mlp")
    model = LanguageModel.load(ModelSource(wrapped))
    found = []
    modules = tracked_modules(inside, "all,adapter")
    backward(model, modules, model.batch(sequences),
             lambda module, a, d: found.append(module.name))
    assert sorted(found) == sorted(module.name for module in modules)
    with wrapped.disable_adapter():
        assert original in names_of(inside, "mlp") and copy not in names_of(inside, "mlp")


def test_choices_that_cannot_be_had():
    with pytest.raises(InputError, match=r"--modules mlp,adapter: the model has no adapter"):
        tracked_modules(random_network("gpt_neox"), "mlp,adapter")
    network = random_network("gpt_neox")
    ia3 = peft.get_peft_model(network, peft.IA3Config(
        target_modules=["dense_h_to_4h"], feedforward_modules=[]))
    with pytest.raises(InputError, match="adapter is IA3, which has no linear map of its own"):
        tracked_modules(ia3, "mlp,adapter")
    with pytest.raises(InputError, match="nor some of mlp, attention, head, all, adapter"):
        tracked_modules(ia3, "mlp,(")
    prompt = peft.get_peft_model(random_network("gpt_neox"), peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="prompt learning"):
        LanguageModel.load(ModelSource(prompt))


def test_a_folder_loads_as_the_object_it_was(adapter_folder, model_folder):
    source = ModelSource(str(adapter_folder), device="cpu")
    loaded = LanguageModel.load(source, "float64")
    base = LanguageModel.load(ModelSource(str(model_folder), device="cpu"), "float64")
    assert source.load_config().to_dict() == base.source.load_config().to_dict()
    assert loaded.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    wrapped = peft.PeftModel.from_pretrained(base.network, adapter_folder)
    again = LanguageModel.load(ModelSource(wrapped))
    assert tensors_digest(loaded.network) == tensors_digest(again.network)
    tokens = torch.arange(7)[None]
    logits = loaded.network(tokens, use_cache=False).logits
    assert torch.equal(logits, again.network(tokens, use_cache=False).logits)
    plain = LanguageModel.load(ModelSource(str(model_folder), device="cpu"), "float64")
    assert not torch.allclose(logits, plain.network(tokens, use_cache=False).logits)
    assert loaded.continuation([1, 2, 3], 4) == again.continuation([1, 2, 3], 4)
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


def test_the_adapters_own_tokenizer_goes_first(adapter_folder, model_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    tokenizer = load_tokenizer(ModelSource(str(model_folder)))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(ModelSource(str(folder))).chat_template == "{{ messages }}"


@pytest.fixture(scope="module")
def both_index(
    adapter_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "both.index"
    gradindex.build(str(adapter_folder), data_file, out, **SMALL, modules="mlp,adapter")
    return out


QUERY = dict(prompt="The apple number", completion=" 8 grows")


def test_a_search_over_base_and_adapter(both_index, adapter_folder, model_folder, data_file,
                                        tmp_path):
    index = gradindex.open(both_index)
    result = index.search(**QUERY, k=5, shortlist="all")
    modules = index.manifest.modules
    network = index.model.network
    assert index.manifest.parameter_share == parameter_share(network, modules)
    assert [m.name for m in modules] == names_of(network, "mlp,adapter") and len(modules) == 12

    # the influence of every hit from the query's and the sequence's gradients by autograd
    def gradients(ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
        return sequence_gradient(network, [m.name for m in modules], torch.tensor(ids),
                                 torch.tensor(labels))

    asked = gradients(result.query.tokens, result.query.labels)
    for hit in result:
        own = gradients(hit.token_ids, hit.token_ids)
        terms = {}
        for module in modules:
            curvature = index.snapshot.ekfac[module.name]
            coordinates = curvature.coordinates(asked[module.name], index.manifest.damping)
            p = curvature.leave_eigenbasis(coordinates)
            terms[module.name] = float((p * own[module.name]).sum())
        assert hit.influence == pytest.approx(sum(terms.values()), rel=1e-3)
        assert set(hit.module_influence) == set(terms)
        largest = max(abs(term) for term in terms.values())
        for name, term in terms.items():
            assert hit.module_influence[name] == pytest.approx(term, abs=1e-3 * largest)
        for kind in ("lora_A", "lora_B", "base_layer"):
            assert any(kind in name and value for name, value in hit.module_influence.items())


def test_an_index_of_both_is_searched_over_one(both_index):
    """The influence over the adapter alone and the base alone add up to the whole."""
    index = gradindex.open(both_index)
    count = len(index)
    found = {}
    for choice in ("adapter", "mlp", "everything"):
        result = index.search(**QUERY, k=count, shortlist="all",
                              modules=None if choice == "everything" else choice)
        found[choice] = {one: hit.influence for hit in result for one in (hit.id, *hit.duplicates)}
        kinds = {module.name: module.kind for module in index.manifest.modules}
        wanted = {"adapter", "mlp"} if choice == "everything" else {choice}
        assert {kinds[name] for name in result.controls["modules"]} == wanted
    assert sorted(found["everything"]) == list(range(count))
    largest = max(abs(value) for value in found["everything"].values())
    for one, value in found["everything"].items():
        assert found["adapter"][one] + found["mlp"][one] == pytest.approx(value, abs=1e-3 * largest)
    assert any(abs(value) > 0.01 * largest for value in found["adapter"].values())


@pytest.mark.parametrize("choice", ["adapter", "mlp"])
def test_builds_over_one_kind(choice, adapter_folder, model_folder, data_file, tmp_path):
    """The adapter's folder and the PeftModel object are one model."""
    index = gradindex.build(str(adapter_folder), data_file, tmp_path / "index",
                            **{**SMALL, "bits": 256}, modules=choice)
    expected = [(hit.id, hit.influence) for hit in index.search(**QUERY, k=5, shortlist="all")]
    names = [module.name for module in index.manifest.modules]
    assert len(names) == (8 if choice == "adapter" else 4)
    assert all(("lora_" in name) == (choice == "adapter") for name in names)
    base = LanguageModel.load(ModelSource(str(model_folder), device="cpu"))
    wrapped = peft.PeftModel.from_pretrained(base.network, adapter_folder)
    again = gradindex.open(tmp_path / "index", model=wrapped, tokenizer=base.tokenizer)
    assert [(hit.id, hit.influence) for hit in again.search(**QUERY, k=5, shortlist="all")] \
        == expected


def test_another_adapter_or_base_is_refused(both_index, adapter_folder, model_folder, tmp_path):
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    copy = shutil.copytree(adapter_folder, tmp_path / "copy")
    settings = json.loads((copy / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model_folder)

    def save(**changes: Any) -> None:
        (copy / "adapter_config.json").write_text(json.dumps({**settings, **changes}))

    def refused() -> bool:
        try:
            gradindex.open(both_index, model=str(copy)).search(**QUERY, k=1)
        except IndexMismatchError as error:
            assert "is not the one the index was built with" in str(error)
            return True
        return False

    save(base_model_name_or_path=str(moved))
    assert files_digest(ModelSource(str(copy))) == files_digest(ModelSource(str(adapter_folder)))
    assert not refused()
    save(lora_alpha=4)  # the same tensors, used otherwise
    assert refused()
    save(base_model_name_or_path=str(moved))
    network = LanguageModel.load(ModelSource(str(moved), device="cpu")).network
    with torch.no_grad():
        network.lm_head.weight[0, 0] += 1e-3
    network.save_pretrained(moved)
    assert refused()
    base = LanguageModel.load(ModelSource(str(model_folder), device="cpu")).network
    other = peft.PeftModel.from_pretrained(base, adapter_folder)
    draw(other, 6)
    other.save_pretrained(copy)
    save()
    assert refused()
    assert refused_plain(both_index, model_folder)


def refused_plain(index: Path, model: Path) -> bool:
    with pytest.raises(IndexMismatchError, match="is not the one the index was built with"):
        gradindex.open(index, model=str(model)).search(**QUERY, k=1)
    return True


def test_what_cannot_be_loaded_says_why(adapter_folder, model_folder, tmp_path, monkeypatch):
    copy = shutil.copytree(adapter_folder, tmp_path / "copy")
    settings = json.loads((copy / "adapter_config.json").read_text())

    def fails(match: str, **changes: Any) -> None:
        (copy / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(InputError, match=match) as caught:
            ModelSource(str(copy)).load_config()
            LanguageModel.load(ModelSource(str(copy), device="cpu"))
        assert "\n" not in str(caught.value)

    fails(r"the model /gone/base can't be loaded: .* It is the base of the adapter in .*: put it "
          r"there, or name the right one in adapter_config\.json",
          base_model_name_or_path="/gone/base")
    fails("names no base model", base_model_name_or_path=None)
    fails("is itself an adapter", base_model_name_or_path=str(adapter_folder))
    fails(r"lack 4 tensors: .*lora_A.* Expected a complete adapter",
          target_modules=["query_key_value", "dense_h_to_4h", "dense_4h_to_h"])
    fails(r"doesn't fit its base .*lora_A.* is \[2, .*, the base has room for \[5, .*put the right "
          "file there", r=5)
    weights = copy / "adapter_model.safetensors"
    torch.save({"x": torch.zeros(1)}, copy / "adapter_model.bin")
    weights.rename(tmp_path / "kept")
    fails("no safetensors weights: convert them, or pass --allow-pickle")
    shutil.copy(model_folder / "model.safetensors", copy)
    fails("an adapter and the weights of a whole model")
    monkeypatch.setitem(sys.modules, "peft", None)
    fails("peft, which loads adapters, isn't installed. Run pip install peft")
    assert ModelSource(str(model_folder)).adapter is None


def test_pickled_adapter_weights_need_the_flag(adapter_folder, tmp_path):
    import safetensors.torch

    copy = shutil.copytree(adapter_folder, tmp_path / "copy")
    weights = copy / "adapter_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), copy / "adapter_model.bin")
    weights.unlink()
    loaded = LanguageModel.load(ModelSource(str(copy), allow_pickle=True, device="cpu"))
    assert tensors_digest(loaded.network) == \
        tensors_digest(LanguageModel.load(ModelSource(str(adapter_folder), device="cpu")).network)
    assert isinstance(loaded, LanguageModel) and np.isfinite(loaded.continuation([1], 2)).all()
