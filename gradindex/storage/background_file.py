"""Background queries: which sequences come up whatever is asked.

Some of the index's own sequences serve as queries (their later half given the first). What is kept
of each is its vector v_q and the code scores that one sequence in a hundred of the index reaches at
the build, above and below. The **generic rate** of a sequence is the share of these queries for
which it is among them: 0.01 by chance (1/n in an index of n < 100 sequences), much more for one
whose gradient is large in directions that many queries share. It is that of the build's damping and
of all modules, whatever a search asks for, and appended sequences are held against the same scores.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradindex.errors import DamagedIndexError
from gradindex.storage.code_file import CodeIndex
from gradindex.storage.files import FileFacts
from gradindex.storage.tensors import read_tensors, write_tensors

ONE_IN = 100  # sequences reach a query's threshold


@dataclass(frozen=True)
class BackgroundQueries:
    """q queries, and which code scores are high and low for each.

    `vectors` float16 [q, K] are v_q / ‖v_q‖; `upper` and `lower` float32 [q] are the thresholds of
    the code scores with these; `ids` int64 [q] are the sequences that the queries were made of and
    `digests` uint64 [q, 2] those of `row_file.digest_of`, by which equal sequences are known even
    where that one was deleted.
    """

    vectors: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    ids: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    def rates(self, codes: CodeIndex, digests: np.ndarray) -> np.ndarray:
        """The generic rates of coded sequences with `digests` [n, 2]: float64 [2, n].

        First as proponents, the share of queries whose upper threshold they reach; then as
        opponents, the same for the lower. A query made of an equal sequence doesn't count; NaN
        where none does.
        """
        scores = codes.many_scores(self.vectors.astype(np.float32))
        counts = (self.digests[:, None] != digests[None]).any(2)
        reached = np.stack([(scores >= self.upper[:, None]) & counts,
                            (scores <= self.lower[:, None]) & counts]).sum(1)
        with np.errstate(invalid="ignore"):
            rates: np.ndarray = reached / counts.sum(0)
        return rates


def thresholds(scores: np.ndarray) -> tuple[np.float32, np.float32]:
    """What the highest and the lowest hundredth (at least one) of scores [n] reach.

    Each lies halfway to the next score, so that rounding moves nobody across it.
    """
    top = -(-len(scores) // ONE_IN)
    ordered = np.sort(scores).astype(np.float64)
    after = min(top, len(scores) - 1)
    upper, lower = ordered[-top] + ordered[-1 - after], ordered[top - 1] + ordered[after]
    return np.float32(upper / 2), np.float32(lower / 2)


def file_bytes(count: int, length: int) -> int:
    """Bytes of the file of `count` background queries of K = `length`, but for its header."""
    return count * (2 * length + 2 * 4 + 3 * 8)


def save(path: Path, queries: BackgroundQueries) -> FileFacts:
    """Write background queries. Raises ResourceError."""
    arrays = {"vectors": queries.vectors, "upper": queries.upper, "lower": queries.lower,
              "ids": queries.ids, "digests": queries.digests.view(np.int64)}
    return write_tensors(path, {  # copied: an empty array of NumPy's has no strides
        name: torch.from_numpy(one).clone(memory_format=torch.contiguous_format)
        for name, one in arrays.items()})


def load(path: Path, count: int, length: int) -> BackgroundQueries:
    """`count` background queries of K = `length`.

    Raises DamagedIndexError for a missing or unreadable file, or one that holds something else.
    """
    tensors, _ = read_tensors(path)
    found = {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()}
    expected = {
        "vectors": ((count, length), torch.float16), "upper": ((count,), torch.float32),
        "lower": ((count,), torch.float32), "ids": ((count,), torch.int64),
        "digests": ((count, 2), torch.int64),
    }
    if found != expected or not all(bool(one.isfinite().all()) for one in tensors.values()) or \
            bool((tensors["upper"] < tensors["lower"]).any()) or \
            bool((tensors["ids"] < 0).any()) or bool((tensors["ids"].diff() <= 0).any()):
        raise DamagedIndexError(
            f"{path} holds {found}, expected finite {expected} with ascending ids and thresholds "
            "in order. Copy the index again, or build again."
        )
    arrays = {name: one.numpy() for name, one in tensors.items()}
    return BackgroundQueries(**{**arrays, "digests": arrays["digests"].view(np.uint64)})
