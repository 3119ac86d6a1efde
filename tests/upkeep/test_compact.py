"""Compact: no answer changes, the deleted text goes, and a kill leaves the old state or the new."""

import gc
import io
import shutil
from collections import Counter

import pytest

import gradindex
from gradindex.progress import Progress
from gradindex.storage import layout, manifest, token_file
from support.documents import NEW, save, tiny_tokens
from support.indexes import add, answer, files_of, records_in, unlisted
from support.kills import KilledError, each_kill
from support.models import tiny_network

MARK = "Zanzibar"


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
    digest = searcher.snapshot.contents.rows["digest"][-1].tobytes()
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
        assert gradindex.open(folder).snapshot.contents.ids.tolist() == [0, 2, 3, 4, 5]
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
