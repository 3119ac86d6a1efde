"""What surrounds a build and a search, with tasks beyond the next token: shards, damage, …"""

import io
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import gradindex
from gradindex.errors import DamagedIndexError, InputError
from gradindex.progress import Progress
from gradindex.storage import layout, records
from gradindex.storage.contents import _mismatch
from gradindex.storage.row_file import digest_of
from indexer.dry_run.estimate import estimate
from search.study.describe import describe, summary
from support.indexes import files_of
from support.kills import each_kill
from support.task_models import (
    NAMES,
    SMALL,
    answers,
    network_of_texts,
    policy,
    save,
    sentences,
    tokenizer_of_texts,
    written,
)
from support.waiting import HANG

TASKS = ("classification", "reward", "preference")
QUESTIONS = {
    "classification": {"text": "a great plot", "label": "positive"},
    "reward": {"prompt": "why was it", "chosen": " great", "rejected": " so bad"},
    "preference": {"prompt": "why was it", "chosen": " great", "rejected": " so bad"}}
SWAPPED = {"chosen": "rejected", "rejected": "chosen", "ref_chosen_logps": "ref_rejected_logps",
           "ref_rejected_logps": "ref_chosen_logps"}


def rows_of(task, count=24):
    if task == "classification":
        return sentences(count)
    return [{**row, "margin": 0.0} for row in answers(count)]


def other_way(row):
    """The same row with the other label, or the other answer preferred."""
    if "label" in row:
        return {**row, "label": {"negative": "positive"}.get(row["label"], "negative")}
    return {SWAPPED.get(name, name): value for name, value in row.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, ended = tmp_path_factory.mktemp("models"), tokenizer_of_texts()
    ended.eos_token = "[SEP]"
    return {
        "classification": save(folder / "c", network_of_texts("bert", 2, torch.float32, **NAMES),
                               tokenizer_of_texts()),
        "reward": save(folder / "r", network_of_texts("bert", 1, torch.float32),
                       tokenizer_of_texts()),
        "preference": save(folder / "p", policy(torch.float32), ended)}


@pytest.fixture(scope="module")
def built(models, tmp_path_factory):
    """An index of each task, and the file of its data."""
    folder = tmp_path_factory.mktemp("built")
    data = {task: written(folder / f"{task}.jsonl", rows_of(task)) for task in TASKS}
    for task in TASKS:
        gradindex.build(models[task], data[task], folder / task, task=task, **SMALL)
    return {task: (folder / task, data[task]) for task in TASKS}


@pytest.mark.parametrize("task", [
    "reward", pytest.param("classification", marks=pytest.mark.slow)])
def test_shards_give_the_bytes_of_one_process(task, models, built, tmp_path):
    index, data = built[task]

    flags = [str(word) for name, value in SMALL.items()
             for word in (f"--{name.replace('_', '-')}", value)]
    # a process: two threads that load models at once leave transformers without its ties
    other = subprocess.Popen(
        [sys.executable, "-m", "gradindex", "build", models[task], data, "-o", tmp_path / "index",
         "--task", task, *flags, "--shard", "1/2"], stderr=subprocess.DEVNULL)
    assert gradindex.build(models[task], data, tmp_path / "index", task=task, **SMALL,
                           shard="0/2", wait=HANG) is None
    assert other.wait(HANG) == 0
    gradindex.merge(tmp_path / "index")
    assert files_of(tmp_path / "index") == files_of(index)


@pytest.mark.parametrize("task", [
    "preference", pytest.param("classification", marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_to_the_same_bytes(task, models, built, tmp_path, monkeypatch):
    index, data = built[task]

    def build(out):
        gradindex.build(models[task], data, out, task=task, **SMALL)

    kills = 0
    for _, out in each_kill(monkeypatch, lambda which: tmp_path / str(which), build, every=25):
        build(out)
        assert files_of(out) == files_of(index)
        shutil.rmtree(out)
        kills += 1
    assert kills >= 2


@pytest.mark.parametrize("task", TASKS)
def test_appended_rows_have_the_influence_of_their_own_label(task, built, tmp_path):
    """∇log p of the other outcome is −p / (1 − p) times that of this one, p being this one's."""
    index = shutil.copytree(built[task][0], tmp_path / "index")
    row, before = rows_of(task)[1], gradindex.open(index)
    old = {hit.id: hit for hit in before.search(**QUESTIONS[task], k=24)}
    searcher = gradindex.append(index, written(tmp_path / "more.jsonl", [row, other_way(row)]))
    scored = {hit.id: hit for hit in searcher.rescore(**QUESTIONS[task], ids=range(26))}
    for number, hit in old.items():
        assert scored[number].influence == pytest.approx(hit.influence, rel=1e-4, abs=1e-4)
    same, other = scored[24], scored[25]
    p = math.exp(same.log_p)
    assert same.influence == pytest.approx(scored[1].influence, rel=1e-4)
    assert math.exp(other.log_p) == pytest.approx(1 - p, rel=1e-4)
    assert other.influence == pytest.approx(-same.influence * p / (1 - p), rel=1e-3)
    # equal tokens are one sequence only where the label, or the order of the pair, is the same
    first = searcher.snapshot.contents.first_equal
    assert first[24] == 1 and first[25] == 25
    gradindex.delete(index, [1, 24])
    gradindex.compact(index)
    found = gradindex.open(index)
    assert not {1, 24} & {hit.id for hit in found.search(**QUESTIONS[task], k=24)}
    [again] = found.rescore(**QUESTIONS[task], ids=[25])
    assert again.influence == pytest.approx(other.influence, rel=1e-4)
    verified = gradindex.verify(index)
    assert verified.sound and verified.records == 24


def test_an_append_takes_rows_of_one_class_and_the_builds_names_alone(built, tmp_path):
    index = shutil.copytree(built["classification"][0], tmp_path / "index")
    good = [row for row in sentences(8, seed=7) if row["label"] == "positive"]
    rows = written(tmp_path / "good.jsonl", [*good, {"sentence": "so", "label": "neutral"}])
    searcher = gradindex.append(index, rows)
    assert len(searcher) == 28
    assert searcher.manifest.skipped == {"a label outside the model's classes": 1}
    assert re.search(r"\ndata +28 documents from \S*classification.jsonl, \S*good.jsonl\n",
                     summary(describe(index)))
    with pytest.raises(InputError, match="expected a text and its label"):
        gradindex.append(index, written(tmp_path / "pairs.jsonl", answers(4)))
    # read as places, these would be the wrong classes; the build would refuse them, too
    counted = [{"sentence": row["sentence"], "label": 1 + (row["label"] == "positive")}
               for row in sentences(8, seed=9)]
    with pytest.raises(InputError, match="is read as a place among them, from 0 on, as at the bu"):
        gradindex.append(index, written(tmp_path / "counted.jsonl", counted))
    assert len(gradindex.open(index)) == 28


# ---- damage


@pytest.mark.parametrize("task, old, new", [
    ("classification", b'"label":1', b'"label":0'), ("reward", b'"border":', b'"bordes":'),
    ("preference", b'"offset":1.0', b'"offset":9.0')])
def test_a_changed_byte_of_what_a_task_has_is_noticed(task, old, new, built, tmp_path):
    index = shutil.copytree(built[task][0], tmp_path / "index")
    path = next(path for path in sorted(index.rglob("records.lmdb")) if old in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(DamagedIndexError, match=r"records\.lmdb"):
        gradindex.open(index).search(**QUESTIONS[task], k=24)
    verified = gradindex.verify(index)
    assert not verified.sound and "records.lmdb" in str(verified.to_dict()["findings"])


@pytest.mark.parametrize("facts", [
    {"label": -1}, {"label": True}, {"label": 1.0}, {"label": "positive"}, {"border": 0},
    {"border": 10**6}, {"border": -1}, {"border": 1.5}, {"offset": math.inf}, {"offset": "1"},
    {"offset": math.nan}, {"ending": 3},
])
def test_records_that_no_writer_wrote(facts, built, tmp_path):
    """A stranger's file may have right digests and sums."""
    [record] = gradindex.open(built["classification"][0]).snapshot.records([0])

    class Strange(records.Record):
        def task_facts(self):
            return facts

    path = tmp_path / "records.lmdb"
    records.write(path, [Strange(**vars(record))])
    with pytest.raises(DamagedIndexError, match="record 0 is not a sequence's"):
        records.read(path, [0])


@pytest.mark.parametrize("task", TASKS)
def test_records_of_another_task_are_told(task, built):
    snapshot = gradindex.open(built[task][0]).snapshot
    [record], row = snapshot.records([0]), snapshot.contents.rows[0].copy()
    one = replace(record, tokens=record.tokens[:5], scored=record.scored[:5], border=None)
    strange = [replace(record, label=2), replace(one, label=None)]
    if task == "classification":
        strange.append(replace(record, label=None))
    for found in strange:
        row["digest"] = digest_of(found)
        assert "is no row of the task" in _mismatch(found, row, snapshot.manifest)
    row["digest"] = digest_of(record)
    assert _mismatch(record, row, snapshot.manifest) is None


# ---- what a build will take, and may


@pytest.mark.parametrize("task", ["classification", "reward"])
def test_a_dry_run_knows_what_a_row_is(task, models, built, tmp_path):
    index, data = built[task]
    said = io.StringIO()
    found = estimate(models[task], data, tmp_path / "none", task=task, **SMALL,
                     progress=Progress(said))
    manifest = gradindex.open(index).manifest
    assert (found.documents, found.sequences, found.tokens) == (24, 24, manifest.tokens)
    assert not (tmp_path / "none").exists()
    on_disk = {name: sum(path.stat().st_size for path in index.rglob(file))
               for name, file in (("records", layout.RECORDS.name), ("codes", "codes*"))}
    assert found.disk["records"] == on_disk["records"]
    if task == "classification":
        rows = written(tmp_path / "one.jsonl", [row for row in sentences(24)
                                                if row["label"] == "positive"])
        with pytest.raises(InputError, match="are of one class, positive"):
            estimate(models[task], rows, tmp_path / "none", **SMALL)


@pytest.mark.parametrize("task", ["classification", "reward"])
def test_memory_that_is_bounded_changes_no_score(task, models, built, tmp_path):
    """Modules are fitted in parts, and gradients of queries formed in parts."""
    index, data = built[task]
    bounded = gradindex.build(models[task], data, tmp_path / "index", task=task, **SMALL,
                              max_memory="2GB")
    found, expected = (one.search(**QUESTIONS[task], k=24)
                       for one in (bounded, gradindex.open(index)))
    assert {hit.id: pytest.approx(hit.influence, rel=1e-3, abs=1e-3) for hit in found} == {
        hit.id: hit.influence for hit in expected}


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16(task, models, built, tmp_path):
    """Scores of a build in bfloat16 go with those in float32, and are its own on every reading."""
    low = gradindex.build(models[task], built[task][1], tmp_path / "index", task=task, **SMALL,
                          dtype="bfloat16")
    found, expected = ({hit.id: hit.influence for hit in one.search(**QUESTIONS[task], k=24)}
                       for one in (low, gradindex.open(built[task][0])))
    pairs = torch.tensor([[found[number], expected[number]] for number in range(24)]).T
    assert torch.corrcoef(pairs)[0, 1] > 0.9
    assert gradindex.verify(tmp_path / "index").sound
