"""The tail's fit against plain float64 sums, known laws, and half of the whole counted by hand."""

import math

import numpy as np
import pytest

from search.study.tail import FEWEST_IN_TAIL, fit_tail, half, half_interval


def plain_fit(values: list[float], x_min: float) -> tuple[float, float]:
    """α (Clauset et al. 2009, eq. 3.1) and the KS distance (eq. 3.9) for a given x_min."""
    tail = sorted(x for x in values if x >= x_min)
    alpha = 1 + len(tail) / sum(math.log(x / x_min) for x in tail)
    distance = 0.0
    for place, x in enumerate(tail):
        law = 1 - (x / x_min) ** -(alpha - 1)
        distance = max(distance, abs((place + 1) / len(tail) - law), abs(place / len(tail) - law))
    return alpha, distance


def pareto(alpha: float, count: int, seed: int, x_min: float = 1.0) -> np.ndarray:
    return x_min * (1 - np.random.default_rng(seed).random(count)) ** (-1 / (alpha - 1))


def test_the_fit_is_the_plain_one_at_its_x_min():
    values = np.concatenate([pareto(2.4, 300, 0, 5.0),
                             np.random.default_rng(1).uniform(0, 5, 400), [-3.0, 0.0]])
    found = fit_tail(values, draws=10)
    alpha, distance = plain_fit(values.tolist(), found.x_min)
    assert found.alpha == pytest.approx(alpha, rel=1e-12)
    assert found.distance == pytest.approx(distance, rel=1e-10)
    assert found.error == pytest.approx((alpha - 1) / found.points**0.5, rel=1e-12)
    assert found.points == sum(values >= found.x_min) and found.total == 700


def test_x_min_has_the_smallest_distance_of_all_that_leave_enough():
    values = np.concatenate([pareto(2.4, 60, 0, 5.0),
                             np.random.default_rng(1).uniform(0, 5, 30)]).tolist()
    found = fit_tail(np.array(values), draws=5)
    assert len(values) - FEWEST_IN_TAIL < 48  # so few candidates that all are tried
    falling = sorted(values, reverse=True)
    assert found.distance == pytest.approx(
        min(plain_fit(values, x)[1] for x in falling[FEWEST_IN_TAIL - 1 :]), rel=1e-10)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 3.5])
def test_a_known_law_is_found(alpha):
    found = fit_tail(pareto(alpha, 4000, 3, 0.01), draws=100)
    assert abs(found.alpha - alpha) < 4 * found.error
    assert not found.rejected


def test_where_the_law_begins_is_found():
    values = np.concatenate([pareto(2.5, 2000, 4, 10.0),
                             np.random.default_rng(5).uniform(0, 10, 6000)])
    found = fit_tail(values, draws=50)
    assert 8 < found.x_min < 14 and abs(found.alpha - 2.5) < 4 * found.error


def test_what_is_no_power_law_is_rejected():
    values = np.random.default_rng(6).uniform(1, 1.5, 4000)
    values[:60] = 1.5 + np.arange(60) * 1e-9  # a wall: even its uppermost part is none
    assert fit_tail(values, draws=50).rejected


def test_p_is_level_under_the_law():
    found = [fit_tail(pareto(2.5, 200, seed), draws=40).p for seed in range(40)]
    assert 0.3 < np.mean(found) < 0.7 and np.mean([p <= 0.1 for p in found]) < 0.3


def test_scale_does_not_matter_and_the_seed_fixes_p():
    values = pareto(2.2, 300, 8)
    one, other = fit_tail(values, draws=30), fit_tail(values * 1e6, draws=30)
    assert other.x_min == pytest.approx(one.x_min * 1e6, rel=1e-12)
    assert other.alpha == pytest.approx(one.alpha, rel=1e-9) and other.p == one.p
    assert fit_tail(values, draws=30) == one
    assert math.isnan(fit_tail(values, draws=0).p)


def test_equal_values_stand_or_fall_together():
    values = np.repeat(pareto(2.5, 40, 9), 5)
    found = fit_tail(values, draws=5)
    assert found.points == sum(values >= found.x_min) and found.points % 5 == 0
    assert found.distance == pytest.approx(plain_fit(values.tolist(), found.x_min)[1], rel=1e-10)


@pytest.mark.parametrize("values", [
    [], [1.0] * 10, [-1.0] * 100, [2.0] * 200, [float(n) for n in range(1, FEWEST_IN_TAIL)],
])
def test_too_few_or_all_the_same_give_no_fit(values):
    assert fit_tail(np.array(values)) is None


def test_half_is_counted():
    def count(values):
        return half(np.array(values, float), np.ones(len(values)))

    assert count([4, 3, 2, 1]) == 2  # 4 is less than half of 10, 7 isn't
    assert count([5, 3, 2]) == 1
    assert count([1, 1, 1, 1]) == 2
    assert count([2, -9, 1, 0]) == 1
    assert count([-1, 0]) == 0 and count([]) == 0
    values = np.random.default_rng(0).normal(0, 1, 999)
    running, taken = 0.0, 0
    for value in sorted(values, reverse=True):
        if running >= sum(v for v in values if v > 0) / 2:
            break
        running, taken = running + value, taken + 1
    assert count(values) == taken


def test_weights_are_copies():
    values, weights = np.array([7.0, 5, 3, 1]), np.array([1.0, 2, 4, 8])
    assert half(values, weights) == half(np.repeat(values, weights.astype(int)), np.ones(15))


def test_a_sample_stands_for_the_whole():
    """Half of a heavy tail, from its largest and a tenth of the others; intervals that hold it."""
    values = np.sort(pareto(2.5, 5000, 11))[::-1]
    truth = half(values, np.ones(5000))
    held, counts = 0, []
    for seed in range(40):
        drawn = np.random.default_rng(seed).choice(np.arange(100, 5000), 490, replace=False)
        known = np.concatenate([np.arange(100), drawn])
        certain = np.arange(590) < 100
        weights = np.where(certain, 1.0, 10.0)
        counts.append(half(values[known], weights))
        low, high = half_interval(values[known], weights, certain)
        held += low <= truth <= high
    assert abs(np.mean(counts) - truth) < 0.05 * truth
    assert held >= 35


def test_nothing_drawn_leaves_no_doubt():
    values = pareto(2.5, 100, 12)
    exact = half(values, np.ones(100))
    assert half_interval(values, np.ones(100), np.ones(100, dtype=bool)) == (exact, exact)
    assert half_interval(values[:0], values[:0], np.zeros(0, dtype=bool)) == (0, 0)
