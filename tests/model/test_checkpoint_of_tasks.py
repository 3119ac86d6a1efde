"""Models that a task can't use, told by their files before their weights are read."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from gradindex.errors import InputError
from indexer.build_request import make_request
from support.references import Said
from support.task_models import (
    FAMILIES,
    answers,
    network_of_texts,
    save,
    sentences,
    tokenizer_of_texts,
)

LABELS = ["negative", "positive"]


def saved(folder, network, tokenizer=None, **changes):
    """The folder of a saved model, with some entries of its config.json set, or taken out."""
    save(folder, network, tokenizer or tokenizer_of_texts())
    file = Path(folder) / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items()
                                if value is not None or name == "pad_token_id"}))
    return str(folder)


def plain(name, **changes):
    """A network of another class than a classifier's."""
    kind = getattr(transformers, name)
    family = {"Bert": "bert", "Llam": "llama", "GPT2": "gpt2"}[name[:4]]
    torch.manual_seed(0)
    return kind(kind.config_class(**{**FAMILIES[family][1], **changes}))


def asked(model, task, rows=None, **arguments):
    return make_request(model, rows or sentences(4), "nowhere", task=task, seq_len=16, **arguments)


@pytest.mark.parametrize("task", [None, "classification", "reward"])
@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_other_problems(kind, task, tmp_path):
    """Several labels a text, a number a text: by name, whatever the task is called."""
    outputs = 1 if kind == "regression" else 3
    model = saved(tmp_path, network_of_texts("bert", outputs, torch.float32), problem_type=kind)
    message = {"regression": "gives a text a number", "multi_label_classification":
               "gives a text several labels"}[kind] + f" .problem_type {kind}"
    if kind == "regression" and task == "reward":  # said, as its pairs are what it learned
        assert asked(model, task, answers(4)).plan.task == "reward"
        with pytest.raises(InputError, match="expected a chosen and a rejected answer"):
            asked(model, task)
        return
    with pytest.raises(InputError, match=message):
        asked(model, task)


@pytest.mark.parametrize("name, task, weights", [
    ("BertModel", "classification", r"lack 2 tensors \(classifier\.bias, classifier\.weight\)"),
    ("LlamaModel", "reward", r"lack 1 tensor \(score\.weight\)"),
    ("LlamaForCausalLM", "classification",
     r"lack 1 tensor \(score\.weight\) and drop 1 tensor \(lm_head\.weight\).*"
     "--task causal or preference"),
    ("GPT2LMHeadModel", "reward", r"lack 1 tensor \(score\.weight\).*--task causal or preference"),
    ("BertForMaskedLM", "classification", r"lack 4 tensors \(bert\.pooler"),
    ("BertForTokenClassification", "classification", "no head that gives whole texts a class"),
])
def test_a_model_without_the_head(name, task, weights, tmp_path):
    """It would be filled with random numbers: refused, and what is missing is named."""
    model = saved(tmp_path, plain(name))
    with pytest.raises(InputError, match=weights):
        asked(model, task)


@pytest.mark.parametrize("changes", [
    {"architectures": ["LlamaForSequenceClassification"]}, {"architectures": None}])
def test_a_base_called_a_classifier(changes, tmp_path):
    """config.json may say anything: the weights tell."""
    model = saved(tmp_path, plain("LlamaForCausalLM"), **changes)
    with pytest.raises(InputError, match=r"lack 1 tensor \(score\.weight\)"):
        asked(model, "classification", labels=LABELS)
    if changes["architectures"]:
        with pytest.raises(InputError, match=r"lack 1 tensor \(score\.weight\)"):
            asked(model, None, labels=LABELS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architectures", [["LlamaForSequenceClassification"], None])
@pytest.mark.parametrize("task", ["causal", "preference", None])
def test_a_reward_model_is_no_language_model(task, architectures, tied, tmp_path):
    """With tied embeddings it would run as one: its score's weights would be dropped."""
    network = network_of_texts("llama", 1, torch.float32, tie_word_embeddings=tied)
    model = saved(tmp_path, network, architectures=architectures)
    rows = answers(4)
    if task is None and architectures:
        assert asked(model, None, rows).plan.task == "reward"
        return
    with pytest.raises(InputError, match=r"score\.weight.*classification or reward"):
        asked(model, task, rows)


@pytest.mark.parametrize("family, outputs, task, message", [
    ("llama", 2, "reward", "has 2 outputs .num_labels in its config.json.; a reward model has one"),
    ("gpt2", 1, "classification", "has one output .* A reward model is indexed with --task rew"),
])
def test_another_number_of_outputs(family, outputs, task, message, tmp_path):
    model = saved(tmp_path, network_of_texts(family, outputs, torch.float32))
    with pytest.raises(InputError, match=message):
        asked(model, task)


def without_padding():
    tokenizer = tokenizer_of_texts()
    tokenizer.pad_token = None
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_token_for_padding(family, tmp_path):
    """A decoder finds a text's last token by it: without, the end of a batch's longest."""
    network = network_of_texts(family, 2, torch.float32)
    for number, named in enumerate([None, -1]):
        model = saved(tmp_path / str(number), network, without_padding(), pad_token_id=named)
        with pytest.raises(InputError, match=r"names a token for padding.*Set pad_token_id"):
            asked(model, "classification", labels=LABELS)
        # the tokenizer's does as well
        model = saved(tmp_path / f"with {number}", network, pad_token_id=named)
        assert asked(model, "classification", labels=LABELS).plan.task == "classification"
    model = saved(tmp_path / "outside", network, pad_token_id=40)
    with pytest.raises(InputError, match=r"padding of .* is 40, and it has 40 tokens"):
        asked(model, "classification", labels=LABELS)


def test_tokenizers_without_end_or_separator(tmp_path):
    """It is said before anything is read; where there is such a token nothing is."""
    plainly = tokenizer_of_texts()
    plainly.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    two = [{"sentence1": row["sentence"], "sentence2": row["sentence"], "label": row["label"]}
           for row in sentences(4)]
    ended = tokenizer_of_texts()
    ended.eos_token = "[SEP]"
    for number, (tokenizer, outputs, rows, line) in enumerate([
            (plainly, 2, two, "puts no token between two texts"),
            (plainly, 2, sentences(4), None), (tokenizer_of_texts(), 2, two, None),
            (tokenizer_of_texts(), 1, answers(4), "the tokenizer has no end token"),
            (ended, 1, answers(4), None)]):
        model = saved(tmp_path / str(number), network_of_texts("bert", outputs, torch.float32),
                      tokenizer)
        said = Said()
        asked(model, None, rows, labels=LABELS if outputs == 2 else (), progress=said)
        found = [one for one in said.lines if "the tokenizer" in one]
        assert [line in one for one in found] == [True] * (line is not None), found
