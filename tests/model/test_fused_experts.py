"""Fused experts: exact gradients, terms and covariances, a build and a search."""

import numpy as np
import pytest
import torch

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.influence.blockwise import covariance_shapes
from gradindex.influence.exact import Influences, Terms, collect
from gradindex.influence.gradients import backward
from gradindex.influence.preconditioned import Preconditioned
from gradindex.model import fused_experts
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import parameter_share, tracked_modules, untracked
from indexer.fit.batch_sums import add_covariances
from support.gradients import captured
from support.indexes import SMALL
from support.models import MIXTURES, SIZES, labels_of, random_network
from support.reference import log_likelihood


@pytest.fixture(params=list(MIXTURES))
def mixture(request, monkeypatch):
    """A small random mixture of experts, run in transformers' own eager way."""
    monkeypatch.setitem(SIZES, request.param, MIXTURES[request.param])
    network = random_network(request.param)
    network.config._experts_implementation = "eager"
    return network


def dense(network, module, ids, scored):
    """∂ log-likelihood / ∂ W of one expert, the bias last, by autograd on the fused tensors."""
    part, _, number = module.name.rpartition("_")
    block, _, tensor = part.rpartition(".")
    fused = network.get_submodule(block)
    names = [tensor, f"{tensor}_bias"] if fused.has_bias else [tensor]
    wanted = [getattr(fused, name).requires_grad_() for name in names]
    loss = log_likelihood(network, torch.from_numpy(ids).long(), labels_of(ids, scored))
    found = [g[int(number)] for g in torch.autograd.grad(loss, wanted)]
    for one in wanted:
        one.requires_grad_(False)
    weight = found[0].T if fused.is_transposed else found[0]
    return torch.cat([weight, found[1][:, None]], 1) if fused.has_bias else weight


def test_experts_have_exact_gradients(mixture, sequences):
    ids = torch.from_numpy(sequences[0][0]).long()[None]
    with torch.no_grad():
        eager = mixture(input_ids=ids, use_cache=False).logits
    model = LanguageModel(mixture.requires_grad_(False), None, ModelSource(mixture))
    with torch.no_grad():
        assert torch.equal(model.network(ids, use_cache=False).logits, eager)
    modules = tracked_modules(mixture)
    assert all(isinstance(mixture.get_submodule(m.name), fused_experts.ExpertMap) for m in modules)
    found, _ = captured(model, modules, model.batch(sequences))
    mixture.config._experts_implementation = "eager"
    assert found.keys() == {module.name for module in modules}
    for row, (ids, scored, *_) in enumerate(sequences):
        for module in modules:
            torch.testing.assert_close(found[module.name][row],
                                       dense(mixture, module, ids, scored), rtol=1e-9, atol=1e-10)


def test_terms_and_covariances_of_experts(mixture, sequences):
    """Terms lie at their tokens and add up; A and S are sums over routed tokens alone."""
    model = LanguageModel(mixture.requires_grad_(False), None, ModelSource(mixture))
    modules = tracked_modules(mixture)
    batch = model.batch(sequences)
    torch.manual_seed(1)
    p = Preconditioned({m.name: torch.randn(1, *m.shape, dtype=torch.float64) for m in modules})
    terms, totals = Terms(p, batch), Influences(p)
    collect(model, modules, batch, terms, totals)
    stacked = terms.stacked(modules)
    assert stacked.shape == (*batch.tokens.shape, len(modules))
    np.testing.assert_allclose(stacked.sum((1, 2)), totals.total[0], rtol=1e-9, atol=1e-10)
    assert (stacked[~batch.real] == 0).all()
    sums = {name: torch.zeros(shape, dtype=torch.float64)
            for name, shape in covariance_shapes(modules, 1).items()}
    with torch.no_grad():
        add_covariances(model, modules, sums, batch, None)
    seen = {m.name: [] for m in modules}
    for sequence in sequences:  # one at a time there is no padding between sequences
        alone = model.batch([sequence])
        backward(model, modules, alone, lambda m, a, d: seen[m.name].append((a[0], d[0])))
    for module in modules:
        for side, place in (("A", 0), ("S", 1)):
            rows = torch.cat([pair[place] for pair in seen[module.name]])
            torch.testing.assert_close(sums[f"{module.name}/{side}"], rows.T @ rows,
                                       rtol=1e-9, atol=1e-10)


def test_packing_keeps_every_token_at_its_place():
    torch.manual_seed(0)
    places = np.array([7, 0, 2, 11, 3, 9])  # of a batch of 3 × 4
    x = torch.randn(6, 5)
    [packed, twice], positions = fused_experts.pack([x, 2 * x], places, (3, 4))
    assert torch.equal(twice, 2 * packed)
    assert positions.tolist() == [[0, 2, -1], [3, 3, -1], [3, 1, -1]] or \
        positions.tolist() == [[0, 2, 3], [3, -1, -1], [3, 1, -1]]
    for row in range(3):
        for slot, position in enumerate(positions[row].tolist()):
            if position < 0:
                assert (packed[row, slot] == 0).all()
            else:
                [index] = np.flatnonzero(places == 4 * row + position)
                assert torch.equal(packed[row, slot], x[index])
    [empty], none = fused_experts.pack([x[:0]], places[:0], (3, 4))
    assert empty.shape == (3, 0, 5) and none.shape == (3, 0)


def test_a_mixture_is_built_and_searched(tmp_path, monkeypatch):
    """End to end; an expert that no token reaches is left out, with a note."""
    monkeypatch.setitem(SIZES, "mixtral", MIXTURES["mixtral"])
    texts = [f"The plum number {n} grows by the river." for n in range(30)]
    tokenizer = train_tokenizer(texts, 300)
    network = random_network("mixtral", torch.float64, vocab_size=len(tokenizer))
    with torch.no_grad():  # the last expert of the first block never is among the best two
        gate = network.model.layers[0].mlp.gate.weight
        gate[3] = 0
        gate[:3] *= 50
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    index = gradindex.build(str(tmp_path / "model"), [{"text": text} for text in texts],
                            tmp_path / "index", **{**SMALL, "id_field": None, "keep_fields": ()},
                            dtype="float64", modules="mlp")
    names = {module.name for module in index.manifest.modules}
    left = index.manifest.fit["left_out"]
    assert names.isdisjoint(left) and len(names) + len(left) == 16
    result = index.search(prompt="The plum number 7 grows", completion=" by the river.",
                          k=3, shortlist="all")
    hit = result[0]
    assert sum(hit.token_influence) == pytest.approx(hit.influence, rel=1e-6)
    query = index.make_query(prompt="The plum number 7 grows", completion=" by the river.")
    truth = 0.0
    model = index.model
    model.network.config._experts_implementation = "eager"
    [text], [record] = query.texts, index.snapshot.records([hit.id])
    for module in index.manifest.modules:
        asked = dense(model.network, module, np.array(text.tokens, np.int32),
                      np.array(text.labels) != -100)
        own = dense(model.network, module, record.tokens, record.scored)
        curvature = index.snapshot.ekfac[module.name]
        truth += float((curvature.leave_eigenbasis(curvature.coordinates(asked, 0.1)) * own).sum())
    assert hit.influence == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("mixture, biases", [
    *((family, False) for family in MIXTURES), ("gpt_oss", True)], indirect=["mixture"])
def test_experts_of_two_blocks_that_share_their_tensors(mixture, sequences, biases):
    """One map each, the sum of both blocks' runs; a bias only where that is shared as well."""
    first, second = (one for one in mixture.modules() if fused_experts.is_fused(one))
    names = ["gate_up_proj", "down_proj"]
    for name in names + [f"{name}_bias" for name in names if first.has_bias and biases]:
        setattr(second, name, getattr(first, name))
    model = LanguageModel(mixture.requires_grad_(False), None, ModelSource(mixture))
    modules = tracked_modules(mixture)
    assert len(modules) == 2 * first.num_experts and {m.layer for m in modules} == {0}
    found, _ = captured(model, modules, model.batch(sequences))
    with_bias = first.has_bias and biases
    for row, (ids, scored, *_) in enumerate(sequences):
        for module in modules:
            truth = dense(mixture, module, ids, scored)[:, :module.shape[1]]
            assert found[module.name].shape[2] == module.d_in and not module.bias
            torch.testing.assert_close(found[module.name][row], truth, rtol=1e-9, atol=1e-10)
    tracked = [getattr(first, name) for name in names] + [
        getattr(first, f"{name}_bias") for name in names if with_bias]
    every = sum(p.numel() for p in mixture.parameters())
    share = parameter_share(mixture, modules)
    assert share == sum(one.numel() for one in tracked) / every
    assert sum(untracked(mixture, modules).values()) + share == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_the_experts_parameters(monkeypatch, sequences):
    """peft's target_parameters: the experts' own maps under it are right, and it is named."""
    import peft

    monkeypatch.setitem(SIZES, "mixtral", MIXTURES["mixtral"])
    wrapped = peft.get_peft_model(random_network("mixtral"), peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    inside = wrapped.double().eval().get_base_model()
    inside.config._experts_implementation = "eager"
    model = LanguageModel.load(ModelSource(wrapped))
    modules = tracked_modules(model.network, "mlp,adapter")
    assert sum(module.kind == "adapter" for module in modules) == 4  # q_proj's alone
    assert len(modules) == 4 + 2 * 2 * 4
    word = "the adapter's LoRA on bare parameters (target_parameters)"
    rest = untracked(model.network, modules)
    own = sum(parameter.numel() for name, parameter in inside.named_parameters()
              if "lora_" in name and "q_proj" not in name)
    total = sum(parameter.numel() for parameter in inside.parameters())
    assert rest[word] == pytest.approx(own / total)
    assert sum(rest.values()) + parameter_share(model.network, modules) == pytest.approx(1)

    found, _ = captured(model, modules, model.batch(sequences[:2]))
    for row, (ids, scored, *_) in enumerate(sequences[:2]):
        experts = {name: part for name, part in inside.named_parameters()
                   if name.endswith(("gate_up_proj", "down_proj"))}
        for part in experts.values():
            part.requires_grad_(True)
        loss = log_likelihood(inside, torch.from_numpy(ids).long(), labels_of(ids, scored))
        truths = dict(zip(experts, torch.autograd.grad(loss, list(experts.values())), strict=True))
        for module in modules:
            if module.kind == "adapter":
                continue
            tensor, _, number = module.name.rpartition("_")
            torch.testing.assert_close(found[module.name][row], truths[tensor][int(number)],
                                       rtol=1e-9, atol=1e-10)
