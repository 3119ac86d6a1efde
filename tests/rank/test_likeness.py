"""Wording shared with the query, and near-duplicates, against plain recomputation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from search.rank.likeness import SHINGLE, Wording, fold_near
from search.show import wording
from support.indexes import APPLES


def test_lexical_overlap(index, result):
    snapshot = index.snapshot
    sample = [set(one.tokens.tolist()) for one in snapshot.records(snapshot.random_sample())]
    rarity = {token: math.log((len(sample) + 1) / (sum(token in one for one in sample) + 1))
              for token in set(result.query.tokens)}
    for hit in result:
        expected = sum(weight for token, weight in rarity.items() if token in hit.token_ids) / \
            sum(rarity.values())
        assert hit.lexical == pytest.approx(expected, abs=1e-12)
    assert max(hit.lexical for hit in result) > min(hit.lexical for hit in result)
    everywhere = Wording([np.array([1, 2]), np.array([1])])
    assert everywhere.overlap([1], [1]) is None
    assert everywhere.overlap([1, 2], [1]) == 0 and everywhere.overlap([2, 2, 9], [2]) == \
        math.log(3 / 2) / (math.log(3 / 2) + math.log(3))
    named = index.rescore(**APPLES, ids=[hit.id for hit in result])
    assert [hit.lexical for hit in named] == [hit.lexical for hit in result]


def test_near_duplicates(result):
    def shingles(ids):
        return {tuple(ids[at : at + SHINGLE]) for at in range(len(ids) - SHINGLE + 1)} or \
            {tuple(ids)}

    def alike(one, other):
        a, b = shingles(one), shingles(other)
        return len(a & b) / len(a | b)

    random = np.random.default_rng(1)
    base = random.integers(0, 50, 40).tolist()
    texts = [base, [*base[:36], 60, 61, 62, 63], random.integers(0, 50, 40).tolist(), base[20:],
             [7, 8], [7, 8], [*base[:39], 99]]
    hits = fold_near([replace(result[0], id=10 + n, token_ids=ids) for n, ids in enumerate(texts)])
    near = [hit.near for hit in hits]
    heads: list[int] = []
    for n, ids in enumerate(texts):
        scores = {head: alike(texts[head], ids) for head in heads}
        best = max(scores, key=lambda head: scores[head], default=None)
        if best is not None and scores[best] >= 0.5:
            assert near[n] == 10 + best
        else:
            assert near[n] is None
            heads.append(n)
    assert near == [None, 10, None, None, None, 14, 10]
    assert [hit.near_duplicates for hit in hits] == [[11, 16], [], [], [], [15], [], []]
    assert "7 of 60 sequences (3 folded into a like one)" in wording.counted(
        replace(result, hits=hits, sequences=60))
    assert "folded" not in wording.counted(replace(result, hits=hits[2:4]))
