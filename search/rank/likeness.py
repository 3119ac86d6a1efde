"""How alike texts are in their wording: a query and a hit, and the hits among each other."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gradindex.model.tokenise import common_tokens
from gradindex.results import Hit

SHINGLE = 5  # tokens
NEAR = 0.5  # of all shingles of two sequences, from here on they are near-duplicates
PRIME = np.uint64(0x9E3779B97F4A7C55)


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
        held = [_shingles(tokens) for tokens in sample]
        self._shingles, self._held_by = np.unique(
            np.concatenate([np.empty(0, np.uint64), *held]), return_counts=True)

    def overlap(self, query_tokens: Sequence[int], tokens: Sequence[int]) -> float | None:
        """Share of the query's distinct tokens that are among `tokens`, weighed by IDF: 0 to 1.

        None where the query has no token that isn't in every sequence of the sample.
        """
        # each token once: a query that repeats a word would weigh it by how often it does
        distinct, members = sorted(set(query_tokens)), set(tokens)
        weights = np.log([(self._size + 1) / (self._counts[token] + 1) for token in distinct])
        shared = np.array([token in members for token in distinct])
        return float(weights[shared].sum() / weights.sum()) if weights.sum() > 0 else None

    def rarity(self, shingles: np.ndarray) -> np.ndarray:
        """How rare each of some shingles is in the sample: log((S + 2) / (n + 1)), above 0."""
        places = np.searchsorted(self._shingles, shingles)
        there = np.append(self._shingles, np.uint64(0))[places] == shingles
        held_by = np.where(there, np.append(self._held_by, 0)[places], 0)
        return np.log((self._size + 2) / (held_by + 1))


def fold_near(hits: list[Hit], learned: Mapping[int, np.ndarray], wording: Wording) -> list[Hit]:
    """The hits, those that share most of their wording with an earlier one marked as `near` it.

    `learned` bool [t] are the masks of the hits' sequences, by id. Each hit is compared with the
    earlier ones that are not themselves marked, by `_Shingles.likeness`; alike are two from NEAR
    on.
    """
    texts = [_Shingles(np.array(hit.token_ids), learned[hit.id], wording) for hit in hits]
    heads: dict[int, list[int]] = {}  # of a shingle: the hits that hold it
    near: dict[int, int] = {}
    for rank, text in enumerate(texts):
        # each hit against all earlier ones at once, by the shingles that they share
        shared: defaultdict[int, float] = defaultdict(float)
        for shingle, weight in text.weights.items():
            for head in heads.get(shingle, ()):
                shared[head] += weight
        # which only what the two begin with can lower
        alike = {head: text.likeness(texts[head]) for head, weight in shared.items()
                 if 1.01 * weight >= NEAR * (text.size + texts[head].size - weight)}
        # of equals the earlier, which ranks higher
        best = max(alike, key=lambda head: (alike[head], -head), default=None)
        if best is not None and alike[best] >= NEAR:
            near[rank] = best
            continue
        for shingle in text.weights:
            heads.setdefault(shingle, []).append(rank)
    folded: dict[int, list[int]] = {}
    for rank, head in near.items():
        folded.setdefault(head, []).append(hits[rank].id)
    return [replace(hit, near=hits[near[rank]].id if rank in near else None,
                    near_duplicates=folded.get(rank, []))
            for rank, hit in enumerate(hits)]


class _Shingles:
    """The shingles of a text, each with its weight, which is how rare it is in a sample.

    What many sequences hold, such as a default system prompt, makes no two of them alike.
    """

    def __init__(self, tokens: np.ndarray, learned: np.ndarray, wording: Wording):
        self._tokens, self._learned, self._wording = tokens, learned, wording
        shingles = _shingles(tokens)
        self.weights: dict[int, float] = dict(
            zip(shingles.tolist(), wording.rarity(shingles).tolist(), strict=True))
        self.size = sum(self.weights.values())

    def likeness(self, other: "_Shingles") -> float:
        """The weighted Jaccard index of both texts' shingles (Broder 1997), 0 to 1.

        What both begin with and neither was trained to say, a prompt, isn't counted.
        """
        unlearned = min(_first(self._learned), _first(other._learned))
        begun = min(unlearned, common_tokens(self._tokens, other._tokens))
        one, two = (_Shingles(text._tokens[begun:], text._learned[begun:], self._wording).weights
                    if begun else text.weights for text in (self, other))
        # exact sums, so that equal pairs are equally alike
        shared = math.fsum(one[shingle] for shingle in one.keys() & two.keys())
        return shared / (math.fsum(one.values()) + math.fsum(two.values()) - shared)


def _first(learned: np.ndarray) -> int:
    """The first token that was learned; the number of all where none was."""
    return int(learned.argmax()) if learned.any() else len(learned)


def _shingles(tokens: np.ndarray) -> np.ndarray:
    """Every run of SHINGLE tokens once, as a number each; of fewer tokens, all of them as one."""
    size = min(SHINGLE, len(tokens))
    runs = np.lib.stride_tricks.sliding_window_view(tokens, size) if size else tokens[None]
    # a polynomial in 64 bits, where two different runs hardly ever meet
    powers = PRIME ** np.arange(1, size + 1, dtype=np.uint64)
    return np.unique(((runs.astype(np.uint64) + np.uint64(1)) * powers).sum(-1, dtype=np.uint64))
