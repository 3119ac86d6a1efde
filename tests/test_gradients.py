"""Hooks against per-sequence gradients by torch.func."""

import numpy as np
import pytest
import torch
from conftest import labels_of
from reference import log_likelihood, sequence_gradient

from gradindex.errors import InputError
from gradindex.gradients import apply_inputs, backward, gradient, make_batch, plan_batches
from gradindex.model import log_probability, sample_targets, tracked_modules


def by_hooks(model, modules, batch, uniforms=None):
    found = {}

    def each(module, a, d):
        found[module.name] = gradient(module, a, d)

    log_p = backward(model, modules, batch, each, uniforms)
    return found, log_p


def test_gradients_equal_torch_func(family, make_model, sequences):
    model = make_model(family)
    modules = tracked_modules(model.network, "all")
    names = [module.name for module in modules]
    found, log_p = by_hooks(model, modules, make_batch(sequences, model.device))
    for row, (ids, scored) in enumerate(sequences):
        tokens, labels = torch.from_numpy(ids).long(), labels_of(ids, scored)
        truth = sequence_gradient(model.network, names, tokens, labels)
        for module in modules:
            assert truth[module.name].shape == module.shape
            torch.testing.assert_close(found[module.name][row], truth[module.name],
                                       rtol=1e-5, atol=1e-6)
        expected = log_likelihood(model.network, tokens, labels)
        torch.testing.assert_close(log_p[row].sum(), expected, rtol=1e-6, atol=1e-6)


def test_gradients_equal_torch_func_to_float64_precision(make_model, sequences):
    """GPT-2 computes in float64 throughout; the others round rotary angles to float32."""
    model = make_model("gpt2")
    modules = tracked_modules(model.network, "all")
    found, _ = by_hooks(model, modules, make_batch(sequences, model.device))
    for row, (ids, scored) in enumerate(sequences):
        truth = sequence_gradient(model.network, [module.name for module in modules],
                                  torch.from_numpy(ids).long(), labels_of(ids, scored))
        for module in modules:
            torch.testing.assert_close(found[module.name][row], truth[module.name],
                                       rtol=1e-10, atol=1e-12)


def test_linear_without_bias_and_with(make_model, sequences):
    for family, bias in (("llama", False), ("gpt_neox", True)):
        modules = tracked_modules(make_model(family).network)
        assert [module.bias for module in modules] == [bias] * len(modules)


def test_packed_documents_are_one_sequence(make_model):
    """Packing needs nothing special: attention runs across documents as in training."""
    model = make_model("gpt2")
    modules = tracked_modules(model.network)
    ids = np.array([5, 9, 0, 4, 8, 2, 0, 7], np.int32)  # two documents and their end tokens
    found, _ = by_hooks(model, modules, make_batch([(ids, np.ones(8, bool))], model.device))
    truth = sequence_gradient(model.network, [modules[0].name], torch.from_numpy(ids).long(),
                              torch.from_numpy(ids).long())
    torch.testing.assert_close(found[modules[0].name][0], truth[modules[0].name],
                               rtol=1e-10, atol=1e-12)


def test_gradients_do_not_depend_on_batch_or_padding(family, make_model, sequences):
    model = make_model(family)
    modules = tracked_modules(model.network, "all")
    together, _ = by_hooks(model, modules, make_batch(sequences, model.device))
    for row, sequence in enumerate(sequences):
        alone, _ = by_hooks(model, modules, make_batch([sequence], model.device))
        for module in modules:
            torch.testing.assert_close(together[module.name][row], alone[module.name][0],
                                       rtol=1e-5, atol=1e-7)


def test_output_gradients_vanish_on_padding(make_model, sequences):
    model = make_model("gpt2")
    batch = make_batch(sequences, model.device)

    def each(module, a, d):
        assert d[~batch.real].abs().max() == 0
        assert d[batch.real].abs().max() > 0

    backward(model, tracked_modules(model.network), batch, each)


def test_backward_computes_no_weight_gradients_and_stops_at_the_first_module(make_model, sequences):
    model = make_model("gpt_neox")
    second = tracked_modules(model.network, r"layers\.1\.mlp")
    seen = []
    handle = model.network.gpt_neox.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(
            (output[0] if isinstance(output, tuple) else output).requires_grad)
    )
    by_hooks(model, second, make_batch(sequences, model.device))
    handle.remove()
    assert seen == [False]
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_log_probability_gradient_equals_autograd():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, 8, -100, 0, 2], [-100, -100, 3, 3, -100]])
    log_p, found = log_probability(logits, targets)
    total = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    total.backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(log_p.sum(), total.detach(), rtol=1e-12, atol=0)
    assert (log_p[targets == -100] == 0).all()


def test_sampled_targets_follow_the_model():
    torch.manual_seed(1)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    draws = 200_000
    uniforms = torch.rand(1, draws, dtype=torch.float64)
    scored = torch.ones(1, draws, dtype=torch.bool)
    scored[0, -5:] = False
    drawn = sample_targets(logits.expand(1, draws, 4), uniforms, scored)
    assert (drawn[0, -5:] == -100).all()
    shares = torch.bincount(drawn[0, :-5], minlength=4) / (draws - 5)
    torch.testing.assert_close(shares, torch.softmax(logits, 0).float(), rtol=0, atol=4e-3)
    extremes = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    edge = sample_targets(logits.expand(1, 2, 4), extremes, torch.ones(1, 2, dtype=torch.bool))
    assert edge.tolist() == [[0, 3]]


def test_plan_batches_is_a_function_of_lengths():
    assert plan_batches([3, 8, 8, 2, 5], 16) == [[1, 2], [4, 0, 3]]
    assert plan_batches([50, 1], 16) == [[0], [1]]
    assert plan_batches([], 16) == []


def test_apply_inputs_is_the_matrix_on_inputs_with_a_one():
    a, matrix = torch.randn(2, 3, 4), torch.randn(5, 5)
    padded = torch.cat([a, torch.ones(2, 3, 1)], dim=-1)
    torch.testing.assert_close(apply_inputs(a, matrix, True), padded @ matrix.T)


def test_module_choice(make_model):
    network = make_model("gpt_neox").network
    assert [m.name for m in tracked_modules(network)] == [
        f"gpt_neox.layers.{layer}.mlp.{name}"
        for layer in (0, 1) for name in ("dense_h_to_4h", "dense_4h_to_h")
    ]
    assert sum(m.kind == "attention" for m in tracked_modules(network, "all")) == 4
    assert [m.layer for m in tracked_modules(network, r"\.1\..*dense$")] == [1]
    with pytest.raises(InputError, match=r"matches none of the linear .* named like gpt_neox"):
        tracked_modules(network, "nothing_like_it")
    with pytest.raises(InputError, match="nor a regular expression"):
        tracked_modules(network, "(")
    for family, names in (("gpt2", ["mlp.c_fc", "mlp.c_proj"]),
                          ("qwen3", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])):
        found = tracked_modules(make_model(family).network)
        assert [m.name.split(".0.")[-1] for m in found if m.layer == 0] == names


def test_a_module_that_runs_twice_is_refused(make_model, sequences):
    model = make_model("gpt_neox")
    layers = model.network.gpt_neox.layers
    layers[1].mlp = layers[0].mlp
    modules = tracked_modules(model.network, r"layers\.0\.mlp")
    with pytest.raises(InputError, match=r"layers\.0\.mlp.* ran more than once"):
        by_hooks(model, modules, make_batch(sequences, model.device))
