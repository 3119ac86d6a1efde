"""How alike texts are in their wording: a query and a hit, and the hits among each other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradindex.results import Hit

SHINGLE = 5  # tokens
NEAR = 0.5  # of all shingles of two sequences, from here on they are near-duplicates


class Wording:
    """How rare each token is in a sample of sequences (tokens [n] each).

    IDF(token) = log((S + 1) / (n + 1)), n of the S sequences holding it: 0 where all do.

    Of three sequences all hold token 1 and one holds 2, so 1 weighs nothing and 2 all; a token that
    none holds weighs most:

    >>> wording = Wording([np.array([1, 2]), np.array([1, 3]), np.array([1, 4])])
    >>> wording.overlap([1, 2], [1]), wording.overlap([1, 2], [2, 2])
    (0.0, 1.0)
    >>> round(wording.overlap([2, 9], [2]), 3)
    0.333
    """

    def __init__(self, sample: Sequence[np.ndarray]):
        self._size = len(sample)
        self._counts = Counter(token for tokens in sample for token in set(tokens.tolist()))

    def overlap(self, query_tokens: Sequence[int], tokens: Sequence[int]) -> float | None:
        """Share of the query's distinct tokens that are among `tokens`, weighed by IDF: 0 to 1.

        None where the query has no token that isn't in every sequence of the sample.
        """
        # each token once: a query that repeats a word would weigh it by how often it does
        distinct, members = sorted(set(query_tokens)), set(tokens)
        weights = np.log([(self._size + 1) / (self._counts[token] + 1) for token in distinct])
        shared = np.array([token in members for token in distinct])
        return float(weights[shared].sum() / weights.sum()) if weights.sum() > 0 else None


def fold_near(hits: list[Hit]) -> list[Hit]:
    """The hits, those that share most of their wording with an earlier one marked as `near` it.

    Alike are two whose sets of shingles (runs of SHINGLE tokens) have a Jaccard index of at least
    NEAR (Broder 1997). Each is compared with the earlier ones that are not themselves marked.
    """
    heads: dict[tuple[int, ...], list[int]] = {}  # of a shingle: the hits that hold it
    sizes: list[int] = []
    near: dict[int, int] = {}
    # each hit against all earlier ones at once, by the shingles that they share
    for rank, hit in enumerate(hits):
        shingles = _shingles(hit.token_ids)
        sizes.append(len(shingles))
        shared = Counter(head for shingle in shingles for head in heads.get(shingle, ()))
        alike = {head: count / (sizes[head] + len(shingles) - count)
                 for head, count in shared.items()}
        # of equals the earlier, which ranks higher
        best = max(alike, key=lambda head: (alike[head], -head), default=None)
        if best is not None and alike[best] >= NEAR:
            near[rank] = best
            continue
        for shingle in shingles:
            heads.setdefault(shingle, []).append(rank)
    folded: dict[int, list[int]] = {}
    for rank, head in near.items():
        folded.setdefault(head, []).append(hits[rank].id)
    return [replace(hit, near=hits[near[rank]].id if rank in near else None,
                    near_duplicates=folded.get(rank, []))
            for rank, hit in enumerate(hits)]


def _shingles(tokens: list[int]) -> set[tuple[int, ...]]:
    """Every run of SHINGLE tokens; of fewer tokens, all of them as one."""
    return {tuple(tokens[start : start + SHINGLE])
            for start in range(max(1, len(tokens) - SHINGLE + 1))}
