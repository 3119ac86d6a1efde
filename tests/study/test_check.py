"""Steps of hits against dense algebra in float64: their length, what they change, all put back."""

import copy
import json

import numpy as np
import pytest
import torch
from torch.autograd.functional import jvp
from torch.func import functional_call

import gradindex
from gradindex.errors import InputError
from gradindex.influence.exact import Influences, collect
from gradindex.influence.preconditioned import Preconditioned
from gradindex.influence.steps import Movable
from gradindex.model.tracked import examine, tracked_modules
from gradindex.objective.batch import Text
from gradindex.results import Result
from search.show.output_forms import render_form
from search.study import check
from support.commands import run
from support.documents import small_documents
from support.indexes import QUESTION, SMALL
from support.models import labels_of, other_model, random_network
from support.reference import ekfac_matrix, log_likelihood, sequence_gradient
from support.task_models import model_of, network_of_texts, policy

TRAINED = 300


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    from gradindex.demo.small_model import train_tokenizer

    documents = small_documents()[:30]
    tokenizer = train_tokenizer([document["text"] for document in documents], 300)
    network = random_network("gpt_neox", vocab_size=len(tokenizer))
    network.config._attn_implementation = "eager"  # which can be differentiated twice
    return gradindex.build(network, documents, tmp_path_factory.mktemp("check") / "i",
                           tokenizer=tokenizer, **SMALL)


def direction(index, network, record):
    """g and p by module, from the formulas: gᵀp, pᵀλp."""
    modules, damping = index.manifest.modules, index.manifest.damping
    g = sequence_gradient(network, [module.name for module in modules],
                          torch.from_numpy(record.tokens).long(),
                          labels_of(record.tokens, record.scored))
    p, along, held = {}, 0.0, 0.0
    for name, one in g.items():
        c = index.snapshot.ekfac[name]
        added = float(damping * c.eigenvalues.mean())
        if c.is_diagonal:
            p[name] = one / (c.eigenvalues + added)
        else:
            dense = ekfac_matrix(c.eigenvectors_s, c.eigenvectors_a, c.eigenvalues, added)
            p[name] = torch.linalg.solve(dense, one.flatten()).view_as(one)
        along += float((one * p[name]).sum())
        held += added * float(p[name].square().sum())
    return p, along, held


def by_parameter(p):
    """The tangent of each parameter of a network."""
    tangents = {}
    for name, one in p.items():
        tangents[f"{name}.weight"] = one if name == "lm_head" else one[:, :-1]
        if name != "lm_head":
            tangents[f"{name}.bias"] = one[:, -1]
    return tangents


def curvature(network, p, record):
    """Σ over the predictions of the variance of J p under the softmax, J p by autograd."""
    tangents = by_parameter(p)
    values = {name: dict(network.named_parameters())[name].detach() for name in tangents}
    ids = torch.from_numpy(record.tokens).long()[None]

    def logits(*these):
        return functional_call(network, dict(zip(values, these, strict=True)), (),
                               {"input_ids": ids, "use_cache": False}).logits

    said, moved = jvp(logits, tuple(values.values()), tuple(tangents.values()))
    prob, moved = said[0].softmax(-1), moved[0]
    variance = (prob * moved**2).sum(-1) - (prob * moved).sum(-1) ** 2
    return float(variance[:-1][torch.from_numpy(record.scored[1:])].sum())


def test_the_step_is_that_of_the_formulas(index):
    snapshot, network = index.snapshot, copy.deepcopy(index.model.network)
    before = {name: tensor.clone() for name, tensor in index.model.network.state_dict().items()}
    result = index.search(**QUESTION, k=3, shortlist="all", train_sequences=TRAINED)
    told = []
    index.check(result, 2, lambda done, total: told.append((done, total)))
    assert result[2].check is None and told[-1][0] == told[-1][1] and sorted(told) == told
    for name, tensor in index.model.network.state_dict().items():
        assert torch.equal(tensor, before[name])  # to the bit
    sample = snapshot.records(snapshot.random_sample())
    text = result.query.texts[0]
    asked = torch.tensor(text.tokens), torch.tensor(text.labels)
    for hit in result[:2]:
        [record] = [one for one in snapshot.records(range(len(snapshot))) if one.id == hit.id]
        p, along, held = direction(index, network, record)
        others = [curvature(network, p, one) for one in sample if one.id != hit.id]
        whole = (curvature(network, p, record) + (TRAINED - 1) * np.mean(others)) / TRAINED + held
        alpha = along / whole
        assert hit.check.scale == pytest.approx(alpha, rel=2e-2)
        error = alpha / whole * (TRAINED - 1) / TRAINED * np.std(others, ddof=1) / len(others)**.5
        assert hit.check.scale_error == pytest.approx(error, rel=5e-2)
        assert hit.check.nats == pytest.approx(hit.check.scale * hit.influence / TRAINED)
        other = copy.deepcopy(network)
        with torch.no_grad():
            for name, step in by_parameter(p).items():
                other.get_parameter(name).add_(step, alpha=hit.check.scale / TRAINED)
            said = [float(log_likelihood(one, *asked)) for one in (network, other)]
        assert hit.check.measured == pytest.approx(said[1] - said[0], rel=1e-6)
        assert hit.check.own > 0


def test_what_is_written_of_it(index):
    result = index.search(**QUESTION, k=2, shortlist="all", train_sequences=TRAINED)
    index.check(result, 1)
    again = Result.from_json(result.to_json())
    assert again[0].check == result[0].check and again[1].check is None
    for form in ("auto", "html"):
        shown = " ".join(render_form(result, form).decode().split())
        assert shown.count("checked: by its own step") == 1
        assert "of the first-order one" in shown
    table = render_form(result, "csv").decode()
    assert json.loads(result.to_json())["hits"][0]["check"]["scale"] > 0 and ",check," in table


@pytest.mark.parametrize("wrong, said", [
    (check.Check(1.0, 0.3, 1.0, 1.0, 1.0), ["its length is rough"]),
    (check.Check(1.0, 0.1, 1.0, 0.4, 1.0), ["it isn't of first order"]),
    (check.Check(1.0, 0.1, -1.0, 0.4, -1.0), ["it isn't of first order",
                                              "its own text loses by it"]),
    (check.Check(1.0, 0.1, 1.0, 1.2, 1.0), []),
])
def test_steps_that_misbehave_are_flagged(wrong, said):
    assert check._wrong(wrong) == said


@pytest.mark.parametrize("task, outputs", [
    ("classification", 2), ("reward", 1), ("preference", 0)])
def test_curvature_of_two_outcomes_is_exact(task, outputs):
    """(√(σσ̄) ∇z · p)², which is what the fit squares."""
    network = policy(torch.float64) if task == "preference" else network_of_texts(
        "bert", outputs, torch.float64)
    model = model_of(network, task)
    modules = tracked_modules(network, "mlp", examine(network, model.source.task))
    tokens, border = np.arange(1, 11, dtype=np.int32), None if task == "classification" else 5
    rows = [Text(tokens, np.ones(10, bool), border, label) for label in (0, 1)]
    torch.manual_seed(1)
    p = {module.name: torch.randn(*module.shape, dtype=torch.float64) for module in modules}
    batch = model.batch(rows)
    found = Movable(model, modules).curvature_along(p, 1e-4, batch)
    terms = Influences(Preconditioned({name: one[None] for name, one in p.items()}))
    numbers = torch.zeros(len(rows) if task == "classification" else 0)
    collect(model, modules, batch, terms, numbers=numbers)
    assert found == pytest.approx(terms.total[0] ** 2, rel=1e-4)


def test_what_can_not_be_checked(index, tmp_path):
    result = index.search(**QUESTION, k=2, train_sequences=TRAINED)
    with pytest.raises(InputError, match="check 0: expected how many hits"):
        index.check(result, 0)
    with pytest.raises(InputError, match="N_train isn't known"):
        index.check(index.search(**QUESTION, k=2))
    with pytest.raises(InputError, match="can't go with rescore=False"):
        index.check(index.search(**QUESTION, k=2, rescore=False, train_sequences=TRAINED))
    network = index.model.network
    two = gradindex.build(network, small_documents()[:10], tmp_path / "two", **SMALL,
                          tokenizer=index.model.tokenizer, also={"base": other_model(network)})
    with pytest.raises(InputError, match="moves one model, and this search asks last, base"):
        two.check(two.search(**QUESTION, k=2, train_sequences=TRAINED))
    alone = two.search(**QUESTION, k=2, train_sequences=TRAINED, members="last")
    assert two.check(alone, 1)[0].check.own > 0
    half = gradindex.build(copy.deepcopy(network).bfloat16(), small_documents()[:10],
                           tmp_path / "half", tokenizer=index.model.tokenizer, **SMALL)
    with pytest.raises(InputError, match="in bfloat16, in which a step of one copy is lost"):
        half.check(half.search(**QUESTION, k=2, train_sequences=TRAINED))


def test_on_the_command_line(index_folder, model_folder):
    asked = ("search", index_folder, "-p", QUESTION["prompt"], "-c", QUESTION["completion"], "-k",
             "2")
    done = run(*asked, "--train-sequences", "300", "--check", "1")
    assert done.returncode == 0, done.stderr
    assert "checked: by its own step" in done.stdout and "check: " in done.stderr
    refused = run(*asked, "--check", "1")
    assert refused.returncode == 2 and "--train-sequences" in refused.stderr
