"""An audit on the command line: every form it is written in, and what is refused."""

import base64
import csv
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser

import click
import numpy as np
import pyarrow.parquet
import pytest
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import InputError
from search.show import html
from search.study.audit_page import STYLES
from search.study.audit_text import render
from search.study.truth import INSPECTED
from support.task_models import answers, network_of_texts, save, sentences, tokenizer_of_texts

SMALL = {"bits": 512, "fit_sequences": 20, "batch_tokens": 64, "segment_size": 7, "seq_len": 16}
NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
BAD = "</style></pre><script>alert(1)</script><img src=x>{{7*7}}"
FIELDS = {"flipped": bool, "number": int, "weight": float, "note": str, "mixed": None,
          "text": str, "field:text": str}


def rows():
    """Rows with a field of every kind, two of which have names of ours."""
    found = sentences(30)
    for number, row in enumerate(found):
        row["flipped"] = number % 7 == 3
        row["weight"] = number if number % 2 else number / 4
        row["note"] = ["=1+1", BAD, "\x1b[2J\u202e"][number % 3]
        row["mixed"] = [number, f"n{number}", {"a": [number]}, None][number % 4]
        row["text"], row["field:text"] = f"of the data {number}", "again"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an index, `i`, and a file of trusted queries."""
    made = tmp_path_factory.mktemp("audited")
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    model = save(made / "model", network_of_texts("bert", 2, **NAMES), tokenizer_of_texts())
    gradindex.build(model, made / "rows.jsonl", made / "i", text_field="sentence",
                    keep_fields=list(FIELDS), id_field="number", **SMALL)
    (made / "trusted.jsonl").write_text(
        json.dumps({"text": "a good film", "label": "positive"}) + "\n"
        + json.dumps({"sentence": "a bad film", "label": 0, "id": "bad"}) + "\n")
    return made


@pytest.fixture(scope="module")
def found(folder):
    return gradindex.open(folder / "i").audit(truth="flipped", exact=20)


def run(*words, code=0):
    shown = CliRunner().invoke(main_group, ["audit", *map(str, words)], standalone_mode=False)
    assert (shown.exception, shown.return_value) == (None, code), shown.output[:2000]
    return shown


def close(one, other):
    return one == pytest.approx(other, rel=1e-6) if isinstance(other, float) else one == other


def test_columns_are_ours_and_the_kept_fields_by_their_own_names(found):
    by_id = {row["number"]: row for row in rows()}
    for row in found.to_list():
        original = by_id[row["id"]]
        for name in ("flipped", "number", "weight", "note", "mixed"):
            assert row[name] == original[name]
        # those that have a name of ours keep theirs behind a word
        assert row["field:field:text"] == original["text"] and row["field:text"] == "again"
        assert row["text"] == f"[CLS] {original['sentence']} [SEP]"
        assert row["label"] == original["label"] and row["corrupted"] == original["flipped"]
        assert (row["source"].endswith("rows.jsonl"), row["row"]) == (True, original["number"] + 1)
        assert row["user_id"] == original["number"]
    assert [row["rank"] for row in found.to_list()] == list(range(1, 31))


def test_every_form_says_the_same(folder, found, tmp_path):
    expected, names = found.to_list(), list(found.to_list()[0])
    for form in ("csv", "json", "jsonl", "parquet", "html"):
        run(folder / "i", "--truth", "flipped", "--exact", 20, "-o", tmp_path / f"a.{form}")
    whole = json.loads((tmp_path / "a.json").read_text())
    assert whole["ranked_by"] == found.ranked_by and (whole["sequences"], whole["exact"]) == (
        30, 20)
    assert [one["signal"] for one in whole["detections"]] == [
        one.signal for one in found.detections]
    assert list(whole["detections"][0]["found"]) == [str(share) for share in INSPECTED]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert [str(table.schema.field(name).type) for name in ("flipped", "number", "weight", "note",
            "mixed", "rank", "suspicion", "user_id")] == [
        "bool", "int64", "double", "string", "string", "int64", "double", "string"]
    assert json.loads(table.schema.metadata[b"gradindex"])["ranked_by"] == found.ranked_by
    with (tmp_path / "a.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    for row, of_json, line, of_parquet, of_csv in zip(
            expected, whole["rows"], lines, table.to_pylist(), cells, strict=True):
        assert list(of_json) == list(line) == list(of_parquet) == list(of_csv) == names
        for name, value in row.items():
            assert close(of_json[name], value) and close(line[name], value), name
            if name in ("mixed", "user_id"):  # what has no one type is JSON text
                assert of_parquet[name] is None if value is None else \
                    json.loads(of_parquet[name]) == value
            elif isinstance(value, str):
                assert "\x1b" not in of_parquet[name] + of_csv[name]
            else:
                assert close(of_parquet[name], value), name
            if value is None:
                assert of_csv[name] == ""
            elif isinstance(value, float):
                assert float(of_csv[name]) == pytest.approx(value, rel=1e-6)
        if row["note"] == "=1+1":
            assert of_csv["note"] == "'=1+1"  # no spreadsheet runs it


def test_to_standard_output_and_for_people(folder, found, tmp_path):
    shown = run(folder / "i", "--exact", 20, "--truth", "flipped", "--format", "jsonl")
    assert [json.loads(line)["id"] for line in shown.stdout.splitlines()] == [
        row["id"] for row in found.to_list()]
    assert "most suspect first, by all others, cosine" in shown.stderr and "AUROC" in shown.stderr
    shown = run(folder / "i", "--exact", 20, "--truth", "flipped", "-o", tmp_path / "a.csv")
    said = " ".join(shown.stdout.split())
    count = int(found.corrupted.sum())
    for text in ("30 sequences, most suspect first, by all others, cosine",
                 "20 of 30 were scored exactly", "with the largest stored norms", "random",
                 f"{count} of 20 sequences that were scored exactly are", "self-confidence"):
        assert text in said, text
    first = found.to_list()[0]
    assert re.search(rf"^ +1 +{first['id']} ", shown.stdout, re.MULTILINE)
    assert "\x1b" not in shown.stdout


def test_a_link_to_a_pipe_is_written_to(folder, found, tmp_path):
    """As /dev/stdout is: the pipe has no name of its own."""
    reader, writer = os.pipe()
    (tmp_path / "out").symlink_to(f"/proc/self/fd/{writer}")
    shown = run(folder / "i", "--exact", 1, "--format", "csv", "-o", tmp_path / "out")
    os.close(writer)
    with os.fdopen(reader) as file:
        assert len(list(csv.DictReader(file))) == 30
    assert shown.stdout == "" and "1 of 30 were scored exactly" in shown.stderr
    assert (tmp_path / "out").is_symlink()
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    run(folder / "i", "--exact", 1, "-o", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").is_file()


def test_against_a_file_of_trusted_queries(folder):
    shown = run(folder / "i", "--against", folder / "trusted.jsonl", "--format", "json")
    whole = json.loads(shown.stdout)
    expected = gradindex.open(folder / "i").audit(against=folder / "trusted.jsonl")
    assert whole["ranked_by"] == "harm, cosine"
    assert [row["id"] for row in whole["rows"]] == [row["id"] for row in expected.to_list()]
    for row, one in zip(whole["rows"], expected.to_list(), strict=True):
        assert row["harm"] == pytest.approx(one["harm"], rel=1e-5)
        assert row["harm_cosine"] == row["suspicion"] == pytest.approx(one["suspicion"], rel=1e-5)
        assert -1 <= row["harm_cosine"] <= 1
        assert {type(row[f"{name}_by_code"]) for name in ("harm", "harm_cosine")} == {float}


def test_a_trusted_query_that_can_not_be_used_is_named(folder, tmp_path):
    file = tmp_path / "trusted.jsonl"
    file.write_text('{"text": "a good film", "label": "positive"}\n{"text": "a bad film"}\n'
                    '{"text": "a film", "label": "fine"}\n')
    shown = run(folder / "i", "--against", file, "--format", "json", code=2)
    assert f"left out: {file}:2: a trusted query says what is right" in shown.stderr
    assert f"left out: {file}:3: " in shown.stderr and "fine" in shown.stderr
    assert "trusted set of 1 query." in json.loads(shown.stdout)["sentences"][0]
    with pytest.raises(InputError, match=r"^against: .*trusted.jsonl:2: a trusted query"):
        gradindex.open(folder / "i").audit(against=file)


class Page(HTMLParser):
    """The tags of a page, its style and its policy."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.policy = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_hostile_text_as_text(folder, found, tmp_path):
    found.write(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags
    assert any(BAD in one for one in page.texts) and "\x1b" not in text and "\u202e" not in text
    style = "".join(map(html.asset, STYLES))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert page.policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert "style=" not in text and "http" not in re.sub(r"http-equiv", "", text)
    said = " ".join(" ".join(page.texts).split())
    assert f"{found.detections[0].auroc:.3f}" in said and "Found against inspected" in said
    # of one prediction a sequence the loss and self-confidence rank alike: one line, both names
    assert "loss, self-confidence" in said and "from others of negative" in said
    assert page.tags.count("polyline") == 3 and page.tags.count("svg") == 5
    items = re.findall(r'<li value="(\d+)"', text)
    assert items == [str(number) for number in range(1, 31)]


def test_a_narrow_terminal_holds_every_line(found):
    narrow, wide = render(found, 80), render(found, 140)
    assert max(map(len, narrow.splitlines())) <= 80
    for text, heads in ((narrow, ["in 5%", "in 30%"]), (wide, ["found in 5%", "found in 30%"])):
        [head] = [line for line in text.splitlines() if "AUROC" in line]
        assert all(f"  {name}" in head for name in heads)
        [row] = [line for line in text.splitlines() if line.startswith("self-confidence ")]
        last = found.detections[[one.signal for one in found.detections].index("self-confidence")]
        assert row.split()[1:] == [f"{last.auroc:.3f}", f"{last.average_precision:.3f}",
                                   *(f"{100 * share:.0f}%" for share in last.found)]


def test_a_notebook_and_a_data_frame(found):
    shown = Page(found._repr_html_())
    assert shown.tags.count("tr") == 21 and "script" not in shown.tags
    frame = found.to_pandas()
    assert len(frame) == 30 and frame["id"].tolist() == [row["id"] for row in found.to_list()]
    assert frame["suspicion"].isna().sum() == 10


def test_pairs_show_both_answers(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers(8)))
    model = save(tmp_path / "model", network_of_texts("bert", 1), tokenizer_of_texts())
    gradindex.build(model, tmp_path / "pairs.jsonl", tmp_path / "i", task="reward",
                    keep_fields=["margin"], **SMALL)
    for form in ("csv", "html"):
        shown = run(tmp_path / "i", "-o", tmp_path / f"a.{form}")
    assert "by all others, cosine" in shown.stdout
    lines = [line for line in shown.stdout.splitlines() if "▸" in line]
    # what both begin with, "why was it", tells nothing apart
    assert len(lines) == 8 and not [line for line in lines if "why" in line]
    for row in gradindex.open(tmp_path / "i").audit().to_list():
        [line] = [line for line in lines if line.split()[1] == str(row["id"])]
        sides = [text.rstrip("…") for text in line.split("  ")[-1].removeprefix("…").split(" ▸ …")]
        assert f"why was it {sides[0]}" in row["chosen"]
        assert f"why was it {sides[1]}" in row["rejected"]
    said = " ".join(" ".join(Page((tmp_path / "a.html").read_text()).texts).split())
    assert said.count(" chosen [CLS] why was it") == said.count(" rejected [CLS] why was it") == 8
    assert "· from all others " in said and "below 0, they speak against it" in said
    with (tmp_path / "a.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    original = {f"{row['chosen'].strip()}": row for row in answers(8)}
    for row in cells:
        assert "text" not in row and "label" not in row and "loss_per_token" not in row
        [expected] = [one for name, one in original.items() if name in row["chosen"]]
        assert expected["rejected"].strip() in row["rejected"]
        assert float(row["margin"]) == expected["margin"]


@pytest.mark.parametrize("words, message", [
    (["-o", "a.xlsx"], "expected a name that ends in .csv, .parquet, .json, .jsonl or .html"),
    (["--exact", "none"], "--exact none: expected a number above 0, or all"),
    (["--truth", "absent"], "--truth absent: expected a field that was kept at the build"),
    (["--truth", "note"], "--truth note holds"),
    (["--truth", "label"], "--truth label is the label that the model was trained on, which is "
     "what is audited. Give a field that says what is corrupted, or the true label"),
    (["--against", "absent.jsonl"], "File 'absent.jsonl' does not exist"),
    (["--against", "empty.jsonl"], "--against empty.jsonl holds no query"),
    (["-o", "absent/a.csv"], "there is no folder"),
    (["--against", "trusted.jsonl", "-o", "trusted.jsonl"], "that file is read here"),
])
def test_what_is_refused_is_told_before_the_model_is_read(
    words, message, folder, tmp_path, monkeypatch
):
    shutil.copytree(folder / "i", tmp_path / "i")
    shutil.copy(folder / "trusted.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    # no model is there: whatever needs it would say so instead
    done = CliRunner().invoke(main_group, ["audit", "i", "--model", "absent", *words],
                              standalone_mode=False)
    error = done.exception
    assert isinstance(error, (InputError, click.UsageError)) and done.stdout == ""
    assert message in getattr(error, "message", str(error)) and error.exit_code == 2


def test_a_shared_snapshot_is_refused(folder):
    from search.rank.ray_search import SharedSnapshot

    index = gradindex.open(folder / "i")
    index.snapshot = SharedSnapshot.__new__(SharedSnapshot)
    index.snapshot.manifest = gradindex.open(folder / "i").manifest
    with pytest.raises(InputError, match="can't go with ray"):
        index.audit()


def test_values_of_a_field_that_has_no_value_everywhere(folder):
    """A column of numbers stays one where some rows have none."""
    index = gradindex.open(folder / "i")
    kinds = index.audit(exact=1).rows.fields
    assert kinds == {name: FIELDS[name] for name in sorted(FIELDS)}
    assert np.isnan(index.audit(exact=1).to_pandas()["self_influence"]).sum() == 29
