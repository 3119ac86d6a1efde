"""Hooks against per-sequence gradients by torch.func."""

import threading

import numpy as np
import pytest
import torch

from gradindex.errors import InputError
from gradindex.influence.blockwise import rotated
from gradindex.influence.gradients import apply_inputs, backward, gradient
from gradindex.influence.split_batches import plan_batches
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.objective.batch import Text
from gradindex.objective.next_token import log_probability, sample_labels
from support.gradients import unscored
from support.models import labels_of
from support.reference import log_likelihood, sequence_gradient


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
    found, log_p = by_hooks(model, modules, model.batch(sequences))
    for row, (ids, scored, *_) in enumerate(sequences):
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
    found, _ = by_hooks(model, modules, model.batch(sequences))
    for row, (ids, scored, *_) in enumerate(sequences):
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
    found, _ = by_hooks(model, modules, model.batch([Text(ids, np.ones(8, bool))]))
    truth = sequence_gradient(model.network, [modules[0].name], torch.from_numpy(ids).long(),
                              torch.from_numpy(ids).long())
    torch.testing.assert_close(found[modules[0].name][0], truth[modules[0].name],
                               rtol=1e-10, atol=1e-12)


def test_gradients_do_not_depend_on_batch_or_padding(family, make_model, sequences):
    model = make_model(family)
    modules = tracked_modules(model.network, "all")
    together, _ = by_hooks(model, modules, model.batch(sequences))
    for row, sequence in enumerate(sequences):
        alone, _ = by_hooks(model, modules, model.batch([sequence]))
        for module in modules:
            torch.testing.assert_close(together[module.name][row], alone[module.name][0],
                                       rtol=1e-5, atol=1e-7)


def test_output_gradients_vanish_on_padding(make_model, sequences):
    model = make_model("gpt2")
    batch = model.batch(sequences)

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
    by_hooks(model, second, model.batch(sequences))
    handle.remove()
    assert seen == [False]
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_a_continuation_waits_for_a_backward_pass(make_model, sequences):
    """Both run the same network, and hooks hear every pass: a thread that continues is held up."""
    model = make_model("llama")
    modules = tracked_modules(model.network)
    batch = model.batch(sequences)
    expected, _ = by_hooks(model, modules, batch)
    wanted = model.continuation([1, 2, 3], 8)
    stop, made, errors = threading.Event(), [], []

    def go_on():
        try:
            while not stop.is_set():
                made.append(model.continuation([1, 2, 3], 8))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        while len(made) < 3 and thread.is_alive():
            found, _ = by_hooks(model, modules, batch)
            for name, one in found.items():
                assert torch.equal(one, expected[name])
    finally:
        stop.set()
        thread.join()
    assert not errors and all(one == wanted for one in made)


def test_logits_that_go_backward_by_their_own_value(make_model, sequences, monkeypatch):
    """Their gradient takes their memory otherwise."""
    model = make_model("gpt2")
    modules, usual = tracked_modules(model.network), model.objective.outputs
    found = []
    for last in (lambda x: torch.tanh(x) * 1.0, torch.tanh, lambda x: torch.tanh(x)[:, :],
                 lambda x: torch.tanh(x.flatten(0, 1)).view(x.shape)):
        monkeypatch.setattr(model.objective, "outputs",
                            lambda *given, last=last: last(usual(*given)))
        found.append(by_hooks(model, modules, model.batch(sequences))[0])
    for name, one in found[0].items():
        assert one.any() and all(torch.equal(one, other[name]) for other in found)


def test_log_probability_gradient_equals_autograd():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, 8, -100, 0, 2], [-100, -100, 3, 3, -100]])
    log_p, found = log_probability(taken := logits.detach().clone(), targets, unscored(targets))
    assert found.data_ptr() == taken.data_ptr()
    total = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    total.backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(log_p.sum(), total.detach(), rtol=1e-12, atol=0)
    assert (log_p[targets == -100] == 0).all()


@pytest.mark.parametrize("v", [4, 64, 100, 128, 1000])
def test_sampled_labels_invert_the_cumulative_distribution(v):
    torch.manual_seed(1)
    p = torch.softmax(3 * torch.randn(500, v, dtype=torch.float64), dim=-1)
    p[:, 1::3] = 0  # labels that can't be drawn
    p[:250, v // 2:] = 0
    p /= p.sum(-1, keepdim=True)
    uniforms = torch.rand(500, dtype=torch.float64)
    uniforms[::50], uniforms[1::50] = 0, 1 - 2.0**-53
    drawn = sample_labels(p, uniforms)
    ends = np.cumsum(p.numpy(), axis=1)
    expected = [int(np.searchsorted(row, u * row[-1], side="right"))
                for row, u in zip(ends, uniforms.numpy(), strict=True)]
    last = [int(np.flatnonzero(row)[-1]) for row in p.numpy()]
    assert drawn.tolist() == np.minimum(expected, last).tolist()
    assert (p.gather(1, drawn[:, None]) > 0).all()
    narrow = sample_labels(p.float(), uniforms)  # may differ where a number falls on a border
    assert (narrow == drawn).float().mean() > 0.99
    assert (p.gather(1, narrow[:, None]) > 0).all()


def test_labels_of_a_position_do_not_depend_on_the_others():
    torch.manual_seed(2)
    logits, uniforms = torch.randn(3, 7, 300), torch.rand(3, 7)
    targets = torch.zeros(3, 7, dtype=torch.int64)
    targets[1, 2] = -100
    log_p, gradient = log_probability(logits.clone(), targets, unscored(targets), uniforms)
    for row in range(3):
        alone = log_probability(logits[row:row + 1].clone(), targets[row:row + 1],
                                unscored(targets[row]), uniforms[row:row + 1])
        assert torch.equal(alone[0][0], log_p[row]) and torch.equal(alone[1][0], gradient[row])
    p = torch.softmax(logits.double(), dim=-1)
    labels = sample_labels(p.flatten(0, 1), uniforms.flatten()).view(3, 7)
    expected = torch.nn.functional.one_hot(labels, 300) - p
    expected[1, 2] = 0
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6)
    assert log_p[1, 2] == 0


def test_plan_batches_is_a_function_of_lengths():
    assert plan_batches([3, 8, 8, 2, 5], 16) == [[1, 2], [4, 0, 3]]
    assert plan_batches([50, 1], 16) == [[0], [1]]
    assert plan_batches([], 16) == []


def test_apply_inputs_is_the_matrix_on_inputs_with_a_one():
    a, matrix = torch.randn(2, 3, 4), torch.randn(5, 5)
    padded = torch.cat([a, torch.ones(2, 3, 1)], dim=-1)
    torch.testing.assert_close(apply_inputs(a, matrix, True), padded @ matrix.T)


@pytest.mark.parametrize("tokens", [2, 40])
def test_rotated_gradients_either_way(tokens):
    """Few tokens are rotated before they are multiplied, many after: the same numbers."""
    torch.manual_seed(0)
    module = Module("m", 0, "mlp", 4, 6, True)
    a, d = (torch.randn(3, tokens, n, dtype=torch.float64) for n in (6, 4))
    q_a, q_s = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (7, 4))
    assert (tokens * (16 + 49) <= 4 * 7 * 11) == (tokens == 2)
    ones = torch.ones(3, tokens, 1, dtype=torch.float64)
    expected = torch.stack([q_s.T @ (one_d.T @ one_a) @ q_a for one_a, one_d in
                            zip(torch.cat([a, ones], -1), d, strict=True)])
    torch.testing.assert_close(rotated(module, a, d, q_a, q_s), expected, rtol=1e-12, atol=1e-12)


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


def test_a_module_that_runs_on_something_else_is_refused(make_model, sequences):
    model = make_model("gpt_neox")
    mlp = model.network.gpt_neox.layers[0].mlp
    real = mlp.forward
    modules = tracked_modules(model.network, r"layers\.0\.mlp")
    mlp.forward = lambda x: real(x.transpose(0, 1)).transpose(0, 1)
    with pytest.raises(InputError, match=r"matches none .* 2 maps can't be tracked, such as "
                       r"gpt_neox\.layers\.0\.mlp\.\w+, that see something else than one input"):
        tracked_modules(model.network, r"layers\.0\.mlp")
    with pytest.raises(InputError, match=r"layers\.0\.mlp.* ran on something else than"):
        by_hooks(model, modules, model.batch(sequences))
