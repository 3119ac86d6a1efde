"""What splitting A and S in blocks does: to scores, to the curvature's size and the fit's time.

    python -m benchmarks.blocks

One model and the same sequences, labels drawn alike; only `--covariance-blocks` differs. Influence
of all training sequences on held-out queries against that with whole A and S.
"""

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from benchmarks.workload import Size, Workload, make_workload
from gradindex.draws import Stream, choose
from gradindex.influence import curvature
from gradindex.influence.curvature import Ekfac
from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Preconditioned, precondition, query_coordinates
from gradindex.progress import Progress, stderr_progress
from indexer.defaults import DAMPING
from indexer.fit.eigen import eigenvectors
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import fit


def scores(work: Workload, ekfac: Ekfac) -> np.ndarray:
    """Influence of every training sequence on every query: float64 [q, n]."""
    prepared = []
    with torch.no_grad():
        for query in work.queries:
            batch = work.model.batch([query])
            coordinates, _ = query_coordinates(work.model, work.modules, ekfac, batch,
                                               curvature.DAMPING)
            prepared.append(Preconditioned(precondition(ekfac, coordinates)))
    return exact_scores(work.model, work.modules, Preconditioned.join(prepared), work.train, 4096)


def top(row: np.ndarray, k: int) -> set[int]:
    return set(np.argsort(-row)[:k].tolist())


def decomposing(width: int, blocks: int) -> float:
    """Seconds of all eigendecompositions of a matrix [width, width] in so many blocks."""
    n = -(-width // blocks)
    x = torch.randn(n, 2 * n, dtype=torch.float64)
    matrix = x @ x.T
    begun = time.perf_counter()
    for _ in range(blocks):
        eigenvectors(matrix, "a benchmark")
    return time.perf_counter() - begun


@click.command()
@click.option("--queries", type=int, default=32, show_default=True)
@click.option("--fit-sequences", type=int, default=2048, show_default=True)
@click.option("--cache", type=Path, default=Path(".demo/benchmark"), show_default=True)
def main(queries: int, fit_sequences: int, cache: Path) -> None:
    """Print a row for each number of blocks."""
    work = make_workload(cache, Size(sequences=4096, steps=500, fit_sequences=fit_sequences),
                         queries, stderr_progress())
    print(work.summary())
    print("| blocks | Pearson | Spearman | top 10 | top 100 | curvature, MB | fit, s "
          "| effective dimension |\n|---|---|---|---|---|---|---|---|")
    whole: np.ndarray | None = None
    for blocks in (1, 2, 4, 8):
        with tempfile.TemporaryDirectory() as home:
            chosen = choose(Stream.FIT_SEQUENCES, 0, len(work.train), fit_sequences)
            settings = FitSettings(chosen, "model",
                                   256, 2048, 0, covariance_blocks=blocks)
            begun = time.perf_counter()
            ekfac, _ = fit(work.model, work.modules, lambda ids: [work.train[n] for n in ids],
                           settings, Path(home), Progress())
            seconds = time.perf_counter() - begun
            size = sum(path.stat().st_size for path in Path(home).rglob("*.safetensors"))
            found = scores(work, ekfac)
            effective = sum(one.effective_dimension(DAMPING) for one in ekfac.values())
        if whole is None:
            whole = found
        measures = np.array([
            (pearsonr(one, other)[0], spearmanr(one, other)[0],
             len(top(one, 10) & top(other, 10)) / 10, len(top(one, 100) & top(other, 100)) / 100)
            for one, other in zip(found, whole, strict=True)])
        means, errors = measures.mean(0), measures.std(0) / len(measures) ** 0.5
        print(f"| {blocks} | " + " | ".join(
            f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
            + f" | {size / 1e6:.1f} | {seconds:.1f} | {effective:,.0f} |", flush=True)
    print("\nseconds of the eigendecompositions of one matrix [2048, 2048] alone: " + ", ".join(
        f"{decomposing(2048, blocks):.2f} in {blocks}" for blocks in (1, 2, 4, 8)))


if __name__ == "__main__":
    main()
