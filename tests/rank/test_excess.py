"""How far groups are from the index's mean: the order they come in, and how often chance errs."""

import math

import numpy as np
import pytest

from search.rank.group_excess import excess_of
from search.rank.group_totals import total_groups
from search.rank.grouping import Grouping, in_quarters, make_grouping

SEQUENCES = 3000


def groups_of(labels, **codes):
    """A grouping of whole sequences, by the number of each one's group."""
    labels = np.asarray(labels)
    order, count = np.argsort(labels, kind="stable"), int(labels.max()) + 1
    return Grouping(list(range(count)), labels[order], order, np.ones(len(labels)), **{
        "spread": np.ones(count), "excess_spread": np.ones(count), "whole_spread": 1.0, **codes})


def listed(grouping, influence, sign=1.0, variance=None):
    variance = np.zeros(len(influence)) if variance is None else variance
    groups, _ = total_groups(grouping, sign * influence, variance, sign, {}, lambda _: (None, None))
    return groups


LAWS = {
    "gaussian": lambda random, n: random.standard_normal(n),
    "t, 3": lambda random, n: random.standard_t(3, n),
    "t, 2": lambda random, n: random.standard_t(2, n),
    "signed lognormal": lambda random, n: np.exp(1.5 * random.standard_normal(n))
    * random.choice([-1, 1], n),
    "far from 0": lambda random, n: 40 + random.standard_t(3, n),
}


@pytest.mark.parametrize("size", [5, 20, 500])
@pytest.mark.parametrize("law", LAWS)
def test_random_groups_are_beyond_two_standard_errors_one_time_in_twenty(law, size):
    random = np.random.default_rng(size)
    z = []
    while len(z) < 2400:
        influence = LAWS[law](random, SEQUENCES)
        labels = random.permutation(SEQUENCES) // size
        z += excess_of(groups_of(labels), influence, np.zeros(SEQUENCES))[2].tolist()
    beyond = np.mean(np.abs(z) > 2)
    assert 0.02 < beyond < 0.075
    # no single sequence makes a group lead the list; of a variance of the whole index one would,
    # by a dozen standard errors and more
    assert np.abs(z).max() < 6.5


@pytest.mark.parametrize("alike", [0.0, 0.3])
def test_codes_errors_count_once(alike):
    """As noise of the totals and not, a second time, as spread; `alike` for all sequences."""
    random = np.random.default_rng(3)
    z = []
    for _ in range(60):
        influence = random.standard_t(3, SEQUENCES)
        common = random.standard_normal()
        noise = 2 * (math.sqrt(1 - alike) * random.standard_normal(SEQUENCES)
                     + math.sqrt(alike) * common)
        # what all errors have in common takes itself away in the excess, and the rest is left
        grouping = groups_of(
            random.permutation(SEQUENCES) // 50, spread=np.full(60, 1 + 49 * alike),
            excess_spread=np.full(60, 1 - alike), whole_spread=1 + (SEQUENCES - 1) * alike)
        excess, error, own = excess_of(grouping, influence + noise, np.full(SEQUENCES, 4.0))
        truth = excess_of(grouping, influence, np.zeros(SEQUENCES))[0]
        assert np.std(excess - truth) < error.mean()
        z += own.tolist()
    assert 0.03 < np.mean(np.abs(z) > 2) < 0.07
    assert 0.9 < np.std(z) < 1.1


@pytest.mark.parametrize("size", [5, 20, 500])
@pytest.mark.parametrize("share", [0.3, 3.0])
def test_codes_that_err_by_very_different_amounts(share, size):
    """As those of large and small gradients do, and much more than influence differs."""
    random = np.random.default_rng(size)
    z = []
    while len(z) < 2400:
        scale = np.exp(0.8 * random.standard_normal(SEQUENCES))
        influence = scale * random.standard_t(3, SEQUENCES)
        noise = share * scale
        z += excess_of(groups_of(random.permutation(SEQUENCES) // size),
                       influence + noise * random.standard_normal(SEQUENCES), noise**2)[2].tolist()
    assert 0.02 < np.mean(np.abs(z) > 2) < 0.075 and np.abs(z).max() < 6.5


def test_a_planted_group_leads_where_a_larger_one_has_a_larger_total():
    random = np.random.default_rng(0)
    influence = 1.0 + random.standard_t(3, SEQUENCES)
    labels = np.repeat([0, 1, 2, 3], [2400, 60, 300, 240])
    influence[labels == 1] += 1.5
    groups = listed(groups_of(labels), influence)
    totals = {group.value: group.influence for group in groups}
    assert totals[0] > 5 * totals[1]
    assert groups[0].value == 1 and groups[0].z > 4 and not groups[0].unsure
    assert [group.unsure for group in groups] == [abs(group.z) < 2 for group in groups]
    assert any(group.unsure for group in groups)
    # one that takes away is last of the proponents', and leads the opponents'
    influence[labels == 1] -= 3.0
    assert listed(groups_of(labels), influence)[-1].value == 1
    first = listed(groups_of(labels), influence, sign=-1.0)[0]
    assert first.value == 1 and first.z < -4


def test_groups_of_fewer_than_five_come_last():
    influence = np.random.default_rng(1).standard_normal(SEQUENCES)
    labels = np.repeat([0, 1, 2, 3], [4, 1, 5, SEQUENCES - 10])
    influence[labels < 2] += 50
    groups = listed(groups_of(labels), influence)
    assert [group.value for group in groups[2:]] == [0, 1] and groups[2].z > groups[0].z


@pytest.mark.parametrize("variance", [0.0, 0.7])
def test_two_halves_are_as_far_from_the_mean_on_either_side(variance):
    influence = np.random.default_rng(2).standard_t(3, 500)
    excess, error, z = excess_of(groups_of(np.repeat([0, 1], [100, 400])), influence,
                                 np.full(500, variance))
    for numbers, sign in ((excess, -1), (error, 1), (z, -1)):
        assert numbers[0] == pytest.approx(sign * numbers[1])


@pytest.mark.parametrize("influence, labels", [
    (np.random.default_rng(0).standard_t(2, 300) + 9, np.zeros(300, int)),  # the whole index
    (np.full(300, 0.1), np.arange(300) % 7),  # all alike
    (np.zeros(300), np.arange(300)),
    (np.array([3.0]), np.zeros(1, int)),
])
def test_nothing_stands_out_where_nothing_can(influence, labels):
    _, error, z = excess_of(groups_of(labels), influence, np.zeros(len(influence)))
    assert (z == 0).all() and np.isfinite(error).all()


def test_nearly_all_alike():
    """Where most gradients are zero, the few others are all the spread there is."""
    influence = np.zeros(1000)
    influence[::50] = 1.0
    _, error, z = excess_of(groups_of(np.arange(1000) % 10), influence, np.zeros(1000))
    assert (error > 0).all() and np.isfinite(z).all() and np.abs(z).max() < 6


def test_errors_that_all_codes_share_take_themselves_away():
    """A standard error of an excess by codes, against the sum of every sequence's own part."""
    random = np.random.default_rng(7)
    common = random.integers(0, 256, 32, dtype=np.uint8)
    signs = np.where(random.random((40, 32)) < 0.7, common, random.integers(0, 256, (40, 32))
                     ).astype(np.uint8)
    steps = random.uniform(0.5, 2, 40).astype(np.float32)
    labels = np.repeat([0, 1, 2], [25, 10, 5])
    entries = np.stack([labels, np.arange(40), np.ones(40)]).astype(float)
    # a packed sequence, half of it in another group
    entries[2, 3] = 0.5
    entries = np.concatenate([entries, [[1], [3], [0.5]]], axis=1)
    made = make_grouping(["a", "b", "c"], entries, signs, steps)
    codes = (2.0 * np.unpackbits(signs, axis=1, bitorder="little") - 1) * steps[:, None]
    shares = np.zeros((3, 40))
    shares[entries[0].astype(int), entries[1].astype(int)] = entries[2]
    for group in range(3):
        away = shares[group] - shares[group].sum() / 40
        joined, apart = ((away @ codes) ** 2).sum(), ((away[:, None] * codes) ** 2).sum()
        assert made.excess_spread[group] == pytest.approx(joined / apart, rel=1e-4)
        assert made.parts(40)[group] == pytest.approx(shares[group].sum() / 40)
        assert made.excess_of_squares(steps)[group] == pytest.approx((away**2 * steps).sum())
    assert made.excess_spread[0] < made.spread[0] / 2


def test_numbers_are_joined_to_quarters():
    values = np.random.default_rng(0).permutation(100)
    names, quarters = in_quarters(values.tolist(), np.arange(100))
    assert names == ["0 to 24", "25 to 49", "50 to 74", "75 to 99"]
    assert quarters.tolist() == (values // 25).tolist()
    names, quarters = in_quarters([5, -2], np.array([0] * 9 + [1]))
    assert names == ["-2", "5"] and quarters.tolist() == [1] * 9 + [0]
    # most of them equal: these are a group, and what is on either side of them
    names, quarters = in_quarters([1, -1], np.array([0] * 135 + [1] * 15))
    assert names == ["-1", "1"] and quarters.tolist() == [1] * 135 + [0] * 15
    names, quarters = in_quarters([-9, -3, 0, 4], np.repeat([0, 1, 2, 3], [8, 12, 60, 20]))
    assert names == ["-9 to -3", "0", "4"] and np.bincount(quarters).tolist() == [20, 60, 20]
    names, quarters = in_quarters([4], np.zeros(3, int))
    assert names == ["4"] and quarters.tolist() == [0, 0, 0]
