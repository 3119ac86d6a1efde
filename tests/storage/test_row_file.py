"""Equal sequences found by digest, against a plain loop."""

import numpy as np
import pytest

from gradindex.storage.records import Part, Record
from gradindex.storage.row_file import digest_of, first_equal


@pytest.mark.parametrize("bits", [1, 3, 60])
def test_first_equal_is_the_plain_loop(bits):
    """Few bits make both halves of a digest collide alone and together."""
    random = np.random.default_rng(bits)
    digests = random.integers(0, 1 << bits, (300, 2)).astype(np.uint64)
    digests[200:] = digests[random.integers(0, 200, 100)]
    plain, seen = [], {}
    for place, digest in enumerate(digests.tolist()):
        plain.append(seen.setdefault(tuple(digest), place))
    assert first_equal(digests).tolist() == plain
    assert first_equal(digests[:0]).tolist() == []
    assert first_equal(digests[:1]).tolist() == [0]


def test_a_digest_is_of_tokens_and_mask_alone():
    def digest(ids, scored, number=0, source="a"):
        return digest_of(Record(number, np.array(ids, np.int32), np.array(scored),
                                [Part(0, source, 1, 0, 1, 0)])).tolist()

    one = digest([1, 2, 3], [True, True, True])
    assert digest([1, 2, 3], [True, True, True], 9, "b") == one
    assert digest([1, 2, 4], [True, True, True]) != one
    assert digest([1, 2, 3], [False, True, True]) != one
    assert digest([1, 2], [True, True]) != one


def test_sequences_of_equal_tokens_and_another_mask_are_not_equal():
    ids = np.array([1, 2, 3], np.int32)
    mask = np.array([True, True, True])

    def record(tokens, scored):
        return Record(0, tokens, scored, [])

    assert (digest_of(record(ids, mask)) == digest_of(record(ids.copy(), mask.copy()))).all()
    others = [record(ids, np.array([False, True, True])), record(ids[:2], mask[:2]),
              record(ids[::-1].copy(), mask)]
    assert all((digest_of(one) != digest_of(record(ids, mask))).any() for one in others)
