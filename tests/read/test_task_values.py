"""What may stand in the fields of labelled texts and of pairs, whoever wrote them."""

import csv
import decimal
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gradindex.errors import InputError
from gradindex.progress import Progress
from gradindex.storage.build_plan import CorpusSettings
from indexer.read.corpus import Corpus, CorpusFacts
from indexer.read.ingest import check_classes, check_read
from support.task_models import WORDS, tokenizer_of_texts

NAMES = ("negative", "positive")
LABELLED = {"text": "good film", "label": 1}
PAIR = {"prompt": "why was it", "chosen": " good", "rejected": " bad",
        "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.5}
CHAT = {"prompt": [{"role": "user", "content": "why"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}]}
TEMPLATE = ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant {% endif %}")


def corpus(data, task="classification", length=32, **settings):
    labels = {"labels": NAMES} if task == "classification" else {}
    return Corpus(data, tokenizer_of_texts(), CorpusSettings(
        length, task=task, **{**labels, **settings}), vocabulary=40)


def read(rows, task="classification", **settings):
    """The records of rows, and the reason why the last of them was left out, if it was."""
    found = corpus([rows], task, **settings)
    records = list(found.sequences())
    [said] = found.facts.examples or [None]
    if said is not None:
        assert said.startswith(f"the data given:{len(rows)}: ") and len(said) < 400
    assert len(records) == len(rows) - (said is not None)
    return records, said


# ---- labels and texts


@pytest.mark.parametrize("label, number", [
    (True, 1), (np.bool_(False), 0), (np.float32(1), 1), (1.0, 1), ("1.0", 1), (" Positive\t", 1),
    (decimal.Decimal(1), 1), (np.str_("negative"), 0), ("0", 0),
])
def test_labels_of_every_kind_that_means_a_class(label, number):
    records, said = read([LABELLED, {"text": "bad", "label": label}])
    assert said is None and records[-1].label == number and type(records[-1].label) is int


@pytest.mark.parametrize("label, reason", [
    ([0, 1], "several labels"), ([], "several labels"), (np.array([1, 0]), "several labels"),
    ({}, "no class (a dict)"), ({"id": 1}, "no class (a dict)"), (b"good", "no class (a bytes)"),
    (float("nan"), "no label"), (None, "no label"), ("", "no label"), (" \n", "no label"),
    (decimal.Decimal("NaN"), "no label"), (float("inf"), "no whole number (inf)"),
    (decimal.Decimal("0.5"), "no whole number (0.5)"), (10**400, "found a huge number"),
    (-(10**400), "found a huge number"), (10**20, "found 100000000000000000000"),
    ("9" * 400, "no whole number (inf)"), ("-1", "unlabelled"), (-2, "found -2, expected 0 to 1"),
    ("1e0", "found '1e0', expected negative, positive"), (1 + 0j, "no class (a complex)"),
    ("\ud800", "outside the model's classes"), ("posi\x00tive", "outside the model's classes"),
    ("x" * 10**6, "outside the model's classes"),
])
def test_labels_that_are_no_class(label, reason):
    records, said = read([LABELLED, {"text": "bad", "label": label}])
    assert reason in said and records[0].label == 1


@pytest.mark.parametrize("text, reason", [
    ("\ud800 good", "a lone surrogate"), (" \u2003\n", "empty text"), ("", "empty text"),
    (None, "no text"), (float("nan"), "no text"), (5, "not text (a int)"), (b"good", "a bytes"),
    (["good"], "a list"), ({"a": 1}, "a dict"),
])
def test_texts_that_are_none(text, reason):
    assert reason in read([LABELLED, {"text": text, "label": 1}])[1]
    both = {**LABELLED, "text_b": "bad"}
    assert reason.split(" ")[0] in read([both, {**both, "text_b": text}])[1]


@pytest.mark.parametrize("task", ["reward", "preference"])
@pytest.mark.parametrize("text, reason", [
    ("\ud800 good", "a lone surrogate in rejected"), (" \n", "empty rejected"),
    (None, "no rejected"), (float("nan"), "no rejected"), (5, "not text (a int)"),
    (b"good", "not text (a bytes)"),
])
def test_answers_that_are_none(task, text, reason):
    assert reason in read([PAIR, {**PAIR, "rejected": text}], task)[1]


def test_texts_that_tokenizers_take():
    texts = ["good\x00film", "good " * 200_000, "x" * 10**6]
    records, said = read([LABELLED, *({"text": text, "label": 0} for text in texts)])
    assert said is None and [len(record.tokens) for record in records] == [4, 5, 32, 3]
    long = {**PAIR, "rejected": " good" * 200_000}
    assert "a pair longer than 32 tokens (found 200005" in read([PAIR, long], "reward")[1]
    records, said = read([PAIR, long], "preference")
    assert said is None and len(records[1].tokens) == records[1].border + 32


def test_a_length_that_leaves_nothing_of_a_text():
    with pytest.raises(InputError, match=r"no row that can be used.*a text, or two, with a label"):
        found = corpus([[LABELLED]], length=2)
        list(found.sequences())
        check_read(found)
    [kept] = corpus([[LABELLED]], length=3).sequences()
    assert kept.tokens.tolist() == [2, 4, 3]
    two = corpus([[{**LABELLED, "text_b": "bad"}]], length=4)
    assert not list(two.sequences())
    assert two.facts.skipped == {"a text without a token of its own": 1}


# ---- numbers of pairs


@pytest.mark.parametrize("value, number", [
    (None, 0.0), (float("nan"), 0.0), ("", 0.0), (" ", 0.0), ("-1.5", -1.5), ("2e-1", 0.2),
    (3, 3.0), (np.float32(0.5), 0.5), (decimal.Decimal("0.25"), 0.25),
])
def test_margins(value, number):
    records, said = read([PAIR, {**PAIR, "margin": value}], "reward")
    assert said is None and records[-1].offset == pytest.approx(number)


@pytest.mark.parametrize("value", [
    float("inf"), -float("inf"), "inf", "nan", "much", "1_0", True, [1.0], {}, b"1", 10**400,
    10**40, 1e300, "0x1",
])
def test_numbers_that_are_none(value):
    assert "'margin' is no number" in read([PAIR, {**PAIR, "margin": value}], "reward")[1]
    assert "'ref_chosen_logps' is no number" in read(
        [PAIR, {**PAIR, "ref_chosen_logps": value}], "preference")[1]


def test_what_a_reference_says_is_a_sum_of_log_p():
    assert "is no sum of log p (found 3" in read(
        [PAIR, {**PAIR, "ref_rejected_logps": 3.0}], "preference")[1]
    for none in (None, "", float("nan")):
        assert "missing field 'ref_chosen_logps'" in read(
            [PAIR, {**PAIR, "ref_chosen_logps": none}], "preference")[1]


# ---- messages


@pytest.mark.parametrize("task", ["reward", "preference"])
@pytest.mark.parametrize("value", [
    [], [{}], [{"role": "assistant"}], [{"content": "x"}], [["x"]], [1], [None],
    {"role": "assistant"}, [{"role": 5, "content": "x"}], [{"role": "assistant", "content": 5}],
])
def test_messages_of_another_shape(task, value):
    references = {name: value for name, value in PAIR.items() if name.startswith("ref")}
    good, bad = {**CHAT, **references}, {**CHAT, **references, "chosen": value}
    found = corpus([[good, bad]], task, chat_template=TEMPLATE)
    assert len(list(found.sequences())) == 1
    assert [one.partition(": ")[0] for one in found.facts.examples] == ["the data given:2"]


def test_messages_beside_texts_and_as_text():
    assert "some are texts and some messages" in read([PAIR, {**PAIR, **{
        "chosen": CHAT["chosen"]}}], "reward")[1]
    assert "chosen is messages as JSON text" in read([PAIR, {**PAIR, **{
        name: json.dumps(CHAT[name]) for name in ("chosen", "rejected")}}], "reward")[1]
    with pytest.raises(InputError, match=r"no chat template.*--chat-template FILE"):
        list(corpus([[CHAT]], "reward").sequences())


def test_a_prompt_may_be_empty_or_come_later():
    bare = {"chosen": " good film", "rejected": " bad film"}
    [one, other], said = read([bare, {**bare, "prompt": "why"}], "reward")
    assert said is None and len(other.tokens) == len(one.tokens) + 2
    for empty in ("", " ", None, float("nan")):
        records, said = read([PAIR, {**bare, "prompt": empty}], "reward")
        assert said is None and records[1].tokens.tolist() == one.tokens.tolist()
    assert "the same (as tokens)" in read([PAIR, {**PAIR, "rejected": "  good "}], "reward")[1]


# ---- fields


@pytest.mark.parametrize("task, given, message", [
    ("reward", {"label_field": "x"}, "--label-field has no use with --task reward"),
    ("classification", {"chosen_field": "x"}, "--chosen-field has no use"),
    ("preference", {"margin_field": "margin"}, "--margin-field has no use"),
    ("causal", {"text_b_field": "x"}, "--text-b-field has no use with --task causal"),
    ("reward", {"margin_field": "x"}, "--margin-field: the first record of .* has no field 'x'"),
    ("classification", {"label_field": "x"}, "--label-field: .* has no field 'x'; it has text"),
])
def test_fields_that_a_task_or_the_data_lack(task, given, message):
    with pytest.raises(InputError, match=message):
        corpus([[{**LABELLED, **PAIR}]], task, **given)


@pytest.mark.parametrize("given", [{"pack": True}, {"truncate": True}])
@pytest.mark.parametrize("task", ["classification", "reward", "preference"])
def test_how_texts_of_next_tokens_are_cut_is_refused(task, given):
    with pytest.raises(InputError, match=f"--pack and --truncate .* --task {task} a row is one"):
        corpus([[{**LABELLED, **PAIR}]], task, **given)


def test_the_second_text_that_is_named():
    row = {"text": "good", "text_b": "film", "note": "bad", "label": 1}
    [both], _ = read([row], text_b_field="note")
    [first], _ = read([row], text_field="text")
    assert both.tokens.tolist() == [2, 4, 3, 5, 3] and first.tokens.tolist() == [2, 4, 3]


# ---- tables


def test_tables_have_numbers_as_text(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected", "margin"])
        table.writerows(["why", " good", " bad", margin] for margin in ("0.5", "", "wide"))
    found = corpus([path], "reward")
    assert [record.offset for record in found.sequences()] == [0.5, 0.0]
    assert found.facts.examples == [f"{path}:3: field 'margin' is no number ('wide')"]


def noted(names):
    features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"_type": "Value"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def parquet(path, names=None):
    table = pyarrow.table({"text": ["good", "bad"], "label": [1, 0]})
    pyarrow.parquet.write_table(table.replace_schema_metadata(names and noted(names)), path)
    return path


def test_names_that_a_data_set_brings(tmp_path):
    for names in (None, ["negative", "positive"], ["Negative", "Positive"]):
        found = corpus([parquet(tmp_path / "rows.parquet", names)])
        assert [record.label for record in found.sequences()] == [1, 0]
        assert not any("labels:" in note for note in found.notes)
    with pytest.raises(InputError, match=r"stand for positive,negative, .*--labels positive,neg"):
        corpus([parquet(tmp_path / "rows.parquet", ["positive", "negative"])])
    [said] = [note for note in corpus([parquet(tmp_path / "rows.parquet", ["neg", "pos"])]).notes
              if note.startswith("labels:")]
    assert "stand for neg,pos" in said and "negative,positive here" in said


def test_what_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["positive", "negative"])})
    data = datasets.Dataset.from_dict({"text": ["good"], "label": [0]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    for given in (data, tmp_path / "saved"):
        with pytest.raises(InputError, match="stand for positive,negative"):
            corpus([given])
        [record] = corpus([given], labels=("positive", "negative")).sequences()
        assert record.label == 0


def test_columns_of_dictionaries_and_of_objects(tmp_path):
    labels = pyarrow.array(["positive", "negative", None]).dictionary_encode()
    nested = pyarrow.array([{"kind": 1}, None, {"kind": 2}])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(
        {"text": ["good", "bad", "so"], "label": labels, "about": nested}), path)
    found = corpus([path], keep_fields=("about",))
    assert [record.label for record in found.sequences()] == [1, 0]
    assert found.facts.examples == [f"{path}:3: no label"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good"] * 3, "label": nested}), path)
    found = corpus([path])
    assert not list(found.sequences())
    assert found.facts.skipped == {"a label that is no class": 2, "no label": 1}


# ---- classes


def test_one_class_only_and_classes_without_rows():
    def checked(labels, limit=None):
        said = io.StringIO()
        check_classes(CorpusFacts(labels=labels), CorpusSettings(
            8, labels=("a", "b", "c"), limit=limit), Progress(said))
        return said.getvalue()

    assert checked({"a": 3, "b": 1, "c": 9}) == ""
    assert checked({"a": 3, "c": 9}).startswith(
        "warning: no row is of the class b; found 3 × a, 9 × c")
    with pytest.raises(InputError, match=r"all 3 rows are of one class, b: .* from a, c by"):
        checked({"b": 3})
    with pytest.raises(InputError, match="--limit takes the first rows"):
        checked({"b": 3}, limit=3)
    found = corpus([[LABELLED, {"text": WORDS[1], "label": 0}, {"text": "good", "label": 1}]])
    list(found.sequences())
    assert found.facts.labels == {"positive": 2, "negative": 1}


def test_answers_that_nothing_predicts_are_left_out():
    bare = tokenizer_of_texts()
    bare.backend_tokenizer.post_processor = None  # it begins and ends nothing
    row = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    rows = [{**row, "chosen": "good", "rejected": "bad"},
            {**row, "chosen": "good film", "rejected": "bad"}]
    found = Corpus([rows], bare, CorpusSettings(32, task="preference"), vocabulary=40)
    assert len(list(found.sequences())) == 1
    assert found.facts.skipped == {
        "answers of one token without a prompt, which no token before predicts": 1}
