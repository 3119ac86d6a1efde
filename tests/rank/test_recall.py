"""The recall statement on synthetic heavy-tailed scores, where the truth is known."""

import numpy as np
import pytest

from search.rank.ranking import CodeRanking, best
from search.rank.recall import (
    estimated_recall,
    expected_recall,
    fit_error,
    inclusion_probability,
)
from search.rank.shortlist import LIST_SHARE, Shortlist, longer
from support.reference import true_recall


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
    return estimated_recall(pi, k)[0], actual


def statement_of(shortlist, taken, influence, k, sample=(), value=None):
    """The statement of a shortlist whose places `taken` are exact, and those places, best first."""
    by = influence if value is None else value
    ranked = sorted(taken, key=lambda one: -by[one])
    return ranked, shortlist.statement(ranked, influence[ranked], k, list(sample),
                                       influence[list(sample)])


@pytest.mark.parametrize("n, shortlist, k, noise, opponents", [
    (2000, 200, 10, 3.0, False),
    (2000, 200, 100, 0.5, False),
    (2000, 100, 1, 3.0, False),
    (2000, 100, 1, 4.0, True),
    (2000, 300, 20, 2.0, True),
    (500, 400, 50, 3.0, False),
    (40, 100, 10, 1.0, False),
    (3000, 50, 10, 3.0, True),
    (3000, 1800, 1000, 1.0, False),
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


@pytest.mark.parametrize("by_norm, listed", [(True, 0), (False, 60), (True, 60)])
def test_claims_are_true_of_other_shortlists(by_norm, listed):
    """Ordered by score / ‖v_m‖ and ranked per unit of the gradient; joined by another list."""
    random = np.random.default_rng(7)
    n, k, length = 2000, 10, 150
    pairs = []
    for _ in range(400):
        norms = random.uniform(0.5, 4.0, n)
        influence = norms * (random.standard_t(2.5, n) * random.pareto(3, n) - 0.1)
        error = 4.0 * norms
        scores = influence + error * random.standard_normal(n)
        value = influence / norms if by_norm else influence
        noisy = value + random.standard_normal(n) * 9  # a list made from something else
        others = best(noisy, listed) if listed else None
        shortlist = Shortlist(CodeRanking(scores, norms, by_norm=by_norm), 4.0, n, others)
        taken = shortlist.advance(range(n), length)
        assert len(taken) == len(set(taken)) == length
        assert listed == 0 or set(others[: length // LIST_SHARE].tolist()) <= set(taken)
        _, made = statement_of(shortlist, taken, influence, k, value=value)
        top = set(np.argsort(-value)[:k].tolist())
        pairs.append((made.estimate, len(top & set(taken)) / k))
    claimed, actual = np.array(pairs).mean(0)
    assert abs(claimed - actual) <= 0.02
    assert 0.3 < actual < 0.97


def test_an_unfinished_list_is_not_counted_as_certain():
    """Interrupted before the TF-IDF list is through, only the code's order counts."""
    random = np.random.default_rng(5)
    n, k, pairs = 2000, 10, []
    for _ in range(200):
        influence = random.standard_t(2.5, n) * random.pareto(3, n)
        scores = influence + 3.0 * random.standard_normal(n)
        others = best(influence + 3.0 * random.standard_normal(n), 1000)
        shortlist = Shortlist(CodeRanking(scores, np.ones(n)), 3.0, n, others)
        exact = set(shortlist.places(200)[:60])
        taken = shortlist.advance(exact, 200)
        assert set(taken) == exact
        _, made = statement_of(shortlist, taken, influence, k)
        top = set(np.argsort(-influence)[:k].tolist())
        pairs.append((made.estimate, len(top & set(taken)) / k))
    claimed, actual = np.array(pairs).mean(0)
    assert abs(claimed - actual) <= 0.03 and actual < 0.9


@pytest.mark.parametrize("seed", [11, 12])
def test_a_search_that_is_sure_is_right(seed):
    """Stopped when the lower bound says .99, it holds at least .98; claims stay within .03."""
    random = np.random.default_rng(seed)
    n, k, sure, pairs, lengths = 3000, 10, [], [], []
    for _ in range(90):
        influence = random.standard_t(2.5, n) * random.pareto(3, n)
        scores = influence + random.choice([0.5, 1.0, 2.0]) * random.standard_normal(n)
        noise = float(np.std(scores - influence))
        others = best(influence + 3.0 * random.standard_normal(n), 1000 // LIST_SHARE)
        shortlist, length = Shortlist(CodeRanking(scores, np.ones(n)), noise, 1000, others), 20
        while True:
            taken = shortlist.advance(range(n), length)
            ranked, made = statement_of(shortlist, taken, influence, k)
            if made.lower >= 0.99 or length == 1000:
                break
            length = min(1000, longer(length, shortlist.length_for(
                0.99, ranked, influence[ranked], k, made)))
        held = len(set(np.argsort(-influence)[:k].tolist()) & set(taken)) / k
        pairs.append((made.estimate, held))
        lengths.append(length)
        if made.lower >= 0.99:
            sure.append(held)
    claimed, actual = np.array(pairs).mean(0)
    assert abs(claimed - actual) <= 0.03
    assert len(sure) > 30 and np.mean(sure) >= 0.98
    assert np.median(lengths) < 700 and len(set(lengths)) > 10


def test_the_length_for_a_recall_is_found():
    """The length suggested holds about what it is suggested for."""
    random = np.random.default_rng(3)
    n, k = 3000, 20
    held = []
    for _ in range(60):
        influence = random.standard_t(2.5, n) * random.pareto(3, n)
        scores = influence + 4.0 * random.standard_normal(n)
        shortlist = Shortlist(CodeRanking(scores, np.ones(n)), 4.0, n)
        taken = shortlist.advance(range(n), 200)
        ranked, made = statement_of(shortlist, taken, influence, k)
        length = shortlist.length_for(0.9, ranked, influence[ranked], k, made)
        assert 200 < length <= n
        top = set(np.argsort(-influence)[:k].tolist())
        held.append(len(top & set(shortlist.places(length))) / k)
    assert np.mean(held) == pytest.approx(0.9, abs=0.04)


@pytest.mark.parametrize("by_norm, noise, most", [
    (False, 4.0, 60), (True, 4.0, 60), (False, 4.0, 600), (False, 0.0, 60)])
def test_the_length_is_the_shortest_that_does(by_norm, noise, most):
    """Against going through every length, with scores in float32, many of them equal."""
    random = np.random.default_rng(13)
    n, k, found = 600, 10, []
    for _ in range(30):
        norms = random.uniform(0.5, 4.0, n)
        influence = norms * random.standard_t(2.5, n) * random.pareto(3, n)
        scores = np.round(influence + noise * norms * random.standard_normal(n)).astype(np.float32)
        shortlist = Shortlist(CodeRanking(scores, norms, by_norm=by_norm), noise, most)
        taken = shortlist.advance(range(n), 60)
        ranked, made = statement_of(shortlist, taken, influence, k)
        falling = -np.sort(-(scores / norms if by_norm else scores))
        for goal in (0.3, 0.7, 0.95):
            plain = next((length for length in range(61, n) if expected_recall(
                made.probabilities, shortlist.probability(
                    ranked, influence[ranked], float(falling[length]), made.own), k,
            ) >= goal), n)
            assert shortlist.length_for(goal, ranked, influence[ranked], k, made) == plain
            found.append(plain)
    assert min(found) == 61 and (noise == 0 or len(set(found)) > 20)


@pytest.mark.parametrize("shift, factor", [(0.0, 1.0), (0.4, 0.8), (-0.5, 1.2)])
def test_a_querys_own_error_is_found(shift, factor):
    """From those that their codes let in, which erred upwards, and from a sample that did not."""
    random = np.random.default_rng(17)
    found, claims = [], []
    for _ in range(80):
        n, k = 2000, 10
        influence = 0.5 * random.standard_t(4, n)
        errors = shift + factor * random.standard_normal(n)
        scores = influence + errors
        sample = random.choice(n, 64, replace=False).tolist()
        shortlist = Shortlist(CodeRanking(scores, np.ones(n)), 1.0, 100)
        taken = shortlist.advance(range(n), 100)
        ranked, made = statement_of(shortlist, taken, influence, k, sample)
        found.append((made.own.shift, made.own.factor))
        held = len(set(np.argsort(-influence)[:k].tolist()) & set(taken)) / k
        plain = estimated_recall(shortlist.probability(ranked, influence[ranked],
                                                       shortlist.cutoff), k)[0]
        claims.append((made.estimate, plain, held))
    assert np.mean(found, 0) == pytest.approx((shift, factor), abs=0.12)
    estimate, plain, held = np.mean(claims, 0)
    assert abs(estimate - held) <= 0.02
    # who takes the error for what is expected is off by more, but where it is that
    assert (shift == 0) == (abs(plain - held) <= 0.04)


def test_the_fit_is_the_plain_mean_over_what_is_likely():
    """Against sums over a finer grid, with the densities written out."""
    from scipy import stats

    random = np.random.default_rng(2)
    m = random.uniform(-2, 6, 30)  # those beyond 4 say nothing
    z = np.maximum(random.standard_normal(30) + 0.3, -m)
    free = random.standard_normal(20) * 0.8 - 0.2
    total, weights = np.zeros(2), 0.0
    for shift in np.linspace(-1.2, 1.2, 49):
        for log_factor in np.linspace(-0.6, 0.6, 49):
            factor = np.exp(log_factor)
            near = m <= 4
            likely = np.prod(stats.norm.pdf(z[near], shift, factor)
                             / stats.norm.cdf(m[near] + shift, 0, factor))
            likely *= np.prod(stats.norm.pdf(free, shift, factor))
            likely *= stats.norm.pdf(shift, 0, 0.4) * stats.norm.pdf(log_factor, 0, 0.15)
            total += likely * np.array([shift, log_factor])
            weights += likely
    own = fit_error(m, z, free)
    assert (own.shift, np.log(own.factor)) == pytest.approx(total / weights, abs=2e-3)


def test_a_shortlist_by_hand():
    scores = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.0])
    shortlist = Shortlist(CodeRanking(scores, np.ones(6)), 1.0, 5, np.array([4, 3]))
    assert shortlist.places(4) == [1, 3, 2, 0] and shortlist.places(5) == [1, 3, 2, 0, 4]
    assert shortlist.advance({1}, 5) == [1] and shortlist.cutoff == 3.0
    # the list is still missing
    assert shortlist.advance({1, 3}, 5) == [1, 3] and shortlist.cutoff == 2.0
    np.testing.assert_allclose(shortlist.probability([3], np.array([2.0]), 2.0), [0.5])
    assert shortlist.advance({0, 1, 2, 3, 4}, 5) == [1, 3, 2, 0, 4]
    np.testing.assert_allclose(
        shortlist.probability([1, 3, 4], np.array([3.0, 2.0, -9.0]), 2.0),
        [0.8413447460685429, 0.5, 1.0])
    assert shortlist.ranks([*range(6)]) == [4, 1, 3, 2, 6, 5]
    assert shortlist.rank_in_list(3) == 2 and shortlist.rank_in_list(1) is None
    # who is of the list and of the best by code takes no one's place
    both = Shortlist(CodeRanking(scores, np.ones(6)), 1.0, 5, np.array([1]))
    assert both.places(5) == [1, 3, 2, 0, 5]
    whole = Shortlist(CodeRanking(scores[:5], np.ones(5)), 1.0, 5)
    assert whole.advance(range(5), 5) == [1, 3, 2, 0, 4] and whole.cutoff is None
    alone = Shortlist(CodeRanking(scores, np.ones(6)), 1.0, 3, np.array([4, 3]), by_list=True)
    assert alone.advance({3, 4, 1}, 3) == [4, 3]
    by_norm = Shortlist(
        CodeRanking(scores[:5], np.array([1.0, 3.0, 1.0, 0.0, 1.0]), by_norm=True), 1.0, 4)
    assert by_norm.places(4) == [2, 0, 1, 3]  # a gradient of zero counts as zero


def test_best_breaks_ties_by_place():
    values = np.array([2.0, 5.0, 2.0, 5.0, 1.0, 2.0])
    assert best(values, 4).tolist() == [1, 3, 0, 2]
    assert best(values, 1).tolist() == [1]
    assert best(values, 9).tolist() == [1, 3, 0, 2, 5, 4]
    random = np.random.default_rng(0).integers(0, 9, 200).astype(float)
    expected = np.lexsort((np.arange(200), -random))
    for count in (1, 7, 100, 199):
        assert best(random, count).tolist() == expected[:count].tolist()


def test_a_shortlist_grows_by_a_quarter_at_least_and_twofold_at_most():
    assert [longer(100, expected) for expected in (0, 125, 150, 10**6)] == [125, 125, 150, 200]
    assert longer(16, 17) == 32


def test_a_complete_answer_has_recall_one():
    pi = inclusion_probability(np.array([3.0, 1.0]), np.array([9.0, 9.0]), None)
    assert pi.tolist() == [1, 1]
    assert estimated_recall(pi, 2) == (1, 0)


def test_estimated_recall_by_hand():
    for probabilities, k, expected, variance in [
        ([1, 0.5, 0.5], 2, (1 + 0.5) / 2, 0.5 * 2), ([0.25], 1, 0.25, 0.25 * 12),
        ([1.0, 1.0, 1.0], 2, 1, 0), ([0.5, 0.8], 4, 0.5, 2 + 0.2 / 0.64),
        ([1.0, 1.0], 4, 0.5, 0), ([], 3, 0, 0),  # a shortlist smaller than k
    ]:
        assert estimated_recall(probabilities, k) == pytest.approx((expected, variance**0.5 / k))


def test_expected_recall_by_hand():
    # one certain hit that stays, one that stands for two of which half stay
    assert expected_recall([1.0, 0.5], [1.0, 0.5], 3) == pytest.approx((1 + 2 * 0.5) / 3)
    assert expected_recall([0.5, 0.5], [1.0, 1.0], 3) == 1  # the last counts for what is left
    assert expected_recall([0.25, 1.0], [0.5, 0.0], 2) == pytest.approx(0.5)


def test_inclusion_probability_by_hand():
    pi = inclusion_probability(np.array([1.0, 2.0, -50.0]), np.array([1.0, 2.0, 1.0]), 1.0)
    np.testing.assert_allclose(pi, [0.5, 0.6914624612740131, 1e-4], rtol=1e-12)
    certain = inclusion_probability(np.array([2.0, 0.5]), np.zeros(2), 1.0)
    np.testing.assert_allclose(certain, [1.0, 1e-4])
