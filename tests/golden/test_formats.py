"""Committed indexes of every format: opened by every later version, or refused with what to run."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import gradindex
from gradindex.errors import DamagedIndexError, IndexMismatchError
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.storage import layout, manifest, sealed_json
from search.study.describe import describe, summary
from support.models import other_model

GOLDEN = Path(__file__).parent
FORMATS = (1, 2, 3, 4, 5, 6, 7)
QUESTION = {"prompt": "The apple number", "completion": " 8 grows"}
APPLES = {"prompt": "The apple number", "completion": " 9 grows"}  # of two models
QUESTIONS = {  # by task, of the indexes of format 6 and later that are of others
    "classification": {"text": "a great plot", "label": "positive"},
    "preference": {"prompt": "why was it", "chosen": " great", "rejected": " so bad"}}


@pytest.fixture(params=FORMATS, ids="format {}".format)
def golden(request):
    return GOLDEN / f"format-{request.param}"


def test_every_format_is_there():
    assert list(range(manifest.OLDEST, manifest.FORMAT + 1)) == list(FORMATS)
    for number in FORMATS:
        facts = manifest.load(GOLDEN / f"format-{number}" / "index")
        assert facts.format == number
        written = json.loads((GOLDEN / f"format-{number}" / "index" / layout.MANIFEST).read_text())
        assert manifest.digest_of(facts) == written[sealed_json.KEY]


def test_it_answers_as_when_it_was_written(golden):
    answers_as_before(golden, QUESTION)


@pytest.mark.parametrize("task", QUESTIONS)
@pytest.mark.parametrize("number", FORMATS[5:])
def test_other_tasks_answer_as_when_they_were_written(number, task):
    folder = GOLDEN / f"format-{number}" / task
    answers_as_before(folder, QUESTIONS[task])
    assert gradindex.verify(folder / "index", str(folder / "model")).sound


def test_two_models_answer_as_when_they_were_written():
    folder = GOLDEN / "format-7" / "members"
    last = LanguageModel.load(ModelSource(str(folder / "model"))).network
    models = {"last": last, "base": other_model(last)}
    answers_as_before(folder, APPLES, models)
    assert gradindex.verify(folder / "index", models, tokenizer=str(folder / "model")).sound
    written = json.loads((folder / "index" / layout.MANIFEST).read_text())
    assert written["also"].keys() == {"base"} and written["plan"]["also"][0]["name"] == "base"


def answers_as_before(golden, question, model=None):
    index = gradindex.open(golden / "index", model=model or str(golden / "model"),
                           tokenizer=str(golden / "model") if model else None)
    expected = json.loads((golden / "answer.json").read_text())
    found = index.search(**question, shortlist="all", k=10)
    assert len(found) == len(expected) == 10
    for hit, was in zip(found, expected, strict=True):
        for name in ("id", "text", "user_id", "fields", "duplicates"):
            assert getattr(hit, name) == was[name]
        assert hit.influence == pytest.approx(was["influence"], rel=1e-3)
        # the query was quantised more finely when the answer was written
        assert hit.code_score == pytest.approx(was["code_score"], rel=5e-2, abs=1)
        assert hit.generic_rate == was.get("generic_rate")  # format 1 has none


def test_it_is_sound(golden):
    found = gradindex.verify(golden / "index", str(golden / "model"))
    assert found.sound, found.findings
    assert found.same_bits > 0.99 and found.score_error < 1e-3
    assert found.records == 56 and found.scores > 0


def test_it_can_be_appended_to_deleted_from_and_compacted(golden, tmp_path):
    index = shutil.copytree(golden / "index", tmp_path / "index")
    model = str(golden / "model")
    before = gradindex.open(index, model=model)
    more = [{"text": "The apple number 8 grows on.", "url": "new", "place": "hill"}]
    first = before.manifest.next_id
    opened = gradindex.append(index, more, model=model)
    assert opened.manifest.format == manifest.FORMAT
    assert len(opened) == len(before) + 1
    assert first in [hit.id for hit in opened.search(**QUESTION, shortlist="all")]
    gradindex.delete(index, [first])
    gradindex.compact(index)
    again = gradindex.open(index, model=model)
    assert again.manifest.background == before.manifest.background
    query = dict(QUESTION, shortlist="all", k=10)
    found, was = again.search(**query), before.search(**query)  # which keeps its view
    assert [hit.id for hit in found] == [hit.id for hit in was]
    assert [hit.influence for hit in found] == pytest.approx([hit.influence for hit in was])
    assert [hit.generic_rate for hit in found] == [hit.generic_rate for hit in was]
    assert gradindex.verify(index, model).sound


def test_format_1_is_kept_byte_for_byte():
    digest = hashlib.sha256()
    for path in sorted((GOLDEN / "format-1").rglob("*")):
        if path.is_file() and path.name != "writer.json":
            digest.update(str(path.relative_to(GOLDEN)).encode() + path.read_bytes())
    assert digest.hexdigest() == \
        "15a71f6db68f5a60bff96d6b43db83275ba44c58d64cd72deb41f535411accbd"


def test_an_index_of_format_1_has_no_background_queries(tmp_path):
    index = GOLDEN / "format-1" / "index"
    facts = describe(index)
    assert facts["background"] is None
    assert "background queries: none (built by an earlier version)" in summary(facts)
    copied = shutil.copytree(index, tmp_path / "index")
    content = json.loads((copied / layout.MANIFEST).read_text())
    del content[sealed_json.KEY]
    (copied / layout.MANIFEST).write_bytes(sealed_json.with_digest({**content, "background": None}))
    with pytest.raises(DamagedIndexError, match="format 1 has no background queries"):
        manifest.load(copied)
    (copied / layout.MANIFEST).write_bytes(sealed_json.with_digest({**content, "format": 2}))
    with pytest.raises(DamagedIndexError, match="background: Field required"):
        manifest.load(copied)


def test_only_the_newest_format_has_split_covariances(tmp_path):
    assert [manifest.load(GOLDEN / f"format-{number}" / "index").plan.covariance_blocks
            for number in FORMATS] == [1, 1, 2, 2, 2, 2, 2]
    index = shutil.copytree(GOLDEN / "format-2" / "index", tmp_path / "index")
    content = json.loads((index / layout.MANIFEST).read_text())
    del content[sealed_json.KEY]
    content["plan"]["covariance_blocks"] = 2
    (index / layout.MANIFEST).write_bytes(sealed_json.with_digest(content))
    with pytest.raises(DamagedIndexError, match="formats 1 and 2 have no split covariances"):
        manifest.load(index)


def test_a_commit_writes_the_newest_format(tmp_path):
    index = shutil.copytree(GOLDEN / "format-1" / "index", tmp_path / "index")
    facts = manifest.load(index)
    manifest.commit(index, facts)
    assert manifest.load(index) == replace(facts, format=manifest.FORMAT)


@pytest.mark.parametrize("version, says", [
    (8, r"has format 8; this gradindex \(.*\) reads formats 1 to 7. Run `pip install --upgrade "),
    (0, r"has format 0; .* Build the index again: `gradindex build MODEL DATA"),
    ("one", "has format one; .* Build the index again"),
])
def test_other_formats_are_refused_with_what_to_run(tmp_path, version, says):
    index = shutil.copytree(GOLDEN / "format-1" / "index", tmp_path / "index")
    content = json.loads((index / layout.MANIFEST).read_text())
    (index / layout.MANIFEST).write_text(json.dumps({**content, "format": version}))
    with pytest.raises(IndexMismatchError, match=says):
        gradindex.open(index)
