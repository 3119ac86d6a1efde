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
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import gradindex
from gradindex.cli import main_group
from gradindex.errors import IndexMismatchError, InputError
from gradindex.influence.split_batches import Splits
from gradindex.model.adapters import without_adapters
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage import layout
from gradindex.task import Task
from indexer.ask_reference import answer_sums, ask_reference, read_records
from indexer.build_request import make_request
from indexer.dry_run.estimate import estimate
from indexer.read.ingest import Run
from indexer.reference import reference_at_build
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


# ---- which one


def offsets_of(request, folder):
    """The offsets of a request's records, of which a build would fit and encode nothing yet."""
    (folder / layout.SEGMENTS).mkdir(parents=True)
    run = Run(folder, 0, 0, 0, SMALL["segment_size"])
    count = read_records(request.corpus, run, Progress()).sequences
    run = replace(run, count=count)
    model = LanguageModel.load(request.source)
    ask_reference(run, request.reference, request.source, model, request.plan, Progress())
    return [record.offset for record in run.records(list(range(count)))]


def adapted(network, seed=5):
    """A PeftModel whose adapter matters."""
    wrapped = peft.get_peft_model(network, peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
        task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return wrapped.eval()


def test_an_adapters_own_base(models, tmp_path):
    """The policy without its adapter says what the base by itself says; the adapter runs after."""
    base = transformers.AutoModelForCausalLM.from_pretrained(models[0])
    adapted(base).save_pretrained(tmp_path / "adapter")
    policy_folder, said = str(tmp_path / "adapter"), Said()
    own = make_request(policy_folder, bare(), "nowhere", progress=said, **SMALL)
    assert own.plan.reference == {"name": models[0], "revision": None, "own_base": True,
                                  "files": None, "tensors": None}
    assert any("the adapter's own base" in line and models[0] in line for line in said.lines)
    named = make_request(policy_folder, bare(), "nowhere", reference=models[0], **SMALL)
    other = make_request(policy_folder, bare(), "nowhere", reference=models[1], **SMALL)
    found = offsets_of(own, tmp_path / "own")
    assert found == offsets_of(named, tmp_path / "named")
    assert found != offsets_of(other, tmp_path / "other")
    # columns go first, and of another adapter's folder that adapter runs
    told = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in bare()]
    assert make_request(policy_folder, told, "nowhere", **SMALL).plan.reference is None
    adapter = make_request(models[0], bare(), "nowhere", reference=policy_folder, **SMALL)
    assert offsets_of(adapter, tmp_path / "of adapter") != found

    # an object is as it was afterwards
    wrapped = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(models[0]), policy_folder)
    tokens = torch.arange(4, 12)[None]
    before = wrapped(tokens).logits
    of_object = make_request(wrapped, bare(), "nowhere", tokenizer=tokenizer(), **SMALL)
    assert of_object.plan.reference["own_base"]
    assert offsets_of(of_object, tmp_path / "object") == found
    assert torch.equal(wrapped(tokens).logits, before)
    wrapped.merge_adapter()
    with pytest.raises(InputError, match="so the base can't be run alone"), \
            without_adapters(wrapped):
        pass


def test_an_object_is_known_by_its_tensors(models, tmp_path):
    network = other_network()
    request = make_request(models[0], bare(), "nowhere", reference=network, **SMALL)
    assert request.plan.reference["files"] is None and request.plan.reference["tensors"]
    named = make_request(models[0], bare(), "nowhere", reference=models[1], **SMALL)
    assert named.plan.reference["files"] and named.plan.reference["tensors"] is None
    assert offsets_of(request, tmp_path / "one") == offsets_of(named, tmp_path / "other")
    with pytest.raises(InputError, match="was a model object; pass it"):
        reference_at_build(request.plan.reference, None, request.source, "float32")
    # the folder that holds the same tensors is it, and others aren't
    found = reference_at_build(request.plan.reference, models[1], request.source, "float32")
    assert found.source.name == models[1]
    with pytest.raises(IndexMismatchError, match="not the one that the index was built with"):
        reference_at_build(request.plan.reference, other_network(4), request.source, "float32")


def told(**changes):
    rows = [dict(row) for row in bare(4)]
    for row in rows[changes.pop("first", 0):]:
        row |= changes
    return rows


@pytest.mark.parametrize("rows, arguments, message", [
    (told(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0), {},
     r"\(ref_chosen_logps and ref_rejected_logps\), and the reference .* \(--reference"),
    (bare(4), {"task": "causal"}, "--reference is the model that a policy .* the task is causal"),
    (bare(4), {"task": None}, "--reference is the model that a policy .* the task is causal"),
    (bare(4), {"reference": "/nowhere/at/all"}, "--reference: the model /nowhere/at/all can't be"),
    (bare(4), {"reference": 3}, "--reference: the model is a int"),
    ([{"text": "good"}], {}, "expected a chosen and a rejected answer"),
    (bare(4), {"reference": None}, "Name the model to ask for them with --reference MODEL"),
])
def test_what_is_refused(rows, arguments, message, models):
    with pytest.raises(InputError, match=message):
        make_request(models[0], rows, "nowhere",
                     **{"reference": models[1], **SMALL, **arguments})


def test_a_later_row_with_columns_is_refused(models):
    rows = told(first=2, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0)
    request = make_request(models[0], rows, "nowhere", reference=models[1], **SMALL)
    with pytest.raises(InputError, match=r":3: the data say what a reference gives"):
        list(request.corpus.sequences())


def test_files_of_which_some_have_columns(models, tmp_path):
    """Without --reference an adapter's base would be asked of some and not of others."""
    adapted(transformers.AutoModelForCausalLM.from_pretrained(models[0])).save_pretrained(
        tmp_path / "adapter")
    files = [written(tmp_path / "one.jsonl", bare(3)), written(tmp_path / "two.jsonl", told(
        ref_chosen_logps=-1.0, ref_rejected_logps=-2.0))]
    with pytest.raises(InputError, match=r"two\.jsonl says what .* \S*one\.jsonl doesn't"):
        make_request(str(tmp_path / "adapter"), files, "nowhere", **SMALL)


@pytest.mark.parametrize("changes, words, message", [
    ({"n_positions": 8}, None, "reads 8 tokens at most, and sequences have up to 12"),
    ({}, ("good", "bad"), "token 4 is 'bad' there and 'good' here"),
])
def test_a_reference_that_reads_other_texts(changes, words, message, models, tmp_path):
    read = tokenizer()
    if words:
        content = json.loads(read.backend_tokenizer.to_str())
        vocabulary = content["model"]["vocab"]
        one, other = words
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        read = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)), pad_token="[PAD]")
    folder = save(tmp_path / "other", other_network(**changes), read)
    with pytest.raises(InputError, match=message):
        make_request(models[0], bare(), "nowhere", reference=folder, **SMALL)


def test_tokens_that_the_reference_lacks(models, tmp_path):
    """A policy may have more tokens; rows that hold one can't be compared, and are counted."""
    words = tokenizer()
    words.add_tokens([f"<{number}>" for number in range(12)])  # 30 to 41
    wider = save(tmp_path / "wider", other_network(vocab_size=42), words)
    rows = bare(4)
    rows[1]["chosen"] += " <2>"
    rows[2]["chosen"] += " <11>"
    request = make_request(wider, rows, "nowhere", reference=models[1], **SMALL)
    assert [one.parts[0].row for one in request.corpus.sequences()] == [1, 2, 4]
    assert request.corpus.facts.skipped == {"token id outside the vocabulary": 1}


def test_no_finite_answer(models, tmp_path):
    broken = other_network()
    broken.transformer.wte.weight[5] = float("inf")
    request = make_request(models[0], bare(), "nowhere", reference=broken, **SMALL)
    with pytest.raises(InputError, match=r":\d+: the reference .* no finite log p"):
        offsets_of(request, tmp_path / "index")


def test_the_policy_itself_is_worth_a_word(models):
    said = Said()
    make_request(models[0], bare(), "nowhere", reference=models[0], progress=said, **SMALL)
    assert any("the policy's own weights" in line for line in said.lines)


@pytest.mark.parametrize("own", [False, True])
def test_a_dry_run_prices_it(own, models, tmp_path):
    """Its passes are a stage, its weights a part of memory; of an adapter's base they are there."""
    one, other = models
    if own:
        adapted(transformers.AutoModelForCausalLM.from_pretrained(one)).save_pretrained(
            tmp_path / "adapter")
        one, other = str(tmp_path / "adapter"), None
    priced = estimate(one, bare(), tmp_path / "index", reference=other, **SMALL)
    stages = list(priced.stages)
    assert stages.index("read") + 1 == stages.index("reference") == stages.index("covariance") - 1
    seconds, count = priced.stages["reference"]
    assert seconds > 0 and count == 20
    weights = LanguageModel.load(ModelSource(models[1], device="cpu")).bytes
    assert priced.memory_parts.get("reference") == (None if own else weights)
    assert not (tmp_path / "index").exists()
    plain = estimate(models[0], told(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0),
                     tmp_path / "index", **SMALL)
    assert "reference" not in plain.stages


# ---- afterwards


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


def test_an_index_that_asked_none(models, tmp_path):
    plan = make_request(models[0], told(ref_chosen_logps=-1.0, ref_rejected_logps=-2.0), "nowhere",
                        **SMALL)
    with pytest.raises(InputError, match="its data said what a reference gives"):
        reference_at_build(plan.plan.reference, models[1], plan.source, "float32")


def test_the_command_line(models, tmp_path):
    data = written(tmp_path / "bare.jsonl", bare())
    shown = CliRunner().invoke(main_group, [
        "build", models[0], str(data), "-o", str(tmp_path / "index"), "--task", "preference",
        "--reference", models[1], "--bits", "512", "--seq-len", "12", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "reference " in shown.stdout and f"reference: loading {models[1]}" in shown.stderr
