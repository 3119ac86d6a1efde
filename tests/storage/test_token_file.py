"""The TF-IDF filter against the formula of Grosse et al. 2023, §3.2, written out."""

import zipfile

import numpy as np
import pytest
import scipy.sparse

from gradindex.errors import DamagedIndexError
from gradindex.storage import token_file
from support.reference import plain_score


def read(path, rows, vocabulary=10):
    return token_file.parse(path.read_bytes(), rows, 12, vocabulary, path)


def test_scores_are_the_papers(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 30, random.integers(1, 12)).astype(np.int32)
                 for _ in range(25)]
    for name, part in (("a", documents[:11]), ("b", documents[11:])):
        token_file.write(tmp_path / f"{name}.npz", part, 30)
    parts = [read(tmp_path / "a.npz", 11, 30), read(tmp_path / "b.npz", 14, 30)]
    matrix = token_file.TokenMatrix(parts, np.ones(25, bool))
    query = [3, 3, 7, 29, 0]
    held = [set(document.tolist()) for document in documents]
    expected = [plain_score(query, held, place) for place in range(25)]
    np.testing.assert_allclose(matrix.scores(query), expected, rtol=1e-12)
    assert max(expected) > 0
    live = np.arange(25) % 3 > 0
    held = [one for one, there in zip(held, live, strict=True) if there]
    expected = [plain_score(query, held, place) for place in range(len(held))]
    found = token_file.TokenMatrix(parts, live).scores(query)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_files_are_the_same_every_time_and_checked(tmp_path):
    documents = [np.array([4, 4, 1], np.int32), np.array([2], np.int32)]
    for name in ("a", "b"):
        token_file.write(tmp_path / f"{name}.npz", documents, 5)
    content = (tmp_path / "a.npz").read_bytes()
    assert content == (tmp_path / "b.npz").read_bytes()
    assert read(tmp_path / "a.npz", 2, 5).toarray().tolist() == [
        [False, True, False, False, True], [False, False, True, False, False]]
    with pytest.raises(DamagedIndexError, match=r"holds 2 sequences of 5 .* expected 3 of 5"):
        read(tmp_path / "a.npz", 3, 5)
    with pytest.raises(DamagedIndexError, match="expected 2 of 6"):
        read(tmp_path / "a.npz", 2, 6)
    (tmp_path / "a.npz").write_bytes(content[:-30])
    with pytest.raises(DamagedIndexError, match="can't be read"):
        read(tmp_path / "a.npz", 2)


def test_what_unpacks_to_more_than_it_may_is_refused(tmp_path):
    """A packed file says how large its parts are; nothing of it is unpacked then."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", bytes(10**8))
    assert path.stat().st_size < 10**6
    with pytest.raises(DamagedIndexError, match="unpacks to more than"):
        read(path, 2)
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(
        (np.ones(1, bool), np.array([9]), np.array([0, 1, 1])), shape=(2, 10)))
    assert read(path, 2).shape == (2, 10)
    matrix = scipy.sparse.csr_matrix(
        (np.ones(1, bool), np.array([9]), np.array([0, 1, 1])), shape=(2, 10))
    matrix.indices[0] = 1000  # a column that isn't there
    scipy.sparse.save_npz(path, matrix)
    with pytest.raises(DamagedIndexError, match="can't be read"):
        read(path, 2)
