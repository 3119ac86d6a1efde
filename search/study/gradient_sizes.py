"""How large sequences' gradients are, and which sequences come up whatever is asked."""

from dataclasses import dataclass

import numpy as np

from gradindex.influence.exact import Rescorer, rescore
from gradindex.influence.preconditioned import Preconditioned
from gradindex.storage.background_file import ONE_IN
from search.rank.generic_rate import all_rates
from search.rank.ranking import best
from search.rank.snapshot import Snapshot
from search.study.texts import ShownSequence, shown_sequences

MOST_SHOWN = 10  # sequences of a kind
FENCE = 3.0  # interquartile ranges above the upper quartile (Tukey's outer fence), of logarithms


@dataclass
class SizeSurvey:
    """Self-influence ‖m̃‖²: the code's estimate ‖v‖² of all [N], and exact of some places.

    `exact` [places] belongs to `random_sample` (places). `fence` is the estimate beyond which a
    sequence is an outlier; `largest` are shown with (estimate, exact).
    """

    estimates: np.ndarray
    random_sample: list[int]
    exact: np.ndarray
    fence: float
    largest: list[tuple[ShownSequence, float, float]]

    @property
    def ratios(self) -> np.ndarray:
        """Estimate / exact of those of the random sample that have a gradient."""
        estimates = self.estimates[self.random_sample]
        return np.asarray(estimates[self.exact > 0] / self.exact[self.exact > 0])

    @property
    def outliers(self) -> int:
        """How many sequences lie beyond the fence."""
        return int((self.estimates > self.fence).sum())


def measure_sizes(snapshot: Snapshot, by: Rescorer, preconditioned: Preconditioned) -> SizeSurvey:
    """Self-influence as the codes know it, exact for the random sample and the largest."""
    estimates, sample = snapshot.norms**2, snapshot.random_sample()
    first = snapshot.contents.first_equal == np.arange(len(snapshot))  # equal ones are shown once
    largest = best(np.where(first, estimates, -1.0), min(MOST_SHOWN, int(first.sum()))).tolist()
    records = snapshot.records([*sample, *largest])
    exact = np.zeros(len(records))
    for batch in rescore(by, preconditioned, records, sizes=True):
        for number, score in batch:
            assert score.self_influence is not None
            exact[number] = score.self_influence
    of_largest = exact[len(sample) :].tolist()
    return SizeSurvey(estimates, sample, exact[: len(sample)], outer_fence(estimates), [
        (shown, float(estimates[place]), size) for shown, place, size in
        zip(shown_sequences(snapshot, largest), largest, of_largest, strict=True)])


def outer_fence(estimates: np.ndarray) -> float:
    """The estimate beyond which a sequence is an outlier, of estimates [n]; infinite without any.

    Quartiles at 10^0.5 and 10^1.5 are a factor of 10 apart, so the fence lies at 10^(1.5 + 3):

    >>> round(outer_fence(np.array([1.0, 10.0, 100.0])))
    31623
    """
    logs = np.log(estimates[estimates > 0])
    if not len(logs):
        return np.inf
    low, high = np.quantile(logs, [0.25, 0.75])
    return float(np.exp(high + FENCE * (high - low)))


def most_generic(snapshot: Snapshot) -> list[tuple[ShownSequence, float]] | None:
    """The sequences with the highest generic rate as proponents, and that rate, above chance.

    Equal ones are one. None where the index keeps no background queries.
    """
    rates = all_rates(snapshot)
    if rates is None:
        return None
    first = snapshot.contents.first_equal == np.arange(len(snapshot))
    upper = np.where(first & ~np.isnan(rates[0]), rates[0], 0.0)
    places = [int(place) for place in np.argsort(-upper, kind="stable")[:MOST_SHOWN]
              if upper[place] > 1 / ONE_IN]
    return [(shown, float(upper[place])) for shown, place in
            zip(shown_sequences(snapshot, places), places, strict=True)]
