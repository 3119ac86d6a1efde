"""Append, delete and compact: what an index answers before and after, and after a kill anywhere."""

import gc
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import gradindex
from demo.prepare import train_tokenizer
from gradindex.cli import main_group
from gradindex.draws import Stream, uniforms
from gradindex.errors import GradindexError, IndexMismatchError, InputError
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage import layout, manifest, records, token_file
from gradindex.storage.layout import APPEND
from gradindex.storage.locks import NOTE, only_writer
from indexer import build as build_module
from indexer.read import ingest
from indexer.upkeep import append as append_module
from indexer.upkeep import commit as commit_module
from indexer.upkeep.delete import Deleted, give_up
from search.ask.controls import Controls
from search.ask.settings import settle
from search.study.evaluate import evaluate
from support.documents import save, small_documents, tiny_tokens
from support.indexes import QUESTION, SMALL, TINY, add, answer, files_of, unlisted
from support.kills import KilledError, each_kill
from support.models import random_network, tiny_network
from support.reference import plain_score, sequence_gradient

MARK = "Zanzibar"
NEW = [
    {"text": "The quince number 77 grows by the gate. The quince number 78 grows by the gate.",
     "url": "new/0", "place": "gate"},
    {"text": small_documents()[9]["text"], "url": "new/1", "place": "river"},
    {"text": "A late plum falls by the river.", "url": "new/2", "place": "river"},
]

# ---- a small index of tokens, for what is repeated often

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An index of eight sequences in two segments; tests copy it."""
    folder = tmp_path_factory.mktemp("tiny")
    gradindex.build(tiny_network(), save(folder / "old.npy", tiny_tokens(0)), folder / "index",
                    **TINY)
    return folder / "index"


@pytest.fixture
def more(tmp_path):
    return save(tmp_path / "more.npy", tiny_tokens(1, 6))


# ---- the index of text


@pytest.fixture(scope="module")
def place(model_folder):
    """The model of index_folder, loaded once, as arguments."""
    from gradindex.model.source import ModelSource

    source = ModelSource(str(model_folder), device="cpu")
    return {"model": LanguageModel.load(source).network, "tokenizer": source.load_tokenizer()}


@pytest.fixture
def index(index_folder, tmp_path):
    return shutil.copytree(index_folder, tmp_path / "index")


def influences(searcher, question=QUESTION):
    """Exact influence of every sequence by id, without folding equal ones."""
    ids = searcher.index.contents.ids.tolist()
    return {hit.id: hit.influence for hit in searcher.rescore(**question, ids=ids)}


def records_in(searcher):
    contents = searcher.index.contents
    return contents.records(contents.places)


# ---- append


def test_appending_adds_segments_and_leaves_every_other_byte(index, place):
    before, old = files_of(index), manifest.load(index)
    searcher = gradindex.append(index, NEW[:2], **place)
    after, new = files_of(index), manifest.load(index)
    assert {name: after.get(name) for name in before if name != layout.MANIFEST} == {
        name: content for name, content in before.items() if name != layout.MANIFEST}
    assert unlisted(index) == set()
    assert [one.name for one in new.segments] == [*(one.name for one in old.segments), "000004"]
    assert new.generation == 2 and new.next_segment == 5
    stored = records_in(searcher)
    assert [record.id for record in stored] == list(range(new.next_id))
    added = stored[old.next_id:]
    assert len(added) == new.segments[-1].rows == new.sequences - old.sequences
    about = [(part.document, part.source, part.row, part.user_id, part.fields)
             for record in added for part in record.parts]
    assert set(map(str, about)) == set(map(str, [
        (40, "the data given", 1, "new/0", {"place": "gate"}),
        (41, "the data given", 2, "new/1", {"place": "river"})]))
    spelt = {n: "".join(NEW[n - 40]["text"][part.start:part.end] for record in added
                        for part in record.parts if part.document == n) for n in (40, 41)}
    assert [spelt[n].replace(" ", "") for n in (40, 41)] == [
        one["text"].replace(" ", "") for one in NEW[:2]]
    assert new.documents == 42 and new.tokens == old.tokens + sum(len(one.tokens) for one in added)
    assert new.scored_tokens == old.scored_tokens + sum(len(one.tokens) - 1 for one in added)
    assert new.appended == [{
        "data": [{"name": "the data given", "size": 2, "sha256": hashlib.sha256("".join(
            json.dumps(one) + "\n" for one in NEW[:2]).encode()).hexdigest()}],
        "first": old.next_id,
        "sequences": len(added),
        "drift": new.appended[0]["drift"], "drift_error": new.appended[0]["drift_error"]}]
    searcher = gradindex.append(index, NEW[2:], **place)
    last = records_in(searcher)[-1]
    assert (last.id, last.parts[0].document, last.parts[0].row) == (new.next_id, 42, 1)
    assert [one["first"] for one in manifest.load(index).appended] == [old.next_id, new.next_id]


def test_an_appended_sequence_scores_as_if_it_had_been_there_from_the_start(
    index, index_folder, model_folder, place, tmp_path, monkeypatch
):
    """Given the same curvature: its influence, its code, its norm; and it is found by both."""
    real = build_module.fit

    def fit(model, modules, read, settings, out, *others):
        shutil.copytree(index_folder / "curvature", out / "curvature")
        return real(model, modules, read, settings, out, *others)

    monkeypatch.setattr(build_module, "fit", fit)
    whole = gradindex.build(place["model"], [*small_documents(), *NEW], tmp_path / "whole",
                            tokenizer=place["tokenizer"], **SMALL)
    grown = gradindex.append(index, NEW, **place)
    expected, found = influences(whole), influences(grown)
    assert found.keys() == expected.keys()
    scale = max(map(abs, expected.values()))
    np.testing.assert_allclose([found[one] for one in found], [expected[one] for one in found],
                               atol=1e-5 * scale, rtol=1e-5)
    last = manifest.load(index_folder).next_id
    assert min(abs(found[one]) for one in found if one >= last) > 1e-3 * scale  # not all zero
    np.testing.assert_allclose(grown.index.norms, whole.index.norms, rtol=1e-5)
    same = np.unpackbits(grown.index.contents.codes_of(grown.index.contents.places)[:, :-8] ^
                         whole.index.contents.codes_of(whole.index.contents.places)[:, :-8])
    assert same.mean() < 1e-3
    assert grown.manifest.duplicates == whole.manifest.duplicates
    copy = whole.search(**QUESTION, k=5), grown.search(**QUESTION, k=5)
    assert [hit.id for hit in copy[0]] == [hit.id for hit in copy[1]]
    assert [hit.duplicates for hit in copy[0]] == [hit.duplicates for hit in copy[1]]


def test_an_append_killed_anywhere_ends_with_the_same_bytes(tiny, more, tmp_path, monkeypatch):
    """And where the kill came after the commit, the same command doesn't append again."""
    whole = shutil.copytree(tiny, tmp_path / "whole")
    add(whole, more)
    expected, before = files_of(whole), manifest.load(tiny).sequences
    assert manifest.load(whole).sequences == before + 6
    states = set()
    for which, folder in each_kill(
            monkeypatch, lambda n: shutil.copytree(tiny, tmp_path / f"killed-{n}"),
            lambda folder: add(folder, more)):
        states.add(manifest.load(folder).sequences)
        assert gradindex.verify(folder, no_model=True).sound
        (folder / NOTE).write_text('{"pid": 1}')  # as a real kill leaves it
        add(folder, more)
        assert files_of(folder) == expected, f"killed at sync {which}"
    assert which > 25 and states == {before, before + 6}


def test_an_append_killed_right_after_its_commit_is_finished(tiny, more, tmp_path, monkeypatch):
    """Whatever is done to the index before the command is run again."""
    index = shutil.copytree(tiny, tmp_path / "index")
    real = commit_module.commit_manifest

    def killed(*arguments):
        real(*arguments)
        raise KilledError

    monkeypatch.setattr(commit_module, "commit_manifest", killed)
    with pytest.raises(KilledError):
        add(index, more)
    monkeypatch.undo()
    assert (index / APPEND).is_file()
    gradindex.delete(index, [3])
    said = io.StringIO()
    searcher = add(index, more, discard=True, progress=Progress(said))
    assert len(searcher) == 8 + 6 - 1
    assert "appended already" in said.getvalue()
    assert unlisted(index) == set()
    assert len(add(index, more)) == 8 + 6 - 1 + 6  # asked for once more, it appends once more


def test_other_data_than_the_unfinished_appends_is_refused(tiny, more, tmp_path, monkeypatch):
    index = shutil.copytree(tiny, tmp_path / "index")
    before = files_of(index)
    monkeypatch.setattr(append_module, "measure_drift", _kill)
    with pytest.raises(KilledError):
        add(index, more)
    monkeypatch.undo()
    unfinished = files_of(index)
    other = save(tmp_path / "other.npy", tiny_tokens(2, 3))
    edited = save(tmp_path / "edited" / more.name, tiny_tokens(3, 6))  # the same name and size
    with pytest.raises(InputError, match=r"unfinished append of other data .*--discard"):
        add(index, edited)
    with pytest.raises(InputError, match=r"unfinished append of other data .*--discard"):
        add(index, other)
    with pytest.raises(InputError, match=r"limit: None before, 2 now.*--discard"):
        add(index, more, limit=2)
    with pytest.raises(InputError, match=r"no data given"):
        add(index)
    with pytest.raises(InputError, match=r"unfinished append.*gradindex append .* --discard"):
        gradindex.compact(index)
    assert files_of(index) == unfinished
    assert len(gradindex.open(index, model=tiny_network())) == 8
    assert add(index, discard=True) is None
    assert files_of(index) == before
    with pytest.raises(KilledError):
        monkeypatch.setattr(append_module, "measure_drift", _kill)
        add(index, more)
    monkeypatch.undo()
    searcher = add(index, other, discard=True)
    expected = shutil.copytree(tiny, tmp_path / "expected")
    add(expected, other)
    assert len(searcher) == 11 and files_of(index) == files_of(expected)


def _kill(*_):
    raise KilledError


def test_data_that_cannot_be_used_can_be_corrected(index, place, tmp_path):
    before = files_of(index)
    path = tmp_path / "more.jsonl"
    good = "".join(json.dumps(one) + "\n" for one in NEW)
    for content, options, message in [
            (good + "{broken\n", {"strict": True}, r"more\.jsonl:4: invalid JSON"),
            (json.dumps({"text": " ", "url": "a"}) + "\n", {}, "no sequence with a token"),
            (json.dumps({"text": "a plum", "url": "a"}) + "\n", {}, "no record has a field"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            gradindex.append(index, path, **place, **options)
        assert files_of(index) == before
    path.write_text(good + "{broken\n")
    searcher = gradindex.append(index, path, **place)
    assert searcher.manifest.documents == 43
    assert searcher.manifest.skipped == {"invalid JSON": 1}


def test_another_model_tokenizer_or_task_is_refused_before_anything_is_read(
    index, model_folder, place, tmp_path, monkeypatch
):
    before = files_of(index)
    monkeypatch.setattr(ingest, "write_records", lambda *_: pytest.fail("the data were read"))
    other = random_network("gpt_neox", torch.float32,
                           vocab_size=place["model"].config.vocab_size)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    other.save_pretrained(moved)
    tokenizer = train_tokenizer(["something else"], 300)
    for options, message in [
        ({**place, "model": other}, "is not the one the index was built with"),
        ({"model": str(moved)}, "is not the one the index was built with"),
        ({**place, "tokenizer": tokenizer}, "tokenizer .* is not the one the index was built"),
    ]:
        with pytest.raises(IndexMismatchError, match=message):
            gradindex.append(index, NEW, **options)
        assert files_of(index) == before
    with pytest.raises(InputError, match="the data holds tokens, the index was built on text"):
        gradindex.append(index, save(tmp_path / "tokens.npy", tiny_tokens(0)), **place)
    with pytest.raises(InputError, match="the data holds completion, the index was built on text"):
        gradindex.append(index, [{"prompt": "a", "completion": " b", "url": "c"}], **place)
    assert files_of(index) == before


def test_an_append_computes_with_as_many_threads_as_the_build(tiny, more, tmp_path, monkeypatch):
    index, used = shutil.copytree(tiny, tmp_path / "index"), []
    manifest.commit(index, replace(manifest.load(index), threads=5))
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert add(index, more).manifest.threads == 5
    assert used == [5]


def test_a_folder_of_somebody_else_among_the_segments_is_left_alone(tiny, more, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    (index / "segments" / ".cache").mkdir()
    assert len(add(index, more)) == 14
    assert (index / "segments" / ".cache").is_dir()


# ---- drift


def slow_sizes(network, index, sequences, first):
    """∇ᵀ(G+λ)⁻¹∇ per token of each sequence for labels drawn from the model, from the formulas."""
    facts = manifest.load(index)
    names = [module.name for module in facts.modules]
    curvature = {name: load_file(index / "curvature" / f"{name}.safetensors") for name in names}
    found = []
    for number, ids in enumerate(torch.as_tensor(sequences)):
        with torch.no_grad():
            p = torch.softmax(network(input_ids=ids[None]).logits[0], dim=-1)
        labels = torch.full_like(ids, -100)
        drawn = uniforms(Stream.DRIFT_LABELS, facts.code["seed"], first + number, len(ids))
        for position in range(len(ids) - 1):
            above = (p[position].cumsum(0) > drawn[position]).nonzero()
            labels[position + 1] = above[0, 0]
        total = 0.0
        for name, g in sequence_gradient(network, names, ids, labels).items():
            own = curvature[name]
            rotated = own["eigenvectors_s"].T @ g @ own["eigenvectors_a"]
            damped = own["eigenvalues"] + facts.damping * own["eigenvalues"].mean()
            total += float((rotated**2 / damped).sum())
        found.append(total / (len(ids) - 1))
    return np.array(found)


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    """A float64 network, and an index of sequences that know six tokens of 37 only."""
    folder = tmp_path_factory.mktemp("drift")
    network = random_network("gpt_neox", torch.float64)
    tokens = _few_tokens(3, 48)
    gradindex.build(network, save(folder / "old.npy", tokens), folder / "index", bits=512)
    return network, folder / "index", tokens


def _few_tokens(seed, rows):
    return np.random.default_rng(seed).integers(0, 6, (rows, 8))


def test_drift_is_that_of_the_formulas_and_warns_of_other_data_only(
    drifting, tmp_path, monkeypatch
):
    network, built, old = drifting
    random = np.random.default_rng(5).integers(6, 37, (24, 8))
    for name, new, warns in (("alike", _few_tokens(4, 24), False), ("random", random, True)):
        index = shutil.copytree(built, tmp_path / name)
        seen, real = [], append_module.measure_drift
        monkeypatch.setattr(append_module, "measure_drift",
                            lambda *them, real=real, seen=seen: seen.append(real(*them)) or seen[0])
        said = io.StringIO()
        gradindex.append(index, save(tmp_path / f"{name}.npy", new), model=network,
                         progress=Progress(said))
        monkeypatch.undo()
        before = slow_sizes(network, index, old, 0)
        after = slow_sizes(network, index, new, len(old))
        ratio = after.mean() / before.mean()
        error = ratio * (before.var(ddof=1) / len(before) / before.mean()**2
                         + after.var(ddof=1) / len(after) / after.mean()**2)**0.5
        [drift] = seen
        assert drift.ratio == pytest.approx(ratio, rel=1e-6)
        assert drift.error == pytest.approx(error, rel=1e-6)
        assert drift.warns == warns and drift.sample == 24
        assert (abs(ratio - 1) < 3 * error) == (not warns)
        stored = manifest.load(index).appended[0]
        assert (stored["drift"], stored["drift_error"]) == (round(ratio, 4), round(error, 4))
        assert ("warning: the curvature was fitted on other data" in said.getvalue()) == warns
        assert f"Λ of the new data is {ratio:.2f} ± {error:.2f} times that" in said.getvalue()


# ---- delete


def test_deleted_sequences_are_in_no_answer_at_once(index, place):
    """Not in a search, a rescoring, a count of words, a background sample or an evaluation."""
    searcher = gradindex.open(index, **place)
    first = searcher.search(**QUESTION, k=3)
    gone = sorted(hit.id for hit in first)
    expected = {one: score for one, score in influences(searcher).items() if one not in gone}
    assert gradindex.delete(index, gone).deleted == 3
    searcher = gradindex.open(index, **place)
    found = influences(searcher)
    assert found.keys() == expected.keys()
    scale = max(map(abs, expected.values()))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-5 * scale)
    everything = [QUESTION, {"shortlist": "all", "k": len(searcher)}]
    for controls in ({}, {"rescore": False}, {"candidates": "tfidf"}, {"candidates": "both"}):
        result = searcher.search(**everything[0], **{**everything[1], **controls})
        seen = {one for hit in result for one in [hit.id, *hit.duplicates]}
        assert seen == set(expected), controls
        assert result.sequences == len(expected) == len(searcher)
    with pytest.raises(InputError, match=rf"no sequence has the id {gone[1]} \(it was deleted"):
        searcher.rescore(**QUESTION, ids=[0, gone[1]])
    held = [set(record.tokens.tolist()) for record in records_in(searcher)]
    assert len(held) == len(expected)
    tokens = searcher.make_query(**QUESTION).scored_tokens
    np.testing.assert_allclose(
        searcher.index.tokens.scores(tokens),
        [plain_score(tokens, held, place) for place in range(len(held))], rtol=1e-12)
    drawn = searcher.index.contents.ids[searcher.index.background()]
    assert set(drawn.tolist()) <= set(expected)
    made = [searcher.make_query(**QUESTION)]
    evaluated = evaluate(searcher, made, settle(Controls(), searcher.manifest), None,
                         lambda *_: None)
    assert (evaluated.sequences, evaluated.scored) == (len(expected), len(expected))


def test_deleting_names_equal_sequences_that_stay(index, place):
    """Documents 9 and 17 of the index are equal."""
    searcher = gradindex.open(index, **place)
    of = {}
    for record in records_in(searcher):
        of.setdefault(record.parts[0].document, []).append(record.id)
    assert len(of[9]) == len(of[17]) and manifest.load(index).duplicates >= len(of[9])
    copies = dict(zip(of[9], of[17], strict=True))
    hit = next(hit for hit in searcher.search(**QUESTION, k=len(searcher), shortlist="all")
               if hit.id == of[9][0])
    assert hit.duplicates == [copies[hit.id]]
    done = gradindex.delete(index, [of[9][0]])
    assert done == Deleted(1, 0, [copies[of[9][0]]])
    searcher = gradindex.open(index, **place)
    hit = next(hit for hit in searcher.search(**QUESTION, k=len(searcher), shortlist="all")
               if hit.id == copies[of[9][0]])
    assert hit.duplicates == []
    assert gradindex.delete(index, [copies[of[9][0]]]) == Deleted(1, 0, [])


def test_deleting_twice_and_what_never_was(tiny, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    assert gradindex.delete(index, [5, 2, 5]) == Deleted(2, 0, [])
    assert gradindex.delete(index, [2, 3]) == Deleted(1, 1, [])
    gradindex.delete(index, [])  # cleans: the list before the last goes
    before = files_of(index)
    assert gradindex.delete(index, [2, 3, 5]) == Deleted(0, 3, [])
    assert gradindex.delete(index, []) == Deleted(0, 0, [])
    for wrong in (8, -1):
        with pytest.raises(InputError, match=rf"has the id {wrong}; expected 0 to 7. Nothing was"):
            gradindex.delete(index, [0, wrong])
    with pytest.raises(InputError, match=r"'x' of your own. Nothing was deleted.*--id-field"):
        gradindex.delete(index, [0], user_ids=["x"])
    assert files_of(index) == before
    gradindex.compact(index)
    assert gradindex.delete(index, [2, 3, 5]) == Deleted(0, 3, [])
    assert gradindex.open(index).index.contents.ids.tolist() == [0, 1, 4, 6, 7]


def test_deleting_by_the_users_own_id_takes_every_sequence_of_the_document(index, place):
    searcher = gradindex.open(index, **place)
    own = {}
    for record in records_in(searcher):
        own.setdefault(record.parts[0].user_id, set()).add(record.id)
    assert len(own["doc/2"]) > 1
    ids = searcher.index.contents.ids.tolist()
    gone = own["doc/2"] | own["doc/5"] | {0}
    done = gradindex.delete(index, [0], user_ids=["doc/2", "doc/5"])
    assert (done.deleted, done.already) == (len(gone), 0)
    left = gradindex.open(index, **place).index.contents.ids.tolist()
    assert left == [one for one in ids if one not in gone]
    before = files_of(index)
    assert gradindex.delete(index, user_ids=["doc/2"]).already == len(own["doc/2"])
    with pytest.raises(InputError, match="no document has the id 'doc/99' of your own"):
        gradindex.delete(index, user_ids=["doc/1", "doc/99"])
    assert files_of(index) == before


def test_the_command_line_deletes_what_standard_input_names(index, place):
    run = CliRunner()
    done = run.invoke(main_group, ["delete", str(index), "--ids", "-"], input='3\n{"id": 4}\n')
    assert done.exit_code == 0 and "2 sequences deleted" in done.stderr
    assert f"gradindex compact {index}" in done.stderr
    done = run.invoke(main_group, ["delete", str(index), "--user-ids", "-"], input="doc/9\n")
    assert "with the same tokens stay" in done.stderr and done.exit_code == 0
    done = run.invoke(main_group, ["delete", str(index)])
    assert done.exit_code == 2 and "say what to delete" in done.output
    assert {3, 4}.isdisjoint(gradindex.open(index, **place).index.contents.ids.tolist())
    done = run.invoke(main_group, ["compact", str(index)])
    assert done.exit_code == 0 and unlisted(index) == set()


def test_an_open_searcher_keeps_its_view(index, place):
    """Through a deletion, an append and a compaction, whose old files wait for it."""
    searcher = gradindex.open(index, **place)
    before = answer(searcher, k=5)
    old = [one.name for one in searcher.manifest.segments]
    late = gradindex.open(index, **place)  # which has read nothing yet
    gone = [hit["id"] for hit in before["hits"]]
    gradindex.delete(index, gone)
    gradindex.append(index, NEW[:1], **place)
    said = io.StringIO()
    assert gradindex.compact(index, Progress(said)) >= 2
    assert "stay on the disk while the index is open" in said.getvalue()
    assert answer(late, k=5) == answer(searcher, k=5) == before
    now = [hit.id for hit in gradindex.open(index, **place).search(**QUESTION, k=5)]
    assert set(now).isdisjoint(gone)
    gradindex.delete(index, [])  # a writer, while they are open
    assert all((index / "segments" / name).is_dir() for name in old)
    del searcher, late
    gc.collect()
    gradindex.delete(index, [])
    assert unlisted(index) == set()


def test_an_index_of_which_all_is_deleted_says_so_and_can_be_appended_to(tiny, more, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    assert gradindex.delete(index, range(8)).deleted == 8
    for compacted in (False, True):
        if compacted:
            assert gradindex.compact(index) == 2
            assert list((index / "segments").iterdir()) == []
        with pytest.raises(InputError, match=r"holds no sequence any more.*gradindex append"):
            gradindex.open(index, model=tiny_network()).search(token_ids=[1, 2, 3])
        with pytest.raises(InputError, match="no sequence has the id 3"):
            gradindex.open(index, model=tiny_network()).rescore(token_ids=[1, 2, 3], ids=[3])
        found = gradindex.verify(index, model=tiny_network())
        assert found.sound and found.encoded == 0
        done = CliRunner().invoke(main_group, ["info", str(index)])
        assert done.exit_code == 0 and "0 of at most 6 tokens" in done.output
        grown = shutil.copytree(index, tmp_path / f"grown-{compacted}")
        said = io.StringIO()
        searcher = add(grown, more, progress=Progress(said))
        assert "curvature: nothing to compare" in said.getvalue()
        assert [hit.id for hit in sorted(searcher.search(token_ids=[1, 2, 3]),
                                         key=lambda hit: hit.id)] == list(range(8, 14))


# ---- compact


def test_compacting_changes_no_answer(index, place):
    """Ids, influence, codes and the statement, of a short list that leaves most out."""
    gradindex.append(index, NEW[:1], **place)
    gradindex.append(index, NEW[1:], **place)
    gradindex.delete(index, [0, 17, 18, 40, 53])
    questions = [{}, {"k": 4, "shortlist": 9}, {"k": 3, "recall": 0.5}, {"opponents": True},
                 {"normalize": "relatif"}, {"rescore": False}, {"candidates": "both", "k": 4,
                                                                "shortlist": 6}]
    before = [answer(gradindex.open(index, **place), **controls) for controls in questions]
    gc.collect()
    old = manifest.load(index)
    assert gradindex.compact(index) == 6  # the last of the build and the appends aren't full
    new = manifest.load(index)
    after = [answer(gradindex.open(index, **place), **controls) for controls in questions]
    assert after == before
    assert any(one["recall"]["estimate"] not in (None, 1.0) for one in before)
    assert [one.rows for one in new.segments] == [16, 16, 16, new.sequences - 48]
    assert (new.deleted, new.deleted_file, new.rows) == (0, None, old.rows - 5)
    assert (new.sequences, new.duplicates, new.next_id) == (
        old.sequences, old.duplicates, old.next_id)
    assert unlisted(index) == set()
    assert gradindex.verify(index, **place).sound


def test_compacting_takes_the_deleted_text_from_the_disk(index, place, tmp_path):
    """A marker in a kept field, its tokens, its words and its digest are in no file any more."""
    rare = "Qxzj vwkq"
    searcher = gradindex.append(
        index, [*NEW, {"text": f"{rare} of the hill", "url": MARK, "place": MARK}], **place)
    record = records_in(searcher)[-1]
    assert record.parts[0].user_id == MARK
    tokens = record.tokens.astype("<i4").tobytes()
    digest = searcher.index.contents.rows["digest"][-1].tobytes()
    there = (MARK.encode(), tokens, digest)

    def found():
        contents = list(files_of(index).values())
        return [sum(what in content for content in contents) > 0 for what in there]

    def words():
        [token] = set(place["tokenizer"](rare[0]).input_ids)
        facts = manifest.load(index)
        paths = [index / "segments" / one.name / "tokens.npz" for one in facts.segments]
        return sum(int(token_file.parse(path.read_bytes(), one.rows, 24, facts.vocabulary,
                                   path)[:, token].sum())
                   for one, path in zip(facts.segments, paths, strict=True))

    assert found() == [True, True, True] and words() == 1
    gradindex.delete(index, user_ids=[MARK])
    del searcher
    gc.collect()
    assert found() == [True, True, True]
    gradindex.compact(index)
    assert found() == [False, False, False] and words() == 0
    assert unlisted(index) == set()


def test_compacting_what_is_compact_changes_nothing(tiny, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    before = files_of(index)
    said = io.StringIO()
    assert gradindex.compact(index, Progress(said)) == 0
    assert files_of(index) == before and "nothing to compact" in said.getvalue()
    gradindex.delete(index, [1])
    assert gradindex.compact(index) == 1  # the full one is left as it is
    before = files_of(index)
    assert [(one.name, one.rows) for one in manifest.load(index).segments] == [
        ("000002", 3), ("000001", 4)]
    assert gradindex.compact(index) == 0
    assert files_of(index) == before


def test_compacting_joins_what_is_not_full(tiny, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    for seed in (3, 4, 5):
        add(index, save(tmp_path / f"{seed}.npy", tiny_tokens(seed, 2)))
    gc.collect()
    before = records_in(gradindex.open(index))
    assert gradindex.compact(index) == 3
    assert [one.rows for one in manifest.load(index).segments] == [4, 4, 4, 2]
    after = records_in(gradindex.open(index))
    assert [(one.id, one.tokens.tolist(), one.parts) for one in after] == [
        (one.id, one.tokens.tolist(), one.parts) for one in before]
    assert gradindex.compact(index) == 0


def test_a_compaction_killed_anywhere_leaves_the_old_state_or_the_new(
    tiny, tmp_path, monkeypatch
):
    start = shutil.copytree(tiny, tmp_path / "start")
    gradindex.delete(start, [1, 6, 7])
    whole = shutil.copytree(start, tmp_path / "whole")
    old = files_of(start)
    gradindex.compact(whole)
    expected, states = files_of(whole), Counter()
    question = {"token_ids": [3, 1, 4, 1, 5]}
    assert answer(gradindex.open(start, model=tiny_network()), question) == \
        answer(gradindex.open(whole, model=tiny_network()), question)
    gc.collect()
    for which, folder in each_kill(
            monkeypatch, lambda n: shutil.copytree(start, tmp_path / f"killed-{n}"),
            gradindex.compact):
        here = files_of(folder)
        listed = {layout.MANIFEST, *manifest.load(folder).files}
        state = next(name for name, files in (("old", old), ("new", expected))
                     if files == {one: here.get(one) for one in listed})
        states[state] += 1
        assert gradindex.open(folder).index.contents.ids.tolist() == [0, 2, 3, 4, 5]
        gradindex.delete(folder, [])  # a writer, which cleans
        assert files_of(folder) == (old if state == "old" else expected)
        assert unlisted(folder) == set()
        gradindex.compact(folder)
        assert files_of(folder) == expected, f"killed at sync {which}"
    assert states["old"] > 20 and states["new"] > 0


def test_killed_while_old_files_are_removed_the_next_writer_removes_the_rest(
    tiny, tmp_path, monkeypatch
):
    index = shutil.copytree(tiny, tmp_path / "index")
    gradindex.delete(index, [1, 6])
    whole = shutil.copytree(index, tmp_path / "whole")
    gradindex.compact(whole)

    def half(folder, *_, **__):
        if folder.is_dir():
            min(folder.iterdir()).unlink()
            raise KilledError

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KilledError):
        gradindex.compact(index)
    monkeypatch.undo()
    assert unlisted(index) and gradindex.verify(index, no_model=True).sound
    gradindex.delete(index, [])
    assert files_of(index) == files_of(whole)


def test_only_one_writer_at_a_time(tiny, more, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    said = f"another process is writing to .*: gradindex test in process {os.getpid()} on .*Wait"
    for write in (lambda: add(index, more), lambda: add(index, discard=True),
                  lambda: gradindex.delete(index, [1]), lambda: gradindex.compact(index),
                  lambda: give_up(index, ["000000"])):
        with only_writer(index, "gradindex test"), pytest.raises(GradindexError, match=said):
            write()
        assert files_of(index) == files_of(tiny)
    with only_writer(index, "gradindex test"):
        assert len(gradindex.open(index, model=tiny_network()).search(token_ids=[1, 2, 3])) == 8


def test_what_is_no_index_is_said(tmp_path):
    (tmp_path / "build.json").write_text("{}")
    for run in (lambda: add(tmp_path, []), lambda: gradindex.delete(tmp_path, [1]),
                lambda: gradindex.compact(tmp_path), lambda: gradindex.verify(tmp_path)):
        with pytest.raises(InputError, match="is an unfinished build; run the same build command"):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json"]


# ---- exact duplicates


def test_equal_sequences_are_one_hit_that_names_all_copies(tmp_path):
    """By a digest taken at the build, also where the copies are no part of the shortlist."""
    tokens = tiny_tokens(7, 30)
    copies = [3, 4, 11, 20, 29]
    tokens[copies] = tokens[3]
    nearly = 12
    tokens[nearly] = tokens[3]
    tokens[nearly, -1] += 1
    searcher = gradindex.build(tiny_network(), save(tmp_path / "a.npy", tokens),
                               tmp_path / "index", **TINY)
    assert searcher.manifest.duplicates == len(tokens) - len({tuple(row) for row in tokens}) == 4
    for controls in ({"k": 1, "shortlist": 1}, {"k": 2, "shortlist": 2}, {"k": 3, "rescore": False},
                     {"k": 30, "shortlist": "all"}):
        result = searcher.search(token_ids=tokens[3], normalize="cosine", **controls)
        of_them = [hit for hit in result if hit.id in copies]
        assert len(of_them) == 1
        assert sorted([of_them[0].id, *of_them[0].duplicates]) == copies, controls
        assert all(hit.duplicates == [] for hit in result if hit.id not in copies)
    assert result[0].id == 3 and len(result) == 26
    [hit] = searcher.rescore(token_ids=tokens[3], ids=[20])
    assert (hit.id, hit.duplicates) == (20, [3, 4, 11, 29])
    lines = re.findall(r"equal an earlier one", json.dumps(result.to_dict()))
    assert not lines  # said by the build and by info alone
    done = CliRunner().invoke(main_group, ["info", str(tmp_path / "index")])
    assert "4 sequences equal an earlier one" in done.output


def test_sequences_of_equal_tokens_and_another_mask_are_not_equal():
    ids = np.array([1, 2, 3], np.int32)
    mask = np.array([True, True, True])
    from gradindex.storage.row_file import digest_of

    def record(tokens, scored):
        return records.Record(0, tokens, scored, [])

    assert (digest_of(record(ids, mask)) == digest_of(record(ids.copy(), mask.copy()))).all()
    others = [record(ids, np.array([False, True, True])), record(ids[:2], mask[:2]),
              record(ids[::-1].copy(), mask)]
    assert all((digest_of(one) != digest_of(record(ids, mask))).any() for one in others)
