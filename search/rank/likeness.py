"""How alike texts are in their wording: a query and a hit, and the hits among each other."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from gradindex.results import Hit

SHINGLE = 5  # tokens
NEAR = 0.5  # of all shingles of two sequences, from here on they are near-duplicates


class Wording:
    """How rare each token is in a sample of sequences (token ids [n] each).

    IDF(token) = log((S + 1) / (n + 1)), n of the S sequences holding it: 0 where all do.
    """

    def __init__(self, sample: Sequence[np.ndarray]):
        self._size = len(sample)
        self._held = Counter(token for ids in sample for token in set(ids.tolist()))

    def overlap(self, query: Iterable[int], ids: Iterable[int]) -> float | None:
        """Share of the query's distinct tokens that `ids` hold, weighed by IDF: 0 to 1.

        None where the query has no token that isn't in every sequence of the sample.
        """
        wanted = sorted(set(query))
        weights = np.log([(self._size + 1) / (self._held[token] + 1) for token in wanted])
        held = set(ids)
        there = np.array([token in held for token in wanted])
        return float(weights[there].sum() / weights.sum()) if weights.sum() > 0 else None


def fold_near(hits: list[Hit]) -> list[Hit]:
    """The hits, those that share most of their wording with an earlier one marked as `near` it.

    Alike are two whose sets of shingles (runs of SHINGLE tokens) have a Jaccard index of at least
    NEAR (Broder 1997). Each is compared with the earlier ones that are not themselves marked.
    """
    heads: dict[tuple[int, ...], list[int]] = {}  # of a shingle: the hits that hold it
    sizes: list[int] = []
    near: dict[int, int] = {}
    for rank, hit in enumerate(hits):
        own = _shingles(hit.token_ids)
        sizes.append(len(own))
        shared = Counter(head for shingle in own for head in heads.get(shingle, ()))
        alike = {head: count / (sizes[head] + len(own) - count) for head, count in shared.items()}
        best = max(alike, key=lambda head: (alike[head], -head), default=None)
        if best is not None and alike[best] >= NEAR:
            near[rank] = best
            continue
        for shingle in own:
            heads.setdefault(shingle, []).append(rank)
    folded: dict[int, list[int]] = {}
    for rank, head in near.items():
        folded.setdefault(head, []).append(hits[rank].id)
    return [replace(hit, near=hits[near[rank]].id if rank in near else None,
                    near_duplicates=folded.get(rank, []))
            for rank, hit in enumerate(hits)]


def _shingles(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[start : start + SHINGLE])
            for start in range(max(1, len(ids) - SHINGLE + 1))}
