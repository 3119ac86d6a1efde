"""The examples run: each on a small model and its documents, as a user would start it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

import gradindex
from gradindex.demo.small_model import DemoSettings
from support.needed import library
from support.waiting import HANG

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROMPT, COMPLETION, OTHER = "The apple number", " 8 grows", " 9 grows"


@pytest.fixture(scope="module")
def folder(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `make demo` leaves, of a small model: model/, documents.jsonl, index/, demo.json."""
    made = tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(model_folder, made / "model")
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    documents = [{"id": row["url"], "text": row["text"], "module": row["place"], "kind": "text"}
                 for row in rows]
    (made / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    settings = DemoSettings(sequences=40, length=24, vocabulary=400, layers=1, hidden=16, heads=2,
                        steps=3, batch=8)
    (made / "demo.json").write_text(json.dumps({"settings": vars(settings)}))
    gradindex.build(str(made / "model"), made / "documents.jsonl", made / "index", seq_len=24,
                    segment_size=16, id_field="id", keep_fields=["module", "kind"])
    return made


@pytest.fixture
def example(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs a program of the folder, in another folder, and returns what it prints."""
    def run(name: str, *arguments: Any) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out
    return run


def test_a_model_and_records_of_ones_own(example, folder, tmp_path):
    shown = example("own_model.py", "--model", folder / "model", "--data",
                    folder / "documents.jsonl", "--out", "own.index", "--records", 20,
                    "--prompt", PROMPT, "--completion", COMPLETION)
    assert len(gradindex.open(tmp_path / "own.index")) >= 20
    assert re.search(r"^1 +\+", shown, re.MULTILINE) and "doc/" in shown
    assert "its strongest tokens: '" in shown
    assert "of the true top 5, an estimated 100.0% are here" in shown


def test_many_queries_become_one_table(example, folder, tmp_path):
    shown = example("many_queries.py", folder / "index", "-k", 4)
    table = pandas.read_parquet(tmp_path / "hits.parquet")
    assert table["question"].unique().tolist() == ["severity", "weekdays", "closed"]
    assert table["rank"].tolist() == [1, 2, 3, 4] * 3
    assert (table["recall"] >= 0.99).all() and set(table["field_kind"]) == {"text"}
    assert "12 hits of 3 questions are in hits.parquet" in shown


def test_the_questions_are_those_of_the_demo():
    from gradindex.demo.questions import QUERIES

    lines = (EXAMPLES / "questions.jsonl").read_text().splitlines()
    assert [(row["prompt"], row["completion"]) for row in map(json.loads, lines)] == list(QUERIES)


def test_a_source_is_audited(example, folder, tmp_path):
    shown = example("audit_source.py", folder / "index", "--by", "module", "--sample", "all",
                    "--prompt", PROMPT, "--completion", COMPLETION)
    [sure] = re.findall(r"of 5 groups 5 are looked at; (\d) are more than two standard", shown)
    marks = re.findall(r"^  z +[+-]\d+\.\d(.)  ", shown, re.MULTILINE)
    assert len(marks) == 5 and marks.count(" ") == int(sure)
    assert "of the 20 hits come up whatever is asked" in shown
    assert "hill" in shown and (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_a_model_is_trained_again_without_what_was_found(example, folder):
    shown = example("retrain_check.py", folder, "--remove", 4, "--prompt", PROMPT,
                    "--completion", COMPLETION)
    changes = re.findall(r"nats, ([+-]\d+\.\d\d) against all documents", shown)
    assert len(changes) == 2
    assert re.search(r"the scores of the top 4, to first order: [+-]\d+\.\d\d nats", shown)


RUN_NOTEBOOK = """\
import json, sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
client = nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3",
                                 resources={"metadata": {"path": sys.argv[2]}})
client.execute()
print(json.dumps([[output for output in cell.outputs] for cell in notebook.cells
                  if cell.cell_type == "code"]))
"""


def test_the_notebook_is_executed(folder, tmp_path):
    library("nbclient")
    library("ipykernel")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert '"../.demo/index"' in "".join(code[0]["source"])
    code[0]["source"] = [f"INDEX = {str(folder / 'index')!r}\n", f"PROMPT = {PROMPT!r}\n",
                         f"COMPLETION = {COMPLETION!r}\n", f"OTHER = {OTHER!r}\n"]
    copy = tmp_path / "notebook.ipynb"
    copy.write_text(json.dumps(notebook))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    ended = subprocess.run([sys.executable, "-c", RUN_NOTEBOOK, str(copy), str(tmp_path)],
                           capture_output=True, text=True, env=environment, timeout=HANG)
    assert ended.returncode == 0, ended.stderr
    outputs = json.loads(ended.stdout.splitlines()[-1])
    shown = [output["data"] for cell in outputs for output in cell if "data" in output]
    assert len(shown) == len(code) - 1  # all but the parameters
    cards = [data["text/html"] for data in shown if "lexical overlap" in data.get("text/html", "")]
    assert len(cards) == 2 and all("<style>" in card for card in cards)
    assert "True" in [data["text/plain"] for data in shown]  # the shares add up
    assert "<table" in shown[3]["text/html"]
