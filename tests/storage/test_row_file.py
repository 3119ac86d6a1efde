"""Equal sequences found by digest, against a plain loop."""

import numpy as np
import pytest

from gradindex.errors import DamagedIndexError
from gradindex.storage.records import Part, Record
from gradindex.storage.row_file import array_bytes, digest_of, first_equal, parse_array


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


def test_a_list_is_read_by_its_size_and_not_by_what_it_says(tmp_path):
    """A header that asks for all of the memory, one that goes on, and ones of something else."""
    where = tmp_path / "rows.npy"
    content = array_bytes(np.arange(3))
    found = parse_array(content, np.dtype("<i8"), where)
    assert found.tolist() == [0, 1, 2] and found.flags.writeable
    assert parse_array(array_bytes(np.arange(0)), np.dtype("<i8"), where).tolist() == []
    huge = content.replace(b"(3,), }          ", b"(9999999999999,)}", 1)
    assert len(huge) == len(content) and huge != content
    for other in (huge, content + b"x", content[:-1], content[:40], b"",
                  content.replace(b"NUMPY\x01", b"NUMPY\x07"), content.replace(b"(3,)", b"(-3)")):
        with pytest.raises(DamagedIndexError, match="can't be read"):
            parse_array(other, np.dtype("<i8"), where)
    for other in (np.zeros((3, 1), np.int64), np.zeros(3)):
        with pytest.raises(DamagedIndexError, match="holds no list of int64"):
            parse_array(array_bytes(other), np.dtype("<i8"), where)
