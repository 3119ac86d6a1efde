"""How far a code's score is from the exact influence, measured once per index.

Some of the index's own sequences serve as queries (their later half given the first) against a
random sample of sequences. Their exact influence needs no codes, so it is computed before these are
made: it tells how many bits they need (`code_length.py`). With the codes on disk,
c is the root mean square of (code score − I) √K / (‖v_q‖ ‖v_m‖); the slope of code score on I shows
that the estimate has no bias. A few of the exact scores are kept as anchors, to be computed again
when the index is verified.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from gradindex.draws import Stream, choose
from gradindex.errors import GradindexError
from gradindex.influence.codes import Codes, CodeSettings, score_error
from gradindex.influence.curvature import Ekfac
from gradindex.influence.exact import Influences, collect
from gradindex.influence.preconditioned import (
    Preconditioned,
    prepare,
    query_coordinates,
    query_vectors,
)
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.memory import Allowance
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.manifest import Calibration
from gradindex.storage.records import Record
from indexer.fit.batch_memory import available_on
from indexer.fit.units import Read

CALIBRATION_QUERIES = 16
# With so many pairs, whose errors are as good as independent, c is known to 1 / √(2 n) = 2 %.
CALIBRATION_SAMPLE = 96
ANCHORS, ANCHORS_EACH = 8, 2  # exact scores kept, and of one query
STACKED = 1 / 4  # of the memory to be had: for preconditioned query gradients held at once
NORM_BITS = 16384  # K of the vectors whose norms tell the size of gradients: any K will do


@dataclass
class PairScores:
    """The exact influence [q, s] of a sample on some queries, and the vectors of both.

    `query_vectors` [q, K] and `vectors` [s, K] are those of the codes that were given.
    """

    queries: list[Record]
    query_vectors: np.ndarray
    influence: np.ndarray
    vectors: np.ndarray


@dataclass
class ExactPairs:
    """The exact influence [q, s] of a sample of sequences on some queries, before there are codes.

    NaN where a sequence's gradient is not finite.
    """

    queries: list[Record]
    sample: list[Record]
    influence: np.ndarray


def draw_pairs(ids: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Which of some ids serve as queries, and which are scored."""
    # from streams of their own: a sequence may be in both, or in one
    queries = choose(Stream.CALIBRATION_QUERIES, seed, len(ids), CALIBRATION_QUERIES)
    sample = choose(Stream.CALIBRATION_SAMPLE, seed, len(ids), CALIBRATION_SAMPLE)
    return [ids[number] for number in queries], [ids[number] for number in sample]


def exact_pairs(
    read: Read, ids: list[int], seed: int, influence: list[list[float | None]]
) -> ExactPairs:
    """The pairs of some ids whose scores were written down, None for NaN."""
    queries, sample = draw_pairs(ids, seed)
    return ExactPairs(read(queries), read(sample), np.array(influence, dtype=np.float64))


def score_pairs(
    model: LanguageModel, modules: list[Module], ekfac: Ekfac, read: Read, ids: list[int],
    seed: int, damping: float, batch_tokens: int, progress: Progress, allowance: Allowance,
) -> tuple[ExactPairs, np.ndarray]:
    """Score a sample of some ids' sequences exactly against queries made of others of them.

    With the pairs come their cosines [q, s], the influence in units of ‖v_q‖ ‖v_m‖: the error of a
    code's score is c / √K in them. NaN where a gradient is not finite, 0 where it is zero.
    Raises GradindexError where no sampled sequence has a gradient.
    """
    queries, sample = map(read, draw_pairs(ids, seed))
    # these codes are for norms alone: K isn't chosen yet, and hardly matters to them
    codes = Codes(modules, ekfac, CodeSettings.of(NORM_BITS, modules, seed, damping))
    stacks = -(-len(queries) // stacked_queries(model, modules, allowance))
    progress.start("pairs", len(queries) + stacks * len(sample), "passes")
    influence, cosines = [], []
    for scored in exact_influence(
            model, codes, ekfac, queries, sample, batch_tokens, allowance, progress.update):
        sizes = np.outer(*(np.linalg.norm(vectors.astype(np.float64), axis=1)
                           for vectors in (scored.query_vectors, scored.vectors)))
        influence.append(scored.influence)
        cosines.append(np.divide(scored.influence, sizes, where=sizes > 0,
                                 out=np.zeros_like(scored.influence)))
    progress.finish()
    pairs = ExactPairs(queries, sample, np.concatenate(influence))
    known = pairs.influence[np.isfinite(pairs.influence)]
    if len(known) and not known.any():
        raise GradindexError(
            f"none of the {len(sample)} sampled sequences has a gradient, so influence is zero "
            "throughout. Is the model the one that was trained on this data?"
        )
    return pairs, np.concatenate(cosines)


def calibrate(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, pairs: ExactPairs,
    stored: Callable[[list[int]], tuple[CodeIndex, np.ndarray]], batch_tokens: int,
    progress: Progress,
) -> Calibration:
    """c, the slope, the number of (query, sequence) pairs they were measured on, and anchors.

    `stored` gives some ids' codes on disk and their norms ‖v_m‖; all of the pairs have codes.
    """
    sample_ids = [record.id for record in pairs.sample]
    code_index, norms = stored(sample_ids)
    progress.start("calibrate", len(pairs.queries), "queries")
    errors, weights = [], []
    for vector, truth in zip(
            own_query_vectors(model, codes, ekfac, pairs.queries, batch_tokens, progress.update),
            pairs.influence, strict=True):
        # everything in units of the error that is expected at c = 1
        scale = score_error(1.0, float(np.linalg.norm(vector)), norms, len(vector))
        real = scale > 0  # a gradient that rounds to zero has a code without error
        errors.append(((code_index.scores(vector) - truth) / np.where(real, scale, 1))[real])
        weights.append((truth / np.where(real, scale, 1))[real])
    progress.finish()
    error, weight = np.concatenate(errors), np.concatenate(weights)
    asked = pairs.queries[: ANCHORS // ANCHORS_EACH]
    anchors = [(query.id, other, float(score))
               for query, scores in zip(asked, pairs.influence.tolist(), strict=False)
               for other, score in zip(sample_ids[:ANCHORS_EACH], scores, strict=False)]
    return Calibration(
        c=round(float(np.sqrt(np.mean(error**2))), 4),
        slope=round(slope(error, weight), 4), pairs=len(error), anchors=anchors,
    )


def slope(error: np.ndarray, truth: np.ndarray) -> float:
    """The slope of a line through 0 of truth + error on truth, by least squares.

    1 for an estimate without bias, below it for one that shrinks what it estimates.

    >>> slope(np.array([-0.5, -1.0]), np.array([1.0, 2.0]))  # half of the truth each time
    0.5
    """
    return float(1 + np.sum(error * truth) / np.sum(truth**2))


def exact_influence(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, queries: list[Record],
    sample: list[Record], batch_tokens: int, allowance: Allowance,
    done: Callable[[int], object] = lambda _: None,
) -> Iterator[PairScores]:
    """Exact influence of each sampled sequence on each query, a sequence that serves as one.

    For as many queries at a time as memory holds; `done` is told of every pass of a sequence.
    Raises ResourceError where memory doesn't hold one sequence.
    """
    stack = stacked_queries(model, codes.modules, allowance)
    for first in range(0, len(queries), stack):
        records, prepared = queries[first : first + stack], []
        for record in records:
            prepared.append(prepare_query(model, codes, ekfac, record))
            done(1)
        query_vectors, preconditioned = zip(*prepared, strict=True)
        # the sequences go through once for all queries at hand: their passes are most of the work
        joined = Preconditioned.join(list(preconditioned))
        influence = np.zeros((len(records), len(sample)))
        vectors = np.zeros((len(sample), codes.settings.length), dtype=np.float32)

        def run(
            rows: list[int], joined: Preconditioned = joined
        ) -> tuple[np.ndarray, np.ndarray]:
            influences, part = Influences(joined), codes.empty(len(rows))
            collect(model, codes.modules, model.batch([sample[row] for row in rows]),
                    influences, partial(codes.add, part))
            return influences.total, part.float().cpu().numpy()

        lengths = model.lengths(sample)
        for rows, (scores, part) in in_batches(lengths, batch_tokens, Splits(), run):
            influence[:, rows], vectors[rows] = scores, part
            done(len(rows))
        yield PairScores(records, np.stack(query_vectors), influence, vectors)


def stacked_queries(model: LanguageModel, modules: list[Module], allowance: Allowance) -> int:
    """How many queries are scored together, for the memory of their gradients: one at least."""
    room = int(STACKED * available_on(model.devices)) if allowance.bytes is None else \
        int(STACKED * allowance.bytes)
    each = model.accumulate.itemsize * sum(module.size for module in modules)
    return min(CALIBRATION_QUERIES, max(1, room // each))


def own_query_vectors(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, records: list[Record], batch_tokens: int,
    done: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """The vectors [q, K] of records that serve as queries; `done` is told of every record."""
    vectors = np.zeros((len(records), codes.settings.length), dtype=np.float32)

    def run(rows: list[int]) -> np.ndarray:
        batch = model.batch([model.objective.as_query(records[row]) for row in rows])
        return query_vectors(model, codes, ekfac, batch).float().cpu().numpy()

    lengths = model.lengths(records)
    for rows, part in in_batches(lengths, batch_tokens, Splits(), run):
        vectors[rows] = part
        done(len(rows))
    return vectors


def prepare_query(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, record: Record
) -> tuple[np.ndarray, Preconditioned]:
    """The vector [K] of a record that serves as a query, and its preconditioned gradient."""
    coordinates, _ = query_coordinates(model, codes.modules, ekfac, model.batch(
        [model.objective.as_query(record)]), codes.settings.damping)
    vectors, squares, preconditioned = codes.empty(1), codes.empty(1)[:, 0], Preconditioned({})
    prepare(codes, ekfac, codes.modules, coordinates, codes.settings.damping, vectors, squares,
            preconditioned)
    return vectors[0].float().cpu().numpy(), preconditioned
