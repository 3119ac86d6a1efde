"""How data are read is in the plan, is said before anything is fitted, and holds for appends."""

import io
import json
import os

import pytest
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import InputError
from gradindex.progress import Progress
from support.documents import small_documents

FAST = {"bits": 512, "segment_size": 32, "batch_tokens": 256, "seq_len": 8}


@pytest.fixture
def said():
    return io.StringIO()


@pytest.fixture
def table(tmp_path):
    """Twelve rows of a table without a header, the first of them long."""
    texts = [document["text"] for document in small_documents()[:12]]
    path = tmp_path / "data.tsv"
    path.write_text("".join(f"{number}\t{text}\n" for number, text in enumerate(texts)))
    return path


def counts(out):
    manifest = gradindex.open(out).manifest
    return manifest.documents, manifest.sequences, manifest.plan


def test_truncation_and_columns_hold_for_appends(
    model_folder, table, tmp_path, said, few_queries
):
    out, progress = tmp_path / "index", Progress(said)
    gradindex.build(model_folder, table, out, truncate=True, columns=["n", "text"], id_field="n",
                    progress=progress, **FAST)
    lines = said.getvalue().splitlines()
    assert lines[:2] == ["task: causal", "rows: text"]
    assert "12 of 12 documents are longer than 8 tokens: cut there, what is behind is left out" \
        in lines
    assert any(line.startswith("warning: 12 sequences are few: ranks") for line in lines)
    documents, sequences, plan = counts(out)
    assert (documents, sequences, plan.truncate, plan.columns) == (12, 12, True, ("n", "text"))

    more = tmp_path / "more.tsv"
    more.write_text(table.read_text().replace("number", "numeral"))
    gradindex.append(out, more, progress=progress)
    found = gradindex.open(out)
    assert (found.manifest.documents, found.manifest.sequences) == (24, 24)
    assert sum(line.startswith("warning: ") for line in said.getvalue().splitlines()) == 1
    contents = found.snapshot.contents
    records = contents.records(contents.places)
    assert [record.parts[0].user_id for record in records] == [str(n) for n in range(12)] * 2
    assert {len(record.tokens) for record in records} == {8}


def test_windows_are_the_default_and_said(model_folder, table, tmp_path, said):
    made = gradindex.estimate(model_folder, table, tmp_path / "index", columns=["n", "text"],
                              progress=Progress(said), **FAST)
    cut = ("12 of 12 documents are longer than 8 tokens: cut into windows; --truncate drops what "
           "is behind, as trainers do")
    assert cut in made.lines()[1] and made.sequences > 12
    assert "warning: " in said.getvalue()


def test_a_form_holds_for_appends(model_folder, tmp_path, said, few_queries):
    rows = [{"instruction": f"Name a fruit, number {n}", "input": "red", "output": "the apple",
             "text": "no"} for n in range(8)]
    out = tmp_path / "index"
    gradindex.build(model_folder, rows, out, rows="alpaca", progress=Progress(said),
                    **{**FAST, "seq_len": 60})
    assert said.getvalue().startswith(
        "task: causal\nrows: alpaca (instruction, output), read as Alpaca's prompt")
    gradindex.append(out, [{**row, "input": "green"} for row in rows])
    found = gradindex.open(out)
    assert (found.manifest.kind, found.manifest.plan.rows) == ("completion", "alpaca")
    assert found.manifest.documents == 16
    with pytest.raises(InputError, match=r"--rows alpaca needs the fields instruction and output"):
        gradindex.append(out, [{"text": "a b c"}])


def run(*words):
    shown = CliRunner().invoke(main_group, [str(word) for word in words])
    return shown.exit_code, str(shown.exception or "") + shown.output


def test_flags_are_checked_before_the_model_is_loaded(model_folder, tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"text": "hello"}) + "\n")
    for flags, said in (
        (["--truncate", "--pack"], "--pack joins documents and cuts nothing off"),
        (["--rows", "nonsense"], "--rows nonsense: expected one of text"),
        (["--columns", "a,a"], "expected a list of names"),
        (["--columns", "a,b"], "none of the data is called so. Call a table that"),
        (["--columns", ","], "expected a list of names"),
    ):
        _, shown = run("build", model_folder, lines, "-o", tmp_path / "x", *flags)
        assert said in shown
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match=r"columns='text': expected a list of names"):
        gradindex.build(model_folder, lines, tmp_path / "x", columns="text")


def test_a_folder_to_write_to_may_have_any_name(model_folder, table, tmp_path):
    out = tmp_path / os.fsdecode(b"ind\xe9x")
    built = gradindex.build(model_folder, table, out, columns=["n", "text"], bits=512)
    assert len(gradindex.open(out)) == len(built) > 0
