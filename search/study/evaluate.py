"""How good is an index? Shortlists by code, by TF-IDF and by both, against exact scores.

Every sequence of the index, or a random part of them, is scored exactly on every query. Shortlists
are always the whole index's. Of a part, the highest share of it stands for the true top k: of a
tenth, the highest 10 for the top 100. Intervals are over queries, and over the draw of the part
(bootstrap, 95 %).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import ndcg_score

from gradindex.draws import Stream, generator
from gradindex.errors import InputError
from gradindex.influence.exact import rescore
from gradindex.results import Query
from gradindex.storage.manifest import Manifest
from search.ask.settings import Settings
from search.engine import Searcher
from search.rank.query_gradient import fits_in_full, make_targets
from search.rank.ranking import CodeRanking, best
from search.rank.recall import estimated_recall
from search.rank.session import Session
from search.rank.shortlist import Shortlist

METHODS = ("code", "tfidf", "both")
TOPS = (10, 100)
LENGTHS = (100, 200, 500, 1000, 2000, 5000)
GAIN_DEPTH = 20  # of NDCG
FEWEST = 5  # sequences of a part that may stand for a true top k
READ = 4096  # records held at once
DRAWS = 1000


@dataclass
class Measure:
    """Means over queries, with 95 % intervals: recall, and for code and both what was claimed."""

    method: str
    k: int
    shortlist: int
    recall: float
    recall_interval: tuple[float, float]
    claimed: float | None
    claimed_error: float | None  # mean absolute, per query


@dataclass
class Evaluation:
    """What `gradindex eval` found.

    `ndcg` is NDCG@20 of each method's own order of the scored, before rescoring; gains are the
    positive influences. `pairs` are (claimed, actual) of single queries.
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


def check_sample(sample: int | None, index: Manifest) -> None:
    """Raise InputError for a part that can't hold enough of a top 100."""
    total, top = index.sequences, TOPS[-1]
    if sample is not None and sample < total and sample * top < FEWEST * total:
        raise InputError(
            f"--sample {sample}: too few of {total} sequences to hold {FEWEST} of a top {top}; "
            f"give at least {-(-FEWEST * total // top)}, or all."
        )


def evaluate(
    searcher: Searcher, queries: list[Query], settings: Settings, sample: int | None,
    follow: Callable[[int, int], None],
) -> Evaluation:
    """Compare on these queries; `sample` sequences, or all. `follow(done, total)` sees progress.

    Raises InputError for no query, or a part too small to say anything.
    """
    if not queries:
        raise InputError("--queries: no query can be scored; nothing to evaluate.")
    check_sample(sample, searcher.manifest)
    total = len(searcher)
    ids = np.arange(total)
    if sample is not None and sample < total:
        ids = np.sort(generator(Stream.EVAL_SAMPLE).choice(total, sample, replace=False))
    found = Evaluation(len(queries), total, len(ids), settings.damping, len(settings.modules))
    compared = []
    together = min(searcher.group_size, max(1, fits_in_full(searcher.index, settings)))
    for first in range(0, len(queries), together):
        group = queries[first : first + together]
        targets, preconditioned = make_targets(searcher.index, group, settings,
                                               searcher.batch_tokens)
        session = Session(searcher.index, settings, targets, preconditioned, searcher.batch_tokens)
        truth = np.zeros((len(group), len(ids)))
        # equal sequences count once, as in a search
        new = np.zeros(len(ids), dtype=bool)
        new[np.unique(searcher.index.contents.first_equal[ids], return_index=True)[1]] = True
        done = first * len(ids)
        for start in range(0, len(ids), READ):
            records = searcher.index.records(ids[start : start + READ].tolist())
            for part in rescore(session.common.by, preconditioned, records):
                for place, exact in part:
                    truth[:, start + place] = exact.influence
                done += len(part) * len(group)
                follow(done, len(queries) * len(ids))
        for track in session.tracks:
            words = searcher.index.tokens.scores(track.query.scored_tokens)
            compared.append(_Comparison(
                ids[new], truth[track.number, new], track.ranking.scores(),
                searcher.index.norms, track.noise, words, len(ids) / total).measured())
    return _summary(found, compared)


@dataclass
class _Measured:
    """One query: recall and claim by (method, k, length), and NDCG by method."""

    pairs: dict[tuple[str, int, int], tuple[float, float | None]]
    tops: dict[int, int]  # by k, how many of the part stand for it
    ndcg: dict[str, float]


class _Comparison:
    """One query: exact influence [n] of the sequences `ids` [n], and what is known of all N.

    `share` of the index was scored; of equal sequences among them only the first is here.
    """

    def __init__(
        self, ids: np.ndarray, truth: np.ndarray, codes: np.ndarray, norms: np.ndarray,
        noise: float, words: np.ndarray, share: float,
    ):
        self.ids, self.truth, self.words, self.total = ids, truth, words, len(codes)
        self.share = share
        self.codes, self.noise = codes, noise
        self.ranking = CodeRanking(codes, norms)
        self.order = best(truth, len(truth))

    def measured(self) -> _Measured:
        tops = {top: round(top * self.share) for top in TOPS}
        lengths = [length for length in LENGTHS if length < self.total]
        asked = [(method, top, length) for method in METHODS for top in TOPS for length in lengths
                 if top <= length and tops[top] >= min(FEWEST, top)]
        ndcg = {name: self.ndcg(scores[self.ids])
                for name, scores in (("code", self.codes), ("tfidf", self.words))}
        return _Measured({one: self.measure(one[0], tops[one[1]], one[2]) for one in asked}, tops,
                         ndcg)

    def measure(self, method: str, k: int, length: int) -> tuple[float, float | None]:
        """Recall of the highest k of the scored, and what a search would claim."""
        k = min(k, len(self.truth))
        listed = None if method == "code" else best(self.words, length)
        shortlist = Shortlist(self.ranking, self.noise, length, listed,
                              by_list=method == "tfidf")
        taken = set(shortlist.advance(range(self.total), length))
        found = np.array([one in taken for one in self.ids[self.order].tolist()])
        actual = float(found[:k].sum() / k)
        if method == "tfidf":
            return actual, None
        ranked = self.order[found]
        pi = shortlist.probability(self.ids[ranked].tolist(), self.truth[ranked], shortlist.cutoff)
        return actual, estimated_recall(pi, k)

    def ndcg(self, scores: np.ndarray) -> float:
        """1 where there is nothing to order."""
        if len(scores) < 2:
            return 1.0
        return float(ndcg_score(np.maximum(self.truth, 0)[None], scores[None], k=GAIN_DEPTH))


def _summary(found: Evaluation, compared: list[_Measured]) -> Evaluation:
    random = generator(Stream.EVAL_INTERVALS)
    draws = random.integers(0, len(compared), (DRAWS, len(compared)))
    for method, top, length in compared[0].pairs:
        measured = [one.pairs[method, top, length] for one in compared]
        actual = np.array([value for value, _ in measured])
        drawn = actual[draws]
        if found.scored < found.sequences:
            k = compared[0].tops[top]
            drawn = random.binomial(k, np.clip(drawn, 0, 1)) / k
        low, high = np.quantile(drawn.mean(1), [0.025, 0.975])
        claims = [(claim, value) for value, claim in measured if claim is not None]
        claimed = np.array([claim for claim, _ in claims])
        found.pairs.setdefault(method, []).extend(claims)
        found.measures.append(Measure(
            method, top, length, float(actual.mean()), (float(low), float(high)),
            float(claimed.mean()) if claims else None,
            float(np.abs(claimed - actual).mean()) if claims else None,
        ))
    found.pairs = {method: pairs for method, pairs in found.pairs.items() if pairs}
    found.ndcg = {name: float(np.mean([one.ndcg[name] for one in compared]))
                  for name in compared[0].ndcg}
    return found


def table(found: Evaluation) -> str:
    """The evaluation as text for people."""
    part = "every sequence" if found.scored == found.sequences else \
        f"a random {found.scored:,} of {found.sequences:,} sequences (their highest stand for all)"
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
        lines.append("(nothing to compare: the index is no larger than a shortlist of 100)")
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
    left.grid(alpha=0.25)
    right.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for method, pairs in found.pairs.items():
        claimed, actual = zip(*pairs, strict=True)
        right.scatter(claimed, actual, s=9, alpha=0.35, color=COLORS[method],
                      marker=MARKS[method], label=NAMES[method], linewidths=0)
    right.set(xlabel="claimed by the recall statement", ylabel="actual", xlim=(0, 1.02),
              ylim=(0, 1.02), title="Claimed against actual, a point a query and shortlist")
    right.grid(alpha=0.25)
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
