"""One-bit codes on disk, and the scan that scores every row: FAISS, through its only door.

`IndexRaBitQ` with inner product keeps the sign of each of the K coordinates and one scale: K/8 + 8
bytes. It is trained on zeros, so that its centre is 0 in every segment: a learned centre differs
between segments and silently breaks joining them. A score is the whole scan's, never a top-k
alone, because the recall statement needs the best sequence left out.
"""

import contextlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

try:
    import faiss
except ImportError as error:
    raise ImportError(
        f"FAISS can't be imported ({error}). gradindex needs it: pip install \"gradindex[cpu]\" "
        "(faiss-cpu; on a machine with an NVIDIA GPU \"gradindex[gpu]\", which asks for the same). "
        "faiss-gpu does as well, but both together break each other: then remove both first, "
        "pip uninstall faiss-cpu faiss-gpu"
    ) from error

from gradindex.errors import DamagedIndexError
from gradindex.storage.files import FileFacts, Writer, atomic_write
from gradindex.storage.layout import code_bytes
from gradindex.storage.os_errors import memory_ran_out

_ONE_AT_A_TIME = threading.Lock()  # FAISS's limits are the process's
UNPACKED_ROWS = 256  # codes unpacked at once: 32 MB at 32,768 bits
QUERY_BITS = 4  # how finely FAISS quantises the query; 8 is half as fast, 0 (not at all) 1/500
SCANNED_ROWS = 1024  # the fewest rows that a thread scans at a time


def file_bytes(length: int, rows: int) -> int:
    """Bytes of a segment's file of `rows` codes of K = `length` bits.

    >>> file_bytes(512, 1001) - file_bytes(512, 1)
    72000
    """
    empty = faiss.serialize_index(CodeIndex(length)._index)
    return len(empty) + rows * code_bytes(length)


class CodeIndex:
    """The codes of one segment, of K = `length` bits each: row i belongs to record i.

    A code score estimates the inner product of a query's vector with a sequence's:

    >>> sequences = np.tile([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]], 16).astype(np.float32)
    >>> index = CodeIndex(64)
    >>> index.add(index.encode(sequences))
    >>> np.allclose(index.scores(sequences[1]), sequences @ sequences[1], atol=1)
    True
    """

    def __init__(self, length: int):
        self._content: np.ndarray | None = None  # what FAISS's codes are a view of
        self._index: Any = faiss.IndexRaBitQ(length, faiss.METRIC_INNER_PRODUCT)
        self._index.train(np.zeros((1, length), dtype=np.float32))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """The codes, uint8 [n, code_bytes(K)], of vectors [n, K]."""
        codes: np.ndarray = self._index.sa_encode(
            np.ascontiguousarray(vectors, dtype=np.float32))
        return codes

    def add(self, codes: np.ndarray) -> None:
        """Append rows, whose codes are uint8 [n, code_bytes(K)]."""
        self._index.add_sa_codes(np.ascontiguousarray(codes))

    def scores(self, query: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """The code scores of some rows [all] for a query's vector, float32 [K]: float32 [rows]."""
        first, end, _ = rows.indices(len(self))
        settings = faiss.RaBitQSearchParameters(  # type: ignore[call-arg]
            qb=QUERY_BITS, sel=faiss.IDSelectorRange(first, end, True))
        # A search for everything above the least number there is: a search for the best k would
        # sort them, and the recall statement needs the scores of all.
        everything = float(np.finfo(np.float32).min)
        _, values, numbers = self._index.range_search(
            query.reshape(1, -1), everything, params=settings)
        # NaN stays where FAISS returned nothing, as for a query that isn't finite.
        scores = np.full(end - first, np.nan, dtype=np.float32)
        scores[numbers - first] = values
        return scores

    def many_scores(self, queries: np.ndarray) -> np.ndarray:
        """The code scores of all rows for many queries' vectors, float32 [q, K]: float32 [q, rows].

        They differ from those of `scores` by far less than a code's own error: FAISS quantises a
        query, and here none is quantised.
        """
        length = queries.shape[1]
        stored = self._stored()
        scale = _steps(stored, length)
        scores = np.empty((len(queries), len(self)), dtype=np.float32)
        total = queries.sum(1, keepdims=True)
        # One product for all queries: FAISS would go through the codes once a query.
        for first in range(0, len(self), UNPACKED_ROWS):
            part = slice(first, first + UNPACKED_ROWS)
            bits = np.unpackbits(stored[part, : length // 8], axis=1, bitorder="little")
            inner = queries @ bits.astype(np.float32).T  # of signs: twice that of bits, less Σ
            scores[:, part] = (2 * inner - total) * scale[part]
        return scores

    def some_signs(self, octets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The signs of every code at some coordinates, and the scale of every code.

        `octets` int64 [n] are the numbers of the bytes, out of K/8, that hold the coordinates. The
        signs come as those bytes, uint8 [rows, n], lowest bit first, a set bit for 1 and none for
        −1. A code's score is the inner product of the query's vector with its signs, times its
        scale, float32 [rows].
        """
        stored = faiss.vector_to_array(self._index.codes).reshape(len(self), -1)
        return stored[:, octets], _steps(stored, self._index.d)

    def signs(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The sign bits, uint8 [rows, K/8], lowest first, and the scales, float32, of some rows.

        A code's score is the inner product of the query's vector with its signs, times its scale.
        """
        stored = self._stored()[rows]
        return stored[:, : self._index.d // 8], _steps(stored, self._index.d)

    def scales(self) -> np.ndarray:
        """The two numbers that FAISS keeps of each code besides its signs: float32 [rows, 2]."""
        return self._stored()[:, -8:].copy().view(np.float32)

    def codes(self, rows: list[int]) -> np.ndarray:
        """The codes of some rows: uint8 [len(rows), code_bytes(K)]."""
        return self._stored()[rows]

    def _stored(self) -> np.ndarray:
        """FAISS's own memory of the codes, uint8 [rows, bytes]: valid while this lives unchanged.
        """
        size = self._index.codes.size()
        return faiss.rev_swig_ptr(self._index.codes.data(), size).reshape(len(self), -1)

    def write(self, path: Path) -> FileFacts:
        """Write the codes. Raises ResourceError."""
        # FAISS hands its bytes to us: its own writer reports success on a full disk.
        return atomic_write(path, self._serialize, len(self) * self._index.code_size)

    def _serialize(self, writer: Writer) -> None:
        errors: list[OSError] = []

        def write(content: bytes) -> int:
            try:
                return writer.write(content)
            except OSError as error:  # FAISS makes it a RuntimeError of its own
                errors.append(error)
                raise

        try:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(write))  # type: ignore[attr-defined]
        except RuntimeError:
            if not errors:
                raise
        if errors:
            raise errors[0]

    @classmethod
    def parse(
        cls, content: bytes | mmap.mmap, length: int, rows: int, where: Path
    ) -> "CodeIndex":
        """The codes of a segment's file, whose `content` is in memory or mapped, without a copy.

        `where` is the file's path, for the message. Raises DamagedIndexError for anything but
        `rows` codes of `length` bits.
        """
        octets = np.frombuffer(content, dtype=np.uint8)
        # FAISS believes the sizes that it reads: it may allocate no more than the file has.
        with _at_most(len(content)):
            try:
                reader = faiss.ZeroCopyIOReader(  # type: ignore[attr-defined]
                    faiss.swig_ptr(octets), len(octets))
                index = faiss.read_index(reader)
            except MemoryError as error:
                raise memory_ran_out(where) from error
            except RuntimeError as error:
                if "bad_alloc" in str(error):  # C++'s word for it, in an error of FAISS's
                    raise memory_ran_out(where) from error
                reason = str(error).strip().rpartition("\n")[2][:120]
                raise DamagedIndexError(
                    f"{where} can't be read: {reason}. Copy the index again."
                ) from None
        if not isinstance(index, faiss.IndexRaBitQ) or not _is_ours(index, length, rows):
            raise DamagedIndexError(
                f"{where} doesn't hold {rows} codes of {length} bits. Copy the index again."
            )
        self = cls.__new__(cls)
        self._index, self._content = index, octets
        return self


def scan(segments: Sequence[CodeIndex], queries: np.ndarray, threads: int) -> np.ndarray:
    """The code scores of all rows of some segments for queries' vectors, float32 [q, K].

    float32 [q, rows], the rows in the order of the segments.

    >>> ones = np.ones((2, 64), dtype=np.float32)
    >>> index = CodeIndex(64)
    >>> index.add(index.encode(ones))
    >>> scan([index, index], ones[:1], threads=1).round().tolist()
    [[64.0, 64.0, 64.0, 64.0]]
    """
    # FAISS's own threads share out queries alone, of which there is mostly one: here the rows are
    # shared out, whatever their segments.
    starts = np.cumsum([0, *map(len, segments)])
    scores = np.empty((len(queries), starts[-1]), dtype=np.float32)

    def score(part: tuple[CodeIndex, int, int, int]) -> None:
        segment, start, first, end = part
        for number, query in enumerate(queries):
            scores[number, start + first : start + end] = segment.scores(query, slice(first, end))

    # FAISS walks by all rows of a segment for every part of it, at 1/150 of what scoring one takes
    most, parts = max(threads, min(4 * threads, 16)), []
    least = SCANNED_ROWS  # which several queries read again from the cache
    if len(queries) == 1:
        least = max(least, -(-int(starts[-1]) // (16 * threads)))
    for segment, start in zip(segments, starts.tolist(), strict=False):
        rows = max(least, -(-len(segment) // most))
        parts += [(segment, start, first, min(first + rows, len(segment)))
                  for first in range(0, len(segment), rows)]
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        list(pool.map(score, parts))
    return scores


def _steps(stored: np.ndarray, length: int) -> np.ndarray:
    """What the signs of each code of K = `length` bits are multiplied by: float32 [rows]."""
    return stored[:, -4:].copy().view(np.float32)[:, 0] / np.float32(length**0.5)


@contextlib.contextmanager
def _at_most(size: int) -> Iterator[None]:
    """Within this, FAISS allocates no vector above `size` bytes and reads no nested index."""
    with _ONE_AT_A_TIME:
        usual = (faiss.get_deserialization_vector_byte_limit(),
                 faiss.get_deserialization_loop_limit())
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(1)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(usual[0])
            faiss.set_deserialization_loop_limit(usual[1])


def _is_ours(read: Any, length: int, rows: int) -> bool:
    """Whether an index read by FAISS is one of `rows` codes of `length` bits around a centre of 0.
    """
    # Every size that a scan relies on: it reads beyond the codes of a file that lies about one.
    return bool(
        read.d == read.rabitq.d == length and read.ntotal == rows
        and read.metric_type == read.rabitq.metric_type == faiss.METRIC_INNER_PRODUCT
        and read.code_size == read.rabitq.code_size == code_bytes(length)
        and read.codes.size() == rows * code_bytes(length)
        and read.rabitq.nb_bits == 1 and read.is_trained
        and read.center.size() == length
        and not faiss.vector_to_array(read.center).any()
    )


def library_version() -> str:
    """The version of FAISS, which a manifest names."""
    return str(faiss.__version__)
