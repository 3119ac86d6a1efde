"""Seconds of all work follow from those of two batches."""

import pytest

from indexer.pace.speed import Speed, Work, fit_speed


def test_seconds_follow_from_two_batches():
    """Two batches of known x and y give them back; a negative one is 0, the other fits alone."""
    speed = fit_speed([(4000, 10), (3900, 200)], [4000 * 2e-3 + 10 * 0.1, 3900 * 2e-3 + 200 * 0.1])
    assert (speed.token, speed.sequence) == pytest.approx((2e-3, 0.1))
    alone = fit_speed([(4000, 10), (4000, 200)], [9.0, 7.0])
    assert alone.sequence == 0 and 7.0 < alone.token * 4000 < 9.0
    same = fit_speed([(4000, 10), (4000, 10)], [3.0, 3.0])
    assert same * Work(8000, 20) == pytest.approx(6.0)
    assert Speed(2.0, 3.0) * Work(5, 7) == 31.0


def test_the_work_of_batches():
    """[5, 3, 3] in batches of 6 padded tokens: (5), (3, 3); [4] alone."""
    assert Work.of([[3, 5, 3], [4]], 6) == Work(5 + 6 + 4, 4)
