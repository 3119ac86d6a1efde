"""The recall statement on synthetic heavy-tailed scores, where the truth is known."""

import numpy as np
import pytest
from reference import true_recall

from search.recall import estimated_recall, inclusion_probability


def claimed_and_actual(random, n, shortlist, k, noise, opponents):
    """One draw: a claim from what a search sees, and the truth."""
    influence = random.standard_t(2.5, n) * random.pareto(3, n) - 0.1
    sigma = noise * random.uniform(0.5, 2.0, n)
    codes = influence + sigma * random.standard_normal(n)
    sign = -1 if opponents else 1
    order = np.argsort(-sign * codes, kind="stable")
    found = order[:shortlist]
    cutoff = float(sign * codes[order[shortlist]]) if shortlist < n else None
    found = sorted(found, key=lambda place: (-sign * influence[place], place))
    pi = inclusion_probability(sign * influence[found], sigma[found], cutoff)
    actual = true_recall((sign * influence).tolist(), [int(f) for f in found], k)
    return estimated_recall(pi, k), actual


@pytest.mark.parametrize("n, shortlist, k, noise, opponents", [
    (2000, 200, 10, 3.0, False),
    (2000, 200, 100, 0.5, False),
    (2000, 100, 1, 3.0, False),
    (2000, 100, 1, 4.0, True),
    (2000, 300, 20, 2.0, True),
    (500, 400, 50, 3.0, False),
    (40, 100, 10, 1.0, False),
    (3000, 50, 10, 3.0, True),
])
def test_claimed_recall_is_true_on_average(n, shortlist, k, noise, opponents):
    random = np.random.default_rng(n + k)
    pairs = np.array([
        claimed_and_actual(random, n, min(shortlist, n), k, noise, opponents) for _ in range(500)
    ])
    assert abs(pairs[:, 0].mean() - pairs[:, 1].mean()) <= 0.02
    if shortlist >= n:
        assert (pairs == 1).all()
    else:
        assert pairs[:, 1].std() > 0.01  # a case that could come out otherwise


def test_a_complete_answer_has_recall_one():
    pi = inclusion_probability(np.array([3.0, 1.0]), np.array([9.0, 9.0]), None)
    assert pi.tolist() == [1, 1]
    assert estimated_recall(pi, 2) == 1


def test_estimated_recall_by_hand():
    assert estimated_recall([1, 0.5, 0.5], 2) == pytest.approx((1 + 0.5) / 2)
    assert estimated_recall([0.25], 1) == pytest.approx(0.25)
    assert estimated_recall([1.0, 1.0, 1.0], 2) == 1
    assert estimated_recall([1.0, 1.0], 4) == pytest.approx(0.5)  # shortlist smaller than k
    assert estimated_recall([], 3) == 0


def test_inclusion_probability_by_hand():
    pi = inclusion_probability(np.array([1.0, 2.0, -50.0]), np.array([1.0, 2.0, 1.0]), 1.0)
    np.testing.assert_allclose(pi, [0.5, 0.6914624612740131, 1e-4], rtol=1e-12)
    certain = inclusion_probability(np.array([2.0, 0.5]), np.zeros(2), 1.0)
    np.testing.assert_allclose(certain, [1.0, 1e-4])
