"""The queries that tell which sequences come up whatever is asked, made once per index."""

from collections.abc import Callable, Iterator

import numpy as np

from gradindex.draws import Stream, choose
from gradindex.influence.codes import Codes
from gradindex.influence.curvature import Ekfac
from gradindex.influence.device_codes import many_scores
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage.background_file import BackgroundQueries, thresholds
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.row_file import digest_of
from indexer.calibrate import own_query_vectors
from indexer.fit.units import Read

BACKGROUND_QUERIES = 64
LARGEST_SAMPLE = 1 << 20  # sequences whose scores are held at once: 256 MiB


def make_background_queries(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, read: Read,
    stored: Callable[[list[int]], Iterator[tuple[np.ndarray, np.ndarray]]], ids: list[int],
    batch_tokens: int, progress: Progress,
) -> tuple[BackgroundQueries, int]:
    """Queries made of some of the sequences, with the thresholds of their code scores.

    `ids` are those that have a code; `stored` gives some ids' codes on disk and their rows, a
    segment at a time. Also returned is how many sequences the thresholds were taken from: all, or a
    fixed random part of more than 2^20. A query without a gradient, or whose sequence equals all
    others, is left out.
    """
    seed = codes.settings.seed
    # a stream of its own: the same sequences shouldn't serve for calibration and here
    records = read([ids[number] for number in choose(
        Stream.BACKGROUND_QUERIES, seed, len(ids), BACKGROUND_QUERIES)])
    progress.start("background", len(records), "queries")
    vectors = np.stack([unit_vector(vector) for vector in own_query_vectors(
        model, codes, ekfac, records, batch_tokens, progress.update)])
    progress.finish()
    sample = [ids[number] for number in choose(
        Stream.BACKGROUND_QUERY_SCORES, seed, len(ids), LARGEST_SAMPLE)]
    # scored with what is stored: a search holds the same float16 against the thresholds
    scores, digests = _scores(model, vectors.astype(np.float32), sample, stored)
    query_digests = np.array([digest_of(record) for record in records])
    usable = np.count_nonzero(vectors, axis=1) > 0
    upper, lower = np.zeros((2, len(records)), dtype=np.float32)
    for number in np.flatnonzero(usable).tolist():
        # a sequence is like itself whatever it says: its copies would raise the threshold
        others = (digests != query_digests[number]).any(1)
        usable[number] = others.any()
        if usable[number]:
            upper[number], lower[number] = thresholds(scores[number, others])
    query_ids = np.array([record.id for record in records], dtype=np.int64)
    return BackgroundQueries(vectors[usable], upper[usable], lower[usable], query_ids[usable],
                             query_digests[usable]), len(sample)


def unit_vector(vector: np.ndarray) -> np.ndarray:
    """v / ‖v‖ [K] in float16, 0 for one that is zero or not finite."""
    wide = vector.astype(np.float64)
    norm = np.linalg.norm(wide)
    return (wide / norm if 0 < norm < np.inf else np.zeros_like(wide)).astype(np.float16)


def _scores(
    model: LanguageModel, vectors: np.ndarray, ids: list[int],
    stored: Callable[[list[int]], Iterator[tuple[np.ndarray, np.ndarray]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Code scores of ids for query vectors [q, K], float32 [q, n], and their digests [n, 2]."""
    scores = np.empty((len(vectors), len(ids)), dtype=np.float32)
    digests = np.empty((len(ids), 2), dtype=np.uint64)
    done = 0
    for codes, rows in stored(ids):  # a segment's codes at a time
        code_index = CodeIndex(vectors.shape[1])
        code_index.add(codes)
        part = slice(done, done + len(rows))
        scores[:, part], digests[part] = many_scores(
            code_index, vectors, model.device), rows["digest"]
        done += len(rows)
    return scores, digests
