"""Gradients of every task's rows, and of their curvature, against torch.func on plain passes."""

import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import logsigmoid

from gradindex.influence.gradients import backward, gradient
from gradindex.model.tracked import examine, tracked_modules
from gradindex.objective.batch import Batch, Text
from gradindex.objective.classes import Classification
from gradindex.objective.whole_texts import WholeTexts
from support.task_models import FAMILIES, VOCABULARY, model_of, network_of_texts, policy

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = (7, 4, 9, 5)


def texts(lengths, seed=0):
    """Token ids without those that stand for padding."""
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]


def labelled(classes):
    return [Text(tokens, np.ones(len(tokens), bool), label=number % classes)
            for number, tokens in enumerate(texts(LENGTHS))]


def pairs(first=0):
    """Pairs whose answers, of unlike lengths, are scored from a place on."""
    rows = []
    for number, (one, other) in enumerate(
            zip(texts(LENGTHS), texts(LENGTHS[::-1], seed=1), strict=True)):
        scored = [np.arange(len(part)) >= first for part in (one, other)]
        rows.append(Text(np.concatenate([one, other]), np.concatenate(scored), len(one),
                         offset=0.2 * number - 0.3))
    return rows


def found(model, modules, rows, numbers=None):
    """log p [b], and each module's gradients [b, o, i], from one pass of all rows together."""
    gradients = {}

    def each(module, a, d):
        gradients[module.name] = gradient(module, a, d)

    with torch.no_grad():
        log_p = backward(model, modules, model.batch(rows), each, numbers)
    return log_p.sum(1), gradients


class Valued(torch.nn.Module):
    """A network, whose parameters `functional_call` replaces while a value is computed."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, value):
        return value()


def plain(network, modules, value):
    """The gradient [o, i] of a value by each module's weight and bias, by torch.func."""
    valued = Valued(network)
    names = {"network." + module.name + part for module in modules for part in (".weight", ".bias")}
    # a shared weight by its own name, under which all of its uses are replaced
    first = {id(parameter): name for name, parameter in valued.named_parameters()}
    own = {name: first[id(parameter)] for name, parameter in
           valued.named_parameters(remove_duplicate=False) if name in names}
    known = dict(valued.named_parameters())
    found = torch.func.grad(lambda values: torch.func.functional_call(valued, values, (value,)))(
        {name: known[name].detach() for name in own.values()})
    parts = {name: found[own[name]] for name in own}
    gradients = {}
    for module in modules:
        weight = parts[f"network.{module.name}.weight"]
        if not isinstance(network.get_submodule(module.name), torch.nn.Linear):
            weight = weight.T  # Conv1D
        bias = parts.get(f"network.{module.name}.bias")
        gradients[module.name] = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    return gradients


def one_by_one(network, tokens):
    """What a network says of a text alone, without padding or a mask."""
    return network(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits


def everything(network, task):
    anatomy = examine(network, model_of(network, task).source.task)
    modules = tracked_modules(network, "all", anatomy)
    return modules


def compare(model, modules, rows, value):
    log_p, gradients = found(model, modules, rows)
    for number, row in enumerate(rows):
        expected = plain(model.network, modules, lambda row=row: value(row))
        torch.testing.assert_close(log_p[number], value(row).detach(), rtol=1e-9, atol=1e-12)
        for name, part in expected.items():
            torch.testing.assert_close(gradients[name][number], part, rtol=1e-9, atol=1e-11)


def label_log_p(network):
    """log p of a row's label, by a plain pass."""
    def value(row):
        return one_by_one(network, row.tokens).log_softmax(-1)[0, row.label]

    return value


def reward_log_p(network):
    """log σ of a pair's rewards, by plain passes."""
    def value(row):
        one, other = (one_by_one(network, part)[0, 0]
                      for part in np.split(row.tokens, [row.border]))
        return logsigmoid(one - other - row.offset)

    return value


def preference_log_p(network):
    """log σ of a pair's β log π, by plain passes."""
    def value(row):
        parts = zip(np.split(row.tokens, [row.border]), np.split(row.scored, [row.border]),
                    strict=True)
        one, other = (answer_log_p(network, *part) for part in parts)
        return logsigmoid(0.3 * (one - other - row.offset))

    return value


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_labels(family, classes):
    network = network_of_texts(family, classes)
    model = model_of(network, "classification")
    modules = everything(network, "classification")
    heads = {module.name for module in modules if module.kind == "head"}
    assert heads == {
        "bert": {"bert.pooler.dense", "classifier"},
        "roberta": {"classifier.dense", "classifier.out_proj"},
        "distilbert": {"pre_classifier", "classifier"},
        "deberta": {"pooler.dense", "classifier"},
        "modernbert": {"head.dense", "classifier"},
        "llama": {"score"}, "gpt2": {"score"}}[family]

    compare(model, modules, labelled(classes), label_log_p(network))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_of_rewards(family):
    network = network_of_texts(family, 1)
    model, modules = model_of(network, "reward"), everything(network, "reward")

    compare(model, modules, pairs(), reward_log_p(network))
    single = [Text(tokens, np.ones(len(tokens), bool)) for tokens in texts(LENGTHS)]
    compare(model, modules, single, lambda row: one_by_one(network, row.tokens)[0, 0])


def answer_log_p(network, tokens, scored):
    logits = one_by_one(network, tokens)[0, :-1].log_softmax(-1)
    targets = torch.from_numpy(tokens[1:].astype(np.int64))
    each = logits.gather(-1, targets[:, None])[:, 0]
    return (each * torch.from_numpy(scored[1:])).sum()


def test_gradients_of_preferences():
    network = policy()
    model, modules = model_of(network, "preference"), everything(network, "preference")
    [head] = [module for module in modules if module.kind == "head"]
    assert head.diagonal  # to the vocabulary
    compare(model, modules, pairs(first=2), preference_log_p(network))
    single = [Text(tokens, np.arange(len(tokens)) >= 2) for tokens in texts(LENGTHS)]
    compare(model, modules, single,
            lambda row: 0.3 * answer_log_p(network, row.tokens, row.scored))


def expected_square(network, modules, log_p_of):
    """Σ over outcomes of p times the squared gradient of its log p."""
    total = {}
    for outcome in log_p_of:
        p = outcome().exp().detach()
        for name, part in plain(network, modules, outcome).items():
            total[name] = total.get(name, 0) + p * part.square()
    return total


@pytest.mark.parametrize("task", ["classification", "reward", "preference"])
def test_the_curvature_of_two_outcomes_is_exact(task):
    """Nothing is drawn: one gradient has the squares that both outcomes have on average."""
    network = policy() if task == "preference" else network_of_texts(
        "bert", 2 if task == "classification" else 1)
    model, modules = model_of(network, task), everything(network, task)
    rows = labelled(2) if task == "classification" else pairs(first=2)
    batch = model.batch(rows)
    numbers = model.objective.label_numbers(batch, lambda row, count: np.zeros(count))
    _, gradients = found(model, modules, rows, numbers)

    def difference(row):
        if task == "classification":
            logits = one_by_one(network, row.tokens)[0]
            return logits[1] - logits[0]
        parts = zip(np.split(row.tokens, [row.border]), np.split(row.scored, [row.border]),
                    strict=True)
        if task == "reward":
            one, other = (one_by_one(network, tokens)[0, 0] for tokens, _ in parts)
            return one - other - row.offset
        one, other = (answer_log_p(network, tokens, scored) for tokens, scored in parts)
        return 0.3 * (one - other - row.offset)

    for number, row in enumerate(rows):
        expected = expected_square(network, modules, [
            lambda row=row: logsigmoid(difference(row)),
            lambda row=row: logsigmoid(-difference(row))])
        for name, square in expected.items():
            torch.testing.assert_close(gradients[name][number].square(), square, rtol=1e-8,
                                       atol=1e-9 * float(square.max()))


def test_of_three_classes_a_label_is_drawn_from_the_softmax():
    network = network_of_texts("bert", 3)
    model, modules = model_of(network, "classification"), everything(network, "classification")
    rows = labelled(3)[:1]
    p = one_by_one(network, rows[0].tokens)[0].softmax(-1)
    ends = [0.0, *p.cumsum(-1).tolist()]
    for label in range(3):
        middle = torch.tensor([(ends[label] + ends[label + 1]) / 2], dtype=torch.float64)
        drawn = found(model, modules, rows, middle)[1]
        given = found(model, modules, [rows[0]._replace(label=label)])[1]
        for name in drawn:
            torch.testing.assert_close(drawn[name], given[name])


def test_two_sentences_are_told_apart():
    """BERT is told which tokens are of the second; without a border all are of the first."""
    network = network_of_texts("bert", 2)
    model = model_of(network, "classification")
    [tokens] = texts([8])
    row = Text(tokens, np.ones(8, bool), border=5, label=1)
    types = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    plainly = network(input_ids=torch.from_numpy(tokens.astype(np.int64))[None],
                      token_type_ids=types).logits.log_softmax(-1)[0, 1]
    others = [Text(texts([11], 3)[0], np.ones(11, bool), label=0)]
    assert found(model, [], [row, *others])[0][0].item() == pytest.approx(plainly.item(), rel=1e-9)
    alone = found(model, [], [row._replace(border=None)])[0][0].item()
    assert alone != pytest.approx(plainly.item(), rel=1e-3)


# ---- adapters

TARGETS = {"bert": ["query", "intermediate.dense"], "roberta": ["query", "intermediate.dense"],
           "distilbert": ["q_lin", "lin1"], "deberta": ["query_proj", "intermediate.dense"],
           "modernbert": ["Wqkv", "Wi"], "llama": ["q_proj", "gate_proj"],
           "gpt2": ["c_attn", "c_fc"]}


def adapted(network, family, **settings):
    """The network inside a PeftModel whose adapter and head matter, with its maps tracked."""
    wrapped = peft.get_peft_model(network, peft.LoraConfig(**{
        "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 3, "target_modules": TARGETS[family],
        "fan_in_fan_out": family == "gpt2", **settings}), autocast_adapter_dtype=False)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.mul_(1.5)
    return wrapped.to(torch.float64).eval().requires_grad_(False).get_base_model()


def all_maps(network, task):
    """Every map that can be tracked, of base, head and adapter."""
    modules = tracked_modules(
        network, "all,adapter", examine(network, model_of(network, task).source.task))
    assert any(module.kind == "adapter" for module in modules)
    return modules


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_labels_under_an_adapter(family):
    """The copy of the head that was trained is the head; what it stands for doesn't run."""
    network = adapted(network_of_texts(family, 3), family)
    model, modules = model_of(network, "classification"), all_maps(network, "classification")
    heads = {module.name for module in modules if module.kind == "head"}
    copy = "modules_to_save.default"
    assert heads == {
        "bert": {"bert.pooler.dense", f"classifier.{copy}"},
        "roberta": {f"classifier.{copy}.dense", f"classifier.{copy}.out_proj"},
        "distilbert": {f"pre_classifier.{copy}", f"classifier.{copy}"},
        "deberta": {"pooler.dense", f"classifier.{copy}"},
        "modernbert": {"head.dense", f"classifier.{copy}"},
        "llama": {f"score.{copy}"}, "gpt2": {f"score.{copy}"}}[family]
    assert not any("original_module" in module.name for module in modules)

    compare(model, modules, labelled(3), label_log_p(network))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_of_rewards_under_an_adapter(family):
    network = adapted(network_of_texts(family, 1), family)
    model, modules = model_of(network, "reward"), all_maps(network, "reward")

    compare(model, modules, pairs(), reward_log_p(network))


def test_gradients_of_preferences_under_an_adapter():
    network = adapted(policy(), "gpt2", task_type="CAUSAL_LM")
    model, modules = model_of(network, "preference"), all_maps(network, "preference")

    compare(model, modules, pairs(first=2), preference_log_p(network))


def test_a_label_that_is_all_but_certain_keeps_its_half_of_the_gradient():
    """1 − p and p of the other class are one number, 4·10⁻⁸, which float32 can't tell from 1."""
    objective = Classification(WholeTexts())
    batch = Batch.of(np.ones((1, 2), np.int64), np.array([1]), np.ones((1, 2), bool),
                     torch.device("cpu"))
    log_p, gradient = objective.log_p(torch.tensor([[0.0, 17.0]]), batch)
    odds = np.exp(-17.0)
    assert log_p.item() == pytest.approx(-np.log1p(odds), rel=1e-9)
    assert gradient.tolist()[0] == pytest.approx([-odds / (1 + odds), odds / (1 + odds)], rel=1e-6)
