"""What a reference gives the answers of pairs, in a build and an append, whatever kills it."""

import shutil
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
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
from support.references import (
    SMALL,
    Said,
    bare,
    offsets,
    other_network,
    save_both,
    sums_by_hand,
    tokenizer,
    told,
    written,
)
from support.task_models import policy, save

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_both(tmp_path_factory.mktemp("models"))


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


def test_an_append_asks_the_same(models, asked, tmp_path):
    """Where it is now, if its bytes are the same; rows with columns of their own are refused."""
    out = tmp_path / "index"
    shutil.copytree(asked.snapshot.contents.root, out)
    more = bare(24)[20:]
    shutil.move(models[1], moved := str(tmp_path / "moved"))
    try:
        with pytest.raises(InputError, match=r"At the build it was .* with --reference PATH"):
            gradindex.append(out, more)
        with pytest.raises(IndexMismatchError, match="not the one that the index"):
            gradindex.append(out, more, reference=models[0])
        with pytest.raises(InputError, match="of an append, that of its build"):
            gradindex.append(out, told(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0),
                             reference=moved)
        index = gradindex.append(out, more, reference=moved)
    finally:
        shutil.move(moved, models[1])
    found = offsets(index)
    assert len(found) == 24 and found[:20] == offsets(asked)
    network = LanguageModel.load(ModelSource(models[1], device="cpu")).network
    for row, offset in zip(more, found[20:], strict=True):
        one, other = (sums_by_hand(network, row["prompt"], row[side])
                      for side in ("chosen", "rejected"))
        assert offset == pytest.approx(one - other, rel=1e-5)
    assert not (out / layout.REFERENCE_PARTIAL).exists()
    assert gradindex.verify(out).sound


def test_an_append_that_was_killed_while_it_asked(models, asked, tmp_path, monkeypatch):
    """The same command goes on; discarded, nothing is left."""
    more, out = bare(24)[20:], tmp_path / "index"
    shutil.copytree(asked.snapshot.contents.root, out)
    before = files_of(out)

    def run(_):
        gradindex.append(out, more)

    struck = 0
    for _, _ in each_kill(monkeypatch, lambda which: out, run, every=4):
        struck += (out / layout.REFERENCE_PARTIAL).is_dir()
        if struck == 2:
            break
    assert struck == 2
    monkeypatch.undo()
    gradindex.append(out, discard=True)
    assert {name: content for name, content in files_of(out).items()
            if name not in ("writer.json",)} == before
    run(out)
    whole = tmp_path / "whole"
    shutil.copytree(asked.snapshot.contents.root, whole)
    gradindex.append(whole, more)
    assert files_of(out) == files_of(whole)


def test_the_command_line(models, tmp_path):
    data = written(tmp_path / "bare.jsonl", bare())
    shown = CliRunner().invoke(main_group, [
        "build", models[0], str(data), "-o", str(tmp_path / "index"), "--task", "preference",
        "--reference", models[1], "--bits", "512", "--seq-len", "12", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "reference " in shown.stdout and f"reference: loading {models[1]}" in shown.stderr


def test_an_append_whose_reference_fails_leaves_nothing(models, tmp_path):
    """A row of which the reference says no number, the second of two."""
    network = other_network(tie_word_embeddings=False)
    read = tokenizer()
    network.transformer.wte.weight[read.convert_tokens_to_ids("never")] = float("nan")
    reference = save(tmp_path / "reference", network, read)
    out, before = tmp_path / "index", bare(6)
    gradindex.build(models[0], before[:4], out, reference=reference, **SMALL)
    files = files_of(out)
    with pytest.raises(InputError, match=r"the data given:2: the reference .* gives its answers no "
                       r"finite log p in float32\. Take the row out, .* a new build may"):
        gradindex.append(out, [before[4], {**before[5], "chosen": " never good"}])
    assert {name: content for name, content in files_of(out).items()
            if name != "writer.json"} == files
