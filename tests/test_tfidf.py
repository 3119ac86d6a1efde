"""The TF-IDF filter against the formula of Grosse et al. 2023, §3.2, written out."""

import math

import numpy as np
import pytest

from gradindex import tfidf
from gradindex.errors import DamagedIndexError


def plain_score(query, documents, place):
    """Σ over query tokens of (k₁+1)·e/(k₁+e) · IDF, e = 1 where the document holds the token."""
    total = 0.0
    for token in query:
        count = sum(token in document for document in documents)
        idf = math.log((len(documents) - count + 0.5) / (count + 0.5) + 1)
        there = float(token in documents[place])
        total += (1.5 + 1) * there / (1.5 + there) * idf
    return total


def test_scores_are_the_papers(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 30, random.integers(1, 12)).astype(np.int32)
                 for _ in range(25)]
    for name, part in (("a", documents[:11]), ("b", documents[11:])):
        tfidf.write(tmp_path / f"{name}.npz", part, 30)
    matrix = tfidf.TokenMatrix([tfidf.read(tmp_path / "a.npz", 11),
                                tfidf.read(tmp_path / "b.npz", 14)])
    query = [3, 3, 7, 29, 0]
    held = [set(document.tolist()) for document in documents]
    expected = [plain_score(query, held, place) for place in range(25)]
    np.testing.assert_allclose(matrix.scores(query), expected, rtol=1e-12)
    assert max(expected) > 0


def test_files_are_the_same_every_time_and_checked(tmp_path):
    documents = [np.array([4, 4, 1], np.int32), np.array([2], np.int32)]
    for name in ("a", "b"):
        tfidf.write(tmp_path / f"{name}.npz", documents, 5)
    content = (tmp_path / "a.npz").read_bytes()
    assert content == (tmp_path / "b.npz").read_bytes()
    assert tfidf.read(tmp_path / "a.npz", 2).toarray().tolist() == [
        [False, True, False, False, True], [False, False, True, False, False]]
    with pytest.raises(DamagedIndexError, match="holds 2 sequences, expected 3"):
        tfidf.read(tmp_path / "a.npz", 3)
    (tmp_path / "a.npz").write_bytes(content[:-30])
    with pytest.raises(DamagedIndexError, match="can't be read"):
        tfidf.read(tmp_path / "a.npz", 2)
