"""Which maps are tracked, shared and repeated ones too; and what is not covered is said."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.errors import InputError
from gradindex.influence.exact import Influences, Terms, collect
from gradindex.influence.preconditioned import Preconditioned
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import parameter_share, tracked_modules, untracked
from gradindex.modules import Module
from gradindex.progress import shares, stderr_progress
from indexer.prepare import NOTABLE, describe_modules
from search.study.describe import describe as info
from search.study.describe import summary
from support.gradients import captured
from support.models import SIZES, VOCABULARY, labels_of, random_network
from support.reference import log_likelihood, sequence_gradient

LLAMA = SIZES["llama"]


def test_a_map_that_sees_flattened_tokens(monkeypatch, sequences):
    """Beside Qwen2-MoE's experts there is one for all tokens, which come as [b·t, i]."""
    monkeypatch.setitem(SIZES, "qwen2_moe", dict(
        LLAMA, moe_intermediate_size=8, num_experts=5, num_experts_per_tok=2,
        shared_expert_intermediate_size=10, decoder_sparse_step=1))
    network = random_network("qwen2_moe").requires_grad_(False)
    untouched = copy.deepcopy(network)
    untouched.config._experts_implementation = "eager"  # transformers' own way, in float64 too
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network, r"shared_expert")
    names = [module.name for module in modules]
    assert sum("shared_expert.down_proj" in name for name in names) == 2
    assert sum("shared_expert_gate" in name for name in names) == 2
    found, _ = captured(model, modules, model.batch(sequences))
    for row, (ids, scored, *_) in enumerate(sequences):
        truth = sequence_gradient(untouched, names, torch.from_numpy(ids).long(),
                                  labels_of(ids, scored))
        for module in modules:
            torch.testing.assert_close(found[module.name][row], truth[module.name],
                                       rtol=1e-9, atol=1e-10)


# ---- maps that run more than once, or share their weights


def test_a_map_that_runs_twice_has_the_sum_of_its_runs(make_model, sequences):
    """The same MLP in both blocks: by autograd on its weight, and token by token."""
    model = make_model("gpt_neox")
    layers = model.network.gpt_neox.layers
    layers[1].mlp = layers[0].mlp
    model = LanguageModel(model.network, None, model.source)
    modules = tracked_modules(model.network)
    assert [m.name.split("layers.")[1] for m in modules] == [
        "0.mlp.dense_h_to_4h", "0.mlp.dense_4h_to_h"]
    batch = model.batch(sequences)
    found, _ = captured(model, modules, batch)
    check_shared(model.network, modules, found, sequences)
    torch.manual_seed(1)
    p = Preconditioned({m.name: torch.randn(1, *m.shape, dtype=torch.float64) for m in modules})
    terms, totals = Terms(p, batch), Influences(p)
    collect(model, modules, batch, terms, totals)
    np.testing.assert_allclose(terms.stacked(modules).sum((1, 2)), totals.total[0],
                               rtol=1e-9, atol=1e-10)
    share = parameter_share(model.network, modules)
    every = sum(p.numel() for p in model.network.parameters())
    assert share == sum(m.shape[0] * m.shape[1] for m in modules) / every


def test_two_maps_that_share_weight_and_bias_are_one(make_model, sequences):
    network = make_model("gpt_neox").network
    first, second = (layer.mlp.dense_h_to_4h for layer in network.gpt_neox.layers)
    second.weight, second.bias = first.weight, first.bias
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network, "dense_h_to_4h")
    assert len(modules) == 1
    found, _ = captured(model, modules, model.batch(sequences))
    check_shared(network, modules, found, sequences)


def test_a_shared_weight_under_two_biases(make_model, sequences):
    """The weight is one parameter, the biases are two: they aren't tracked."""
    network = make_model("gpt2").network
    first, second = (block.mlp.c_fc for block in network.transformer.h)
    second.weight = nn.Parameter(first.weight.data, requires_grad=False)  # another object
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network, "c_fc")
    assert [(m.name, m.shape) for m in modules] == [("transformer.h.0.mlp.c_fc", (20, 12))]
    found, _ = captured(model, modules, model.batch(sequences))
    for row, (ids, scored, *_) in enumerate(sequences):
        wanted = [first.weight.requires_grad_(), second.weight.requires_grad_()]
        loss = log_likelihood(network, torch.from_numpy(ids).long(), labels_of(ids, scored))
        truth = sum(torch.autograd.grad(loss, wanted)).T
        for one in wanted:
            one.requires_grad_(False)
        torch.testing.assert_close(found[modules[0].name][row], truth, rtol=1e-10, atol=1e-12)
    every = sum(p.numel() for p in network.parameters()) - first.weight.numel()
    assert parameter_share(network, modules) == 20 * 12 / every
    left = untracked(network, modules)
    assert sum(left.values()) + 20 * 12 / every == pytest.approx(1)


def test_a_bias_shared_under_two_weights(make_model, sequences):
    """The weights are two parameters, the bias is one: it isn't tracked, and counts once."""
    network = make_model("gpt_neox").network
    first, second = (layer.mlp.dense_h_to_4h for layer in network.gpt_neox.layers)
    second.bias = first.bias
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network, "dense_h_to_4h")
    assert [module.shape for module in modules] == [(20, 12)] * 2
    found, _ = captured(model, modules, model.batch(sequences))
    for row, (ids, scored, *_) in enumerate(sequences):
        wanted = [first.weight.requires_grad_(), second.weight.requires_grad_()]
        loss = log_likelihood(network, torch.from_numpy(ids).long(), labels_of(ids, scored))
        for module, truth in zip(modules, torch.autograd.grad(loss, wanted), strict=True):
            torch.testing.assert_close(found[module.name][row], truth, rtol=1e-9, atol=1e-10)
        first.weight.requires_grad_(False)
        second.weight.requires_grad_(False)
    every = sum(p.numel() for p in network.parameters())
    share = parameter_share(network, modules)
    assert share == 2 * 20 * 12 / every
    assert sum(untracked(network, modules).values()) + share == pytest.approx(1)


def test_a_weight_shared_with_something_else_is_not_tracked(make_model):
    """Its gradient has a part that no linear map of a block sees; that is said."""
    network = make_model("llama", intermediate_size=VOCABULARY).network
    network.model.layers[0].mlp.up_proj.weight = network.model.embed_tokens.weight
    network.model.layers[1].mlp.gate_proj.weight = nn.Parameter(
        network.model.layers[1].mlp.down_proj.weight.data.T)  # the same place, another map
    names = [module.name for module in tracked_modules(network)]
    assert names == [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "down_proj")] + [
        "model.layers.1.mlp.up_proj"]
    left = untracked(network, tracked_modules(network))
    every = sum(p.numel() for p in network.parameters()) - VOCABULARY * 12
    assert left["linear maps that aren't called, or share a weight with something else"] == \
        pytest.approx(VOCABULARY * 12 / every)


def test_blocks_that_run_several_times(make_model, sequences):
    """One list of blocks, run twice over, as ALBERT does: the sum of both runs."""
    model = make_model("gpt_neox")
    inner, blocks = model.network.gpt_neox, model.network.gpt_neox.layers
    model.network.config.num_hidden_layers = 4
    inner.config.num_hidden_layers = 4

    class Twice(nn.ModuleList):
        def __iter__(self):
            return iter([*self._modules.values(), *self._modules.values()])

        def __getitem__(self, index):
            return [*self._modules.values(), *self._modules.values()][index]

    inner.layers = Twice(blocks._modules.values())
    modules = tracked_modules(model.network)
    assert [m.layer for m in modules] == [0, 0, 1, 1]
    found, _ = captured(model, modules, model.batch(sequences))
    check_shared(model.network, modules, found, sequences)


def check_shared(network, modules, found, sequences):
    """G of every sequence against autograd on the shared parameters."""
    for row, (ids, scored, *_) in enumerate(sequences):
        for module in modules:
            own = network.get_submodule(module.name)
            wanted = [own.weight.requires_grad_(), own.bias.requires_grad_()]
            loss = log_likelihood(network, torch.from_numpy(ids).long(), labels_of(ids, scored))
            weight, bias = torch.autograd.grad(loss, wanted)
            for one in wanted:
                one.requires_grad_(False)
            torch.testing.assert_close(found[module.name][row],
                                       torch.cat([weight, bias[:, None]], 1),
                                       rtol=1e-9, atol=1e-10)


# ---- what is not covered


class Odd(nn.Module):
    """An MLP whose weights no hook can see."""

    def __init__(self, size):
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(size) * 0.1)

    def forward(self, x):
        return x @ self.kernel


def test_what_is_not_tracked_is_said(make_model):
    network = make_model("llama").network
    modules = tracked_modules(network)
    every = sum(p.numel() for p in network.parameters())
    left = untracked(network, modules)
    assert left == pytest.approx({
        "attention": sum(m.shape[0] * m.shape[1] for m in tracked_modules(network, "attention")) /
        every, "embeddings": 37 * 12 / every, "head": 37 * 12 / every, "norms": 5 * 12 / every})
    assert sum(left.values()) + parameter_share(network, modules) == pytest.approx(1)
    network.model.layers[1].mlp = Odd(12).double()
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network)
    assert untracked(network, modules)["Odd"] == pytest.approx(
        144 / sum(p.numel() for p in network.parameters()))
    described = describe_modules(model, modules, untracked(model.network, modules))
    assert "not tracked: " in described and "Odd" in described


class Rounded(nn.Linear):
    """A linear map by its class, and not by what it computes: inputs are rounded."""

    def forward(self, x):
        return super().forward((x * 8).round() / 8)


def test_a_linear_subclass_with_a_forward_of_its_own_is_named(make_model, sequences):
    network = make_model("llama").network
    for layer in network.model.layers:
        own = layer.mlp.gate_proj
        layer.mlp.gate_proj = Rounded(12, 20, bias=False, dtype=own.weight.dtype)
        layer.mlp.gate_proj.weight = own.weight
        plain = type("Plain", (nn.Linear,), {})(12, 20, bias=False, dtype=own.weight.dtype)
        plain.weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj = plain  # computes what nn.Linear does
    model = LanguageModel(network.requires_grad_(False), None, ModelSource(network))
    modules = tracked_modules(network)
    assert [module.name.rpartition(".")[2] for module in modules] == ["up_proj", "down_proj"] * 2
    left = untracked(network, modules)
    every = sum(p.numel() for p in network.parameters())
    assert left["Rounded"] == pytest.approx(2 * 20 * 12 / every)
    assert sum(left.values()) + parameter_share(network, modules) == pytest.approx(1)
    found, _ = captured(model, modules, model.batch(sequences))
    names = [module.name for module in modules if module.name.endswith("down_proj")]
    for row, (ids, scored, *_) in enumerate(sequences):
        truth = sequence_gradient(network, names, torch.from_numpy(ids).long(),
                                  labels_of(ids, scored))
        torch.testing.assert_close(found[names[1]][row], truth[names[1]], rtol=1e-5, atol=1e-8)


ROUTERS = {
    "phimoe": ("PhimoeTopKRouter", dict(LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "llama4_text": ("Llama4Router", dict(
        LLAMA, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=20, head_dim=6,
        pad_token_id=0)),
}


@pytest.mark.parametrize("family", ROUTERS)
def test_a_router_that_is_a_linear_subclass(family, monkeypatch, tmp_path, sequences):
    """It gives a tuple, and is named; the model is built and searched, here from tokens."""
    name, settings = ROUTERS[family]
    monkeypatch.setitem(SIZES, family, settings)
    network = random_network(family, torch.float32)
    network.save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    np.save(tmp_path / "tokens.npy", random.integers(0, VOCABULARY, (24, 12)).astype(np.int32))
    index = gradindex.build(str(tmp_path / "model"), tmp_path / "tokens.npy", tmp_path / "index",
                            bits=512, segment_size=16)
    routers = [at for at, one in network.named_modules() if type(one).__name__ == name]
    assert routers and not {module.name for module in index.manifest.modules} & {*routers}
    every = sum(p.numel() for p in network.parameters())
    assert info(tmp_path / "index")["untracked"][name] == pytest.approx(
        sum(network.get_submodule(at).weight.numel() for at in routers) / every, abs=1e-6)
    tokens = np.load(tmp_path / "tokens.npy")
    result = index.search(token_ids=tokens[3].tolist(), labels=tokens[3].tolist(), k=1,
                          shortlist="all")
    assert result[0].id == 3
    model, router = index.model, network.get_submodule(routers[0])
    wrong = Module(routers[0], 0, "mlp", router.out_features, router.in_features, False)
    with pytest.raises(InputError, match=rf"{routers[0]} \({name}\) gave a tuple; expected a lin"):
        captured(model, [wrong], model.batch(sequences))


MAMBAS = {
    "mamba": dict(hidden_size=12, state_size=4, num_hidden_layers=2, time_step_rank=3),
    "falcon_mamba": dict(hidden_size=12, state_size=4, num_hidden_layers=2, time_step_rank=3),
}


@pytest.mark.parametrize("family", MAMBAS)
def test_maps_whose_weight_is_used_without_calling_them(family, monkeypatch, sequences):
    """Mamba's dt_proj: not tracked and said to be so; the others are as autograd has them."""
    monkeypatch.setitem(SIZES, family, MAMBAS[family])
    network = random_network(family).requires_grad_(False)
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network)
    names = [module.name for module in modules]
    assert {name.rpartition(".")[2] for name in names} == {"in_proj", "x_proj", "out_proj"}
    left = untracked(network, modules)
    dt_proj = sum(p.numel() for name, p in network.named_parameters() if "dt_proj" in name)
    every = sum(p.numel() for p in network.parameters())
    assert left["linear maps that aren't called, or share a weight with something else"] == \
        pytest.approx(dt_proj / every)
    assert sum(left.values()) + parameter_share(network, modules) == pytest.approx(1)
    found, _ = captured(model, modules, model.batch(sequences))
    for row, (ids, scored, *_) in enumerate(sequences):
        truth = sequence_gradient(network, names, torch.from_numpy(ids).long(),
                                  labels_of(ids, scored))
        for name in names:
            torch.testing.assert_close(found[name][row], truth[name], rtol=1e-5, atol=1e-6)
    uncalled = Module("backbone.layers.0.mixer.dt_proj", 0, "mlp", 24, 3, True)
    with pytest.raises(InputError, match=r"didn't call module .*dt_proj in a pass.*--modules"):
        captured(model, [*modules, uncalled], model.batch(sequences))


WORDS = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 20}


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_both_ways_is_refused(family, dtype, monkeypatch, tmp_path):
    """Unless its configuration makes it a decoder."""
    monkeypatch.setitem(SIZES, family, {**WORDS, "pad_token_id": 0})
    assert tracked_modules(random_network(family, dtype, is_decoder=True, pad_token_id=0))
    network = random_network(family, dtype, pad_token_id=0)
    with pytest.raises(InputError, match=r"isn't causal: .*a causal language model; .*is_decoder"):
        tracked_modules(network)
    np.save(tmp_path / "tokens.npy", np.ones((24, 12), np.int32))
    with pytest.raises(InputError, match=r"isn't causal"):
        gradindex.build(network, tmp_path / "tokens.npy", tmp_path / "index", bits=512)
    assert not (tmp_path / "index" / "curvature.partial").exists()


def test_the_small_pass_leaves_the_network_as_it_was(make_model, sequences):
    """In training mode or not, with its parameters' settings and without its hooks."""
    network = make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).network
    network.train()
    network.transformer.h[1].eval()
    before = {name: one.training for name, one in network.named_modules()}
    with torch.no_grad():
        assert len(tracked_modules(network)) == 4
    assert before == {name: one.training for name, one in network.named_modules()}
    assert not any(one._forward_hooks for one in network.modules())
    assert all(one.grad is None for one in network.parameters())


class Packed(nn.Module):
    """A map as other quantisers keep it: no nn.Linear, the weight in a buffer."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.out_features, 2, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x):
        return torch.zeros(*x.shape[:-1], self.out_features, dtype=x.dtype) + self.bias


def test_weights_that_others_packed_are_named(make_model):
    network = make_model("llama").network
    whole = sum(p.numel() for p in network.parameters())
    for layer in network.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name)))
    with pytest.raises(InputError, match=r"'mlp' matches none of the linear modules"):
        tracked_modules(network)
    modules = tracked_modules(network, "attention,head,embeddings")
    left = untracked(network, modules)
    biases = 2 * (20 + 20 + 12)
    assert left["Packed"] == pytest.approx((2 * 3 * 20 * 12 + biases) / (whole + biases))
    assert sum(left.values()) + parameter_share(network, modules) == pytest.approx(1)
    for layer in network.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    with pytest.raises(InputError, match=r"no linear map that can be tracked: its .* in Packed, "):
        tracked_modules(network)


def test_a_build_says_what_it_can_not_track(tmp_path, capsys):
    """In the build's lines, in the index, in `info`; loudly where it is much."""
    texts = [f"The plum number {n} grows." for n in range(8)]
    tokenizer = train_tokenizer(texts, 300)
    network = random_network("llama", torch.float32, vocab_size=len(tokenizer), hidden_size=24)
    network.model.layers[1].mlp = Odd(24)
    gradindex.build(network, [{"text": text} for text in texts], tmp_path / "index",
                    tokenizer=tokenizer, seq_len=16, bits=512, progress=stderr_progress())
    said = capsys.readouterr().err
    modules = tracked_modules(network, "mlp,head")
    left = untracked(network, modules)
    assert set(left) == {"attention", "embeddings", "norms", "Odd"}
    assert list(left.values()) == sorted(left.values(), reverse=True)
    attention = f"attention (not chosen) {left['attention']:.1%}"
    assert "of the model's parameters; not tracked: " in said
    assert attention in said and f"Odd {left['Odd']:.1%}" in said
    assert ("parameters can't be tracked, so" in said) == (left["Odd"] > NOTABLE)
    facts = info(tmp_path / "index")
    assert facts["untracked"] == pytest.approx(left, abs=1e-6)
    assert f"\nnot tracked {shares(left)}\n" in summary(facts)

    network.model.layers[1].mlp.kernel = nn.Parameter(torch.eye(24).repeat(9, 1) * 0.01)
    network.model.layers[1].mlp.forward = lambda x: x @ network.model.layers[1].mlp.kernel[:24]
    capsys.readouterr()
    gradindex.build(network, [{"text": text} for text in texts], tmp_path / "second",
                    tokenizer=tokenizer, seq_len=16, bits=512, progress=stderr_progress())
    share = untracked(network, modules)["Odd"]
    assert share > NOTABLE
    assert (f"warning: {share:.0%} of the model's parameters can't be tracked, so their influence "
            f"is in no score: Odd {share:.1%}") in capsys.readouterr().err
