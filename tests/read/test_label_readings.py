"""How labels are read where the model's classes are called otherwise, or have no names."""

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from gradindex.errors import BadRowError, InputError
from gradindex.model.class_labels import label_number
from gradindex.progress import Progress
from gradindex.storage.build_plan import CorpusSettings
from indexer.build_request import make_request
from indexer.read.corpus import Corpus, CorpusFacts
from indexer.read.ingest import check_classes, check_read, report_read
from support.task_models import network_of_texts, tokenizer_of_texts

WITHOUT = ("LABEL_0", "LABEL_1")
STARS = ("1", "2", "3", "4", "5")
WORDED = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
WORDS = ("bad", "so", "good")


def corpus(labels, names, settled=False):
    rows = labels if isinstance(labels, list) and isinstance(labels[0], dict) else [
        {"text": "good film", "label": label} for label in labels]
    return Corpus([rows], tokenizer_of_texts(), CorpusSettings(
        32, task="classification", labels=tuple(names)), vocabulary=40, settled=settled)


def read(labels, names, settled=False):
    """The numbers of the labels, all of them looked at."""
    found = corpus(labels, names, settled)
    numbers = [record.label for record in found.sequences()]
    check_read(found)
    return numbers


def in_csv(path, labels):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *(["good film", one] for one in labels)])
    return path


# ---- numbers


@pytest.mark.parametrize("labels, names, numbers", [
    ([1, "2", 5.0, "3.0"], STARS, [0, 1, 4, 2]),  # names, as 5 is no place among five
    ([0, 1, 4, "2"], WORDED, [0, 1, 4, 2]),  # places, as 0 is no name
    (["1 star", "5 stars", 0], WORDED, [0, 4, 0]),
    ([-1, 0, "1", -1.0], ("-1", "0", "1"), [0, 1, 2, 0]),
    ([1, "2.0", "1.0"], ("1.0", "2.0"), [0, 1, 0]),
    ([0, 1, "2"], ("0", "1", "2"), [0, 1, 2]),  # called by their places
    (["other", 1, 1], ("other", "1"), [0, 1, 1]),
    ([0, *STARS], STARS, [0, 1, 2, 3, 4]),  # one stray 0
    ([0, 1, 1, -1, 2], WORDS, [0, 1, 1, 2]),
    (["bad", "so", "good", 3], WORDS, [0, 1, 2]),  # names, and one stray number
    (["bad", "Good", "2"], ("bad", "good"), [0, 1]),
    (["1 star", "5 stars", "5 stars", 2], WORDED, [0, 4, 4, 2]),
])
def test_numbers_are_places_or_names(labels, names, numbers, tmp_path):
    assert read(labels, names) == numbers
    found = Corpus([in_csv(tmp_path / "rows.csv", labels)], tokenizer_of_texts(), CorpusSettings(
        32, task="classification", labels=names), vocabulary=40)
    assert [record.label for record in found.sequences()] == numbers


@pytest.mark.parametrize("labels, names, by_name, by_place", [
    ([0, 1, 4, 2], STARS, "1,2,3,4,5 if 1", "0,1,2,3,4"),
    (["1", "2", "3"], STARS, "1,2,3,4,5 if 1", "0,1,2,3,4"),  # either
    ([1, 2, 3, 5], WORDED, "1,2,3,4,5 if 1", "0,1,2,3,4"),
    ([2, 3], WORDED, "1,2,3,4,5 if 1", "0,1,2,3,4"),
    ([0, 1, 1], ("1", "0"), "1,0 if 1", "0,1"),
    ([1, "2", 3.0], WORDS, "1,2,3 if 1", "0,1,2"),  # the names tell nothing: there is no 0
    ([1, 2, 1], WITHOUT, "1,2 if 1", "0,1"),
    ([-1, 0, 1], WORDS, "-1,0,1 if -1", "0,1,2"),
])
def test_numbers_that_may_be_either_are_refused(labels, names, by_name, by_place):
    message = f"--labels {by_name} means the first of them, --labels {by_place} if 0 does"
    with pytest.raises(InputError, match=message):
        read(labels, names)
    # as it says
    own = by_name.split(" ")[0]
    kept = [one for one in labels if str(one) in own.split(",")]
    assert read(kept, own.split(","), settled=True) == [
        own.split(",").index(str(int(float(one)))) for one in kept]


def test_what_is_settled_stays_so():
    """As it was said, or in an index that more is appended to; unless the data say otherwise."""
    assert read([1, 2, 2], STARS, settled=True) == [0, 1, 1]
    assert read([2, 3], WORDED, settled=True) == [2, 3]
    assert read([0, 2, 3, 5], WORDED, settled=True) == [0, 2, 3]  # the 5 is a stray one
    assert read([0, 1, 2, 3], WORDS, settled=True) == [0, 1, 2]
    assert read([1, 1, 2, 3], ("0", "1", "2"), settled=True) == [1, 1, 2]
    for labels, names, first in (([1, 1, 2, 3], WORDS, 1), ([2, 3, 5], WORDED, 1),
                                 ([-1, 0, 1], WORDS, -1)):
        with pytest.raises(InputError, match="is read as a place among them, from 0 on, as at the "
                           f"build, where {first} would not be the first of them. Write the cl"):
            read(labels, names, settled=True)
    with pytest.raises(InputError, match=r"is read as a name of these.*--labels 0,1,2,3,4 if the "
                       "data's 0 means the first"):
        read([0, 1, 2], STARS, settled=True)


def test_every_advice_can_be_followed():
    """Names that are given as numbers settle it, also where these are the places."""
    network = network_of_texts("bert", 3)
    rows = [{"text": "good film", "label": label} for label in (0, 1, 2, 3, 3, -1)]
    asked = {"tokenizer": tokenizer_of_texts(), "seq_len": 16}
    for given, settled in (((), False), (WORDS, False), (("0", "1", "2"), True),
                           (("1", "2", "3"), True)):
        found = make_request(network, rows, "nowhere", labels=given, **asked).corpus
        assert found.settled is settled
        numbers = [record.label for record in found.sequences()]
        if settled:
            check_read(found)
            assert numbers == ([0, 1, 2] if given[0] == "0" else [0, 1, 2, 2])
        else:  # more of what counts from 1 than from 0
            with pytest.raises(InputError, match=r"--labels 1,2,3 if 1 means .* --labels 0,1,2 if"):
                check_read(found)


def test_numbers_of_a_data_set_that_names_them_are_places(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=list(STARS))})
    data = datasets.Dataset.from_dict({"text": ["good"] * 3, "label": [1, 2, 2]}, features=features)
    found = Corpus([data], tokenizer_of_texts(), CorpusSettings(
        32, task="classification", labels=STARS), vocabulary=40)
    assert [record.label for record in found.sequences()] == [1, 2, 2] and not found.facts.found
    check_read(found)
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good"] * 2, "label": [1.0, 5.0]}), path)
    found = Corpus([path], tokenizer_of_texts(), CorpusSettings(
        32, task="classification", labels=STARS), vocabulary=40)
    assert [record.label for record in found.sequences()] == [0, 4]


@pytest.mark.parametrize("names, numbers", [
    (("bad", "good"), [1, 0]), (("true", "false"), [0, 1]), (WITHOUT, [1, 0]),
    (("no", "yes"), [1, 0]),
])
def test_true_and_false_of_two_classes(names, numbers):
    for labels in ([True, False], ["true", "FALSE"], [" True", "false "]):
        assert [label_number(one, names) for one in labels] == numbers


@pytest.mark.parametrize("names", [WORDS, ("1", "2")])
def test_true_and_false_of_other_classes(names):
    for label in (True, "true", "False"):
        with pytest.raises(BadRowError, match="outside the model's classes"):
            label_number(label, names)


def test_labels_with_fractions_are_a_regressions():
    with pytest.raises(InputError, match=r"3 labels are no whole numbers, 1 are .*regress"):
        read([0.5, "2.25", 3.75, 1.0], WORDS)
    assert read([0, 1, 2, 0.5], WORDS) == [0, 1, 2]


# ---- names


def test_one_label_by_name_is_a_bad_row():
    found = corpus([0, 1, *[1] * 20, "good"], WITHOUT)
    assert len(list(found.sequences())) == 22
    check_read(found)
    assert found.facts.skipped == {"a label by name, of classes that have none": 1}
    assert found.facts.examples == [
        "the data given:23: a label by name, of classes that have none (found 'good', expected 0 "
        "to 1; a build's --labels names them in the model's order)"]
    assert not found.said_of_rows()
    strict = Corpus([[{"text": "good", "label": 0}, {"text": "good", "label": "x"}]],
                    tokenizer_of_texts(), CorpusSettings(
                        32, task="classification", labels=WITHOUT), vocabulary=40, strict=True)
    with pytest.raises(InputError, match=r"the data given:2: a label by name.*--strict"):
        list(strict.sequences())


@pytest.mark.parametrize("labels, names, message", [
    (["good", "bad", "good"], WITHOUT, "are good, bad; the model's classes are LABEL_0, LABEL_1. "
     "Where they are the same by other names, build an index with those of the data, in the "
     "model's order: --labels good,bad if good is LABEL_0"),
    (["neg", "pos"], ("NEGATIVE", "POSITIVE"), "--labels neg,pos if neg is NEGATIVE"),
    (["a", "b", "c"], ("NEGATIVE", "POSITIVE"), "a, b, c; .*: --labels A,B,…"),
    ([True, False], WORDS, "are true, false; the model's classes are bad, so, good"),
    ([7, "9", 8], WORDS, "--labels 7,8,9 if 7 is bad"),
    ([-1, -1], WORDS, "2: unlabelled .−1.[.]$"),  # as a test set has it
])
def test_labels_that_all_are_others_are_refused_with_advice(labels, names, message):
    with pytest.raises(InputError, match=f"no row that can be used.*{message}"):
        read(labels, names)


def test_labels_that_are_shown_can_be_kept():
    found = corpus(["\ud800 x", "a" * 99, "1.50", True, 10**400, [1], None, ""], ("0", "1.5"))
    assert len(list(found.sequences())) == 1
    assert found.facts.found == {
        "\\ud800 x": 1, "a" * 60: 1, "1.5": 1, "true": 1, "a huge number": 1}
    assert json.loads(json.dumps(found.facts.found, ensure_ascii=False).encode()) == \
        found.facts.found


@pytest.mark.parametrize("labels, message", [
    ([0, 4, 4, 0], "all 2 rows are of one class, bad.*Skipped: 2 × a label outside.*--labels 0,4"),
    ([-1, 1, -1], "all 1 rows are of one class, good.*2 × unlabelled.*--labels -1,1 if -1 is bad"),
])
def test_one_class_left_of_two_is_refused_with_advice(labels, message):
    found = corpus(labels, ("bad", "good"))
    list(found.sequences())
    with pytest.raises(InputError, match=message):
        check_classes(found.facts, found.settings, Progress(io.StringIO()))


def test_many_rows_that_are_lost_are_warned_of():
    found = corpus(["bad", "good", "so", "so", *["good"] * 16], ("bad", "good"))
    list(found.sequences())
    assert not found.said_of_rows()  # 2 of 20
    found = corpus(["bad", "good", "so", None, [1], -1, -1], ("bad", "good"))
    list(found.sequences())
    [said] = found.said_of_rows()
    assert said == (
        "warning: 3 of 7 rows (43%) can't be used and are left out: 1 × a label outside the "
        "model's classes, 1 × no label, 1 × a label that is no class. The labels of the data are "
        "-1, bad, good, so; the model's classes are bad, good. Where they are the same by other "
        "names, build an index with those of the data, in the model's order: --labels A,B,….")
    found = Corpus([[{"text": "good film"}, {"text": ""}]], tokenizer_of_texts(),
                   CorpusSettings(32), vocabulary=40)
    list(found.sequences())
    assert found.said_of_rows() == [
        "warning: 1 of 2 rows (50%) can't be used and are left out: 1 × empty text"]


@pytest.mark.parametrize("settings, facts, line", [
    ({"task": "classification", "labels": WORDS}, CorpusFacts(9, 9, 80, 9, {"good": 6, "bad": 3}),
     "data: 9 labelled texts of at most 14 tokens, 80 tokens: 3 × bad, 6 × good"),
    ({"task": "reward"}, CorpusFacts(40, 40, 960, 40),
     "data: 40 pairs of texts of at most 14 tokens each, 960 tokens"),
    ({"task": "preference"}, CorpusFacts(1, 1, 20, 1),
     "data: 1 pairs of texts of at most 14 tokens each, 20 tokens"),
    ({}, CorpusFacts(4, 6, 80, 74),
     "data: 4 documents → 6 sequences of at most 14 tokens, 80 tokens, 74 scored"),
])
def test_what_was_read_is_said_in_the_tasks_words(settings, facts, line):
    said = io.StringIO()
    report_read(facts, CorpusSettings(14, **settings), Progress(said))
    assert said.getvalue() == line + "\n"
