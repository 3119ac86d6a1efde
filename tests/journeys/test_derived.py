"""Derived fields and classes from a build to the totals of their groups."""

import csv
import io
import json

import pytest
import torch
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import DamagedIndexError, InputError
from gradindex.storage import manifest
from search.rank.grouping import read_grouping
from support.task_models import (
    answers,
    network_of_texts,
    save,
    sentences,
    tokenizer_of_texts,
)

SMALL = {"bits": 512, "fit_sequences": 24, "batch_tokens": 64, "segment_size": 10, "seq_len": 16}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
ASKED = {"prompt": "why was it", "chosen": " a great film", "rejected": " a bad film"}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words):
    shown = CliRunner().invoke(main_group, [str(word) for word in words])
    assert shown.exit_code == 0, shown.output
    return shown


def longer(row):
    return len(row["chosen"].split()) - len(row["rejected"].split())


@pytest.fixture(scope="module")
def rewarder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewarder")
    return save(folder, network_of_texts("bert", 1, torch.float32),
                tokenizer_of_texts())


@pytest.fixture(scope="module")
def built(rewarder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("derived")
    rows = [{**row, "rejected": row["rejected"] + " very" * (n % 4), "annotator": n % 3}
            for n, row in enumerate(answers(24))]
    out = folder / "index"
    run("build", rewarder, written(folder / "pairs.jsonl", rows), "-o", out, *FLAGS,
        "--keep-fields", "annotator", "--derive", "length-difference", "--derive",
        " longer-chosen,")
    return out, rows


def totals_by(index, result, key):
    """The exact total of each group, and how many are in it, from the records."""
    exact = {hit.id: hit.influence for hit in result}
    found = {}
    for record in index.snapshot.records(range(len(index))):
        name = key(record)
        total, count = found.get(name, (0.0, 0))
        found[name] = total + exact[record.id], count + 1
    return found


def test_a_derived_field_is_a_field_like_any_other(built):
    out, rows = built
    index = gradindex.open(out)
    assert index.manifest.plan.derive == ("length-difference", "longer-chosen")
    asked = {**ASKED, "k": len(rows), "shortlist": "all"}
    result = index.search(**asked, group_by="longer-chosen")
    for hit in result:
        row = rows[hit.row - 1]
        assert hit.fields == {"annotator": row["annotator"], "length-difference": longer(row),
                              "longer-chosen": longer(row) > 0}
    expected = totals_by(index, result, lambda record: record.parts[0].fields["longer-chosen"])
    assert {group.value for group in result.groups} == {True, False} == set(expected)
    for group in result.groups:
        total, count = expected[group.value]
        assert group.influence == pytest.approx(total, rel=1e-3) and group.sequences == count
    assert result.groups[0].z > 0 and result.groups[1].z == pytest.approx(-result.groups[0].z)


def test_lengths_make_quarters(built):
    out, rows = built
    index = gradindex.open(out)
    result = index.search(**ASKED, k=24, shortlist="all", group_by="length-difference")
    edges = [[int(end) for end in group.value.split(" to ")] for group in result.groups]
    assert sum(group.sequences for group in result.groups) == len(rows)
    exact = {hit.fields["length-difference"]: 0.0 for hit in result}
    for hit in result:
        exact[hit.fields["length-difference"]] += hit.influence
    for group, (low, *high) in zip(result.groups, edges, strict=True):
        inside = [value for value in exact if low <= value <= (high or [low])[0]]
        assert group.influence == pytest.approx(sum(exact[value] for value in inside), rel=1e-3,
                                                abs=1e-6)
    assert len(result.groups) > 1


def test_an_append_derives_the_same(built, rewarder, tmp_path):
    _, rows = built
    out = tmp_path / "index"
    gradindex.build(rewarder, written(tmp_path / "a.jsonl", rows[:12]), out,
                    derive=["longer-chosen"], **SMALL)
    # a field of the data with that name doesn't come instead
    more = [{**row, "longer-chosen": "mine"} for row in rows[12:]]
    index = gradindex.append(out, written(tmp_path / "b.jsonl", more))
    found = [record.parts[0].fields for record in index.snapshot.records(range(len(index)))]
    assert found == [{"longer-chosen": longer(row) > 0} for row in rows]


def test_data_with_groups(built, tmp_path):
    out, _ = built
    told = ["-p", ASKED["prompt"], "--chosen", ASKED["chosen"], "--rejected", ASKED["rejected"],
            "-k", 6, "--group-by", "longer-chosen"]
    shown = run("search", out, *told).stdout
    assert "total influence by longer-chosen, ± the code's error, by z" in " ".join(shown.split())
    assert "all 2 together" in shown
    saved = tmp_path / "result.json"
    run("search", out, *told, "-o", saved)
    content = json.loads(saved.read_text())
    groups = {group["value"]: group for group in content["groups"]}
    for group in groups.values():
        assert group["z"] == pytest.approx(group["excess"] / group["excess_error"])
        assert group["unsure"] == (abs(group["z"]) < 2)
    assert content["total"]["z"] is None
    result = gradindex.Result.from_json(saved.read_text())
    assert [group.z for group in result.groups] == [group["z"] for group in content["groups"]]
    page = tmp_path / "result.html"
    run("export", saved, "-o", page)
    mark = "?" if result.groups[0].unsure else ""
    assert f'<td class="n">{result.groups[0].z:+.1f}{mark}</td>' in page.read_text()
    table = tmp_path / "result.csv"
    run("export", saved, "-o", table)
    read = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(read) == 6
    for line in read:
        own = groups[line["field:longer-chosen"] == "True"]
        assert line["group_value"] == str(own["value"])
        assert float(line["group_z"].lstrip("'")) == own["z"]
        assert int(line["group_sequences"]) == own["sequences"]
        assert line["group_unsure"] == str(own["unsure"])
    # without groups there are no such columns
    run("search", out, *told[:-2], "-o", table)
    assert "group" not in table.read_text().splitlines()[0]


def test_what_is_not_there_is_refused(built, rewarder, tmp_path):
    out, rows = built
    data = written(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match="--derive length: expected one or more of length-diff"):
        gradindex.build(rewarder, data, tmp_path / "index", derive=["length"], **SMALL)
    assert not (tmp_path / "index").exists()
    gradindex.build(rewarder, data, tmp_path / "plain", **SMALL)
    with pytest.raises(InputError, match="has no such field; build it with derive longer-chosen"):
        gradindex.open(tmp_path / "plain").search(**ASKED, group_by="longer-chosen")
    with pytest.raises(InputError, match="kept were annotator, length-difference, longer-chosen"):
        gradindex.open(out).search(**ASKED, group_by="label")


def test_records_without_the_number_that_the_manifest_promises(built):
    out, _ = built
    contents = gradindex.open(out).snapshot.contents
    read = contents.records

    class Stranger(type(contents)):
        def records(self, rows):
            found = read(rows)
            found[0].parts[0].fields["length-difference"] = "12"
            return found

    contents.__class__ = Stranger
    with pytest.raises(DamagedIndexError, match="as no number of tokens"):
        read_grouping(contents, [], "length-difference")
    assert manifest.load(out).plan.record_fields[0] == "annotator"


# ---- classes


def test_a_classifiers_rows_are_grouped_by_their_class(tmp_path):
    model = save(tmp_path / "model", network_of_texts("bert", 2, torch.float32,
                                                      **NAMES), tokenizer_of_texts())
    rows = sentences(30)
    index = gradindex.build(model, written(tmp_path / "a.jsonl", rows), tmp_path / "index",
                            **SMALL)
    asked = {"text": "the film was so great", "label": "positive", "k": 30, "shortlist": "all"}
    result = index.search(**asked, group_by="label")
    for group in result.groups:
        own = [hit.influence for hit in result if hit.label == group.value]
        assert group.sequences == len(own) == 15
        assert group.influence == pytest.approx(sum(own), rel=1e-3)
    assert {group.value for group in result.groups} == {"negative", "positive"}
    with pytest.raises(InputError, match="expected document, source, label or a field"):
        index.search(**asked, group_by="number")
    with pytest.raises(InputError, match="the index's task is classification"):
        index.search(**asked, group_by="longer-chosen")
    # a field that was kept under that name is what was asked for
    kept = gradindex.build(model, [{**row, "label": None, "stars": row["label"]} | {
        "label": n % 3} for n, row in enumerate(rows)], tmp_path / "kept", label_field="stars",
        keep_fields=["label"], **SMALL)
    result = kept.search(**asked, group_by="label")
    assert {group.value: group.sequences for group in result.groups} == {0: 10, 1: 10, 2: 10}
