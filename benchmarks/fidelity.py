"""Does a shortlist by code hold the sequences with the most exact influence?

    python benchmarks/fidelity.py

Trains a small GPT-NeoX on standard-library text, scores held-out queries exactly (EK-FAC) against
every training sequence, and compares shortlists: codes of several lengths K, the eigen-coordinates
with the largest Λ, and the TF-IDF filter of Grosse et al. 2023 (§3.2). r10@100 is the share of the
true top 10 in a shortlist of 100. Then: the recall statement, claimed against actual.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import Workload, make_workload
from gradindex.codes import Codes, CodeSettings, default_width, score_error
from gradindex.curvature import Ekfac
from gradindex.gradients import apply_inputs, backward, make_batch, plan_batches
from gradindex.influence import precondition, query_coordinates
from gradindex.model import Module
from gradindex.progress import duration, stderr_progress
from gradindex.vectors import CodeIndex, code_bytes
from indexer.calibrate import calibrate
from search.recall import estimated_recall, inclusion_probability

LENGTHS = (4096, 8192, 16384, 32768, 65536)
COORDINATES = (4096, 16384, 65536)
SHORTLISTS = ((10, 100), (10, 1000), (100, 1000))  # k, shortlist


class Baseline:
    """The coordinates of largest Λ/(Λ+λ) in the eigenbasis, half-whitened, in float16."""

    def __init__(self, modules: list[Module], ekfac: Ekfac, count: int, rows: int):
        weight = torch.cat([
            (ekfac[m.name].eigenvalues / ekfac[m.name].damped(0.1)).flatten() for m in modules
        ])
        chosen = torch.topk(weight, min(count, len(weight))).indices
        self.order = {}  # by module: places in the vector, places in the module
        start = 0
        for m in modules:
            size = ekfac[m.name].eigenvalues.numel()
            here = ((chosen >= start) & (chosen < start + size)).nonzero()[:, 0]
            self.order[m.name] = (here, chosen[here] - start)
            start += size
        self.ekfac = ekfac
        self.stored = torch.zeros(rows, len(chosen), dtype=torch.float16)

    def add(self, rows: list[int], module: Module, a: torch.Tensor, d: torch.Tensor) -> None:
        c = self.ekfac[module.name]
        there, here = self.order[module.name]
        root = c.damped(0.1).flatten()[here].sqrt()
        rotated_a = apply_inputs(a, c.eigenvectors_a.T, module.bias)
        for row, one_d, one_a in zip(rows, d @ c.eigenvectors_s, rotated_a, strict=True):
            self.stored[row, there] = ((one_d.T @ one_a).flatten()[here] / root).half()

    def query(self, coordinates: dict[str, torch.Tensor]) -> torch.Tensor:
        vector = torch.zeros(self.stored.shape[1])
        for name, (there, here) in self.order.items():
            root = self.ekfac[name].damped(0.1).flatten()[here].sqrt()
            vector[there] = coordinates[name].flatten()[here] * root
        return vector


def tfidf_scores(work: Workload) -> np.ndarray:
    """Σ of the IDF of the completion's tokens that a sequence holds (notes of App. B): [q, n]."""
    vocabulary = work.model.network.config.vocab_size
    holds = np.zeros((len(work.train), vocabulary), dtype=np.float32)
    for row, record in enumerate(work.train):
        holds[row, record.ids] = 1
    count = holds.sum(0)
    idf = np.log((len(work.train) - count + 0.5) / (count + 0.5) + 1)
    scores = np.zeros((len(work.queries), len(work.train)))
    for row, record in enumerate(work.queries):
        tokens = record.ids[record.scored]
        scores[row] = holds[:, tokens] @ idf[tokens]
    return scores


def shortlist_recall(truth: np.ndarray, scores: np.ndarray, k: int, length: int) -> np.ndarray:
    """Share of each query's true top k among its `length` best by score: [q]."""
    best = np.argsort(-truth, axis=1, kind="stable")[:, :k]
    found = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    return np.array([len(set(b) & set(f)) / k for b, f in zip(best, found, strict=True)])


def claimed_recall(
    truth: np.ndarray, scores: np.ndarray, error: np.ndarray, k: int, length: int
) -> np.ndarray:
    """What the recall statement says of each query: [q]."""
    claims = []
    for own, code, sd in zip(truth, scores, error, strict=True):
        order = np.argsort(-code, kind="stable")
        found = order[:length]
        found = found[np.argsort(-own[found], kind="stable")]
        pi = inclusion_probability(own[found], sd[found], float(code[order[length]]))
        claims.append(estimated_recall(pi, k))
    return np.array(claims)


def one_pass(
    work: Workload, codes: dict[int, Codes], baseline: Baseline, stacked: dict[str, torch.Tensor]
) -> tuple[dict[int, CodeIndex], dict[int, np.ndarray], np.ndarray]:
    """Codes, norms and exact scores from one forward and backward pass of every sequence."""
    n, queries = len(work.train), len(work.queries)
    stored = {k: np.zeros((n, code_bytes(k)), np.uint8) for k in codes}
    norms = {k: np.zeros(n) for k in codes}
    indexes = {k: CodeIndex(k) for k in codes}
    truth = np.zeros((queries, n))
    progress = stderr_progress()
    progress.start("encode and score", n, "sequences")
    for rows in plan_batches([len(record.ids) for record in work.train], 2048):
        vectors = {k: one.empty(len(rows)) for k, one in codes.items()}
        total = torch.zeros(queries, len(rows), dtype=torch.float64)

        def each(module: Module, a: torch.Tensor, d: torch.Tensor) -> None:
            for k, one in codes.items():
                one.add(vectors[k], module, a, d)  # noqa: B023
            baseline.add(rows, module, a, d)  # noqa: B023
            padded = torch.nn.functional.pad(a, (0, int(module.bias)), value=1.0)
            g = torch.bmm(d.transpose(1, 2), padded)
            total.add_(stacked[module.name] @ g.flatten(1).T)  # noqa: B023

        members = [(work.train[row].ids, work.train[row].scored) for row in rows]
        with torch.no_grad():
            backward(work.model, work.modules, make_batch(members, work.model.device), each)
        for k in codes:
            array = vectors[k].numpy()
            stored[k][rows] = indexes[k].encode(array)
            norms[k][rows] = np.linalg.norm(array.astype(np.float64), axis=1)
        truth[:, rows] = total.numpy()
        progress.update(len(rows))
    progress.finish()
    for k, index in indexes.items():
        index.add(stored[k])
    return indexes, norms, truth


@click.command()
@click.option("--sequences", type=int, default=8192, show_default=True)
@click.option("--queries", type=int, default=64, show_default=True)
@click.option("--steps", type=int, default=1000, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
def main(sequences: int, queries: int, steps: int, cache: Path) -> None:
    """Train, score exactly, compare shortlists, print two tables."""
    begun = time.monotonic()
    progress = stderr_progress()
    work = make_workload(cache, sequences, queries, steps, progress)
    codes = {
        k: Codes(work.modules, work.ekfac,
                 CodeSettings(k, default_width(k, len(work.modules)), 0, 0.1)) for k in LENGTHS
    }
    baseline = Baseline(work.modules, work.ekfac, max(COORDINATES), len(work.train))
    coordinates, preconditioned = [], []
    for record in work.queries:
        batch = make_batch([(record.ids, record.scored)], work.model.device)
        c, _ = query_coordinates(work.model, work.modules, work.ekfac, batch, 0.1)
        coordinates.append(c)
        preconditioned.append(precondition(work.ekfac, c))
    stacked = {
        m.name: torch.stack([p[m.name].flatten() for p in preconditioned]) for m in work.modules
    }
    indexes, norms, truth = one_pass(work, codes, baseline, stacked)

    print(f"{work.summary()}; {queries} queries of 64 + 32 tokens\n")
    print("| stored per sequence | bytes | r10@100 | r10@1000 | r100@1000 |\n|---|---|---|---|---|")

    def row(name: str, size: str, scores: np.ndarray) -> None:
        shares = [shortlist_recall(truth, scores, k, n).mean() for k, n in SHORTLISTS]
        print(f"| {name} | {size} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")

    row("TF-IDF filter (completion tokens)", "–", tfidf_scores(work))
    vectors = torch.stack([baseline.query(c) for c in coordinates])
    for count in COORDINATES:  # chosen in order of weight: a prefix is the smaller choice
        found = torch.cat([vectors[:, :count] @ part[:, :count].float().T
                           for part in baseline.stored.split(512)], dim=1)
        row(f"top-Λ eigen-coordinates, fp16, {count:,}", f"{2 * count:,}", found.numpy())
    statements = []
    for k, one in codes.items():
        query_vectors = [one.query_vector(c).numpy() for c in coordinates]
        scores = np.stack([indexes[k].scores(v) for v in query_vectors]).astype(np.float64)
        row(f"code, 1 bit, K = {k:,}", f"{code_bytes(k):,}", scores)
        calibration = calibrate(
            work.model, one, work.ekfac, lambda ids: [work.train[n] for n in ids],
            lambda ids, k=k: (_subset(indexes[k], k, ids), norms[k][ids]),  # type: ignore[misc]
            len(work.train), 2048, progress,
        )
        query_norms = np.array([np.linalg.norm(v) for v in query_vectors])
        error = np.stack([score_error(calibration["c"], float(q), norms[k], k)
                          for q in query_norms])
        unit = error / calibration["c"]
        z = (scores - truth) / unit
        slope = 1 + float(((scores - truth) / unit * (truth / unit)).sum() /
                          ((truth / unit) ** 2).sum())
        statements.append(f"\nK = {k:,}: c = {calibration['c']} calibrated, {z.std():.3f} on these "
                          f"queries; slope {slope:.3f}; kurtosis of the error "
                          f"{float((z**4).mean() / (z**2).mean() ** 2):.2f}")
        for top, length in SHORTLISTS:
            claim = claimed_recall(truth, scores, error, top, length)
            actual = shortlist_recall(truth, scores, top, length)
            statements.append(
                f"  r{top}@{length}: claimed {claim.mean():.3f}, actual {actual.mean():.3f}, "
                f"difference {claim.mean() - actual.mean():+.3f}, "
                f"per query {np.abs(claim - actual).mean():.3f}"
            )
    print("\nRecall statement, claimed against actual (mean over queries; mean absolute per query)")
    print("\n".join(statements))
    print(f"\ntotal {duration(time.monotonic() - begun)}")


def _subset(index: CodeIndex, length: int, ids: list[int]) -> CodeIndex:
    part = CodeIndex(length)
    part.add(index.codes(ids))
    return part


if __name__ == "__main__":
    main()
