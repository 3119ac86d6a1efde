"""A committed index of format 1: opened by every later version, or refused with what to run."""

import json
import shutil
from pathlib import Path

import pytest

import gradindex
from gradindex import manifest
from gradindex.errors import IndexMismatchError

GOLDEN = Path(__file__).parent / "golden" / "format-1"
QUESTION = {"prompt": "The apple number", "completion": " 8 grows"}


def test_format_1_answers_as_when_it_was_written():
    index = gradindex.open(GOLDEN / "index", model=str(GOLDEN / "model"))
    expected = json.loads((GOLDEN / "answer.json").read_text())
    found = index.search(**QUESTION, shortlist="all", k=10)
    assert len(found) == len(expected) == 10
    for hit, was in zip(found, expected, strict=True):
        for name in ("id", "text", "user_id", "fields", "duplicates"):
            assert getattr(hit, name) == was[name]
        assert hit.influence == pytest.approx(was["influence"], rel=1e-3)
        assert hit.code_score == pytest.approx(was["code_score"], rel=1e-2, abs=1)


def test_format_1_is_sound():
    found = gradindex.verify(GOLDEN / "index", str(GOLDEN / "model"))
    assert found.sound, found.findings
    assert found.same_bits > 0.99 and found.score_error < 1e-3
    assert found.records == 56 and found.scores > 0


def test_format_1_can_be_appended_to_deleted_from_and_compacted(tmp_path):
    index = shutil.copytree(GOLDEN / "index", tmp_path / "index")
    model = str(GOLDEN / "model")
    before = gradindex.open(index, model=model)
    more = [{"text": "The apple number 8 grows on.", "url": "new", "place": "hill"}]
    first = before.manifest.next_id
    opened = gradindex.append(index, more, model=model)
    assert len(opened) == len(before) + 1
    assert first in [hit.id for hit in opened.search(**QUESTION, shortlist="all")]
    gradindex.delete(index, [first])
    gradindex.compact(index)
    again = gradindex.open(index, model=model)
    query = dict(QUESTION, shortlist="all", k=10)
    found, was = again.search(**query), before.search(**query)  # which keeps its view
    assert [hit.id for hit in found] == [hit.id for hit in was]
    assert [hit.influence for hit in found] == pytest.approx([hit.influence for hit in was])


@pytest.mark.parametrize("version, says", [
    (2, r"has format 2; this gradindex \(.*\) reads format 1. Run `pip install --upgrade gradin"),
    (0, r"has format 0; .* Build the index again: `gradindex build MODEL DATA"),
    ("one", "has format one; .* Build the index again"),
])
def test_other_formats_are_refused_with_what_to_run(tmp_path, version, says):
    index = shutil.copytree(GOLDEN / "index", tmp_path / "index")
    content = json.loads((index / manifest.NAME).read_text())
    (index / manifest.NAME).write_text(json.dumps({**content, "format": version}))
    with pytest.raises(IndexMismatchError, match=says):
        gradindex.open(index)
