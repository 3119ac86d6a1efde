"""The TF-IDF filter of Grosse et al. 2023 (§3.2): which sequences share rare tokens with a query.

score(query, m) = Σ over the query's tokens that m holds of IDF(token), with
IDF(token) = log((N − n + ½)/(n + ½) + 1), where n of the N sequences hold the token. The paper's
factor (k₁+1)/(k₁+1) for a token that is there is 1. A token that the query repeats counts each
time.

Each segment keeps which tokens each of its sequences holds, as a sparse matrix. SciPy, which writes
it without pickle, enters here.
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
from gradindex.storage.layout import token_bytes
from gradindex.storage.os_errors import memory_ran_out

Matrix: TypeAlias = scipy.sparse.csr_matrix  # of bool [sequences, vocabulary]


def write(path: Path, sequences: Sequence[np.ndarray], vocabulary: int) -> FileFacts:
    """Write which tokens each sequence holds; see `pack`. Raises ResourceError."""
    return atomic_write(path, pack(sequences, vocabulary))


def pack(sequences: Sequence[np.ndarray], vocabulary: int) -> bytes:
    """The content of a segment's file, from the token ids, int32 [n], of each sequence.

    All of them are below `vocabulary`.

    >>> content = pack([np.array([3, 1, 3]), np.array([2])], vocabulary=5)
    >>> parse(content, 2, 4, 5, Path("tokens.npz")).toarray().astype(int).tolist()
    [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    """
    distinct = [np.unique(tokens) for tokens in sequences]
    starts = np.cumsum([0, *map(len, distinct)])
    matrix = scipy.sparse.csr_matrix(
        (np.ones(starts[-1], dtype=bool), np.concatenate(distinct), starts),
        shape=(len(distinct), vocabulary),
    )
    buffer = io.BytesIO()
    scipy.sparse.save_npz(buffer, matrix)
    return buffer.getvalue()


def parse(content: bytes, rows: int, length: int, vocabulary: int, where: Path) -> Matrix:
    """The matrix [rows, vocabulary] of a segment's file. `where` is its path, for the message.

    Raises DamagedIndexError for anything but such a matrix, each of whose rows holds at most
    `length` tokens.
    """
    # Before it is unpacked: a file of a few kilobytes can unpack to all of the memory.
    most = token_bytes(rows, length) + (1 << 12)  # and headers
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > most:
                raise ValueError(f"it unpacks to more than {most:,} bytes")
        matrix = scipy.sparse.load_npz(io.BytesIO(content))
        if not isinstance(matrix, scipy.sparse.csr_matrix) or matrix.dtype != bool:
            raise ValueError("it holds another kind of matrix")
        matrix.check_format(full_check=True)
    except MemoryError as error:
        raise memory_ran_out(where) from error
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
    """Which tokens every sequence of an index holds.

    `segments` are the matrices of all segments, and `live` bool [rows] says which rows count.

    >>> content = pack([np.array([0, 1]), np.array([1]), np.array([1, 2])], vocabulary=3)
    >>> matrix = TokenMatrix([parse(content, 3, 4, 3, Path("tokens.npz"))], np.ones(3, dtype=bool))
    >>> matrix.scores([0, 1]).round(3).tolist()  # only the first holds the rare token 0
    [1.114, 0.134, 0.134]
    """

    def __init__(self, segments: list[Matrix], live: np.ndarray):
        self._matrix = scipy.sparse.vstack(segments, format="csr")
        if not live.all():
            self._matrix = self._matrix[live]
        total = self._matrix.shape[0]
        count = np.asarray(self._matrix.sum(0)).ravel()
        # The ½ keeps a token that no sequence holds from a division by 0, and the 1 one that all
        # hold from a negative weight.
        self._idf = np.log((total - count + 0.5) / (count + 0.5) + 1)

    def scores(self, tokens: Sequence[int]) -> np.ndarray:
        """The TF-IDF score of every live sequence for a query's token ids: float64 [N]."""
        weights = np.zeros(len(self._idf))
        np.add.at(weights, np.asarray(tokens, dtype=np.int64), 1.0)  # counts repeated tokens
        scores: np.ndarray = self._matrix @ (weights * self._idf)
        return scores
