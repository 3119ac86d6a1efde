"""How far a code's score is from the exact influence, measured once per index.

Some of the index's own sequences serve as queries (their second half given the first) against a
random sample of sequences. c is the root mean square of (code score − I) √K / (‖v_q‖ ‖v_m‖); the
slope of code score on I shows that the estimate has no bias.
"""

from collections.abc import Callable

import numpy as np

from gradindex.codes import Codes
from gradindex.curvature import Ekfac
from gradindex.gradients import Batch, make_batch
from gradindex.influence import exact_scores, precondition, query_gradient
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

    `stored(ids)` gives the codes on disk and their norms ‖v_m‖.
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
            gradients, _ = query_gradient(model, codes.modules, _second_half(record, model))
            coordinates = {
                name: ekfac[name].coordinates(g, codes.settings.damping)
                for name, g in gradients.items()
            }
            vectors.append(codes.query_vector(coordinates).float().cpu().numpy())
            preconditioned.append(precondition(ekfac, coordinates))
        exact = exact_scores(model, codes.modules, preconditioned, sample, batch_tokens)
        for vector, truth in zip(vectors, exact, strict=True):
            scale = np.linalg.norm(vector) * norms.astype(np.float64) / len(vector) ** 0.5
            errors.append((index.scores(vector).astype(np.float64) - truth) / scale)
            weights.append(truth / scale)
            progress.update(1)
    progress.finish()
    error, weight = np.concatenate(errors), np.concatenate(weights)
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
