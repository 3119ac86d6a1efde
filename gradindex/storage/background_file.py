"""Background queries: which sequences come up whatever is asked.

Some of the index's own sequences serve as queries (their later half given the first). Of each of
these, the index keeps the vector v_q, and two thresholds: the code scores that the highest and the
lowest hundredth of the sequences reached at the build. The **generic rate** of a sequence is the
share of these queries whose threshold it reaches: 0.01 by chance (1/n in an index of n < 100
sequences), much more for one whose gradient is large in directions that many queries share. It is
that of the build's damping and of all modules, whatever a search asks for. Appended sequences are
compared with the same thresholds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradindex.errors import DamagedIndexError
from gradindex.storage.files import FileFacts
from gradindex.storage.tensors import read_tensors, write_vouched

ONE_IN = 100  # sequences reach a query's threshold


@dataclass(frozen=True)
class BackgroundQueries:
    """q queries, with the code scores that are high and low for each.

    `vectors` float16 [q, K] are v_q / ‖v_q‖; `upper` and `lower` float32 [q] are the thresholds of
    the code scores of these vectors; `ids` int64 [q] are the sequences that the queries were made
    of, and `digests` uint64 [q, 2] their digests (`row_file.digest_of`).
    """

    vectors: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    ids: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    def rates(self, scores: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """The generic rates of sequences with these code scores [q, n] and `digests` uint64 [n, 2].

        float64 [2, n]: first as proponents, the share of queries whose upper threshold they reach;
        then as opponents, the share whose lower threshold they reach. NaN where no query counts,
        all being made of equal sequences.
        """
        # Everything is influential for itself. By digest and not by id, because the sequence that a
        # query was made of may have been deleted, and an equal one remain.
        counts = (self.digests[:, None] != digests[None]).any(2)
        reached = np.stack([(scores >= self.upper[:, None]) & counts,
                            (scores <= self.lower[:, None]) & counts]).sum(1)
        with np.errstate(invalid="ignore"):
            rates: np.ndarray = reached / counts.sum(0)
        return rates


def thresholds(scores: np.ndarray) -> tuple[np.float32, np.float32]:
    """The upper and the lower threshold: what the highest and lowest hundredth of scores [n] reach.

    >>> [float(threshold) for threshold in thresholds(np.arange(200.0))]
    [197.5, 1.5]
    """
    top = -(-len(scores) // ONE_IN)
    ordered = np.sort(scores).astype(np.float64)
    after = min(top, len(scores) - 1)
    # Halfway to the next score: a machine that rounds otherwise moves no sequence across.
    upper, lower = ordered[-top] + ordered[-1 - after], ordered[top - 1] + ordered[after]
    return np.float32(upper / 2), np.float32(lower / 2)


def save(path: Path, queries: BackgroundQueries) -> FileFacts:
    """Write background queries. Raises ResourceError."""
    arrays = {"vectors": queries.vectors, "upper": queries.upper, "lower": queries.lower,
              "ids": queries.ids, "digests": queries.digests.view(np.int64)}
    return write_vouched(path, {  # copied: an empty array of NumPy's has no strides
        name: torch.from_numpy(array).clone(memory_format=torch.contiguous_format)
        for name, array in arrays.items()})


def load(path: Path, count: int, length: int) -> BackgroundQueries:
    """Read `count` background queries of K = `length`.

    The manifest vouches for the file. Raises DamagedIndexError for a missing or unreadable one, or
    one that holds something else.
    """
    tensors, _ = read_tensors(path, check=False)
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    # All that `rates` relies on: a NaN, or thresholds the wrong way round, would give rates that
    # look like any other.
    expected = {
        "vectors": ((count, length), torch.float16), "upper": ((count,), torch.float32),
        "lower": ((count,), torch.float32), "ids": ((count,), torch.int64),
        "digests": ((count, 2), torch.int64),
    }
    if kinds != expected or \
            not all(bool(tensor.isfinite().all()) for tensor in tensors.values()) or \
            bool((tensors["upper"] < tensors["lower"]).any()) or \
            bool((tensors["ids"] < 0).any()) or bool((tensors["ids"].diff() <= 0).any()):
        raise DamagedIndexError(
            f"{path} holds {kinds}, expected finite {expected} with ascending ids and thresholds "
            "in order. Copy the index again, or build again."
        )
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    # safetensors has no uint64, so the digests are kept as int64 of the same bits.
    return BackgroundQueries(**{**arrays, "digests": arrays["digests"].view(np.uint64)})
