"""The upper tail of influence: a power law fitted to it, and how few sequences carry half.

Clauset, Shalizi & Newman 2009 (arXiv 0706.1062), continuous values: from x_min on the density is
p(x) ∝ x^−α, so the share of the tail at or above x is (x / x_min)^−(α−1). α here is always that
**density exponent**; Grosse et al. 2023 (eq. 32) write the distribution function with −α where
Clauset's has −(α−1), while what they say of moments holds for the density exponent.
"""

import math
from dataclasses import dataclass

import numpy as np

from gradindex.draws import Stream, generator
from gradindex.results import Result

FEWEST_IN_TAIL = 50  # values: below, the estimate of α is biased (Clauset et al., section 3.5)
MOST_FITTED = 10_000  # values looked at
CUTOFFS_TRIED = 48  # values of x_min tried
SYNTHETIC_SAMPLES = 250  # synthetic samples behind p, and resamples behind an interval
REJECTED = 0.1  # at or below this p a power law is ruled out (Clauset et al., section 4.1)


@dataclass(frozen=True)
class Tail:
    """A power law from x_min on, fitted to the `points` largest of `total` positive values.

    `alpha` ± `error` is the density exponent and its standard error; `distance` the
    Kolmogorov–Smirnov distance in the tail; `p` the share of synthetic samples of the fitted law
    that fit worse: small where the values are no power law, NaN where none was drawn.
    """

    alpha: float
    error: float
    x_min: float
    points: int
    total: int
    distance: float
    p: float

    @property
    def rejected(self) -> bool:
        """Whether a power law is ruled out."""
        return self.p <= REJECTED


def upper_tail(result: Result) -> np.ndarray:
    """The exact scores of the side that a search was for, made positive: float64 [n]."""
    scores = np.array(result.exact_influence) * (-1 if result.opponents else 1)
    return scores[scores > 0]


def fit_tail(values: np.ndarray, draws: int = SYNTHETIC_SAMPLES, seed: int = 0) -> Tail | None:
    """Fit the upper tail of `values` [n]; the others than positive ones are left out.

    x_min is the candidate with the smallest distance. Candidates are values with at least
    FEWEST_IN_TAIL at or above them, spaced evenly in the logarithm of their rank. Of more than
    MOST_FITTED values only the largest are looked at. None where there are too few different
    ones.

    Values whose share at or above x is 1/x², so that the density exponent is 3:

    >>> tail = fit_tail(np.sqrt(1000 / np.arange(1, 1001)), draws=0)
    >>> round(tail.alpha, 2), tail.total
    (3.01, 1000)
    """
    positive = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    positive = positive[positive > 0]
    # a fit of all that an index holds would take minutes, and the tail is at the top
    logs = np.log(positive[:MOST_FITTED])
    fitted = _best_fit(logs)
    if fitted is None:
        return None
    alpha, points, distance = fitted
    return Tail(
        alpha=alpha, error=(alpha - 1) / math.sqrt(points), x_min=float(positive[points - 1]),
        points=points, total=len(positive), distance=distance,
        p=_worse(logs, alpha, points, distance, draws, seed),
    )


def _best_fit(logs: np.ndarray) -> tuple[float, int, float] | None:
    """α, the values in the tail, and the distance, for logarithms [n] in falling order."""
    best = None
    for points in _candidates(logs):
        excess = logs[:points] - logs[points - 1]
        total = float(excess.sum())
        if total <= 0:  # all the same
            continue
        rate = points / total  # α − 1 (eq. 3.1)
        distance = _distance(excess, rate)
        # of equals the shorter tail, which came first
        if best is None or distance < best[2]:
            best = 1 + rate, points, distance
    return best


def _candidates(logs: np.ndarray) -> list[int]:
    """How many values lie at or above each x_min that is tried, ascending."""
    if len(logs) < FEWEST_IN_TAIL:
        return []
    # in the logarithm of the rank: x_min moves most where values lie far apart
    ranks = np.geomspace(FEWEST_IN_TAIL, len(logs), CUTOFFS_TRIED).round().astype(np.int64)
    counts: list[int] = np.unique(
        np.searchsorted(-logs, -logs[ranks - 1], side="right")).tolist()
    return counts


def _distance(excess: np.ndarray, rate: float) -> float:
    """The Kolmogorov–Smirnov distance (eq. 3.9) of log(x / x_min) [k], falling, from the law."""
    k = len(excess)
    above = np.exp(-rate * excess)  # the law's share at or above each
    ranks = np.arange(1, k + 1)
    return float(np.maximum(ranks / k - above, above - (ranks - 1) / k).max())


def _worse(
    logs: np.ndarray, alpha: float, points: int, distance: float, draws: int, seed: int
) -> float:
    """The share of synthetic samples whose own best fit is no closer (section 4.1).

    A synthetic sample follows the fitted law above x_min, and below it is drawn from the values.
    """
    random = generator(Stream.TAIL_SAMPLES, seed)
    n, low, below = len(logs), logs[points - 1], logs[points:]
    worse = 0
    # each sample's x_min is found anew, or fits to the data would look too good (section 4.1)
    for _ in range(draws):
        above = int(random.binomial(n, points / n)) if len(below) else n
        tail = low + random.exponential(1 / (alpha - 1), above)
        rest = random.choice(below, n - above) if above < n else below[:0]
        again = _best_fit(np.sort(np.concatenate([tail, rest]))[::-1])
        worse += again is not None and again[2] >= distance
    return worse / draws if draws else math.nan


def half(values: np.ndarray, weights: np.ndarray) -> int:
    """How many of the largest carry half of all that is positive.

    values [n] stand for `weights` [n] sequences each, as a sample does for those left out
    (Horvitz–Thompson); with weights of 1 it is an exact count. 0 where nothing is positive.

    Of 10 in all the first carries 6, more than half. If each of the small ones stands for ten
    sequences, the first and 17 of those carry half of 46:

    >>> values = np.array([6.0, 1.0, 1.0, 1.0, 1.0, -3.0])
    >>> half(values, np.ones(6))
    1
    >>> half(values, np.array([1.0, 10.0, 10.0, 10.0, 10.0, 10.0]))
    18
    """
    if not len(values):
        return 0
    order = np.argsort(-values, kind="stable")
    return int(_half(np.maximum(values[order], 0.0), weights[order][None])[0])


def half_interval(
    values: np.ndarray, weights: np.ndarray, certain: np.ndarray, seed: int = 0
) -> tuple[int, int]:
    """A 95 % interval of `half` over the draw of the sample (bootstrap).

    The values that are `certain` [n] were not drawn; the others are drawn again from themselves.
    """
    if not len(values):
        return 0, 0
    order = np.argsort(-values, kind="stable")
    values, weights, drawn = np.maximum(values[order], 0.0), weights[order], ~certain[order]
    n = int(drawn.sum())
    again = np.repeat(weights[None], SYNTHETIC_SAMPLES, axis=0)
    if n:
        random = generator(Stream.HALF_INTERVALS, seed)
        again[:, drawn] *= random.multinomial(n, np.full(n, 1 / n), SYNTHETIC_SAMPLES)
    # outwards to whole sequences, so that the interval holds what it says
    low, high = np.quantile(_half(values, again), [0.025, 0.975])
    return math.floor(low), math.ceil(high)


def _half(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`half` for each row of weights [draws, n] and values [n] ≥ 0 in falling order."""
    # a fraction of the sequence at which half is reached counts, then all is rounded up
    carried = np.cumsum(weights * values, axis=1)
    goal = carried[:, -1:] / 2
    last = np.minimum((carried < goal).sum(axis=1), len(values) - 1)
    rows = np.arange(len(weights))
    before = carried[rows, last] - weights[rows, last] * values[last]
    missing = np.divide(goal[:, 0] - before, values[last], out=np.zeros(len(rows)),
                        where=values[last] > 0)
    count = np.cumsum(weights, axis=1)[rows, last] - weights[rows, last] + missing
    return np.where(goal[:, 0] > 0, np.ceil(count - 1e-9), 0)
