"""Every random stream by name: nothing else in gradindex draws a random number.

A stream is a number that no other one has, so no two of them give the same bits. Those that decide
the bytes of an index, or a score, are raw Philox bits keyed by (seed, stream): the same on every
machine and with every version of NumPy. Where a draw belongs to a sequence, the sequence's id is
part of the key, so nothing depends on batching.
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
    """What is drawn, and its key: what is added to the seed, and the stream's number."""

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
    BACKGROUND_SAMPLE = 0, 4
    DRIFT_LABELS = 0, 5
    EVAL_SAMPLE = 0, 6
    EVAL_INTERVALS = 0, 7
    REPORT_QUERIES = 0, 8
    REPORT_SAMPLE = 0, 9
    TAIL_SAMPLES = 0, 10  # of the fitted power law
    HALF_INTERVALS = 0, 11
    DRY_RUN_SAMPLE = 0, 12
    GROUP_COORDINATES = 0, 13


def choose(stream: Stream, seed: int, count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, drawn without replacement, ascending.

    >>> choose(Stream.FIT_SEQUENCES, 0, 10, 3)
    [3, 5, 7]
    """
    if wanted >= count:
        return list(range(count))
    raw = _philox(stream, seed).random_raw(count)
    return sorted(int(one) for one in raw.argsort(kind="stable")[:wanted])


def uniforms(stream: Stream, seed: int, sequence: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [count], of one sequence by its id."""
    raw = _philox(stream, seed, sequence).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def order(stream: Stream, seed: int, count: int) -> np.ndarray:
    """The numbers below `count` in a random order: int64 [count]."""
    return _philox(stream, seed).random_raw(count).argsort(kind="stable")


def distinct(stream: Stream, seed: int, below: int, wanted: int) -> list[int]:
    """At most `wanted` different numbers below a bound, ascending; the same as it grows slowly."""
    raw = _philox(stream, seed).random_raw(4 * wanted)
    drawn = dict.fromkeys(int(value) for value in raw % np.uint64(below))
    return sorted(list(drawn)[:wanted])


def signs(seed: int, name: str, count: int) -> np.ndarray:
    """±1, float32 [count], keyed by (seed, name): what a code mixes one module's entries with."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.Philox(key=np.array([seed, key], dtype=np.uint64)).random_raw(-(-count // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8), count=count)
    return bits.astype(np.float32) * 2 - 1


def generator(stream: Stream, seed: int = 0) -> np.random.Generator:
    """NumPy's generator on a stream, for what needs distributions; never for an index's bytes."""
    return np.random.Generator(_philox(stream, seed))


@contextlib.contextmanager
def always_alike(device: "torch.device") -> Iterator[None]:
    """Give what draws from PyTorch's global generator the same numbers each time.

    The user's own come out afterwards as if nothing had been drawn.
    """
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _philox(stream: Stream, seed: int, sequence: int = 0) -> np.random.Philox:
    added, number = stream.value
    return np.random.Philox(key=np.array([seed + added, number], dtype=np.uint64),
                            counter=np.array([0, 0, sequence, 0], dtype=np.uint64))
