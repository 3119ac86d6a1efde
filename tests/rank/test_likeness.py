"""Wording shared with the query, and near-duplicates, against plain recomputation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from search.rank.likeness import SHINGLE, Wording, _shingles, fold_near
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


def folded(result, texts, prompts=None, sample=()):
    """Hits with these token ids, of which the first `prompts` weren't learned."""
    prompts = prompts or [0] * len(texts)
    hits = [replace(result[0], id=10 + n, token_ids=ids) for n, ids in enumerate(texts)]
    learned = {hit.id: np.arange(len(hit.token_ids)) >= count
               for hit, count in zip(hits, prompts, strict=True)}
    return fold_near(hits, learned, Wording([np.array(tokens) for tokens in sample]))


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
    hits = folded(result, texts)
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


def words(seed, count):
    return np.random.default_rng(seed).integers(100, 200, count).tolist()


SYSTEM = words(0, 300)
CHATS = [SYSTEM + words(n, 60) for n in range(1, 9)]


def test_a_prompt_that_chats_begin_with_folds_none_of_them(result):
    """Whoever else has it; the same chat with another word is folded."""
    asked = [340] * len(CHATS)
    assert all(hit.near is None for hit in folded(result, CHATS, asked))
    again = [*CHATS[0][:310], 7, *CHATS[0][311:]]
    hits = folded(result, [*CHATS, again], [*asked, 340])
    assert [hit.near for hit in hits] == [None] * 8 + [10]
    # the same question with other answers, and with nearly the same one
    answers = [words(50, 40), words(51, 40), [*words(50, 40)[:39], 7]]
    hits = folded(result, [CHATS[0] + answer for answer in answers], [360] * 3)
    assert [hit.near for hit in hits] == [None, None, 10]


def test_what_much_of_the_data_begins_with_folds_nothing(result):
    """Though it is learned, as in chats that were rendered before, or under a licence."""
    others = [SYSTEM + words(100 + n, 60) for n in range(24)]
    sample = [*others, *CHATS, *(words(200 + n, 360) for n in range(8))]
    assert all(hit.near is None for hit in folded(result, CHATS, sample=sample))
    again = [*CHATS[0][:310], 7, *CHATS[0][311:]]
    assert [hit.near for hit in folded(result, [*CHATS, again], sample=sample)][-1] == 10
    # without the others it is their wording
    assert [hit.near for hit in folded(result, CHATS)] == [None] + [10] * 7


def test_rarity_counts_the_sequences_that_hold_a_shingle():
    sample = [np.array(tokens) for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5] * 2, [1, 2])]
    asked = [_shingles(np.array(tokens)) for tokens in (
        [1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [1, 2], [2, 1], [5, 4, 3, 2, 1])]
    rarity = [Wording(sample).rarity(one).tolist() for one in asked]
    assert rarity == [[math.log(5 / (n + 1))] for n in (2, 1, 1, 0, 0)]
    assert Wording([]).rarity(asked[0]).tolist() == [math.log(2)]
