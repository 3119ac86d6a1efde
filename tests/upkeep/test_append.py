"""Append: what an index answers before and after, after a kill anywhere, and its drift."""

import hashlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.draws import Stream, uniforms
from gradindex.errors import IndexMismatchError, InputError
from gradindex.progress import Progress
from gradindex.storage import layout, manifest
from gradindex.storage.layout import APPEND, WRITER
from indexer import build as build_module
from indexer.read import ingest
from indexer.upkeep import append as append_module
from indexer.upkeep import commit as commit_module
from support.documents import NEW, save, small_documents, tiny_tokens
from support.indexes import QUESTION, SMALL, add, files_of, influences, records_in, unlisted
from support.kills import KilledError, each_kill
from support.models import random_network, tiny_network
from support.reference import sequence_gradient


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
    np.testing.assert_allclose(grown.snapshot.norms, whole.snapshot.norms, rtol=1e-5)
    same = np.unpackbits(grown.snapshot.contents.codes_of(grown.snapshot.contents.places)[:, :-8] ^
                         whole.snapshot.contents.codes_of(whole.snapshot.contents.places)[:, :-8])
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
        (folder / WRITER).write_text('{"pid": 1}')  # as a real kill leaves it
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
            q_s, q_a = own["eigenvectors_s"], own["eigenvectors_a"]
            rotated = g if name == "lm_head" else q_s.T @ g @ q_a  # over a vocabulary no rotation
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
    for name, new, warns in (("alike", _few_tokens(6, 24), False), ("random", random, True)):
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
