"""Every causal-LM family of transformers: hooks against autograd, alone, padded, beside others."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradindex.errors import InputError
from gradindex.model.fused_experts import ExpertMap
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import parameter_share, tracked_modules, untracked
from gradindex.objective.batch import Text
from support.families import (
    CHANGES,
    FAMILIES,
    FLOAT32,
    NOT_MADE,
    REFUSED,
    small_network,
)
from support.gradients import captured
from support.models import labels_of
from support.reference import log_likelihood

CHOSEN = (  # of each kind one
    "gpt2",  # Conv1D
    "llama", "mixtral",  # fused experts
    "gpt_oss",  # transposed ones with biases
    "mamba",  # a map that isn't called
    "zamba2",  # shared blocks with adapters of their own
    "deepseek_v3",  # latent attention: [b, 1, t, i]
    "longcat_flash",  # lists in blocks
    "hrm_text",  # two lists, runs without gradients
    "deepseek_v4",  # maps that influence nothing
    "gemma3",  # towers of equally many layers
    "xlm",  # a list of attentions, one of MLPs
    "blenderbot",  # a decoder of an encoder-decoder
    *REFUSED, *NOT_MADE,
)
ALL = [pytest.param(family, marks=[] if family in CHOSEN else [pytest.mark.slow])
       for family in FAMILIES]
TEXTS = ((13, 0), (7, 3), (9, 0), (5, 2))  # tokens, of which so many belong to a prompt
# what two orders of the same sums may differ by, relative to the largest entry of a gradient: most
# families compute rotary angles, norms or routing in float32 whatever the dtype
ROUNDING = {torch.float64: 2e-6, torch.float32: 5e-4}


def test_the_tables_name_families_that_are_there():
    named = {*CHOSEN, *CHANGES, *NOT_MADE, *REFUSED, *FLOAT32}
    assert named <= {*FAMILIES}
    assert not {*NOT_MADE} & {*REFUSED}
    assert len(FAMILIES) - len(NOT_MADE) - len(REFUSED) >= 125


@pytest.mark.parametrize("family", ALL)
def test_gradients_of_every_family(family):
    """Those that can't be made or are refused stand in tables, and no others do."""
    if family in NOT_MADE:
        with pytest.raises(Exception, match=NOT_MADE[family]):  # of classes of every library
            small_network(family)
        return
    network = small_network(family)
    plain = copy.deepcopy(network)
    model = LanguageModel(network, None, ModelSource(network))
    if family in REFUSED:
        for choice in ("all", "mlp"):
            with pytest.raises(InputError, match=REFUSED[family]):
                tracked_modules(network, choice)
        return
    texts = made_texts()
    modules = tracked_modules(network, "all")
    found, _ = captured(model, modules, model.batch(texts))
    limit, whole = ROUNDING[model.dtype], max(float(one.abs().max()) for one in found.values())
    for row, text in enumerate(texts):
        truth = by_autograd(plain, network, modules, text)
        largest = max(float(one.abs().max()) for one in truth.values())
        alone, _ = captured(model, modules, model.batch([text]))
        for name, expected in truth.items():
            for ours in (found[name][row], alone[name][0]):
                torch.testing.assert_close(ours, expected, rtol=0, atol=limit * largest, msg=name)
    for choice in ("all", "mlp"):
        chosen = tracked_modules(network, choice)
        shares = untracked(network, chosen)
        assert sum(shares.values()) + parameter_share(network, chosen) == pytest.approx(1)
        fewer, _ = captured(model, chosen, model.batch(texts))
        for module in chosen:
            torch.testing.assert_close(fewer[module.name], found[module.name], rtol=0,
                                       atol=limit * whole, msg=module.name)
    assert {module.kind for module in chosen} == {"mlp"}


@pytest.mark.parametrize("family", [family for family in FLOAT32 if family not in REFUSED])
def test_families_that_take_no_float64_say_so(family):
    network = small_network(family, torch.float64)
    with pytest.raises(InputError, match=r"fails in a small pass in float64, forward over 2 × 5 "
                       r"tokens: RuntimeError: .* give another \(--dtype bfloat16 or float32\)"):
        tracked_modules(network)


def made_texts() -> list[Text]:
    """Of different lengths, some with a prompt; without the special tokens of either end."""
    random = np.random.default_rng(3)
    return [Text(random.integers(3, 44, count).astype(np.int32), np.arange(count) >= prompt)
            for count, prompt in TEXTS]


def by_autograd(
    plain: Any, network: Any, modules: list[Any], text: Text
) -> dict[str, Tensor]:
    """∂ log-likelihood / ∂ W̄ of one text by itself, on the parameters of a network without hooks.

    `plain` is as `network` was before its experts got modules.
    """
    ids, labels = torch.from_numpy(text.tokens).long(), labels_of(text.tokens, text.scored)
    parameters = dict(plain.named_parameters(remove_duplicate=False))  # tied: by all uses
    names = {module.name: parameter_names(network.get_submodule(module.name), module)
             for module in modules}
    wanted = {name: parameters[name].requires_grad_() for some in names.values() for name in some}
    gradients = torch.autograd.grad(
        log_likelihood(plain, ids, labels), list(wanted.values()), allow_unused=True)
    plain.requires_grad_(False)
    by_name = {name: torch.zeros_like(wanted[name]) if one is None else one
               for name, one in zip(wanted, gradients, strict=True)}
    return {name: in_our_form(network.get_submodule(name), [by_name[one] for one in some])
            for name, some in names.items()}


def parameter_names(linear: nn.Module, module: Any) -> list[str]:
    """The names of a map's weight and, if it is tracked, bias; of all experts for an expert's."""
    if isinstance(linear, ExpertMap):
        weight = module.name.rpartition("_")[0]
        return [weight] + [f"{weight}_bias"] * (linear.bias is not None)
    return [f"{module.name}.weight"] + [f"{module.name}.bias"] * module.bias


def in_our_form(linear: Any, gradients: list[Tensor]) -> Tensor:
    """[o, i], a bias as the last column, of gradients as the parameters are stored."""
    if isinstance(linear, ExpertMap):
        gradients = [one[linear.number] for one in gradients]
    turned = isinstance(linear, Conv1D) or \
        (isinstance(linear, ExpertMap) and linear.experts.is_transposed)
    weight = gradients[0].T if turned else gradients[0]
    return torch.cat([weight, *(bias[:, None] for bias in gradients[1:])], dim=1)
