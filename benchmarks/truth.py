"""Queries of an index whose exact influence on every sequence is known, kept in a file.

A search can then be gone through as often as one likes, rescoring nothing: `search_known`.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradindex.influence.exact import Exact, exact_scores
from gradindex.influence.preconditioned import Preconditioned
from gradindex.results import UNSCORED, Query
from search.ask.controls import Controls
from search.ask.settings import Settings, settle
from search.engine import Searcher
from search.rank.query_gradient import QueryGradient, form_gradients
from search.rank.ranking import best
from search.rank.session import Session

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 32, 64)  # of completions, in turn; the first seven are short
SHORT = 12
BEFORE = 40  # tokens of prompt, at most


@dataclass
class Known:
    """A query, its vector, and the exact influence [N] of every sequence on it."""

    query: Query
    gradient: QueryGradient
    influence: np.ndarray


@dataclass
class Outcome:
    """What a search would have done: how many it scored, what it claims, what is true."""

    rescored: int
    actual: float
    claimed: float
    lower: float


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


def asked(index: Searcher, path: Path) -> list[Query]:
    """Queries of a file of JSON lines, as `--queries` takes them."""
    return [index.make_query(**json.loads(line)) for line in path.read_text().splitlines()]


def find(index: Searcher, queries: Sequence[Query], together: int, kept: Path) -> list[Known]:
    """Score every sequence exactly on each query, so many `together`, unless `kept` has it."""
    settings = settle(Controls(), index.manifest)
    done: dict[str, Any] = dict(np.load(kept)) if kept.exists() else {}
    missing = [query for query in queries if f"{_key(query)}/influence" not in done]
    for first in range(0, len(missing), together):
        group = missing[first : first + together]
        gradients, preconditioned = form_gradients(index.snapshot, group, settings,
                                                   index.batch_tokens)
        scores = exact_scores(index.snapshot.model, settings.modules, preconditioned,
                              index.snapshot.records(range(len(index))), index.batch_tokens)
        for gradient, row in zip(gradients, scores, strict=True):
            key = _key(gradient.query)
            done |= {f"{key}/influence": row, f"{key}/vector": gradient.vector,
                     f"{key}/norm": np.array(gradient.norm)}
        np.savez(kept, **done)
        print(f"truth of {first + len(group)} more queries", file=sys.stderr, flush=True)
    return [Known(query, QueryGradient(query, done[f"{key}/vector"], float(done[f"{key}/norm"])),
                  done[f"{key}/influence"]) for query in queries for key in [_key(query)]]


def _key(query: Query) -> str:
    return hashlib.sha256(json.dumps([query.tokens, query.labels]).encode()).hexdigest()[:16]


def search_known(index: Searcher, known: Known, controls: dict[str, Any]) -> Outcome:
    """What a search with these controls does, its exact scores being looked up."""
    settings = settle(Controls(**controls), index.manifest)
    session = Session(index.snapshot, settings, [known.gradient], Preconditioned({}),
                      index.batch_tokens)
    session.common.exact = {place: Exact(known.influence[place : place + 1])
                            for place in range(len(index))}
    [track] = session.tracks
    for _ in session.rescore(track):
        pass
    session.hear_random_sample(track)
    for _ in session.rescore(track):  # the sample may say that it isn't sure yet
        pass
    groups, made = track.statement()
    found = {group[0] for group in groups[: settings.k]}
    return Outcome(len(track.shortlist.places(track.length)),
                   len(found & top(index, known, settings)) / settings.k, made.estimate, made.lower)


def top(index: Searcher, known: Known, settings: Settings) -> set[int]:
    """The true top k, the first of equal sequences standing for all."""
    first = index.snapshot.contents.first_equal
    order = best(settings.sign * known.influence, len(first))
    return set(order[first[order] == order][: settings.k].tolist())
