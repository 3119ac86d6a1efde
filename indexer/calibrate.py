"""How far a code's score is from the exact influence, measured once per index.

Some of the index's own sequences serve as queries (their second half given the first) against a
random sample of sequences. c is the root mean square of (code score − I) √K / (‖v_q‖ ‖v_m‖); the
slope of code score on I shows that the estimate has no bias.
"""

from collections.abc import Callable

import numpy as np

from gradindex.codes import Codes, score_error
from gradindex.curvature import Ekfac
from gradindex.errors import GradindexError
from gradindex.gradients import Batch, make_batch
from gradindex.influence import Preconditioned, exact_scores, precondition, query_coordinates
from gradindex.model import LanguageModel
from gradindex.progress import Progress
from gradindex.records import Record
from gradindex.vectors import CodeIndex
from indexer.fit import Read, choose_sequences

QUERIES = 16
SAMPLE = 128
LARGEST_STACK = 1 << 29  # entries of preconditioned query gradients held at once


def calibrate(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, read: Read,
    stored: Callable[[list[int]], tuple[CodeIndex, np.ndarray]], count: int, batch_tokens: int,
    progress: Progress,
) -> dict[str, float]:
    """c, the slope, and the number of (query, sequence) pairs they were measured on.

    `stored(ids)` gives the codes on disk and their norms ‖v_m‖. Raises GradindexError where no
    sampled sequence has a gradient.
    """
    seed = codes.settings.seed
    queries = read(choose_sequences(count, QUERIES, seed + 1))
    ids = choose_sequences(count, SAMPLE, seed + 2)
    sample = read(ids)
    index, norms = stored(ids)
    progress.start("calibrate", len(queries), "queries")
    stack = max(1, LARGEST_STACK // sum(m.shape[0] * m.shape[1] for m in codes.modules))
    errors, weights = [], []
    for first in range(0, len(queries), stack):
        chunk = queries[first : first + stack]
        vectors, preconditioned = [], []
        for record in chunk:
            coordinates, _ = query_coordinates(
                model, codes.modules, ekfac, _second_half(record, model), codes.settings.damping
            )
            vectors.append(codes.query_vectors(coordinates)[0].float().cpu().numpy())
            preconditioned.append(Preconditioned(precondition(ekfac, coordinates)))
        together = Preconditioned.join(preconditioned)
        exact = exact_scores(model, codes.modules, together, sample, batch_tokens)
        for vector, truth in zip(vectors, exact, strict=True):
            scale = score_error(1.0, float(np.linalg.norm(vector)), norms, len(vector))
            real = scale > 0  # a gradient that rounds to zero has a code without error
            errors.append(((index.scores(vector) - truth) / np.where(real, scale, 1))[real])
            weights.append((truth / np.where(real, scale, 1))[real])
            progress.update(1)
    progress.finish()
    error, weight = np.concatenate(errors), np.concatenate(weights)
    if not np.any(weight):
        raise GradindexError(
            f"none of the {len(ids)} sampled sequences has a gradient, so influence is zero "
            "throughout. Is the model the one that was trained on this data?"
        )
    return {
        "c": round(float(np.sqrt(np.mean(error**2))), 4),
        "slope": round(float(1 + np.sum(error * weight) / np.sum(weight**2)), 4),
        "pairs": len(error),
    }


def _second_half(record: Record, model: LanguageModel) -> Batch:
    """The record as a query: its later scored tokens given everything before them."""
    positions = np.flatnonzero(record.scored[1:]) + 1
    scored = np.zeros(len(record.ids), dtype=bool)
    scored[positions[len(positions) // 2 :]] = True
    return make_batch([(record.ids, scored)], model.device)
