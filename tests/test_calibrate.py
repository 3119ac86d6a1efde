"""The exact scores that tell a code's bits and its error: made once, and right."""

import numpy as np
import pytest

import gradindex
from gradindex.storage import manifest
from indexer import build as build_module
from indexer import calibrate
from indexer.calibrate import draw_pairs, own_query_vectors, prepare_query
from support.indexes import SMALL, files_of


@pytest.fixture
def options(few_queries):
    """A build without `bits`, so that they are settled on the way."""
    return {name: value for name, value in SMALL.items() if name != "bits"}


def test_a_build_stopped_after_its_pairs_doesnt_score_them_again(
    model_folder, data_file, tmp_path, options, monkeypatch
):
    whole = gradindex.build(str(model_folder), data_file, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "encode_run",
                      lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            gradindex.build(str(model_folder), data_file, tmp_path / "index", **options)
    monkeypatch.setattr(build_module, "score_pairs", lambda *_: pytest.fail("scored again"))
    index = gradindex.build(str(model_folder), data_file, tmp_path / "index", **options)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")
    facts = index.manifest
    assert facts.plan.bits is None and facts.code["length"] == whole.manifest.code["length"]
    # 46 sequences are all among the first 100, whatever the codes say; the maps have 5,440 numbers
    assert facts.code["length"] == 5440 and facts.batch_tokens == SMALL["batch_tokens"]


def test_the_anchors_are_what_a_search_finds(model_folder, data_file, tmp_path, options):
    """The influence of another sequence on a sequence's later half, as asked by its own tokens."""
    index = gradindex.build(str(model_folder), data_file, tmp_path / "index", **options)
    anchors = manifest.load(tmp_path / "index").calibration["anchors"]
    queries, sample = draw_pairs(list(range(len(index))), 0)
    assert [anchor[:2] for anchor in anchors] == [
        (query, other) for query in queries for other in sample[:calibrate.ANCHORS_EACH]]
    for query, other, score in anchors:
        [record] = index.snapshot.records([query])
        asked = index.model.objective.as_query(record)
        labels = np.where(asked.scored, asked.tokens, -100).tolist()
        [hit] = index.rescore(token_ids=asked.tokens.tolist(), labels=labels, ids=[other])
        assert hit.influence == pytest.approx(score, rel=1e-4)


def test_vectors_alone_are_those_of_prepared_queries(index_folder):
    snapshot = gradindex.open(index_folder).snapshot
    _ = snapshot.codes
    records = snapshot.records([3, 11, 7])
    found = own_query_vectors(snapshot.model, snapshot.codes, snapshot.ekfac, records, 60)
    for vector, record in zip(found, records, strict=True):
        expected, _ = prepare_query(snapshot.model, snapshot.codes, snapshot.ekfac, record)
        np.testing.assert_allclose(vector, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
