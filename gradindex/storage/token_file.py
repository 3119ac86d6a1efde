"""The TF-IDF filter of Grosse et al. 2023 (§3.2): which sequences share rare tokens with a query.

score(query, m) = Σ over the query's tokens that m holds of IDF(token), with
IDF(token) = log((N − n + ½)/(n + ½) + 1), n of the N sequences holding it. The paper's factor
(k₁+1)/(k₁+1) for a token that is there is 1. Repeated query tokens count each time.

Each segment keeps which tokens each of its sequences holds, as a sparse matrix. SciPy, which
writes it without pickle, enters here.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import scipy.sparse

from gradindex.errors import DamagedIndexError
from gradindex.storage.files import FileFacts, atomic_write

Matrix: TypeAlias = scipy.sparse.csr_matrix  # of bool [sequences, vocabulary]


def write(path: Path, sequences: Sequence[np.ndarray], vocabulary: int) -> FileFacts:
    """Write which of `vocabulary` token ids each sequence (token ids [n]) holds.

    Raises ResourceError.
    """
    return atomic_write(path, pack(sequences, vocabulary))


def pack(sequences: Sequence[np.ndarray], vocabulary: int) -> bytes:
    """The content of a segment's file, for token ids [n] of each sequence."""
    held = [np.unique(ids) for ids in sequences]
    starts = np.cumsum([0, *map(len, held)])
    matrix = scipy.sparse.csr_matrix(
        (np.ones(starts[-1], dtype=bool), np.concatenate(held), starts),
        shape=(len(held), vocabulary),
    )
    buffer = io.BytesIO()
    scipy.sparse.save_npz(buffer, matrix)
    return buffer.getvalue()


def parse(content: bytes, rows: int, length: int, vocabulary: int, where: Path) -> Matrix:
    """A segment's matrix [rows, vocabulary]; a row holds at most `length` tokens.

    Raises DamagedIndexError, also where it would unpack to more than such a matrix takes.
    """
    most = 16 * rows * (length + 1) + (1 << 12)  # bytes: index, value and row start, and headers
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > most:
                raise ValueError(f"it unpacks to more than {most:,} bytes")
        matrix = scipy.sparse.load_npz(io.BytesIO(content))
        if not isinstance(matrix, scipy.sparse.csr_matrix) or matrix.dtype != bool:
            raise ValueError("it holds another kind of matrix")
        matrix.check_format(full_check=True)
    except Exception as error:  # hostile bytes make zipfile, NumPy and SciPy raise anything
        raise DamagedIndexError(
            f"{where} can't be read: {str(error)[:120]}. Copy the index again."
        ) from error
    if matrix.shape != (rows, vocabulary):
        raise DamagedIndexError(
            f"{where} holds {matrix.shape[0]} sequences of {matrix.shape[1]} possible tokens, "
            f"expected {rows} of {vocabulary}. Copy the index again."
        )
    return matrix


class TokenMatrix:
    """Which tokens every sequence of an index holds; `live` [rows] says which rows count."""

    def __init__(self, segments: list[Matrix], live: np.ndarray):
        self._held = scipy.sparse.vstack(segments, format="csr")
        if not live.all():
            self._held = self._held[live]
        total = self._held.shape[0]
        count = np.asarray(self._held.sum(0)).ravel()
        self._idf = np.log((total - count + 0.5) / (count + 0.5) + 1)

    def scores(self, tokens: Sequence[int]) -> np.ndarray:
        """The TF-IDF score of every sequence for a query's tokens: float64 [N]."""
        weights = np.zeros(len(self._idf))
        np.add.at(weights, np.asarray(tokens, dtype=np.int64), 1.0)
        scores: np.ndarray = self._held @ (weights * self._idf)
        return scores
