"""Small passes before any data: what is refused, what is left out and named, what is tracked."""

import pytest
import torch
from torch import nn

from gradindex.errors import InputError
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import parameter_share, tracked_modules, untracked
from support.gradients import captured
from support.models import labels_of, random_network
from support.reference import sequence_gradient


def layers_of(network):
    return network.gpt_neox.layers


def names_of(network, choice="mlp"):
    return [module.name.removeprefix("gpt_neox.layers.")
            for module in tracked_modules(network, choice)]


EVERY = [f"{layer}.mlp.{name}" for layer in (0, 1) for name in ("dense_h_to_4h", "dense_4h_to_h")]


def patched(change):
    """A small GPT-NeoX whose first MLP's forward is `change(forward, x)`."""
    network = random_network("gpt_neox").requires_grad_(False)
    mlp = layers_of(network)[0].mlp
    real = mlp.forward
    mlp.forward = lambda x: change(real, x)
    return network


def check_shares(network, left_out):
    modules = tracked_modules(network)
    shares = untracked(network, modules)
    assert sum(shares.values()) + parameter_share(network, modules) == pytest.approx(1)
    assert left_out in shares and shares[left_out] == pytest.approx(
        sum(p.numel() for p in layers_of(network)[0].mlp.parameters()) /
        sum(p.numel() for p in network.parameters()), rel=0.2)


def check_gradients(network, names, sequences):
    model = LanguageModel(network, None, ModelSource(network))
    modules = [one for one in tracked_modules(network) if one.name.endswith(names)]
    assert modules
    found, _ = captured(model, modules, model.batch(sequences))
    for row, (ids, scored, *_) in enumerate(sequences):
        truth = sequence_gradient(network, [module.name for module in modules],
                                  torch.from_numpy(ids).long(), labels_of(ids, scored))
        for module in modules:
            torch.testing.assert_close(found[module.name][row], truth[module.name],
                                       rtol=1e-5, atol=1e-6)


# Tokens before sequences have the right number when they are flattened: their order is tried.
ORDERS = {
    "tokens first": lambda real, x: real(x.transpose(0, 1)).transpose(0, 1),
    "tokens first, flattened":
        lambda real, x: real(x.transpose(0, 1).flatten(0, 1)).unflatten(
            0, (x.shape[1], x.shape[0])).transpose(0, 1),
    "from the last token": lambda real, x: real(x.flip(1)).flip(1),
    "other sequences first": lambda real, x: real(x.flip(0)).flip(0),
    "heads of a token": lambda real, x: real(x[:, :, None].repeat(1, 1, 2, 1)).mean(2),
    "pooled": lambda real, x: real(x[:, :1]).expand_as(x),
}


@pytest.mark.parametrize("order", ORDERS)
def test_maps_that_see_tokens_in_another_order_are_left_out(order):
    network = patched(ORDERS[order])
    assert names_of(network) == EVERY[2:]
    check_shares(network, "linear maps that see something else than one input a token")


@pytest.mark.parametrize("axes", [lambda x: x[:, None], lambda x: x[:, :, None],
                                  lambda x: x[None, :, None], lambda x: x.flatten(0, 1)[None]])
def test_axes_of_one_do_not_count(axes, sequences):
    network = patched(lambda real, x: real(axes(x)).reshape(x.shape))
    assert names_of(network) == EVERY
    check_gradients(network, ("dense_h_to_4h", "dense_4h_to_h"), sequences)


def test_maps_without_influence_are_left_out_and_named():
    network = patched(lambda real, x: x + 0 * real(x).detach())
    assert names_of(network) == EVERY[2:]
    check_shares(network, "linear maps without influence on the logits")
    with torch.no_grad():
        assert names_of(network) == EVERY[2:]


def test_influence_that_begins_far_behind(sequences):
    """It is found by a longer pass; in short sequences the gradient is zero."""
    def far(real, x):
        return torch.cat([0 * x[:, :20], real(x)[:, 20:]], dim=1)

    network = patched(far)
    assert names_of(network) == EVERY
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network)
    found, _ = captured(model, modules, model.batch(sequences))
    assert not found[modules[0].name].any() and found[modules[2].name].any()
    alone, log_p = captured(model, modules[:2], model.batch(sequences))
    assert log_p.any() and not any(one.any() for one in alone.values())
    check_gradients(network, ("dense_h_to_4h", "dense_4h_to_h"), sequences)


def test_maps_that_no_path_reaches_in_a_short_text(sequences):
    network = patched(lambda real, x: real(x) if x.shape[1] > 20 else x + unused(real, x))
    assert names_of(network) == EVERY
    check_gradients(network, ("dense_h_to_4h", "dense_4h_to_h"), sequences)


def unused(real, x):
    """What runs the maps and isn't used."""
    real(x)
    return 0 * x


def test_runs_without_gradient_do_not_count(sequences):
    """Of two runs the first is under no_grad, as autograd on the weights has it too."""
    def twice(real, x):
        with torch.no_grad():
            first = real(x)
        return real(x + first)

    network = patched(twice)
    assert names_of(network) == EVERY
    check_gradients(network, ("0.mlp.dense_h_to_4h", "0.mlp.dense_4h_to_h"), sequences)


def test_outputs_that_are_changed_in_place_are_left_out(sequences):
    """Autograd forgets a hook on them."""
    network = patched(lambda real, x: real(x).mul_(3))
    assert names_of(network) == [EVERY[0], *EVERY[2:]]
    assert "linear maps whose weights work in ways that hooks don't see" in untracked(
        network, tracked_modules(network))
    check_gradients(network, ("0.mlp.dense_h_to_4h", "1.mlp.dense_4h_to_h"), sequences)
    network = random_network("gpt_neox").requires_grad_(False)
    layers_of(network)[0].mlp.act = nn.ReLU(inplace=True)
    assert names_of(network) == EVERY[1:]


class Aside(torch.autograd.Function):
    """Runs a module without a graph and computes it again backward, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, d):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), d)
        return x.grad, None


def test_maps_whose_graph_hooks_never_see_are_left_out():
    network = patched(lambda real, x: Aside.apply(x, real))
    assert names_of(network) == EVERY[2:]
    check_shares(network, "linear maps whose weights work in ways that hooks don't see")


def test_a_weight_that_works_elsewhere_too_is_left_out():
    """A map that runs, and whose weight the MLP uses once more without running it."""
    network = random_network("gpt_neox").requires_grad_(False)
    mlp = layers_of(network)[0].mlp
    real, weight = mlp.forward, mlp.dense_4h_to_h.weight
    mlp.forward = lambda x: real(x) + x @ weight @ weight.T
    assert names_of(network) == [EVERY[0], *EVERY[2:]]


# ---- what is refused


def test_a_network_that_fails_in_a_pass_is_refused_in_a_sentence():
    def fail(real, x):
        raise ValueError(f"only multiples of 4,\n not {x.shape[1]}")

    with pytest.raises(InputError, match=r"GPTNeoXForCausalLM fails in a small pass in float64, "
                       r"forward over 2 × 5 tokens: ValueError: only multiples of 4, not 5\. Exp"):
        tracked_modules(patched(fail))


def test_logits_that_depend_on_neighbours_are_refused():
    """With a gradient or without: a mean over the batch, a number of tokens taken of it."""
    for change in (lambda real, x: real(x) + x.mean(0, keepdim=True),
                   lambda real, x: real(x) * (torch.arange(len(x))[:, None, None] < 1)):
        with pytest.raises(InputError, match="mixes the sequences of a batch"):
            tracked_modules(patched(change))


def test_logits_that_depend_on_chance_are_refused():
    with pytest.raises(InputError, match="draws random numbers in a pass"):
        tracked_modules(patched(lambda real, x: real(x + torch.randn_like(x))))


def test_logits_that_depend_on_the_length_are_refused():
    with pytest.raises(InputError, match="isn't causal"):
        tracked_modules(patched(lambda real, x: real(x) * x.shape[1]))


def test_the_networks_own_gradients_come_back():
    network = random_network("gpt_neox")
    first, second = list(network.parameters())[:2]
    first.grad, kept = torch.ones_like(first), torch.ones_like(first)
    second.requires_grad_(False)
    tracked_modules(network)
    assert torch.equal(first.grad, kept) and first.requires_grad and not second.requires_grad
    assert all(one.grad is None for one in list(network.parameters())[1:])
