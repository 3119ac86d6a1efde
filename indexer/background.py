"""The queries that tell which sequences come up whatever is asked, made once per index."""

from collections.abc import Callable, Iterator

import numpy as np

from gradindex.draws import Stream, choose
from gradindex.influence.codes import Codes
from gradindex.influence.curvature import Ekfac
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage.background_file import BackgroundQueries, thresholds
from gradindex.storage.code_file import CodeIndex
from gradindex.storage.row_file import digest_of
from indexer.calibrate import prepare_query
from indexer.fit.units import Read

QUERIES = 64
LARGEST_SAMPLE = 1 << 20  # sequences whose scores are held at once: 256 MiB


def make_background(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, read: Read,
    stored: Callable[[list[int]], Iterator[tuple[np.ndarray, np.ndarray]]], ids: list[int],
    progress: Progress,
) -> tuple[BackgroundQueries, int]:
    """Queries made of some of the sequences, with the thresholds of their code scores.

    `ids` are those that have a code; `stored` gives some ids' codes on disk and their rows, a
    segment at a time. Also returned is how many sequences the thresholds were taken from: all, or a
    fixed random part of more than 2^20. A query without a gradient, or whose sequence equals all
    others, is left out.
    """
    seed, length = codes.settings.seed, codes.settings.length
    chosen = read([ids[one] for one in choose(
        Stream.BACKGROUND_QUERIES, seed, len(ids), QUERIES)])
    progress.start("background", len(chosen), "queries")
    vectors = np.zeros((len(chosen), length), dtype=np.float16)
    for number, record in enumerate(chosen):
        vectors[number] = unit(prepare_query(model, codes, ekfac, record)[0])
        progress.update(1)
    progress.finish()
    sample = [ids[one] for one in choose(
        Stream.BACKGROUND_QUERY_SCORES, seed, len(ids), LARGEST_SAMPLE)]
    scores, digests = _scores(vectors.astype(np.float32), sample, stored)
    own = np.array([digest_of(record) for record in chosen])
    kept = np.count_nonzero(vectors, axis=1) > 0
    upper, lower = np.zeros((2, len(chosen)), dtype=np.float32)
    for number in np.flatnonzero(kept).tolist():
        others = (digests != own[number]).any(1)
        kept[number] = others.any()
        if kept[number]:
            upper[number], lower[number] = thresholds(scores[number, others])
    named = np.array([record.id for record in chosen], dtype=np.int64)
    return BackgroundQueries(vectors[kept], upper[kept], lower[kept], named[kept],
                             own[kept]), len(sample)


def unit(vector: np.ndarray) -> np.ndarray:
    """v / ‖v‖ [K] in float16, 0 for one that is zero or not finite."""
    wide = vector.astype(np.float64)
    norm = np.linalg.norm(wide)
    return (wide / norm if 0 < norm < np.inf else np.zeros_like(wide)).astype(np.float16)


def _scores(
    vectors: np.ndarray, ids: list[int],
    stored: Callable[[list[int]], Iterator[tuple[np.ndarray, np.ndarray]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Code scores of ids for query vectors [q, K], float32 [q, n], and their digests [n, 2]."""
    scores = np.empty((len(vectors), len(ids)), dtype=np.float32)
    digests = np.empty((len(ids), 2), dtype=np.uint64)
    done = 0
    for codes, rows in stored(ids):
        index = CodeIndex(vectors.shape[1])
        index.add(codes)
        here = slice(done, done + len(rows))
        scores[:, here], digests[here] = index.many_scores(vectors), rows["digest"]
        done += len(rows)
    return scores, digests
