"""How good is an index? Shortlists by code, by TF-IDF and by both, against exact scores.

Every sequence of the index, or of a random part of it, is scored exactly on every query. A part is
treated as an index of its own, k and the shortlist's length scaled down with it, so that what is
found estimates the whole's. Intervals are over queries (bootstrap, 95 %).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import ndcg_score

from gradindex.codes import score_error
from gradindex.errors import InputError
from gradindex.results import Query
from search.controls import Controls, settle
from search.engine import Searcher
from search.recall import estimated_recall
from search.rescore import Rescorer, rescore
from search.shortlist import Shortlist, best
from search.target import make_targets

METHODS = ("code", "tfidf", "both")
TOPS = (10, 100)
LENGTHS = (100, 200, 500, 1000, 2000, 5000)
GAIN_DEPTH = 20  # of NDCG
DRAWS = 1000


@dataclass
class Measure:
    """Means over queries, with 95 % intervals: recall, and for code and both what was claimed.

    `k` and `shortlist` are the whole index's, whatever part was scored.
    """

    method: str
    k: int
    shortlist: int
    recall: float
    recall_interval: tuple[float, float]
    claimed: float | None
    claimed_error: float | None  # mean absolute, per query


@dataclass
class Evaluation:
    """What `gradindex eval` found. `ndcg` is NDCG@20 of each method's own order, before rescoring;
    gains are the positive influences. `pairs` are (claimed, actual) of single queries.
    """

    queries: int
    sequences: int  # N
    scored: int  # of them, exactly
    damping: float
    modules: int
    measures: list[Measure] = field(default_factory=list)
    ndcg: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


def evaluate(
    searcher: Searcher, queries: list[Query], controls: Controls, sample: int | None,
    follow: Callable[[int, int], None],
) -> Evaluation:
    """Compare on these queries; `sample` sequences, or all. `follow(done, total)` sees progress.

    Raises InputError for no query, or a part too small to say anything.
    """
    if not queries:
        raise InputError("--queries: no query can be scored; nothing to evaluate.")
    settings = settle(controls, searcher.manifest)
    index, total = searcher.index, len(searcher)
    ids = np.arange(total)
    if sample is not None and sample < total:
        if sample * min(TOPS[-1], total) < total:
            raise InputError(f"--sample {sample}: too few of {total} sequences to hold one of a "
                             f"top {TOPS[-1]}; give at least {-(-total // TOPS[-1])}, or all.")
        ids = np.sort(np.random.default_rng(0).choice(total, sample, replace=False))
    by = Rescorer(index.model, settings.modules, index.ekfac, settings.damping,
                  searcher.batch_tokens)
    found = Evaluation(len(queries), total, len(ids), settings.damping, len(settings.modules))
    comparisons = []
    for first in range(0, len(queries), searcher.group_size):
        group = queries[first : first + searcher.group_size]
        targets, preconditioned = make_targets(index, group, settings, searcher.batch_tokens)
        truth = np.zeros((len(group), len(ids)))
        done = first * len(ids)
        for start in range(0, len(ids), 4096):
            records = index.records(ids[start : start + 4096].tolist())
            for part in rescore(by, preconditioned, records):
                for place, exact in part:
                    truth[:, start + place] = exact.influence
                done += len(part) * len(group)
                follow(done, len(queries) * len(ids))
        scores = index.code_scores(np.stack([target.vector for target in targets]))[:, ids]
        for number, target in enumerate(targets):
            error = score_error(searcher.manifest.calibration["c"],
                                float(np.linalg.norm(target.vector)), index.norms[ids],
                                len(target.vector))
            words = index.tokens.scores(target.query.scored_tokens)[ids]
            comparisons.append(_Comparison(truth[number], scores[number], error, words))
    return _summary(found, comparisons, len(ids) / total)


class _Comparison:
    """One query: exact influence, code scores, their error and TF-IDF scores, all [n]."""

    def __init__(
        self, truth: np.ndarray, scores: np.ndarray, error: np.ndarray, words: np.ndarray
    ):
        self.truth, self.scores, self.error, self.words = truth, scores, error, words
        self.order = best(truth, len(truth))

    def measure(self, method: str, k: int, length: int) -> tuple[float, float | None]:
        """Recall of the true top k, and what a search would claim."""
        n = len(self.truth)
        listed = None if method == "code" else best(self.words, min(length, n))
        shortlist = Shortlist(self.scores, self.error, None, n, listed, by_list=method == "tfidf")
        taken = shortlist.advance(range(n), min(length, n))
        actual = len(set(taken) & set(self.order[:k].tolist())) / k
        if method == "tfidf":
            return actual, None
        if shortlist.cutoff is None:
            return actual, 1.0
        ranked = sorted(taken, key=lambda one: (-self.truth[one], one))
        pi = shortlist.probability(ranked, self.truth[ranked], shortlist.cutoff)
        return actual, estimated_recall(pi, k)

    def ndcg(self, scores: np.ndarray) -> float:
        return float(ndcg_score(np.maximum(self.truth, 0)[None], scores[None], k=GAIN_DEPTH))


def _summary(found: Evaluation, comparisons: list[_Comparison], share: float) -> Evaluation:
    draws = np.random.default_rng(0).integers(0, len(comparisons), (DRAWS, len(comparisons)))
    for method in METHODS:
        pairs = []
        for top in TOPS:
            k = round(top * share)
            for shortlist in LENGTHS:
                if k < 1 or shortlist < top or shortlist >= found.sequences:
                    continue
                length = max(k, round(shortlist * share))
                measured = [one.measure(method, k, length) for one in comparisons]
                actual = np.array([value for value, _ in measured])
                low, high = np.quantile(actual[draws].mean(1), [0.025, 0.975])
                claims = [claim for _, claim in measured if claim is not None]
                pairs += [(claim, value) for value, claim in measured if claim is not None]
                found.measures.append(Measure(
                    method, top, shortlist, float(actual.mean()), (float(low), float(high)),
                    float(np.mean(claims)) if claims else None,
                    float(np.abs(np.array(claims) - actual).mean()) if claims else None,
                ))
        if pairs:
            found.pairs[method] = pairs
    found.ndcg = {
        "code": float(np.mean([one.ndcg(one.scores) for one in comparisons])),
        "tfidf": float(np.mean([one.ndcg(one.words) for one in comparisons])),
    }
    return found


def table(found: Evaluation) -> str:
    """The evaluation as text for people."""
    part = "every sequence" if found.scored == found.sequences else \
        f"a random {found.scored:,} of {found.sequences:,} sequences"
    lines = [
        f"{found.queries} queries, {part} scored exactly; recall of the true top k by shortlist, "
        "with 95% intervals over queries",
        "",
        f"{'shortlist by':<14}{'k':>5}{'shortlist':>11}   {'recall':<7}{'interval':<16}"
        f"{'claimed':<9}per query",
    ]
    for one in found.measures:
        low, high = one.recall_interval
        claim = "unknown" if one.claimed is None else f"{one.claimed:.3f}"
        each = "" if one.claimed_error is None else f"±{one.claimed_error:.3f}"
        lines.append(f"{NAMES[one.method]:<14}{one.k:>5}{one.shortlist:>11,}   {one.recall:<7.3f}"
                     f"{f'{low:.3f} to {high:.3f}':<16}{claim:<9}{each}".rstrip())
    if not found.measures:
        lines.append("(the index is no larger than a shortlist of 100: every search is complete)")
    lines += ["", "NDCG@20 before rescoring (gains: positive influence): " + ", ".join(
        f"{NAMES[name]} {value:.3f}" for name, value in found.ndcg.items())]
    lines += ["by both: as many by code as by TF-IDF, so up to twice the sequences are rescored",
              "claimed: what the recall statement of such searches says, on average; ± is its mean "
              "error a query"]
    return "\n".join(lines)


NAMES = {"code": "code", "tfidf": "TF-IDF", "both": "both"}
COLORS = {"code": "#1f5fbf", "tfidf": "#c2570c", "both": "#3a7d44"}
MARKS = {"code": "o", "tfidf": "s", "both": "^"}


def plot(found: Evaluation, path: Path) -> None:
    """Recall against the shortlist's length, and claimed against actual, as an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in METHODS:
        for top, line in zip(TOPS, ("-", "--"), strict=False):
            rows = [one for one in found.measures if (one.method, one.k) == (method, top)]
            if not rows:
                continue
            lengths = [one.shortlist for one in rows]
            left.plot(lengths, [one.recall for one in rows], line, color=COLORS[method],
                      marker=MARKS[method], label=f"{NAMES[method]}, top {top}")
            left.fill_between(lengths, [one.recall_interval[0] for one in rows],
                              [one.recall_interval[1] for one in rows], color=COLORS[method],
                              alpha=0.12, linewidth=0)
    left.set(xscale="log", xlabel="shortlist (both: so many by each)", ylim=(0, 1.02),
             ylabel="share of the true top k in the shortlist", title="Recall")
    lengths = sorted({one.shortlist for one in found.measures})
    left.set_xticks(lengths, [f"{length:,}" for length in lengths])
    left.minorticks_off()
    left.legend(fontsize=8)
    left.grid(alpha=0.25)
    right.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for method, pairs in found.pairs.items():
        claimed, actual = zip(*pairs, strict=True)
        right.scatter(claimed, actual, s=9, alpha=0.35, color=COLORS[method],
                      marker=MARKS[method], label=NAMES[method], linewidths=0)
    right.set(xlabel="claimed by the recall statement", ylabel="actual", xlim=(0, 1.02),
              ylim=(0, 1.02), title="Claimed against actual, a point a query and shortlist")
    right.legend(fontsize=8)
    right.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
