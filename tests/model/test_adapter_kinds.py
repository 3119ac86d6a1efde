"""Every kind of adapter: its gradients are autograd's, or what can't be had is named.

The truth is `torch.autograd.grad` with respect to the weights, without a hook.
"""

from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import gradindex
from gradindex.errors import InputError
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import parameter_share, tracked_modules, untracked
from indexer.build_request import make_request
from support.gradients import captured
from support.models import labels_of, random_network
from support.reference import log_likelihood

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TARGETS = ["q_proj", "gate_proj"]
NEOX = ["query_key_value", "dense_h_to_4h"]  # which have biases


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, **settings})


KINDS = {  # a configuration, and the word for what of it can't be tracked
    "rslora": (lora(use_rslora=True), None),
    "dora": (lora(use_dora=True), "the adapter's DoRA"),
    "lora_bias": (lora(lora_bias=True), None),
    "saved": (lora(modules_to_save=["down_proj"]), "originals of trained copies"),
    "tokens": (lora(trainable_token_indices=[1, 2]), "the adapter's TRAINABLE_TOKENS"),
    "bare": (lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
             "the adapter's LoRA on bare parameters"),
    "ia3": (peft.IA3Config(target_modules=["q_proj", "down_proj"],
                           feedforward_modules=["down_proj"]), "the adapter's IA3"),
    "loha": (peft.LoHaConfig(r=2, target_modules=TARGETS), "the adapter's LOHA"),
    "lokr": (peft.LoKrConfig(r=2, target_modules=TARGETS), "the adapter's LOKR"),
    "adalora": (peft.AdaLoraConfig(target_r=2, init_r=2, target_modules=TARGETS, total_step=9,
                                   tinit=1, tfinal=1), "the adapter's ADALORA"),
    "vera": (peft.VeraConfig(r=2, target_modules=["q_proj"]), "the adapter's VERA"),
    "boft": (peft.BOFTConfig(boft_block_size=2, target_modules=TARGETS), "the adapter's BOFT"),
    "hra": (peft.HRAConfig(r=2, target_modules=TARGETS), "linear maps under the adapter's HRA"),
    "shira": (peft.ShiraConfig(r=1, target_modules=["q_proj"]),
              "linear maps under the adapter's SHIRA"),
    "norms": (peft.LNTuningConfig(target_modules=["input_layernorm"]), "the adapter's LN_TUNING"),
}


def adapted(config: Any, family: str = "llama", name: str = "default") -> Any:
    """A PeftModel in float64 whose adapter matters."""
    wrapped = peft.get_peft_model(random_network(family), config, name,
                                  autocast_adapter_dtype=False)
    return drawn(wrapped)


def drawn(wrapped: Any, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return wrapped.double().eval()


def check(model: LanguageModel, modules: list[Any], texts: list[Any]) -> None:
    """Assert that what hooks read of a batch is autograd's, alone."""
    found, _ = captured(model, modules, model.batch(texts))
    for row, (tokens, scored, *_) in enumerate(texts):
        if not scored[1:].any():
            continue
        maps = [model.network.get_submodule(module.name) for module in modules]
        weights = [part for map_, module in zip(maps, modules, strict=True)
                   for part in ([map_.weight, map_.bias] if module.bias else [map_.weight])]
        for weight in weights:
            weight.requires_grad_(True)
        log_p = log_likelihood(model.network, torch.from_numpy(tokens).long(),
                               labels_of(tokens, scored))
        truths = iter(torch.autograd.grad(log_p, weights))
        for weight in weights:
            weight.requires_grad_(False)
        for module in modules:
            truth = next(truths)
            if module.bias:
                truth = torch.cat([truth, next(truths)[:, None]], dim=1)
            torch.testing.assert_close(found[module.name][row], truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_tracked_is_right_and_the_rest_is_named(kind, sequences):
    config, word = KINDS[kind]
    wrapped = adapted(config)
    model = LanguageModel.load(ModelSource(wrapped))
    has_maps = type(config) is peft.LoraConfig and kind != "bare"
    if not has_maps:
        expected = "LoRA on bare parameters" if kind == "bare" else config.peft_type.value
        with pytest.raises(InputError, match=f"adapter is {expected}.*no linear map of its own"):
            tracked_modules(model.network, "mlp,adapter")
    modules = tracked_modules(model.network, "all,adapter" if has_maps else "all")
    assert sum(module.kind == "adapter" for module in modules) == (8 if has_maps else 0)
    check(model, modules, sequences[:2])
    rest = untracked(model.network, modules)
    assert sum(rest.values()) + parameter_share(model.network, modules) == pytest.approx(1)
    assert word is None or any(word in one and share > 0.001 for one, share in rest.items())
    under = word is not None and word.startswith("linear maps under")
    assert len([one for one in modules if one.kind != "adapter"]) == \
        15 - under * (2 if kind == "shira" else 4)


def test_a_bias_under_dora_is_left_out(sequences):
    """DoRA takes the base's bias out of its output before it scales that: no hook sees its part."""
    wrapped = adapted(lora(use_dora=True, target_modules=NEOX), "gpt_neox")
    model = LanguageModel.load(ModelSource(wrapped))
    modules = tracked_modules(model.network, "all,adapter")
    biases = {module.name.partition("layers.0.")[2]: module.bias for module in modules
              if module.layer == 0 and module.kind != "adapter"}
    assert biases == {"attention.query_key_value.base_layer": False, "attention.dense": True,
                      "mlp.dense_h_to_4h.base_layer": False, "mlp.dense_4h_to_h": True}
    check(model, modules, sequences[:2])


@pytest.mark.parametrize("config, modules, equal", [
    (lora(), "mlp", True), (lora(use_rslora=True), "mlp", True),
    (lora(use_dora=True), "down_proj", True),
    # which scale what the base's map gives: the merged weight is another parameter than that one's
    (lora(use_dora=True), "mlp", False), (KINDS["boft"][0], "mlp", False),
    (KINDS["ia3"][0], "mlp", False),
], ids=["lora", "rslora", "dora beside", "dora", "boft", "ia3"])
def test_merged_and_unmerged_give_equal_scores(config, modules, equal, tmp_path):
    """The influence doesn't depend on where ΔW is kept, if it is added to the weights."""
    base = random_network("llama")
    base.save_pretrained(tmp_path / "base")
    wrapped = adapted(config)
    wrapped.get_base_model().name_or_path = str(tmp_path / "base")
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(1, 37, (24, 9)))
    found = []
    for name in ("adapter", "merged"):
        index = gradindex.build(
            str(tmp_path / name), tmp_path / "tokens.npy", tmp_path / f"{name}.index",
            bits=64, dtype="float64", modules=modules)
        result = index.search(token_ids=list(range(1, 8)), k=24, shortlist="all")
        found.append({hit.id: hit.influence for hit in result})
    assert (found[0] == pytest.approx(found[1], rel=1e-6)) is equal
    assert equal or found[0] != pytest.approx(found[1], rel=1e-2)


@pytest.fixture
def two_adapters(tmp_path):
    """A folder with the adapters "default" and "other", and the PeftModel that it was saved from.
    """
    random_network("llama").save_pretrained(tmp_path / "base")
    wrapped = adapted(lora(task_type="CAUSAL_LM", base_model_name_or_path=str(tmp_path / "base")))
    wrapped.add_adapter("other", lora(
        task_type="CAUSAL_LM", r=3, base_model_name_or_path=str(tmp_path / "base")))
    wrapped.set_adapter("other")
    drawn(wrapped, 4)
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "both")
    return tmp_path / "both", wrapped


def test_one_of_several_adapters(two_adapters, tmp_path):
    folder, wrapped = two_adapters
    tokens = torch.arange(1, 8)[None]
    logits = {}
    for name in ("default", "other"):
        wrapped.set_adapter(name)
        logits[name] = wrapped(tokens, use_cache=False).logits
    assert not torch.allclose(logits["default"], logits["other"])
    for given, name in ((None, "default"), ("default", "default"), ("other", "other")):
        loaded = LanguageModel.load(ModelSource(str(folder), device="cpu", adapter_name=given),
                                    "float64")
        torch.testing.assert_close(loaded.network(tokens, use_cache=False).logits, logits[name])
        if given is None:
            continue
        # of an object: whichever runs in it, and it runs there afterwards
        for running in ("default", "other"):
            wrapped.set_adapter(running)
            loaded = LanguageModel.load(ModelSource(wrapped, adapter_name=given))
            assert torch.equal(loaded.network(tokens, use_cache=False).logits, logits[name])
            assert {module.name.rpartition(".")[2] for module
                    in tracked_modules(loaded.network, "adapter")} == {name}
            assert torch.equal(wrapped(tokens, use_cache=False).logits, logits[running])
    for source in (str(folder), wrapped):
        with pytest.raises(InputError, match=r"--adapter third: .*default, other"):
            LanguageModel.load(ModelSource(source, device="cpu", adapter_name="third"))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"in folders of its own: other. Say which with --adapter"):
        ModelSource(str(folder)).load_config()

    # an index knows which it was built with
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(1, 37, (20, 9)))
    gradindex.build(str(folder), tmp_path / "tokens.npy", tmp_path / "index", bits=512,
                    modules="mlp,adapter", adapter="other")
    index = gradindex.open(tmp_path / "index")
    assert index.manifest.plan.adapter == "other"
    query = dict(token_ids=[1, 2, 3, 4], k=20, shortlist="all")
    influences = [hit.influence for hit in index.search(**query)]
    assert influences == [hit.influence for hit in gradindex.open(
        tmp_path / "index", model=str(folder / "other")).search(**query)]
    assert gradindex.verify(tmp_path / "index").sound
    appended = gradindex.append(tmp_path / "index", tmp_path / "tokens.npy", limit=3)
    assert len(appended) == 23


def test_what_cannot_be_used_says_its_true_reason(tmp_path):
    random_network("llama").save_pretrained(tmp_path / "base")
    quiet_transformers()
    np.save(tmp_path / "tokens.npy", np.ones((20, 9), np.int32))
    for name, config, said in (
        ("prompt", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
         "PROMPT_TUNING.* learned tokens"),
        ("prefix", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
         "PREFIX_TUNING.* learned tokens"),
        ("alora", lora(task_type="CAUSAL_LM", alora_invocation_tokens=[3]), "the network inside"),
    ):
        wrapped = adapted(config)
        wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        wrapped.save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=said):
            LanguageModel.load(ModelSource(wrapped))
        for look in (lambda folder: LanguageModel.load(ModelSource(folder, device="cpu")),
                     lambda folder: make_request(folder, tmp_path / "tokens.npy", tmp_path / "i")):
            with pytest.raises(InputError, match=said):
                look(str(tmp_path / name))
    reward = peft.PeftModel(random_network("llama"), lora(task_type="SEQ_CLS"))
    reward.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    reward.save_pretrained(tmp_path / "reward")
    for task, message in (("causal", r"trained for another task \(task_type SEQ_CLS\)"),
                          (None, r"lack 1 tensor \(score\.weight\).*base of the adapter")):
        with pytest.raises(InputError, match=message):
            make_request(str(tmp_path / "reward"), tmp_path / "tokens.npy", tmp_path / "i",
                         task=task)


def saved_on(base, config, folder):
    """An adapter that was trained on one base and says that it was on the tiny Llama beside it."""
    wrapped = drawn(peft.get_peft_model(base, config, autocast_adapter_dtype=False))
    wrapped.peft_config["default"].base_model_name_or_path = str(folder.parent / "base")
    wrapped.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family, settings, config, said", [
    ("llama", {"hidden_size": 16}, {}, r"doesn't fit its base .*q_proj.lora_A.* is \[\d, 16\], the "
     r"base has room for .* trained on another base, or adapter_config.json isn't the one"),
    ("gpt_neox", {}, {"target_modules": NEOX}, r"doesn't fit its base .*: target modules .* not "
     r"found in the base model\. It was trained on another base"),
    ("llama", {"num_hidden_layers": 3}, {}, r"also hold 4 tensors: .* LlamaForCausalLM, has no "
     r"such modules: the adapter was trained on another base, or with another head"),
    ("llama", {"num_hidden_layers": 1}, {}, r"lack 4 tensors: .* on the base that it was trained "
     r"on; found .*base\."),
    ("llama", {"vocab_size": 50}, {"modules_to_save": ["lm_head"]}, r"doesn't fit its base .*"
     r" is \[50, \d+\], the base has room for \[37, "),
])
def test_an_adapter_of_another_base_is_told_so(family, settings, config, said, tmp_path):
    quiet_transformers()
    random_network("llama").save_pretrained(tmp_path / "base")
    folder = saved_on(random_network(family, **settings), lora(**config), tmp_path / "adapter")
    with pytest.raises(InputError, match=said):
        LanguageModel.load(ModelSource(folder, device="cpu"))


def test_a_score_head_without_its_task_is_told_so(tmp_path):
    quiet_transformers()
    network = random_network("llama")
    network.save_pretrained(tmp_path / "base")
    reward = transformers.LlamaForSequenceClassification(network.config)
    folder = saved_on(reward, lora(modules_to_save=["score"]), tmp_path / "reward")
    with pytest.raises(InputError, match=r"also hold 1 tensor: .*score\.weight\. .* another head"):
        LanguageModel.load(ModelSource(folder, device="cpu"))


EVERY = [*TARGETS, "up_proj", "down_proj"]


@pytest.mark.parametrize("config, choice, said", [
    (peft.HRAConfig(r=2, target_modules=EVERY), "mlp", "8 maps can't be tracked, such as .*"
     "the adapter's HRA. The adapter uses weights of its base in another way"),
    (peft.ShiraConfig(r=1, target_modules=EVERY), "mlp", "the adapter's SHIRA. The adapter uses"),
    (peft.HRAConfig(r=2, target_modules="all-linear"), "all", "has no linear map that can be "
     "tracked: .* merge it into the base"),
    (peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, target_modules="self_attn"),
     "adapter", "the model's adapter is ADAPTION_PROMPT, which has no linear map of its own"),
])
def test_why_nothing_of_an_adapted_base_is_tracked(config, choice, said):
    model = LanguageModel.load(ModelSource(adapted(config)))
    with pytest.raises(InputError, match=said):
        tracked_modules(model.network, choice)
