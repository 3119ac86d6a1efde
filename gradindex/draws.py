"""Every random stream by name: nothing else in gradindex draws a random number.

For one seed no two streams give the same bits. Whatever decides the bytes of an index, or a score,
is raw Philox bits keyed by (seed, stream): they are the same on every machine and with every
version of NumPy. Where a draw belongs to a sequence, the sequence's id is part of the key, so
nothing depends on batching. (The group coordinates, keyed by K, have the bits of the code offsets
of an index whose seed happens to be K; the two never meet in one number.)
"""

import contextlib
import hashlib
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class Stream(Enum):
    """What is drawn, and its key: what is added to the seed, and the stream's number.

    Once an index has been built with a key, it stays: another one would give other codes, other
    curvature or another random sample. New streams take numbers that are free.
    """

    CODE_OFFSETS = 0, 0  # the order in which modules go round a code's buckets
    FIT_SEQUENCES = 0, 1
    CALIBRATION_QUERIES = 1, 1
    CALIBRATION_SAMPLE = 2, 1
    DRIFT_SAMPLE = 3, 1
    VERIFIED_SEQUENCES = 5, 1
    BACKGROUND_QUERIES = 6, 1
    BACKGROUND_QUERY_SCORES = 7, 1  # whose scores make the thresholds
    COVARIANCE_LABELS = 0, 2
    EIGENVALUE_LABELS = 0, 3
    RANDOM_SAMPLE = 0, 4
    DRIFT_LABELS = 0, 5
    # the only one of NumPy's default generator, which goes by the seed alone: another would draw
    # other sequences for indexes that were evaluated already
    EVAL_SAMPLE = 0, 6, "PCG64"
    EVAL_INTERVALS = 0, 7
    REPORT_QUERIES = 0, 8
    REPORT_SAMPLE = 0, 9
    TAIL_SAMPLES = 0, 10  # of the fitted power law
    HALF_INTERVALS = 0, 11
    DRY_RUN_SAMPLE = 0, 12
    DEMO_BATCHES = 0, 13  # in which order the demo's model is trained
    AUDIT_CLASSES = 0, 20  # whose gradients are added up where not all are
    DEMO_LABELS = 0, 21  # which labels of the classifying demo are wrong
    GROUP_COORDINATES = 0, 0, "K"  # keyed by K in the place of the seed


def choose(stream: Stream, seed: int, count: int, size: int) -> list[int]:
    """A sample of `size` of the numbers below `count`, without replacement, ascending.

    All of them where there are no more than that.

    >>> choose(Stream.FIT_SEQUENCES, 0, 10, 3)
    [3, 5, 7]
    """
    if size >= count:
        return list(range(count))
    raw = _philox(stream, seed).random_raw(count)
    return sorted(int(number) for number in raw.argsort(kind="stable")[:size])


def uniforms(stream: Stream, seed: int, sequence: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [count], that belong to the sequence of id `sequence`.

    >>> uniforms(Stream.COVARIANCE_LABELS, 0, 7, 2).round(4).tolist()
    [0.1596, 0.3033]
    """
    raw = _philox(stream, seed, sequence).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53  # 53 bits: never 1, even by rounding


def order(stream: Stream, seed: int, count: int) -> np.ndarray:
    """The numbers below `count` in a random order: int64 [count].

    >>> order(Stream.CODE_OFFSETS, 0, 5).tolist()
    [0, 2, 1, 4, 3]
    """
    return _philox(stream, seed).random_raw(count).argsort(kind="stable")


def distinct(stream: Stream, seed: int, below: int, size: int) -> list[int]:
    """At most `size` different numbers below `below`, ascending.

    >>> distinct(Stream.RANDOM_SAMPLE, 0, below=1000, size=3)
    [208, 218, 388]
    """
    # By remainders and not by a shuffle: it costs nothing however large the index is. Some numbers
    # come twice, so more are drawn than wanted.
    raw = _philox(stream, seed).random_raw(4 * size)
    numbers = dict.fromkeys(int(value) for value in raw % np.uint64(below))
    return sorted(list(numbers)[:size])


def signs(seed: int, name: str, count: int) -> np.ndarray:
    """±1, float32 [count], keyed by (seed, name): what a code mixes one module's entries with.

    >>> signs(0, "layers.0.mlp/input", 4).tolist()
    [1.0, -1.0, 1.0, 1.0]
    """
    # A module's name is its key, so tracking more modules doesn't change the codes of the others.
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.Philox(key=np.array([seed, key], dtype=np.uint64)).random_raw(-(-count // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8), count=count)
    return bits.astype(np.float32) * 2 - 1


def generator(stream: Stream, seed: int = 0) -> np.random.Generator:
    """NumPy's generator on a stream, for draws from other distributions.

    Never for the bytes of an index: NumPy may change what its generators make of the same bits.
    """
    if "PCG64" in stream.value:
        return np.random.default_rng(seed)
    return np.random.Generator(_philox(stream, seed))


@contextlib.contextmanager
def always_alike(device: "torch.device", seed: int = 0) -> Iterator[None]:
    """Within this, PyTorch's global generators give the same numbers each time, by `seed`.

    Afterwards they are as they were before: the user's own numbers don't shift.
    """
    import torch  # late: most draws do without it

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _philox(stream: Stream, seed: int, sequence: int = 0) -> np.random.Philox:
    added, number, *_ = stream.value
    # Philox counts up in the lowest word of its counter, so a sequence's id in the third one gives
    # each sequence 2¹²⁸ numbers that no other one reaches.
    return np.random.Philox(key=np.array([seed + added, number], dtype=np.uint64),
                            counter=np.array([0, 0, sequence, 0], dtype=np.uint64))
