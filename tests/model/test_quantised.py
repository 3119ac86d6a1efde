"""Quantised bases: the gradients of what they stand for, and adapters over them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.errors import InputError
from gradindex.model.identity import tensors_digest
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import examine, parameter_share, tracked_modules
from gradindex.objective.batch import Text
from gradindex.task import Task
from support.documents import small_documents
from support.gradients import captured
from support.indexes import SMALL
from support.models import random_network
from support.needed import library
from support.task_models import answers, network_of_texts, sentences, tokenizer_of_texts


@pytest.fixture(params=[8, 4], scope="module")
def quantised(request, tmp_path_factory):
    """Bits, a whole model in float32 and a folder with it quantised, and its tokenizer."""
    library("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("quantised")
    tokenizer = train_tokenizer([document["text"] for document in small_documents()], 300)
    network = random_network("llama", torch.float32, hidden_size=64, intermediate_size=128,
                             vocab_size=len(tokenizer))
    with torch.no_grad():  # so that rounding isn't blown up on its way through the blocks
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.3)
    network.save_pretrained(folder / "whole")
    settings = BitsAndBytesConfig(load_in_8bit=request.param == 8, load_in_4bit=request.param == 4,
                                  bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=settings).save_pretrained(folder / "packed")
    tokenizer.save_pretrained(folder / "packed")
    return request.param, network, folder / "packed"


def dequantised(network, packed):
    """The network with the weights that a packed one stands for."""
    import bitsandbytes

    same = copy.deepcopy(network).requires_grad_(False)
    count = 0
    for name, own in packed.named_modules():
        if isinstance(own, bitsandbytes.nn.Linear8bitLt):
            weight = own.weight.data.float() * own.weight.SCB[:, None] / 127
        elif isinstance(own, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                own.weight.data, own.weight.quant_state)
        else:
            continue
        same.get_submodule(name).weight.copy_(weight)
        count += 1
    assert count == 14
    return same


def test_a_quantised_base(quantised, sequences):
    """Gradients of the dequantised weights, also after other passes, whatever the batch."""
    _, network, packed = quantised
    model = LanguageModel.load(ModelSource(str(packed), device="cpu"))
    assert model.dtype == model.accumulate == torch.float32
    modules = tracked_modules(model.network, "all")
    assert [m.shape for m in modules] == [m.shape for m in tracked_modules(network, "all")]
    assert parameter_share(model.network, modules) == pytest.approx(
        parameter_share(network, tracked_modules(network, "all")), rel=1e-12)
    same = dequantised(network, model.network)
    before = tensors_digest(model.network)
    again = LanguageModel.load(ModelSource(str(packed), device="cpu"))
    assert before == tensors_digest(again.network)
    model.continuation([1, 2, 3], 3)  # passes without gradients, which pack 4-bit weights anew
    batch = model.batch(sequences)
    found, log_p = captured(model, modules, batch)
    assert tensors_digest(model.network) == before
    expected, truth = captured(LanguageModel(same, None, ModelSource(same)), modules, batch)
    torch.testing.assert_close(log_p, truth, rtol=1e-4, atol=1e-4)
    for module in modules:
        wanted = expected[module.name]
        assert (found[module.name] - wanted).norm() < 1e-4 * wanted.norm(), module.name
    for row, sequence in enumerate(sequences):
        alone, _ = captured(model, modules, model.batch([sequence]))
        for module in modules:
            one = alone[module.name][0]
            assert (found[module.name][row] - one).norm() < 1e-4 * one.norm() + 1e-5
    quantised_far = captured(LanguageModel(network.requires_grad_(False), None, model.source),
                             modules, batch)[0]
    assert any((found[m.name] - quantised_far[m.name]).norm() > 1e-3 * found[m.name].norm()
               for m in modules)


def test_a_quantised_model_given_after_it_ran(quantised, sequences):
    """The same gradients, or, where the CPU made bitsandbytes change the weights, none."""
    _, _, packed = quantised
    used = AutoModelForCausalLM.from_pretrained(packed).eval()
    with torch.no_grad():
        used(torch.arange(7)[None])
    states = [getattr(own.weight, "quant_state", None) for own in used.modules()
              if isinstance(own, nn.Linear)]
    if any(state is not None and state.absmax.ndim > 1 for state in states):
        for _ in range(2):
            with pytest.raises(InputError, match=r"packed model\.layers\.0\.self_attn\.q_proj"):
                LanguageModel.load(ModelSource(used))
            used.state_dict()  # unpacks the weights, and leaves their scales in the wrong order
        return
    model = LanguageModel.load(ModelSource(used))
    again = LanguageModel.load(ModelSource(str(packed), device="cpu"))
    modules = tracked_modules(model.network)
    found, _ = captured(model, modules, model.batch(sequences))
    expected, _ = captured(again, modules, model.batch(sequences))
    for module in modules:
        assert torch.equal(found[module.name], expected[module.name])


def test_a_quantised_model_has_the_dtype_it_has(quantised):
    _, _, packed = quantised
    for source in (AutoModelForCausalLM.from_pretrained(packed), str(packed)):
        for dtype in ("bfloat16", "float64"):
            with pytest.raises(InputError, match=rf"--dtype {dtype}: the weights of .* quantised"):
                LanguageModel.load(ModelSource(source, device="cpu"), dtype)
        for dtype in ("float32", "auto"):
            assert ModelSource(source, device="cpu").resolve(dtype)[1] == torch.float32
            loaded = LanguageModel.load(ModelSource(source, device="cpu"), dtype)
            assert loaded.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_an_adapter_over_a_quantised_base(quantised, sequences, tmp_path):
    """QLoRA: gradients as over the dequantised base, then an index over the adapter alone."""
    peft = library("peft")
    _, network, packed = quantised
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(packed), peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    model = LanguageModel.load(ModelSource(str(tmp_path / "adapter"), device="cpu"))
    base = LanguageModel.load(ModelSource(str(packed), device="cpu")).network
    dequantised(network, base).save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    whole.load_adapter(str(tmp_path / "adapter"))
    modules = tracked_modules(model.network, "all,adapter")
    assert sum(module.kind == "adapter" for module in modules) == 8
    batch = model.batch(sequences)
    found, _ = captured(model, modules, batch)
    expected, _ = captured(LanguageModel.load(ModelSource(whole, device="cpu")), modules, batch)
    for module in modules:
        wanted = expected[module.name]
        assert (found[module.name] - wanted).norm() < 1e-4 * wanted.norm(), module.name

    index = gradindex.build(str(tmp_path / "adapter"), small_documents(), tmp_path / "index",
                            **SMALL, modules="adapter")
    own = tracked_modules(model.network, "adapter")
    assert index.manifest.modules == own and len(own) == 8
    assert index.manifest.parameter_share == parameter_share(model.network, own)
    result = index.search(prompt="The apple number", k=5, shortlist="all")  # its own continuation
    assert [hit.influence for hit in result] == sorted(
        (hit.influence for hit in result), reverse=True) and result[0].influence > 0
    found = gradindex.verify(tmp_path / "index", str(tmp_path / "adapter"))
    assert found.sound, found.findings


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outputs, task", [(2, "classification"), (1, "reward")])
def test_a_quantised_base_of_whole_texts(bits, outputs, task, tmp_path):
    """A classifier's and a reward model's gradients, and those of an adapter with its own head."""
    library("bitsandbytes")
    peft = library("peft")
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    network = network_of_texts("llama", outputs, torch.float32, hidden_size=64,
                               intermediate_size=128)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.05)
    tokenizer = tokenizer_of_texts()
    network.save_pretrained(tmp_path / "whole")
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4,
                                  bnb_4bit_quant_type="nf4")
    packed = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole", quantization_config=settings)
    packed.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    wrapped = peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed"),
        peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], task_type="SEQ_CLS"))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")

    rows = [Text(np.arange(4, 9, dtype=np.int32), np.ones(5, bool), label=0),
            Text(np.arange(9, 18, dtype=np.int32), np.ones(9, bool), label=1)]
    if task == "reward":
        rows = [Text(np.arange(4, 16, dtype=np.int32), np.ones(12, bool), border=5, offset=0.1)]
    whole = dequantised(network, LanguageModel.load(ModelSource(
        str(tmp_path / "packed"), device="cpu", task=Task(task))).network)
    whole.save_pretrained(tmp_path / "dequantised")
    adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
    for folder, same, choice in (("packed", tmp_path / "dequantised", "all,head"),
                                 ("adapter", adapted, "all,head,adapter")):
        model = LanguageModel.load(ModelSource(
            str(tmp_path / folder), device="cpu", task=Task(task)))
        expected_of = LanguageModel.load(ModelSource(
            same if folder == "adapter" else str(same), device="cpu", task=Task(task)))
        modules = tracked_modules(model.network, choice, examine(model.network, Task(task)))
        assert {module.kind for module in modules} >= {"head", "mlp"}
        batch = model.batch(rows)
        found, log_p = captured(model, modules, batch)
        expected, truth = captured(expected_of, modules, batch)
        torch.testing.assert_close(log_p, truth, rtol=1e-4, atol=1e-4)
        for module in modules:
            wanted = expected[module.name]
            assert (found[module.name] - wanted).norm() < 1e-4 * wanted.norm(), module.name
    data = sentences(12) if task == "classification" else answers(12)
    index = gradindex.build(str(tmp_path / "adapter"), data, tmp_path / "index", bits=512,
                            seq_len=16, modules="head,adapter", labels=(
                                ["negative", "positive"] if task == "classification" else ()))
    assert index.manifest.task.name == task  # as the adapter's weights tell
    assert {module.kind for module in index.manifest.modules} == {"head", "adapter"}
