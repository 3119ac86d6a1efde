"""Random streams: each has its own bits, and they are the same for ever."""

import numpy as np
import pytest
import torch

from gradindex import draws
from gradindex.draws import Stream


def test_no_two_streams_share_bits():
    assert len(Stream) == len(Stream.__members__)  # a repeated value would be an alias
    by_seed = [stream for stream in Stream if stream is not Stream.GROUP_COORDINATES]
    for seed in (0, 7):
        first = {tuple(draws.generator(stream, seed).random(4)) for stream in by_seed}
        assert len(first) == len(by_seed) == len(Stream) - 1
    assert not np.array_equal(draws.order(Stream.GROUP_COORDINATES, 4096, 9),
                              draws.order(Stream.CODE_OFFSETS, 0, 9))


@pytest.mark.parametrize("stream, expected", [
    (Stream.FIT_SEQUENCES, [3, 5, 7]), (Stream.CALIBRATION_QUERIES, [0, 5, 6]),
])
def test_what_decides_the_bytes_of_an_index_never_changes(stream, expected):
    assert draws.choose(stream, 0, 10, 3) == expected


def test_a_sample_of_distinct_numbers_is_ascending_and_below_the_bound():
    drawn = draws.distinct(Stream.RANDOM_SAMPLE, 3, 50, 20)
    assert drawn == sorted(set(drawn)) and len(drawn) == 20 and max(drawn) < 50
    assert draws.distinct(Stream.RANDOM_SAMPLE, 3, 2, 20) == [0, 1]


def test_an_order_holds_every_number_once():
    assert sorted(draws.order(Stream.CODE_OFFSETS, 1, 9).tolist()) == list(range(9))


def test_pytorch_draws_alike_and_the_users_numbers_stay():
    before = torch.random.get_rng_state()
    made = []
    for _ in range(2):
        with draws.always_alike(torch.device("cpu")):
            made.append(torch.rand(3))
    assert torch.equal(*made) and torch.equal(torch.random.get_rng_state(), before)


def test_a_generator_has_the_streams_own_numbers():
    same = [draws.generator(Stream.TAIL_SAMPLES, 1).random(3) for _ in range(2)]
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], draws.generator(Stream.HALF_INTERVALS, 1).random(3))
