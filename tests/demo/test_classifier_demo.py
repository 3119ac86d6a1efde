"""The classifying demo, as `gradindex demo classifier` runs it, on a few of the library's texts."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from gradindex.cli import main_group
from gradindex.demo.journey import run_demo
from gradindex.demo.kinds import classifier_demo, language_demo
from gradindex.demo.labelled_documents import FAMILIES, LabelledDocument, plant
from gradindex.demo.questions import LABEL_QUERIES, as_typed, label_arguments
from gradindex.demo.small_classifier import ClassifierSettings
from gradindex.demo.small_model import DemoSettings
from gradindex.errors import InputError
from gradindex.progress import Progress

TINY = ClassifierSettings(texts=24, planted=0.25, length=128, vocabulary=500, layers=1, hidden=16,
                          heads=2, steps=3, batch=4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standard library of two modules a family."""
    whole = Path(sysconfig.get_paths()["stdlib"])
    folder = tmp_path_factory.mktemp("library")
    (folder / "pydoc_data").mkdir()
    topics = {"bool": "Every object can be tested for its truth value. " * 2}
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics}\n")
    for name in ("poplib", "socketserver", "bisect", "statistics", "queue", "sched", "string",
                 "textwrap", "shelve"):
        shutil.copy(whole / f"{name}.py", folder)
    return folder


@pytest.fixture(scope="module")
def made(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "demo"
    assert run_demo(folder, classifier_demo(TINY), Progress(), library) == 0
    return folder


def test_the_demo_answers_its_questions(made, library, capfd):
    """Run again it trains and builds nothing, and asks what a user would type."""
    weights = (made / "model" / "model.safetensors").stat().st_mtime_ns
    assert run_demo(made, classifier_demo(TINY), Progress(), library) == 0
    assert (made / "model" / "model.safetensors").stat().st_mtime_ns == weights
    shown = capfd.readouterr().out
    for query in LABEL_QUERIES:
        assert f"$ {as_typed(label_arguments(made / 'index', *query))}" in shown
        assert query[0] in " ".join(shown.split())
    assert shown.count("proponents: 3 of 24 sequences") == 3 == shown.count("recall: ")
    assert "label: network\n" in shown and "the model's own\n" in shown
    assert "label: processes, rather than network\n" in shown
    assert shown.count("planted=") == 9 == shown.count("its log p")
    assert f"gradindex view {made / 'index'}" in shown


def test_some_labels_are_wrong_on_purpose(made):
    rows = [json.loads(line) for line in (made / "documents.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and sum(row["planted"] for row in rows) == 6
    assert all(row["planted"] == (row["label"] != row["family"]) for row in rows)
    assert {row["family"] for row in rows} == set(FAMILIES)
    facts = json.loads((made / "demo.json").read_text())
    assert facts["planted"] == 6 and 0 <= facts["right"] <= facts["others"] == 3
    config = json.loads((made / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(FAMILIES)


def test_labels_are_planted_alike_each_time():
    rows = [LabelledDocument(id=str(number), text="", label="text", family="text", planted=False,
                             module="m") for number in range(50)]
    wrong = plant(rows, 0.1, 0)
    assert wrong == plant(rows, 0.1, 0) != plant(rows, 0.1, 1)
    assert [one["id"] for one in wrong] == [one["id"] for one in rows]
    assert sum(one["label"] != "text" for one in wrong) == 5


def test_a_folder_of_the_other_demo_is_left_alone(made, library):
    facts = (made / "demo.json").read_text()
    with pytest.raises(InputError, match="holds another demo, of another kind of model"):
        run_demo(made, language_demo(DemoSettings()), Progress(), library)
    assert (made / "demo.json").read_text() == facts and (made / "index").is_dir()


def test_a_library_without_sources_is_refused(tmp_path):
    (tmp_path / "library" / "pydoc_data").mkdir(parents=True)
    (tmp_path / "library" / "pydoc_data" / "topics.py").write_text("topics = {}\n")
    with pytest.raises(InputError, match="no text here to train"):
        run_demo(tmp_path / "demo", classifier_demo(TINY), Progress(), tmp_path / "library")


def test_a_step_is_measured():
    assert classifier_demo(TINY).seconds_of_a_step() > 0


def test_help_says_how():
    assert "gradindex demo classifier" in main_group.get_command(None, "demo").help
