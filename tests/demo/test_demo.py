"""The demo, as `gradindex demo` runs it, on a few of the standard library's documents."""

import json
import re
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from gradindex.cli import main_group
from gradindex.demo import expected_time
from gradindex.demo.journey import run_demo as run
from gradindex.demo.kinds import LANGUAGE_PARTS, language_demo
from gradindex.demo.library_documents import standard_library_documents
from gradindex.demo.make_demo import check_folder, choose_documents
from gradindex.demo.questions import QUERIES, as_typed, search_arguments
from gradindex.demo.small_model import DemoSettings
from gradindex.errors import GradindexError, InputError
from gradindex.progress import Progress
from gradindex.storage.locks import only_writer

TINY = DemoSettings(sequences=12, length=64, longest=60, vocabulary=300, layers=1, hidden=16,
                    heads=2, steps=3, batch=4)


def run_demo(folder: Path, settings: DemoSettings, progress: Progress,
             library: Path | None = None) -> int:
    return run(folder, language_demo(settings), progress, library)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standard library of a few modules."""
    whole = Path(sysconfig.get_paths()["stdlib"])
    folder = tmp_path_factory.mktemp("library")
    (folder / "pydoc_data").mkdir()
    topics = {"bool": "Every object can be tested for its truth value. " * 2}
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics}\n")
    for name in ("bisect", "cmd", "heapq", "queue", "sched", "shelve", "string", "textwrap",
                 "types"):
        shutil.copy(whole / f"{name}.py", folder)
    return folder


@pytest.fixture(scope="module")
def made(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "demo"
    assert run_demo(folder, TINY, Progress(), library) == 0
    return folder


def test_the_demo_answers_its_questions(made, library, capfd):
    """Run again it trains and builds nothing, and asks what a user would type."""
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    assert run_demo(made, TINY, Progress(), library) == 0
    shown = capfd.readouterr().out
    for query in QUERIES:
        assert f"$ {as_typed(search_arguments(made / 'index', *query))}" in shown
    assert shown.count("proponents: 3 of 12 sequences") == len(QUERIES) == shown.count("recall: ")
    assert f"gradindex view {made / 'index'}" in shown
    after = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {made / "index"}
    facts = json.loads((made / "demo.json").read_text())
    assert facts["documents"] == 12 == len((made / "documents.jsonl").read_text().splitlines())
    assert [(line["prompt"], line["completion"]) for line in facts["learned"]] == list(QUERIES)


def test_other_settings_make_the_demo_anew(made, library, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "demo"))
    (folder / "mine.txt").write_text("stays")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert run_demo(folder, replace(TINY, seed=1), Progress(), library) == 0
    assert (folder / "model" / "model.safetensors").read_bytes() != weights
    assert (folder / "mine.txt").read_text() == "stays"


def test_a_demo_that_was_stopped_goes_on(made, library, tmp_path):
    """Stopped in training: it begins anew. Stopped in the build: the model is reused."""
    folder = Path(shutil.copytree(made, tmp_path / "demo"))
    weights = (folder / "model" / "model.safetensors").read_bytes()
    facts = json.loads((folder / "demo.json").read_text())
    (folder / "demo.json").write_text(json.dumps(
        {name: facts[name] for name in ("settings", "python")}))
    shutil.rmtree(folder / "index")
    assert run_demo(folder, TINY, Progress(), library) == 0
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(folder / "index")
    time = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert run_demo(folder, TINY, Progress(), library) == 0
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == time


@pytest.mark.parametrize("name", ["model", "index", "documents.jsonl", "demo.json"])
def test_what_is_not_the_demos_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("[1]")
    with pytest.raises(InputError, match=rf"holds {re.escape(name)}, which no demo made"):
        run_demo(tmp_path, TINY, Progress())
    assert (tmp_path / name).read_text() == "[1]"
    with pytest.raises(InputError, match="is a file; expected a folder"):
        run_demo(tmp_path / name, TINY, Progress())
    (tmp_path / name).unlink()
    (tmp_path / "other.txt").write_text("of no concern")
    assert check_folder(tmp_path, TINY) == {}


def test_two_demos_in_a_folder_exclude_each_other(tmp_path):
    with only_writer(tmp_path, "the demo"), pytest.raises(
            GradindexError, match=r"another process is writing to .* the demo"):
        run_demo(tmp_path, TINY, Progress())


def test_expected_time_is_that_of_what_is_left():
    anew, made, built = (expected_time.expected(0.5, steps, build, LANGUAGE_PARTS)
                         for steps, build in ((100, True), (None, True), (None, False)))
    assert anew.first - made.first == 0.5 * (100 + LANGUAGE_PARTS.documents)
    assert made.first - built.first == 0.5 * LANGUAGE_PARTS.build
    for one in (anew, made, built):
        assert one.whole - one.first == 0.5 * 2 * LANGUAGE_PARTS.later_search


def test_a_step_is_measured():
    assert language_demo(TINY).seconds_of_a_step() > 0


def test_documents_are_the_same_each_time(library):
    documents, tokenizer = choose_documents(TINY, library)
    again, _ = choose_documents(TINY, library)
    assert documents == again and len(documents) == TINY.sequences
    assert {one["id"] for one in documents} <= {
        one["id"] for one in standard_library_documents(library)}
    assert all(len(tokenizer(one["text"]).input_ids) <= TINY.longest for one in documents)


def test_help_says_where_and_how():
    command = main_group.get_command(None, "demo")
    assert "gradindex demo -o .demo" in command.help
