"""What a field says of the corrupted, and how well a signal finds them, against plain counts."""

import numpy as np
import pytest

from gradindex.errors import InputError
from search.study.truth import INSPECTED, curve, detection, found_among, read_truth

LABELS = ("negative", "positive")
OWN = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])


def truth_of(column, labels=LABELS, own=OWN, meant=None):
    """The truth that a column of a table tells."""
    values = list(dict.fromkeys(value for value in column if value is not None))
    numbers = np.array([-1 if value is None else values.index(value) for value in column])
    return read_truth("told", values, numbers, labels, own if labels else None,
                      meant)


@pytest.mark.parametrize("yes, no", [
    (True, False), (1, 0), (1.0, 0.0), ("1", "0"), ("true", "false"), ("True", "False"),
    (" TRUE ", "False"), ("1.0", "0")])
@pytest.mark.parametrize("labels", [LABELS, ()])
def test_marks(yes, no, labels):
    marked = np.arange(10) == 4
    found = truth_of([yes if one else no for one in marked], labels, meant="marks")
    assert found.corrupted.tolist() == marked.tolist() and found.known.all()
    assert "marks" in found.how


@pytest.mark.parametrize("names", [
    LABELS, (0, 1), ("0", "1"), (0.0, 1.0), ("Negative", "POSITIVE")])
def test_true_labels_are_compared(names):
    column = [names[label] for label in OWN]
    column[3], column[8] = names[1], names[0]
    found = truth_of(column, meant="labels")
    assert np.flatnonzero(found.corrupted).tolist() == [3, 8] and "labels" in found.how


def test_true_labels_of_more_classes():
    own = np.array([0, 1, 2, 2])
    assert truth_of([0, 2, 2, 1], ("a", "b", "c"), own).corrupted.tolist() == [
        False, True, False, True]


def test_what_is_missing_is_not_known():
    found = truth_of([True, None, False, False, False, None, False, False, False, False])
    assert np.flatnonzero(~found.known).tolist() == [1, 5]
    assert np.flatnonzero(found.corrupted).tolist() == [0]
    own = np.array([1, 1, 0])
    assert truth_of(["positive", None, "positive"], LABELS, own).corrupted.tolist() == [
        False, False, True]


def test_of_several_documents_one_is_enough():
    numbers = np.array([0, 1, 2])
    found = read_truth("told", [[True, False], False, [False]], numbers, (), None)
    assert found.corrupted.tolist() == [True, False, False]


@pytest.mark.parametrize("column, message", [
    ([True] * 10, "is true for every one of the 10 sequences that have it, .* some that aren't.$"),
    ([0] * 10, "is 0 for every one of the 10"), (["x"] * 10, 'is "x" for every one of the 10'),
    # as a mark, or a label that half of the sequences have
    ([1] * 10, "is 1 for every one of the 10"),
    ([True] * 3 + [None] * 7, "the 3 sequences .*; 7 have no value, which is not read as false"),
    ([LABELS[label] for label in OWN], "compared with the sequences' own, none of 10 .* beside "),
    ([LABELS[1 - label] for label in OWN], "compared with .* own, every one of 10 sequences is"),
    (["maybe"] + [True] * 9, r'holds "maybe", true; expected marks .* true labels \(of negative'),
    ([0, 1, 2] * 3 + [0], r"holds 0, 1, 2; expected marks"),
    ([None] * 10, "holds nothing"),
    # as marks three are corrupted, as labels four; then one and five
    ([0, 1, 0, 0, 0, 0, 0, 0, 1, 1], r"may be marks or labels .*, 3 would .*, 4 would"),
    ([0] * 9 + [1], r"as marks .*, 1 would .*, 4 would .*--truth-as marks or --truth-as labels"),
])
def test_what_tells_nothing_is_refused(column, message):
    with pytest.raises(InputError, match=f"--truth told.*{message}"):
        truth_of(column)


@pytest.mark.parametrize("column, meant", [
    ([True] + [False] * 9, "marks"), (["negative"] + ["positive"] * 9, "labels")])
def test_what_can_be_read_in_one_way_is(column, meant):
    found = truth_of(column)
    assert found.corrupted.tolist() == truth_of(column, meant=meant).corrupted.tolist()
    other, said = {"marks": ("labels", "true labels"), "labels": ("marks", "marks of")}[meant]
    with pytest.raises(InputError, match=f"expected {said}"):
        truth_of(column, meant=other)


def test_values_without_a_meaning_are_refused_where_there_are_no_classes():
    with pytest.raises(InputError, match=r"expected marks of what is corrupted .*1 and 0\)\.$"):
        truth_of(["negative", "positive"] * 5, ())


# ---- how well


def plain_auroc(values, corrupted):
    """The share of pairs that are in order; of equal values a half."""
    pairs = [(one > other) + (one == other) / 2
             for one in values[corrupted] for other in values[~corrupted]]
    return sum(pairs) / len(pairs)


def plain_precision(values, corrupted):
    """The mean, over the corrupted, of the precision at each one's place."""
    order = np.argsort(-values)
    hits = corrupted[order]
    return np.mean([hits[: place + 1].mean() for place in np.flatnonzero(hits)])


def test_detection_against_plain_counts():
    random = np.random.default_rng(3)
    corrupted = random.random(60) < 0.2
    values = random.normal(size=60) + corrupted
    found = detection("it", values, corrupted)
    assert found.auroc == pytest.approx(plain_auroc(values, corrupted))
    assert found.average_precision == pytest.approx(plain_precision(values, corrupted))
    order = np.argsort(-values)
    for share, value in zip(INSPECTED, found.found, strict=True):
        count = {0.05: 3, 0.1: 6, 0.2: 12, 0.3: 18}[share]
        assert value == pytest.approx(corrupted[order[:count]].sum() / corrupted.sum())


def test_of_equal_values_each_is_as_likely():
    corrupted = np.array([True, False, False, True])
    level = detection("random", np.zeros(4), corrupted)
    assert level.auroc == 0.5 and level.average_precision == 0.5
    assert found_among(np.array([3.0, 1.0, 1.0, 1.0]), corrupted, 2) == pytest.approx(
        (1 + 1 / 3) / 2)
    assert found_among(np.array([3.0, 2.0, 1.0, 0.0]), corrupted, 4) == 1.0


def test_a_curve_rises_to_all():
    random = np.random.default_rng(4)
    corrupted = random.random(400) < 0.1
    inspected, found = curve(random.normal(size=400) + 2 * corrupted, corrupted)
    assert inspected[0] == found[0] == 0 and inspected[-1] == found[-1] == 1
    assert (np.diff(inspected) > 0).all() and (np.diff(found) >= 0).all() and len(found) <= 150
