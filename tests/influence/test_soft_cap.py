"""Logits that end in c·tanh(x / c): the cap is made of a part of them at a time."""

import numpy as np
import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gradindex.influence.gradients import backward, gradient
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.objective import next_token
from gradindex.objective.batch import Text
from gradindex.objective.next_token import log_probability, sample_labels
from support.gradients import unscored
from support.models import labels_of
from support.reference import log_likelihood


@pytest.mark.parametrize("dtype, within, drawn", [
    (torch.float64, 1e-13, False), (torch.float64, 1e-13, True), (torch.float32, 1e-6, False),
    (torch.float32, 1e-6, True), (torch.bfloat16, 2e-2, False)])
def test_soft_capped_logits_equal_the_plain_formula(dtype, within, drawn):
    """log softmax of c·tanh(x / c) by autograd in float64, in one piece."""
    torch.manual_seed(0)
    cap, logits = 3.0, (4 * torch.randn(3, 700, 2000)).to(dtype)  # so that there are several parts
    targets = torch.randint(0, 2000, (3, 700))
    targets[1, 100:] = -100
    uniforms = torch.rand(3, 700, dtype=torch.float64)
    x = logits.double().requires_grad_()
    said = torch.log_softmax(cap * torch.tanh(x / cap), -1)
    labels = sample_labels(said.detach().exp().flatten(0, 1),
                           uniforms.flatten()).view(3, 700) if drawn else targets.clamp(min=0)
    counted = targets != -100
    expected = said.gather(-1, labels[..., None])[..., 0] * counted
    expected.sum().backward()
    taken = logits.clone()
    log_p, found = log_probability(
        taken, targets, unscored(targets), uniforms if drawn else None, cap)
    assert found.data_ptr() == taken.data_ptr()
    if drawn and dtype != torch.float64:  # rounding draws a few of the labels otherwise
        same = (log_p - expected).abs() < 10 * within
        assert same.float().mean() > 0.9
    else:
        same = torch.ones_like(counted)
    torch.testing.assert_close(log_p[same].double(), expected.detach()[same], rtol=within,
                               atol=10 * within)
    torch.testing.assert_close(found[same].double(), x.grad[same], rtol=within, atol=within)


CAPPED = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=2, head_dim=8, vocab_size=600, pad_token_id=0, bos_token_id=0,
              eos_token_id=0)


def capped_model(kind="Gemma2", **settings):
    """A model whose logits are beyond where tanh is straight."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**{**CAPPED, **settings})
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(60)  # tied
    network = network.eval().requires_grad_(False)
    return LanguageModel(network, None, ModelSource(network))


@pytest.mark.parametrize("kind, settings, cap", [
    ("Gemma2", {}, 30.0), ("Gemma2", {"final_logit_softcapping": 4.0}, 4.0),
    ("Gemma2", {"final_logit_softcapping": None}, None),
    ("Gemma3Text", {"final_logit_softcapping": 4.0}, 4.0),
    ("VaultGemma", {"final_logit_softcapping": 4.0}, 4.0),
    ("NanoChat", {"final_logit_softcapping": 4.0, "tie_word_embeddings": True}, 4.0),
    # which has one whatever is configured
    ("RecurrentGemma", {"logits_soft_cap": 4.0, "num_hidden_layers": 3}, None),
])
def test_gradients_below_soft_capped_logits(kind, settings, cap, sequences):
    model = capped_model(kind, **settings)
    assert model.objective.soft_cap == cap
    modules = tracked_modules(model.network)
    found = {}
    for text in sequences[:3]:
        # one at a time: norms and attention are partly in float32, which texts in a batch and by
        # themselves round differently on some processors
        log_p = backward(model, modules, model.batch([text]), lambda module, a, d: found.update(
            {module.name: gradient(module, a, d)}))
        weights = [model.network.get_submodule(module.name).weight for module in modules]
        for weight in weights:
            weight.requires_grad_(True)
        # as the network says it, cap and all
        said = log_likelihood(model.network, torch.from_numpy(text.tokens).long(),
                              labels_of(text.tokens, text.scored))
        truths = torch.autograd.grad(said, weights)
        for weight in weights:
            weight.requires_grad_(False)
        torch.testing.assert_close(log_p.sum(), said.detach(), rtol=1e-9, atol=1e-9)
        for module, truth in zip(modules, truths, strict=True):
            torch.testing.assert_close(found[module.name][0, :, :module.d_in], truth, rtol=1e-7,
                                       atol=1e-9)
    tokens = torch.arange(1, 9)[None]
    logits = model.network(tokens).logits
    assert cap is None or logits.abs().max() <= cap  # the network itself stays as it is


class Copies(TorchDispatchMode):
    """How many tensors of some number of bytes or more there were at once, at most."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.most = size, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() >= self.size:
                kept = StorageWeakRef(one.untyped_storage())
                self.alive[kept.cdata] = kept
        self.alive = {key: kept for key, kept in self.alive.items() if not kept.expired()}
        self.most = max(self.most, len(self.alive))
        return made


@pytest.mark.parametrize("cap, copies", [(4.0, 1), (None, 1)])
def test_no_more_than_one_tensor_of_the_logits_size(cap, copies, monkeypatch):
    monkeypatch.setitem(next_token.LOGITS_AT_ONCE, "cpu", 1200)  # two positions at a time
    model = capped_model(final_logit_softcapping=cap)
    modules = tracked_modules(model.network)
    random = np.random.default_rng(0)
    batch = model.batch([Text(random.integers(1, 600, 40).astype(np.int32), np.ones(40, bool))
                         for _ in range(2)])
    seen = []

    def largest(the_batch):
        logits = the_batch.tokens.numel() * 600 * 8
        with Copies(logits) as copies:
            backward(model, modules, the_batch, lambda *_: None)
        seen.append(copies.most)

    largest(batch)
    monkeypatch.setattr(model, "objective", next_token.NextToken())  # the network's own way
    largest(batch)
    assert seen[0] == copies and (seen[1] > 2 if cap else seen[1] == 1)
