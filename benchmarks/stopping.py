"""When is a search sure? Three defaults on the same queries: seconds, rescored, actual, claimed.

    python benchmarks/stopping.py .demo --queries 40

FOLDER holds `index` and `model`, as `make demo` leaves them. Queries are made of sequences of the
index: a completion of 1 to 64 tokens after what stands before it. Every sequence is scored exactly
on each for the truth, that the query was made of included.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from gradindex.influence.exact import rescore
from gradindex.results import UNSCORED, Query
from search.ask.controls import Controls
from search.ask.settings import settle
from search.engine import Searcher
from search.rank.query_gradient import form_gradients
from search.rank.ranking import best
from search.rank.session import Session
from search.rank.shortlist import Shortlist

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 32, 64)  # of completions, in turn; the first seven are short
SHORT = 12
BEFORE = 40  # tokens of prompt, at most
AT_ONCE = 20  # queries whose truth is found together
DEFAULTS: dict[str, dict[str, Any]] = {
    "1,000 by code": {"shortlist": 1000, "candidates": "code"},
    "1,000 by both": {"shortlist": 1000, "candidates": "both"},
    "until sure, by code": {"candidates": "code"},
    "until sure, by both (the default)": {},
}


def make_queries(index: Searcher, count: int, seed: int) -> list[Query]:
    """Queries of known places in the index, of every length in turn."""
    random, queries = np.random.default_rng(seed), []
    while len(queries) < count:
        length = LENGTHS[len(queries) % len(LENGTHS)]
        tokens = index.snapshot.records([int(random.integers(len(index)))])[0].tokens.tolist()
        if len(tokens) < length + 6:
            continue
        at = int(random.integers(4, len(tokens) - length + 1))
        text = tokens[max(0, at - BEFORE) : at + length]
        queries.append(index.make_query(
            token_ids=text, labels=[UNSCORED] * (len(text) - length) + text[-length:]))
    return queries


def truth_of(index: Searcher, queries: list[Query], k: int) -> tuple[np.ndarray, list[list[float]]]:
    """Exact influence [q, N], and of each query the recall of the top k by share of the list."""
    settings, places = settle(Controls(k=k), index.manifest), list(range(len(index)))
    truth = np.zeros((len(queries), len(index)))
    shares: list[list[float]] = []
    for first in range(0, len(queries), AT_ONCE):
        group = queries[first : first + AT_ONCE]
        gradients, preconditioned = form_gradients(index.snapshot, group, settings,
                                                   index.batch_tokens)
        session = Session(index.snapshot, settings, gradients, preconditioned, index.batch_tokens)
        for batch in rescore(session.common.by, preconditioned, index.snapshot.records(places)):
            for place, exact in batch:
                truth[first : first + len(group), place] = exact.influence
        for track in session.tracks:
            words = index.snapshot.tables.tokens.scores(track.query.scored_tokens)
            top = set(best(truth[first + track.number], k).tolist())
            shares.append([
                len(top & set(Shortlist(track.ranking, track.noise, length, listed).places(length)))
                / k for length in (50, 100, 200, 500, 1000)
                for listed in (None, best(words, length // 5))])
    return truth, shares


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--queries", "count", default=40, show_default=True)
@click.option("-k", default=10, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(folder: Path, count: int, k: int, seed: int) -> None:
    """Print a line for each default, and what a list by words adds at the same length."""
    index = gradindex.open(folder / "index", model=str(folder / "model"))
    index.snapshot.load()
    queries = make_queries(index, count, seed)
    truth, shares = truth_of(index, queries, k)
    print(f"{len(index):,} sequences, {count} queries, k = {k}\n\n"
          f"{'':<34}seconds  rescored  actual  claimed  sure of .99: share  rescored  actual")
    for name, controls in DEFAULTS.items():
        rows = []
        for query, influence in zip(queries, truth, strict=True):
            begun = time.monotonic()
            [result] = index.search_many([query], k=k, **controls)
            top = set(best(influence, k).tolist())
            found = {index.known([hit.id])[0] for hit in result}
            assert result.recall.lower is not None and result.recall.estimate is not None
            rows.append((time.monotonic() - begun, result.rescored, len(found & top) / k,
                         result.recall.estimate, result.recall.lower >= 0.99))
        table = np.array(rows, dtype=float)
        sure = table[table[:, 4] == 1]
        seconds, rescored, actual, claimed = table[:, :4].mean(0)
        print(f"{name:<34}{seconds:>7.1f}  {rescored:>8.0f}  {actual:>6.3f}  {claimed:>7.3f}  "
              f"{len(sure) / len(table):>18.2f}" + (
                  f"  {sure[:, 1].mean():>8.0f}  {sure[:, 2].mean():>6.3f}" if len(sure) else ""),
              flush=True)
    short = [query.scored <= SHORT for query in queries]
    for what, chosen in (("completions of 1 to 12 tokens", short),
                         ("longer ones", [not one for one in short])):
        means = np.array(shares)[chosen].mean(0).reshape(-1, 2)
        print(f"\n{what} ({sum(chosen)}): recall of the top {k}\n"
              "shortlist  by code  by both (a fifth by words)")
        for length, (code, both) in zip((50, 100, 200, 500, 1000), means, strict=True):
            print(f"{length:>9,}  {code:>7.3f}  {both:>7.3f}")


if __name__ == "__main__":
    main()
