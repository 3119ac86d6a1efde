"""A reference that a build asks what it gives the answers of preference pairs."""

import json
import shutil
import tempfile
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import gradindex
from gradindex.errors import IndexMismatchError, InputError
from gradindex.influence.split_batches import Splits
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage import layout
from gradindex.task import Task
from indexer.ask_reference import answer_sums, ask_reference, read_records
from indexer.build_request import make_request
from indexer.read.ingest import Run
from support.indexes import files_of
from support.kills import each_kill
from support.needed import library
from support.task_models import FAMILIES, answers, policy, save, tokenizer_of_texts

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SMALL = {"bits": 512, "fit_sequences": 24, "batch_tokens": 64, "segment_size": 4, "seq_len": 12,
         "task": "preference", "beta": 0.2}


def tokenizer():
    """One that puts no token around a text, as most of causal models."""
    made = tokenizer_of_texts()
    made.eos_token = "[SEP]"
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return made


def other_network(seed=3, dtype=torch.float32, **changes):
    """A causal language model with other random weights than `policy`."""
    torch.manual_seed(seed)
    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**FAMILIES["gpt2"][1], **changes}))
    return network.to(dtype).eval().requires_grad_(False)


def bare(count=20):
    """Pairs without what a reference says of them; two are longer than a sequence."""
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")}
            for row in answers(count)]
    for row in rows[3:5]:
        row["chosen"] += " the plot of the film was not very good"
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of a policy and of its reference."""
    folder = tmp_path_factory.mktemp("models")
    return (save(folder / "policy", policy(torch.float32), tokenizer()),
            save(folder / "reference", other_network(), tokenizer()))


def sums_by_hand(network, prompt, answer, length=SMALL["seq_len"]):
    """Σ log p of an answer's tokens, one softmax after the other."""
    read = tokenizer()
    asked = read(prompt)["input_ids"]
    tokens = (asked + read(f"{answer}[SEP]")["input_ids"])[:length]
    logits = network(torch.tensor([tokens])).logits[0].double()
    return sum(float(logits[at - 1].log_softmax(-1)[tokens[at]])
               for at in range(len(asked), len(tokens)))


def offsets(index):
    return [record.offset for record in index.snapshot.records(range(len(index)))]


def test_sums_are_those_of_plain_passes():
    """Batches of many pairs, padded, in float64; what is behind the sequence length is cut off."""
    network = other_network(dtype=torch.float64)
    model = LanguageModel(network, None, ModelSource(network, task=Task("preference")))
    request = make_request(policy(), bare(), "nowhere", tokenizer=tokenizer(), reference=network,
                           **SMALL)
    records = list(request.corpus.sequences())
    assert {record.offset for record in records} == {0.0} and len(records) == 20
    found = {}
    for rows, sums in answer_sums(model, records, 100, Splits()):
        assert sums.dtype == np.float64 and len(rows) > 1
        found |= dict(zip(rows, sums.tolist(), strict=True))
    for number, row in enumerate(bare()):
        expected = [sums_by_hand(network, row["prompt"], row[side])
                    for side in ("chosen", "rejected")]
        assert found[number] == pytest.approx(expected, rel=1e-12)
    assert max(len(record.tokens) for record in records) > SMALL["seq_len"]


@pytest.fixture(scope="module")
def data():
    return bare()


@pytest.fixture(scope="module")
def asked(models, data, tmp_path_factory):
    """An index whose build asked the reference."""
    out = tmp_path_factory.mktemp("asked") / "index"
    return gradindex.build(models[0], data, out, reference=models[1], **SMALL)


def test_an_index_is_the_one_that_columns_give(models, data, asked, tmp_path):
    """The same bytes of records and codes, curvature and scores."""
    one, other = models
    reference = LanguageModel.load(ModelSource(other, device="cpu", task=Task("preference")))
    request = make_request(one, data, "nowhere", reference=other, **SMALL)
    records, rows = list(request.corpus.sequences()), bare()
    # in the segments and batches of the build
    for first in range(0, 20, 4):
        for numbers, sums in answer_sums(reference, records[first : first + 4], 64, Splits()):
            for number, (chosen, rejected) in zip(numbers, sums.tolist(), strict=True):
                rows[first + number] |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    told = gradindex.build(one, rows, tmp_path / "told", **SMALL)
    found, expected = files_of(asked.snapshot.contents.root), files_of(tmp_path / "told")
    assert set(found) == set(expected)
    assert {name for name in found if found[name] != expected[name]} == {layout.MANIFEST}
    assert told.manifest.plan.reference is None
    assert asked.manifest.plan.reference["name"] == other
    assert len(set(offsets(asked))) == 20 and 0.0 not in offsets(asked)


class Said(Progress):
    """What was said, in a list."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_it_makes_way_and_comes_again(models, data, asked, tmp_path):
    """Where memory doesn't hold both, the policy goes while the reference is asked."""
    said = Said()
    index = gradindex.build(models[0], data, tmp_path / "index", reference=models[1],
                            max_memory="900MB", progress=said, **SMALL)
    order = [line.partition(" ")[2].partition(" as ")[0] for line in said.lines
             if ": loading" in line]
    assert order == [f"loading {models[0]}", f"loading {models[1]}", f"loading {models[0]} again"]
    assert f"reference: {models[1]}" in said.lines
    assert any(line.startswith("reference: 20 sequences") for line in said.lines)
    assert offsets(index) == offsets(asked)
    assert not (tmp_path / "index" / layout.REFERENCE_PARTIAL).exists()


def test_it_survives_kills(models, data, tmp_path, monkeypatch):
    """At any sync of a file; what was asked isn't asked again, and the bytes are the same."""
    request = make_request(models[0], data, "nowhere", reference=models[1], limit=8, **SMALL)

    def ask(folder):
        run = Run(folder, 0, 0, 0, SMALL["segment_size"])
        if not (folder / "read").exists():
            read_records(request.corpus, run, Progress())
            (folder / "read").touch()
        ask_reference(replace(run, count=8), request.reference, request.source, None, request.plan,
                      Progress())
        (folder / "read").unlink()

    def fresh(which):
        folder = tmp_path / f"killed {which}"
        (folder / layout.SEGMENTS).mkdir(parents=True)
        return folder

    ask(whole := fresh("never"))
    expected, struck = files_of(whole), 0
    assert len(expected) == 4
    for which, folder in each_kill(monkeypatch, fresh, ask, every=2):
        struck += (folder / "read").exists()
        ask(folder)
        assert files_of(folder) == expected, which
        shutil.rmtree(folder)
    assert struck > 3


def test_a_build_that_was_killed_while_it_asked(models, data, asked, tmp_path, monkeypatch):
    out = tmp_path / "index"

    def run(_):
        gradindex.build(models[0], data, out, reference=models[1], **SMALL)

    for which, _ in each_kill(monkeypatch, lambda which: out, run, every=30):
        if which == 30:
            assert (out / layout.REFERENCE_PARTIAL).is_dir()
            break
    monkeypatch.undo()
    run(out)
    assert files_of(out) == files_of(asked.snapshot.contents.root)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of its own arguments
def test_sums_are_trls():
    """DPOTrainer's own, as it adds them to its data."""
    trl = library("trl")
    datasets = library("datasets")
    one, other, rows = policy(torch.float32), other_network(), bare()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            one.requires_grad_(True), other, trl.DPOConfig(
                folder, precompute_ref_log_probs=True, max_length=SMALL["seq_len"], use_cpu=True,
                per_device_train_batch_size=4, report_to=[]),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer())
        trainer.get_train_dataloader()
        theirs = trainer.train_dataset
    model = LanguageModel(other, None, ModelSource(other, task=Task("preference")))
    request = make_request(policy(), rows, "nowhere", tokenizer=tokenizer(), reference=other,
                           **SMALL)
    for numbers, sums in answer_sums(model, list(request.corpus.sequences()), 100, Splits()):
        np.testing.assert_allclose(sums, [
            (theirs[number]["ref_chosen_logps"], theirs[number]["ref_rejected_logps"])
            for number in numbers], rtol=1e-5)
