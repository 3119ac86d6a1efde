"""How far a code's score is from the exact influence, measured once per index.

Some of the index's own sequences serve as queries (their later half given the first) against a
random sample of sequences. c is the root mean square of (code score − I) √K / (‖v_q‖ ‖v_m‖); the
slope of code score on I shows that the estimate has no bias. A few of the exact scores are kept as
anchors, to be computed again when the index is verified.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from gradindex.draws import Stream, choose
from gradindex.errors import GradindexError
from gradindex.influence.codes import Codes, score_error
from gradindex.influence.curvature import Ekfac
from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Preconditioned, prepare, query_coordinates
from gradindex.memory import Allowance
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.manifest import Calibration
from gradindex.storage.records import Record
from indexer.fit.units import Read

CALIBRATION_QUERIES = 16
CALIBRATION_SAMPLE = 128
ANCHORS, ANCHORS_EACH = 8, 2  # exact scores kept, and of one query
STACKED_ENTRIES = 1 << 29  # entries of preconditioned query gradients held at once


def calibrate(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, read: Read,
    stored: Callable[[list[int]], tuple[CodeIndex, np.ndarray]], ids: list[int], batch_tokens: int,
    progress: Progress, allowance: Allowance,
) -> Calibration:
    """c, the slope, the number of (query, sequence) pairs they were measured on, and anchors.

    `ids` are those that have a code; `stored` gives some ids' codes on disk and their norms ‖v_m‖.
    Raises GradindexError where no sampled sequence has a gradient.
    """
    seed = codes.settings.seed
    # queries and sample from streams of their own: a sequence may be in both, or in one
    queries = read([ids[number] for number in choose(
        Stream.CALIBRATION_QUERIES, seed, len(ids), CALIBRATION_QUERIES)])
    sample_ids = [ids[number] for number in choose(
        Stream.CALIBRATION_SAMPLE, seed, len(ids), CALIBRATION_SAMPLE)]
    sample = read(sample_ids)
    code_index, norms = stored(sample_ids)
    progress.start("calibrate", len(queries), "queries")
    errors, weights = [], []
    anchors: list[tuple[int, int, float]] = []
    for vectors, exact, records in exact_influence(
            model, codes, ekfac, queries, sample, batch_tokens, allowance):
        for vector, truth, query in zip(vectors, exact, records, strict=True):
            # everything in units of the error that is expected at c = 1
            scale = score_error(1.0, float(np.linalg.norm(vector)), norms, len(vector))
            real = scale > 0  # a gradient that rounds to zero has a code without error
            errors.append(((code_index.scores(vector) - truth) / np.where(real, scale, 1))[real])
            weights.append((truth / np.where(real, scale, 1))[real])
            if len(anchors) < ANCHORS:
                anchors += [(query.id, other, float(score)) for other, score in
                            list(zip(sample_ids, truth, strict=True))[:ANCHORS_EACH]]
            progress.update(1)
    progress.finish()
    error, weight = np.concatenate(errors), np.concatenate(weights)
    if not np.any(weight):
        raise GradindexError(
            f"none of the {len(sample)} sampled sequences has a gradient, so influence is zero "
            "throughout. Is the model the one that was trained on this data?"
        )
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
) -> Iterator[tuple[np.ndarray, np.ndarray, list[Record]]]:
    """Exact influence of each sampled sequence on each query: a sequence's later half.

    Yields, for some queries at a time, their vectors [q, K], the influence [q, sample] and them.
    """
    stack = stacked_queries(codes.modules, allowance)
    for first in range(0, len(queries), stack):
        records = queries[first : first + stack]
        vectors, preconditioned = zip(
            *(prepare_query(model, codes, ekfac, record) for record in records), strict=True)
        joined = Preconditioned.join(list(preconditioned))
        exact = exact_scores(model, codes.modules, joined, sample, batch_tokens)
        yield np.stack(vectors), exact, records


def stacked_queries(modules: list[Module], allowance: Allowance) -> int:
    """How many queries are scored together at most, for the memory of their gradients.

    >>> stacked_queries([Module("m", 0, "mlp", 1 << 14, 1 << 14, False)], Allowance())
    2
    """
    entries = allowance.part(1 / 16, 4 * STACKED_ENTRIES) // 4  # of 4 bytes each
    return max(1, entries // sum(module.size for module in modules))


def prepare_query(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, record: Record
) -> tuple[np.ndarray, Preconditioned]:
    """The vector [K] of a record's later half as a query, and its preconditioned gradient."""
    # asked of its later half given the first: what was said before is context, not target
    batch = model.batch([replace(record, scored=model.objective.later_half(record.scored))])
    coordinates, _ = query_coordinates(
        model, codes.modules, ekfac, batch, codes.settings.damping)
    vectors, squares, preconditioned = codes.empty(1), codes.empty(1)[:, 0], Preconditioned({})
    prepare(codes, ekfac, coordinates, codes.settings.damping, vectors, squares, preconditioned)
    return vectors[0].float().cpu().numpy(), preconditioned
