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
from search.engine import Searcher, group_size
from search.rank.query_gradient import fits_in_full, form_gradients
from search.rank.ranking import CodeRanking, best
from search.rank.session import Session
from search.rank.shortlist import LIST_SHARE, Shortlist
from search.study.texts import RECORDS_HELD

METHODS = ("code", "tfidf", "both")
TOPS = (10, 100)
LENGTHS = (100, 200, 500, 1000, 2000, 5000)
GAIN_DEPTH = 20  # of NDCG
FEWEST_OF_TOP = 5  # sequences of a part that may stand for a true top k
RESAMPLES = 1000  # behind an interval


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
        """All of it as plain JSON types."""
        return {"schema": 1, **asdict(self)}


def check_sample(sample: int | None, manifest: Manifest) -> None:
    """Raise InputError for a part that can't hold enough of a top 100."""
    total, top = manifest.sequences, TOPS[-1]
    if sample is not None and sample < total and sample * top < FEWEST_OF_TOP * total:
        raise InputError(
            f"--sample {sample}: too few of {total} sequences to hold {FEWEST_OF_TOP} of a top "
            f"{top}; give at least {-(-FEWEST_OF_TOP * total // top)}, or all."
        )


def evaluate(
    searcher: Searcher, queries: list[Query], settings: Settings, sample: int | None,
    follow: Callable[[int, int], None],
) -> Evaluation:
    """Compare on these queries; `sample` sequences, or all. `follow(done, total)` sees progress.

    Raises InputError for no query, or a part too small to say anything.
    """
    snapshot, total = searcher.snapshot, len(searcher)
    if not queries:
        raise InputError("--queries: no query can be scored; nothing to evaluate.")
    check_sample(sample, searcher.manifest)
    places = np.arange(total)
    if sample is not None and sample < total:
        places = np.sort(generator(Stream.EVAL_SAMPLE).choice(total, sample, replace=False))
    # equal sequences count once, as in a search
    different = np.zeros(len(places), dtype=bool)
    different[np.unique(snapshot.contents.first_equal[places], return_index=True)[1]] = True

    comparisons = []
    # so many together as keep their gradients in full: low rank would be the truth's error too
    together = min(group_size(total), max(1, fits_in_full(snapshot, settings)))
    for first in range(0, len(queries), together):
        group = queries[first : first + together]
        gradients, preconditioned = form_gradients(snapshot, group, settings, searcher.batch_tokens)
        session = Session(snapshot, settings, gradients, preconditioned, searcher.batch_tokens)
        truth = np.zeros((len(group), len(places)))
        done = first * len(places)
        for start in range(0, len(places), RECORDS_HELD):
            records = snapshot.records(places[start : start + RECORDS_HELD].tolist())
            for batch in rescore(session.common.by, preconditioned, records):
                for number, exact in batch:
                    truth[:, start + number] = exact.influence
                done += len(batch) * len(group)
                follow(done, len(queries) * len(places))
        for track in session.tracks:
            tfidf = snapshot.tables.tokens.scores(track.query.scored_tokens)
            comparisons.append(Shortlists(
                places[different], truth[track.number, different], track.ranking.scores(),
                snapshot.norms, track.noise, tfidf, len(places) / total,
                np.array(snapshot.random_sample())).compare())
    return _summary(Evaluation(len(queries), total, len(places), settings.damping,
                               len(settings.modules)), comparisons)


@dataclass
class QueryMeasures:
    """One query: recall and claim by (method, k, length), and NDCG by method."""

    pairs: dict[tuple[str, int, int], tuple[float, float | None]]
    tops: dict[int, int]  # by k, how many of the part stand for it
    ndcg: dict[str, float]


class Shortlists:
    """One query: exact influence [n] of the sequences at `places` [n], and what is known of all N.

    `code_scores` and `tfidf` [N] are the scores of every place, `noise` the sd of a code's error
    for ‖v_m‖ = 1, `sample` [m] the places of the random sample that a search rescores. A `share` of
    the index was scored; of equal sequences only the first is here.

    Four sequences with codes that err by 1: the best two by code hold one of the true top two. What
    a search would claim of itself is right on average only:

    >>> truth, scores = np.array([4.0, 3.0, 1.0, 0.0]), np.array([5.0, 1.5, 2.0, 0.0])
    >>> nobody = np.zeros(0, np.int64)
    >>> lists = Shortlists(np.arange(4), truth, scores, np.ones(4), 1.0, np.zeros(4), 1.0, nobody)
    >>> actual, claimed = lists.measure("code", 2, 2)
    >>> actual, round(claimed, 2)
    (0.5, 0.67)
    """

    def __init__(
        self, places: np.ndarray, truth: np.ndarray, code_scores: np.ndarray,
        norms: np.ndarray, noise: float, tfidf: np.ndarray, share: float, sample: np.ndarray,
    ):
        self.places, self.truth, self.tfidf = places, truth, tfidf
        self.total, self.share = len(code_scores), share
        self.code_scores, self.noise = code_scores, noise
        self.ranking = CodeRanking(code_scores, norms)
        self.order = best(truth, len(truth))
        # of the part alone the truth is known
        self.sample = np.flatnonzero(np.isin(places, sample))

    def compare(self) -> QueryMeasures:
        """Every method at every k and length that the index and the part allow."""
        tops = {top: round(top * self.share) for top in TOPS}
        lengths = [length for length in LENGTHS if length < self.total]
        cases = [(method, top, length) for method in METHODS for top in TOPS for length in lengths
                 if top <= length and tops[top] >= min(FEWEST_OF_TOP, top)]
        ndcg = {name: self.ndcg(scores[self.places])
                for name, scores in (("code", self.code_scores), ("tfidf", self.tfidf))}
        pairs = {(method, top, length): self.measure(method, tops[top], length)
                 for method, top, length in cases}
        return QueryMeasures(pairs, tops, ndcg)

    def measure(self, method: str, k: int, length: int) -> tuple[float, float | None]:
        """Recall of the highest k of the scored, and what a search would claim."""
        k = min(k, len(self.truth))
        listed = None if method == "code" else best(
            self.tfidf, length if method == "tfidf" else length // LIST_SHARE)
        # made as a search would make it, but of codes alone: nothing has to be rescored again
        shortlist = Shortlist(self.ranking, self.noise, length, listed,
                              by_list=method == "tfidf")
        members = set(shortlist.advance(range(self.total), length))
        inside = np.array([place in members for place in self.places[self.order].tolist()])
        actual = float(inside[:k].sum() / k)
        if method == "tfidf":
            return actual, None
        ranked = self.order[inside]
        made = shortlist.statement(self.places[ranked].tolist(), self.truth[ranked], k,
                                   self.places[self.sample].tolist(), self.truth[self.sample])
        return actual, made.estimate

    def ndcg(self, scores: np.ndarray) -> float:
        """NDCG@20 of the order by some scores [n]; 1 where there is nothing to order."""
        if len(scores) < 2:
            return 1.0
        # a gain can't be below zero: to rank an opponent low is as good as to rank a stranger low
        return float(ndcg_score(np.maximum(self.truth, 0)[None], scores[None], k=GAIN_DEPTH))


def _summary(evaluation: Evaluation, queries: list[QueryMeasures]) -> Evaluation:
    """The evaluation, filled in with means over queries and their intervals."""
    random = generator(Stream.EVAL_INTERVALS)
    resamples = random.integers(0, len(queries), (RESAMPLES, len(queries)))
    for method, top, length in queries[0].pairs:
        pairs = [query.pairs[method, top, length] for query in queries]
        actual = np.array([recall for recall, _ in pairs])
        resampled = actual[resamples]
        if evaluation.scored < evaluation.sequences:
            # of a part, each query's recall is itself an estimate from k draws
            k = queries[0].tops[top]
            resampled = random.binomial(k, np.clip(resampled, 0, 1)) / k
        low, high = np.quantile(resampled.mean(1), [0.025, 0.975])
        claims = [(claim, recall) for recall, claim in pairs if claim is not None]
        claimed = np.array([claim for claim, _ in claims])
        evaluation.pairs.setdefault(method, []).extend(claims)
        evaluation.measures.append(Measure(
            method, top, length, float(actual.mean()), (float(low), float(high)),
            float(claimed.mean()) if claims else None,
            float(np.abs(claimed - actual).mean()) if claims else None,
        ))
    evaluation.pairs = {method: pairs for method, pairs in evaluation.pairs.items() if pairs}
    evaluation.ndcg = {name: float(np.mean([query.ndcg[name] for query in queries]))
                       for name in queries[0].ndcg}
    return evaluation


# ---- what is shown


def table(evaluation: Evaluation) -> str:
    """The evaluation as text for people."""
    part = "every sequence" if evaluation.scored == evaluation.sequences else \
        f"a random {evaluation.scored:,} of {evaluation.sequences:,} sequences (their highest " \
        "stand for all)"
    lines = [
        f"{evaluation.queries} queries, {part} scored exactly; recall of the true top k by "
        "shortlist, with 95% intervals over queries",
        "",
        f"{'shortlist by':<14}{'k':>5}{'shortlist':>11}   {'recall':<7}{'interval':<16}"
        f"{'claimed':<9}per query",
    ]
    for measure in evaluation.measures:
        # a TF-IDF list claims nothing: what it misses is unknown
        low, high = measure.recall_interval
        claim = "unknown" if measure.claimed is None else f"{measure.claimed:.3f}"
        each = "" if measure.claimed_error is None else f"±{measure.claimed_error:.3f}"
        lines.append(f"{METHOD_NAMES[measure.method]:<14}{measure.k:>5}{measure.shortlist:>11,}   "
                     f"{measure.recall:<7.3f}{f'{low:.3f} to {high:.3f}':<16}{claim:<9}"
                     f"{each}".rstrip())
    if not evaluation.measures:
        lines.append("(nothing to compare: the index is no larger than a shortlist of 100)")
    lines += ["", "NDCG@20 before rescoring (gains: positive influence): " + ", ".join(
        f"{METHOD_NAMES[name]} {value:.3f}" for name, value in evaluation.ndcg.items())]
    lines += ["by both: a fifth by TF-IDF, the rest by code, so as many are rescored at most",
              "claimed: what the recall statement of such searches says, on average; ± is its mean "
              "error a query"]
    return "\n".join(lines)


METHOD_NAMES = {"code": "code", "tfidf": "TF-IDF", "both": "both"}
METHOD_COLORS = {"code": "#1f5fbf", "tfidf": "#c2570c", "both": "#3a7d44"}
METHOD_MARKS = {"code": "o", "tfidf": "s", "both": "^"}


def plot(evaluation: Evaluation, path: Path) -> None:
    """Recall against the shortlist's length, and claimed against actual, as an image file."""
    from matplotlib.figure import Figure

    # a Figure by itself: pyplot would look for a screen, and keep the figure
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    recalls, claims = figure.subplots(1, 2)
    for method in METHODS:
        for top, line in zip(TOPS, ("-", "--"), strict=False):
            rows = [measure for measure in evaluation.measures
                    if (measure.method, measure.k) == (method, top)]
            if not rows:
                continue
            lengths = [row.shortlist for row in rows]
            recalls.plot(lengths, [row.recall for row in rows], line, color=METHOD_COLORS[method],
                         marker=METHOD_MARKS[method], label=f"{METHOD_NAMES[method]}, top {top}")
            recalls.fill_between(lengths, [row.recall_interval[0] for row in rows],
                                 [row.recall_interval[1] for row in rows],
                                 color=METHOD_COLORS[method], alpha=0.12, linewidth=0)
    recalls.set(xscale="log", xlabel="shortlist (both: a fifth by TF-IDF)", ylim=(0, 1.02),
                ylabel="share of the true top k in the shortlist", title="Recall")
    lengths = sorted({measure.shortlist for measure in evaluation.measures})
    recalls.set_xticks(lengths, [f"{length:,}" for length in lengths])
    recalls.minorticks_off()
    recalls.grid(alpha=0.25)
    claims.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for method, pairs in evaluation.pairs.items():
        claimed, actual = zip(*pairs, strict=True)
        claims.scatter(claimed, actual, s=9, alpha=0.35, color=METHOD_COLORS[method],
                       marker=METHOD_MARKS[method], label=METHOD_NAMES[method], linewidths=0)
    claims.set(xlabel="claimed by the recall statement", ylabel="actual", xlim=(0, 1.02),
               ylim=(0, 1.02), title="Claimed against actual, a point a query and shortlist")
    claims.grid(alpha=0.25)
    for axis in (recalls, claims):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
