"""Adapters of classifiers, reward models and policies: from a saved folder to a hit."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gradindex
from gradindex.errors import IndexMismatchError, InputError
from gradindex.model.adapters import untrained
from gradindex.model.network import LanguageModel
from indexer.build_request import make_request
from indexer.prepare import load_model
from indexer.state import BuildState
from support.references import Said
from support.task_models import (
    FAMILIES,
    answers,
    network_of_texts,
    save,
    sentences,
    tokenizer_of_texts,
)

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SMALL = {"bits": 512, "fit_sequences": 24, "batch_tokens": 64, "segment_size": 10, "seq_len": 16}
BASES = {"bert": ("BertModel", ["query", "intermediate.dense"]),
         "llama": ("LlamaForCausalLM", ["q_proj", "gate_proj"]),
         "roberta": ("RobertaForMaskedLM", ["query", "intermediate.dense"])}


def trained_adapter(folder, family, outputs, **settings):
    """The folder of an adapter with a head of its own, over a base that has none."""
    name, targets = BASES[family]
    torch.manual_seed(1)
    base = getattr(transformers, name)(getattr(transformers, name).config_class(
        **{**FAMILIES[family][1], "hidden_dropout_prob": 0.0}))
    save(folder / "base", base, tokenizer_of_texts())
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=outputs)
    wrapped = peft.get_peft_model(network, peft.LoraConfig(**{
        "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 3, "target_modules": targets, **settings}))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder / "adapter")
    return str(folder / "adapter"), wrapped.eval()


@pytest.mark.parametrize("family, outputs", [("bert", 3), ("llama", 2), ("roberta", 2)])
def test_a_classifiers_adapter(family, outputs, tmp_path):
    """The task is guessed and the classes are counted by the head that the adapter brings."""
    folder, wrapped = trained_adapter(tmp_path, family, outputs)
    names = ["negative", "positive", "neither"][:outputs]
    index = gradindex.build(folder, sentences(24), tmp_path / "index", labels=names,
                            modules="mlp,head,adapter", **SMALL)
    assert index.manifest.task.name == "classification"
    assert index.manifest.plan.labels == tuple(names)
    kinds = {module.kind for module in index.manifest.modules}
    assert kinds == {"mlp", "head", "adapter"}
    # opened again from the folder, it says what peft's own model says
    index = gradindex.open(tmp_path / "index")
    text = "the film was so great"
    result = index.search(text=text, label="positive", k=24)
    with torch.no_grad():
        logits = wrapped(**tokenizer_of_texts()(text, return_tensors="pt")).logits
    assert result.query.log_p == pytest.approx(float(logits.log_softmax(-1)[0, 1]), abs=1e-4)
    for hit in result[:3]:
        assert set(hit.kind_influence) == kinds
        assert sum(hit.kind_influence.values()) == pytest.approx(hit.influence, rel=1e-3)
    alone = index.search(text=text, label="positive", k=3, modules="head,adapter")
    assert set(alone[0].kind_influence) == {"head", "adapter"}

    settings = json.loads((Path(folder) / "adapter_config.json").read_text())
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 9}))
    with pytest.raises(IndexMismatchError):
        gradindex.open(tmp_path / "index", model=str(other)).search(text=text, label="positive")


def test_a_reward_models_adapter(tmp_path):
    """As TRL saves one: LoRA and the score's map, over a causal language model."""
    folder, wrapped = trained_adapter(tmp_path, "llama", 1, modules_to_save=["score"])
    index = gradindex.build(folder, answers(12), tmp_path / "index",
                            modules="mlp,adapter,head", **SMALL)
    assert index.manifest.task.name == "reward"
    result = index.search(prompt="why was it", response=" a great film", k=3)
    with torch.no_grad():
        reward = wrapped(**tokenizer_of_texts()(
            "why was it a great film", return_tensors="pt")).logits
    assert result.query.log_p == pytest.approx(float(reward[0, 0]), rel=1e-3)
    assert set(result[0].kind_influence) == {"mlp", "head", "adapter"}


def test_an_adapter_as_older_ones_were_saved(tmp_path):
    """Its settings don't list the head, its weights hold it."""
    folder, _ = trained_adapter(tmp_path, "llama", 2)
    file = Path(folder) / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert settings["modules_to_save"] == ["classifier", "score"]
    labels = ["negative", "positive"]
    plan = make_request(folder, sentences(4), "nowhere", labels=labels, **SMALL).plan
    file.write_text(json.dumps({**settings, "modules_to_save": None}))
    index = gradindex.build(folder, sentences(12), tmp_path / "index", labels=labels, **SMALL)
    assert index.manifest.plan.labels == plan.labels
    assert [module.name for module in index.manifest.modules if module.kind == "head"] == [
        "score.modules_to_save.default"]


def test_an_adapter_that_was_never_trained(tmp_path):
    """LoRA's B begins at 0: said where it is so in all layers, before anything is read."""
    network = peft.get_peft_model(network_of_texts("bert", 2, torch.float32), peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=BASES["bert"][1], lora_bias=True))
    assert untrained(network) == {"default": 4}
    said = Said()
    request = make_request(network, sentences(4), tmp_path, tokenizer=tokenizer_of_texts(),
                           labels=["negative", "positive"], **SMALL)
    load_model(request.source, request.dtype, BuildState.open(tmp_path, request.plan, said), said)
    [line] = [line for line in said.lines if line.startswith("warning: the adapter")]
    assert "default was never trained: B of its LoRA is 0 in all of 4 layers, so it adds" in line
    *_, bias = (parameter for name, parameter in network.named_parameters()
                if name.endswith("lora_B.default.bias"))
    with torch.no_grad():
        bias[3] = 0.5
        assert untrained(network) == {}
        bias[3] = 0.0
    with network.disable_adapter():
        assert untrained(network) == {}  # none runs


def without(folder, *names):
    """The adapter of a folder without some of its tensors."""
    file = Path(folder) / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items()
               if not any(part in name for part in names)}, file)
    return folder


def test_adapters_that_are_refused(tmp_path):
    """Of another task, without the head that the base lacks, or over a base that lacks more."""
    folder, _ = trained_adapter(tmp_path / "llama", "llama", 2)
    refusals = [
        ("causal", r"another task \(task_type SEQ_CLS\) .* --task classification or reward"),
        ("preference", r"another task \(task_type SEQ_CLS\) .* --task classification or reward"),
        ("reward", "has 2 outputs"),
    ]
    for task, message in refusals:
        with pytest.raises(InputError, match=message):
            make_request(folder, sentences(4), "nowhere", task=task, **SMALL)
    # of the base's own layers nothing may be dropped, as of its head
    file = tmp_path / "llama" / "base" / "config.json"
    config = file.read_text()
    file.write_text(json.dumps({**json.loads(config), "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"hold 9 tensors \(model\.layers\.1\..*They are of the "
                       r"layers under the adapter .*base of the adapter"):
        make_request(folder, sentences(4), "nowhere", **SMALL)
    file.write_text(config)
    with pytest.raises(InputError, match=r"lack 1 tensor \(score\.weight\).*base of the adapter"):
        make_request(without(folder, "score"), sentences(4), "nowhere", **SMALL)

    # a pooler that nobody saved
    folder, _ = trained_adapter(tmp_path / "bert", "bert", 2)
    base = transformers.BertForMaskedLM(transformers.BertConfig(**FAMILIES["bert"][1]))
    base.save_pretrained(tmp_path / "bert" / "base")
    with pytest.raises(InputError, match=r"pooler\.dense\.bias.*Nor are they among the adapter's"):
        make_request(folder, sentences(4), "nowhere", **SMALL)

    causal = peft.get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILIES["llama"][1])),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    causal.peft_config["default"].base_model_name_or_path = str(tmp_path / "llama" / "base")
    causal.save_pretrained(tmp_path / "causal")
    for task in ("classification", "reward"):
        with pytest.raises(InputError, match=r"task_type CAUSAL_LM\) .*causal or preference"):
            make_request(str(tmp_path / "causal"), sentences(4), "nowhere", task=task, **SMALL)


def test_the_head_of_an_adapters_base(tmp_path):
    """An adapter without a head of its own over a whole classifier leaves the classifier's."""
    network = network_of_texts("bert", 2, torch.float32,
                               id2label={0: "negative", 1: "positive"})
    save(tmp_path / "base", network, tokenizer_of_texts())
    wrapped = peft.get_peft_model(
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=["query"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    index = gradindex.build(str(tmp_path / "adapter"), sentences(12), tmp_path / "index", **SMALL)
    assert index.manifest.task.name == "classification"
    assert index.manifest.plan.labels == ("negative", "positive")
    assert {module.name for module in index.manifest.modules if module.kind == "head"} == {
        "bert.pooler.dense", "classifier"}


def test_an_adapter_that_names_no_task(tmp_path):
    """Its own head takes the place of what the base lacks, once the task is said."""
    folder, _ = trained_adapter(tmp_path, "llama", 1, task_type=None, modules_to_save=["score"])
    assert json.loads((Path(folder) / "adapter_config.json").read_text())["task_type"] is None
    request = make_request(folder, answers(12), "nowhere", task="reward", **SMALL)
    model = LanguageModel.load(request.source)
    assert model.network.score.active_adapters == ["default"]
    assert model.network.config.num_labels == 1
