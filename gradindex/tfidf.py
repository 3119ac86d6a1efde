"""The TF-IDF filter of Grosse et al. 2023 (§3.2): which sequences share rare tokens with a query.

score(query, m) = Σ over the query's tokens that m holds of IDF(token), with
IDF(token) = log((N − n + ½)/(n + ½) + 1), n of the N sequences holding it. The paper's factor
(k₁+1)/(k₁+1) for a token that is there is 1. Repeated query tokens count each time.

Each segment keeps which tokens each of its sequences holds, as a sparse matrix. SciPy, which
writes it without pickle, enters here.
"""

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse

from gradindex.errors import DamagedIndexError
from gradindex.files import atomic_write


def write(path: Path, sequences: Sequence[np.ndarray], vocabulary: int) -> None:
    """Write which of `vocabulary` token ids each sequence (token ids [n]) holds."""
    held = [np.unique(ids) for ids in sequences]
    starts = np.cumsum([0, *map(len, held)])
    matrix = scipy.sparse.csr_matrix(
        (np.ones(starts[-1], dtype=bool), np.concatenate(held), starts),
        shape=(len(held), vocabulary),
    )
    buffer = io.BytesIO()
    scipy.sparse.save_npz(buffer, matrix)
    atomic_write(path, buffer.getvalue())


def read(path: Path, rows: int) -> scipy.sparse.csr_matrix:
    """A segment's matrix [rows, vocabulary]. Raises DamagedIndexError."""
    try:
        matrix = scipy.sparse.load_npz(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedIndexError(f"{path} can't be read: {error}. Copy the index again.") from error
    if matrix.shape[0] != rows:
        raise DamagedIndexError(
            f"{path} holds {matrix.shape[0]} sequences, expected {rows}. Copy the index again."
        )
    return matrix


class TokenMatrix:
    """Which tokens every sequence of an index holds."""

    def __init__(self, segments: list[scipy.sparse.csr_matrix]):
        self._held = scipy.sparse.vstack(segments, format="csr")
        total = self._held.shape[0]
        count = np.asarray(self._held.sum(0)).ravel()
        self._idf = np.log((total - count + 0.5) / (count + 0.5) + 1)

    def scores(self, tokens: Sequence[int]) -> np.ndarray:
        """The TF-IDF score of every sequence for a query's tokens: float64 [N]."""
        weights = np.zeros(len(self._idf))
        np.add.at(weights, np.asarray(tokens, dtype=np.int64), 1.0)
        return self._held @ (weights * self._idf)
