"""A model object that the user gives stays as it is: in training, with its hooks and its flags."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

import gradindex
from gradindex.errors import InputError
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.own_copy import own_copy
from gradindex.model.tracked import tracked_modules
from support.gradients import captured
from support.models import SIZES, random_network

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

MIXTURE = dict(SIZES["llama"], num_local_experts=4, num_experts_per_tok=2)


def state(network):
    """All that a build could change in a network."""
    return {
        "modules": [(name, module.training, type(module), sorted(vars(module)))
                    for name, module in network.named_modules()],
        "hooks": [list(hooks) for module in network.modules() for name, hooks
                  in sorted(vars(module).items()) if name.endswith("_hooks")],
        "weights": [(name, id(weight), weight.data_ptr(), weight.dtype, weight.requires_grad,
                     weight.grad is None) for name, weight in network.named_parameters()],
        "buffers": [(name, id(buffer), buffer.dtype, buffer.device)
                    for name, buffer in network.named_buffers()],
        "config": network.config.to_json_string(use_diff=False),
        "experts": getattr(network.config, "_experts_implementation", None),
        "checkpointing": network.is_gradient_checkpointing,
        "adapters": [list(module.active_adapters) for module in network.modules()
                     if hasattr(module, "base_layer")],
    }


def in_training(kind, monkeypatch):
    """A model as one has it in the middle of training, and what its own hooks saw."""
    monkeypatch.setitem(SIZES, "mixtral", MIXTURE)
    network = random_network("mixtral" if kind == "mixture" else "llama", torch.float32)
    if kind == "adapter":
        network = peft.get_peft_model(network, peft.LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights=False))
    inside = network.get_base_model() if kind == "adapter" else network
    inside.gradient_checkpointing_enable()
    inside.enable_input_require_grads()
    inside.config.use_cache = True
    network.train()
    inside.lm_head.weight.requires_grad_(False)
    inside.model.layers[0].mlp.eval()
    seen = []
    # it holds on to what can't be copied
    trainer = (i for i in range(3))
    inside.model.norm.register_forward_hook(lambda *_: seen.append(trainer))
    return network, inside, seen


@pytest.mark.parametrize("kind", ["plain", "mixture", "adapter"])
def test_a_build_and_a_search_leave_it_as_it_is(kind, monkeypatch, tmp_path):
    network, inside, seen = in_training(kind, monkeypatch)
    before = state(inside)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(1, 37, (20, 9)))
    index = gradindex.build(network, tmp_path / "tokens.npy", tmp_path / "index", bits=512)
    found = index.search(token_ids=[1, 2, 3, 4], k=20, shortlist="all")
    index.search(token_ids=[1, 2, 3], labels=[-100, -100, 3], k=1)
    assert state(inside) == before
    assert seen  # its hooks belong to the model, and run
    with pytest.raises(InputError):
        gradindex.build(network, tmp_path / "tokens.npy", tmp_path / "other", bits=512,
                        modules="no such module")
    assert state(inside) == before

    # what was measured is what the model says in evaluation mode, without all this
    network.eval()
    inside.gradient_checkpointing_disable()
    again = gradindex.open(tmp_path / "index", model=network).search(
        token_ids=[1, 2, 3, 4], k=20, shortlist="all")
    assert [hit.id for hit in found] == [hit.id for hit in again]
    assert [hit.influence for hit in found] == pytest.approx([hit.influence for hit in again])


def test_another_dtype_is_a_copys_own(sequences):
    network = random_network("llama")
    before = state(network)
    model = LanguageModel.load(ModelSource(network), "float32")
    assert model.dtype == torch.float32 and state(network) == before
    same = LanguageModel.load(ModelSource(network))
    weights = dict(network.named_parameters())
    assert all(weight.data_ptr() == weights[name].data_ptr()
               for name, weight in same.network.named_parameters())
    assert same.bytes == sum(weight.nbytes for weight in weights.values()) + sum(
        buffer.nbytes for buffer in network.buffers())
    modules = tracked_modules(same.network)
    found, _ = captured(same, modules, same.batch(sequences))
    direct = LanguageModel(network.requires_grad_(False), None, ModelSource(network))
    expected, _ = captured(direct, modules, direct.batch(sequences))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tied_weights_stay_tied():
    network = random_network("llama", tie_word_embeddings=True)
    copied = own_copy(network)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not network.lm_head.weight
    with torch.no_grad():
        network.lm_head.weight[0, 0] = 7.0
    assert copied.model.embed_tokens.weight[0, 0] == 7.0


def test_objects_that_are_no_models_or_cannot_be_copied():
    network = random_network("llama")
    for thing in (nn.Linear(2, 2), nn.DataParallel(network), [network], 3):
        with pytest.raises(InputError, match=f"the model is a {type(thing).__name__}; expected a"):
            ModelSource(thing)
    network.model.trainer = (i for i in range(3))
    with pytest.raises(InputError, match=r"can't be copied: .*generator.* Save it"):
        LanguageModel.load(ModelSource(network))
