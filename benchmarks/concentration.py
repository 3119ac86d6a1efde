"""What `gradindex report` says of the tail from a sample, against what all sequences say.

    make demo; python -m benchmarks.concentration [.demo/index]

Scores every sequence exactly on the report's 16 queries. Then draws samples, and compares how many
sequences carry half of the positive influence: as the report estimates it (the best by code are all
scored, the sample stands for the others), and by the sample alone, scaled up. Also the exponent of
the tail of the sample and of all.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import gradindex
from gradindex.influence.exact import Rescorer
from gradindex.progress import stderr_progress
from search.ask.controls import Controls
from search.ask.settings import settle
from search.rank.query_gradient import form_gradients
from search.study.exact_sample import TOP_BY_CODE, ExactSample, own_queries
from search.study.report_defaults import OWN_QUERIES
from search.study.tail import fit_tail, half, half_interval

SAMPLES, DRAWS = (256, 512, 1024, 2048), 10


def main() -> None:
    """Print a table by sample size."""
    flags = argparse.ArgumentParser()
    flags.add_argument("index", nargs="?", type=Path, default=Path(".demo/index"))
    searcher = gradindex.open(flags.parse_args().index)
    scores = score_all(searcher)
    total = len(searcher)
    everything = [scores.influence[q][scores.allowed[q]] for q in range(OWN_QUERIES)]
    truth = np.array([half(values, np.ones(len(values))) for values in everything])
    begun = time.monotonic()
    fits = [fit_tail(values) for values in everything]
    print(f"{total:,} sequences, {OWN_QUERIES} queries; half is carried by {truth.min()} to "
          f"{truth.max()}, median {np.median(truth):.0f}")
    print(f"tails of all: α {min(f.alpha for f in fits):.2f} to {max(f.alpha for f in fits):.2f}, "
          f"median {np.median([f.alpha for f in fits]):.2f}; {sum(f.rejected for f in fits)} "
          f"rejected; {(time.monotonic() - begun) / OWN_QUERIES:.2f} s a fit with its p")
    print(f"\n{DRAWS} samples of each size, and the {TOP_BY_CODE} best by code of each query\n")
    print("| sample | by | mean / truth | mean error | truth in the 95% interval | median α |")
    print("|---|---|---|---|---|---|")
    for size in SAMPLES:
        compare(scores, everything, truth, size)


def score_all(searcher) -> ExactSample:
    """Every sequence on the report's own queries."""
    snapshot, settings = searcher.snapshot, settle(Controls(), searcher.manifest)
    snapshot.load()
    queries, own = own_queries(snapshot, OWN_QUERIES)
    targets, preconditioned = form_gradients(snapshot, queries, settings, searcher.batch_tokens)
    code_scores = snapshot.code_scores(np.stack([target.vector for target in targets]))
    scores = ExactSample(snapshot, list(own), code_scores, None)
    scores.fill(Rescorer(snapshot.model, settings.modules, snapshot.ekfac, settings.damping,
                         searcher.batch_tokens), preconditioned, stderr_progress())
    return scores


def compare(
    scores: ExactSample, everything: list[np.ndarray], truth: np.ndarray, size: int
) -> None:
    """Print two lines: as the report estimates, and by the sample alone."""
    found: dict[str, list[tuple[float, float, bool]]] = {"report": [], "sample alone": []}
    alphas = []
    for draw in range(DRAWS):
        random = np.random.default_rng(draw)
        for q, values in enumerate(everything):
            places = np.flatnonzero(scores.allowed[q])
            sampled = np.zeros(len(places), dtype=bool)
            sampled[random.choice(len(places), size, replace=False)] = True
            certain = np.isin(places, scores.top[q])
            rest = (sampled & ~certain).sum()
            weights = np.where(certain, 1.0, (~certain).sum() / rest)
            alone = np.full(len(places), len(places) / size)
            for name, known, by, sure in (("report", sampled | certain, weights, certain),
                                          ("sample alone", sampled, alone, ~sampled)):
                estimate = half(values[known], by[known])
                low, high = half_interval(values[known], by[known], sure[known])
                found[name].append((estimate / truth[q], abs(estimate / truth[q] - 1),
                                    low <= truth[q] <= high))
            fit = fit_tail(values[sampled], draws=0)
            alphas += [fit.alpha] if fit else []
    for name, rows in found.items():
        ratio, error, held = np.mean(np.array(rows, float), axis=0)
        alpha = f"{np.median(alphas):.2f}" if name == "sample alone" else ""
        print(f"| {size:,} | {name} | {ratio:.3f} | {error:.3f} | {held:.1%} | {alpha} |")


if __name__ == "__main__":
    main()
