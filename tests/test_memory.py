"""Bounded memory: what may be used for what, and that answers and bytes don't depend on it."""

import json

import pytest
from conftest import SMALL
from test_build import files_of
from test_search import QUESTION

import gradindex
from gradindex.errors import InputError, ResourceError
from gradindex.memory import Allowance, parse_size
from indexer.budget import held_bytes, partitions
from search import target
from search.controls import Controls, settle


@pytest.mark.parametrize("text, expected", [
    ("8GB", 8 * 10**9), ("512MB", 512 * 10**6), ("1.5 GiB", 3 << 29), ("20kb", 20_000),
    ("4096", 4096), (4096, 4096), ("7B", 7)])
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "8 PB", "GB", "-1GB", "0GB", "many", "1,5GB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="expected a size such as 8GB"):
        parse_size(text)


def test_an_allowance_is_what_the_model_leaves():
    free = Allowance.beside(10**9, None, 10**12, "anything")
    assert (free.bytes, free.fit, free.curvature, free.part(0.1, 77)) == (None, None, None, 77)
    bound = Allowance.beside(3000, 5000, 1000, "fitting m")
    assert (bound.bytes, bound.fit, bound.curvature) == (2000, 1000, 500)
    assert (bound.part(0.25, 10**6), bound.part(0.25, 400)) == (500, 400)
    with pytest.raises(ResourceError, match=r"the model takes 3 kB and fitting m 1 kB, .* expected "
                                            r"5 kB at least"):
        Allowance.beside(3000, 4999, 1000, "fitting m")


def tight(index) -> int:
    """The least memory that the index's model and modules need for a fit."""
    return index.model.bytes + 2 * max(held_bytes([module], 1) for module in index.manifest.modules)


def test_a_build_in_little_memory_gives_the_same_bytes(
    model_folder, data_file, index_folder, tmp_path
):
    index = gradindex.open(index_folder)
    least = tight(index)
    assert len(partitions(index.manifest.modules, 1, (least - index.model.bytes) // 2)) > 1
    with pytest.raises(ResourceError, match=r"--max-memory .* does not suffice: the model takes"):
        gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL,
                        max_memory=least - 1)
    gradindex.build(str(model_folder), data_file, tmp_path / "index", **SMALL, max_memory=least)
    found, expected = files_of(tmp_path / "index"), files_of(index_folder)
    made, whole = (json.loads(files.pop("manifest.json")) for files in (found, expected))
    assert found == expected
    anchors, same = (manifest["calibration"].pop("anchors") for manifest in (made, whole))
    for one, other in zip(anchors, same, strict=True):  # scored with fewer queries at a time
        assert one == [*other[:2], pytest.approx(other[2], rel=1e-4)]
    assert {**made, "sha256": ""} == {**whole, "sha256": ""}
    with pytest.raises(ResourceError, match="the curvature of"):
        gradindex.open(index_folder, max_memory=index.model.bytes).search(**QUESTION, k=3)


def test_a_search_in_little_memory_gives_the_same_answer(index_folder):
    """Curvature read module by module, the query reduced to rank 32, hits scored in parts."""
    free = gradindex.open(index_folder)
    least = free.model.bytes + 2 * 4 * max(
        m.shape[0] ** 2 + m.shape[1] ** 2 + m.shape[0] * m.shape[1] for m in free.manifest.modules)
    bound = gradindex.open(index_folder, max_memory=least)
    settings = settle(Controls(), bound.manifest)
    assert len(list(target.together(bound.index, settings.modules))) > 1
    assert list(target.together(free.index, settings.modules)) == [settings.modules]
    assert target.rank_for(free.index, 1, settings) is None
    assert target.rank_for(bound.index, 1, settings) == target.LOW_RANK
    for controls in (dict(k=5, shortlist="all"), dict(k=3, shortlist="all", normalize="cosine"),
                     dict(k=3, shortlist="all", rank=2)):
        expected = free.search(**QUESTION, **controls)
        found = bound.search(**QUESTION, **controls)
        assert [hit.id for hit in found] == [hit.id for hit in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.influence == pytest.approx(other.influence, rel=1e-4)
            assert one.token_influence == pytest.approx(other.token_influence, rel=1e-3, abs=1e-3)
            assert one.layer_influence == pytest.approx(other.layer_influence, rel=1e-3, abs=1e-3)
            assert one.code_score == pytest.approx(other.code_score, rel=1e-4)
