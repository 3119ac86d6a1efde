"""Work and speed: padded tokens and sequences, and the seconds that each of them takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradindex.influence.split_batches import plan_batches


@dataclass(frozen=True)
class Work:
    """Padded tokens and sequences of some batches.

    >>> Work(100, 4) * 2.5
    Work(padded_tokens=250.0, sequences=10.0)
    """

    padded_tokens: float
    sequences: float

    def __mul__(self, times: float) -> "Work":
        return Work(self.padded_tokens * times, self.sequences * times)

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], batch_tokens: int) -> "Work":
        """The work on groups of lengths; each group is put into batches by itself.

        >>> Work.of([[5, 3, 3]], batch_tokens=6)  # a batch of one, and one of two
        Work(padded_tokens=11, sequences=3)
        """
        padded_tokens = sequences = 0
        for lengths in groups:
            padded_tokens += sum(lengths[batch[0]] * len(batch)
                                 for batch in plan_batches(lengths, batch_tokens))
            sequences += len(lengths)
        return cls(padded_tokens, sequences)


@dataclass(frozen=True)
class Speed:
    """Seconds a padded token and a sequence.

    >>> (Speed(1.0, 2.0) + Speed(1.0, 0.0)) * Work(10, 1)
    22.0
    """

    token: float
    sequence: float

    def __mul__(self, work: Work) -> float:
        return self.token * work.padded_tokens + self.sequence * work.sequences

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(self.token + other.token, self.sequence + other.sequence)


def fit_speed(shapes: Sequence[tuple[int, int]], seconds: Sequence[float]) -> Speed:
    """x, y ≥ 0 with x · tokens + y · sequences nearest to the seconds, both batches counting alike.

    Two unknowns: where the free solution has a negative one, that is 0.

    >>> speed = fit_speed([(100, 2), (40, 4)], [1.04, 0.48])
    >>> round(speed.token, 6), round(speed.sequence, 6)
    (0.01, 0.02)
    """
    # each equation divided by its seconds: errors are relative, so a short batch counts as much
    rows = np.array(shapes, dtype=np.float64) / np.maximum(seconds, 1e-9)[:, None]
    ones = np.ones(len(rows))
    free = np.linalg.lstsq(rows, ones, rcond=1e-9)[0]
    if (free >= 0).all():
        return Speed(float(free[0]), float(free[1]))
    # the best with one of them alone is the best with both at least 0
    alone = [rows[:, side] @ ones / (rows[:, side] @ rows[:, side]) for side in (0, 1)]
    wrong = [float(((rows[:, side] * alone[side] - 1) ** 2).sum()) for side in (0, 1)]
    better = int(wrong[1] < wrong[0])
    return Speed(*(float(alone[side]) if side == better else 0.0 for side in (0, 1)))


def in_groups(values: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """The values in runs of at most so many.

    >>> list(in_groups([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for first in range(0, len(values), most):
        yield values[first : first + most]
