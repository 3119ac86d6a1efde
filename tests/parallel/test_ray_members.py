"""Several models in one index on a Ray cluster: the bytes, and the answers, of one process."""

import pytest

import gradindex
from support.clusters import two_nodes
from support.indexes import QUESTION, SMALL, files_of
from support.needed import library
from support.waiting import HANG

ray = library("ray")


@pytest.fixture(scope="module")
def cluster():
    with two_nodes(num_cpus=2) as cluster:
        yield cluster
        ray.shutdown()


@pytest.mark.slow
def test_a_build_and_its_searches_over_ray(
    cluster, one_thread, model_folder, other_folder, data_file, tmp_path
):
    how = {**SMALL, "also": {"base": str(other_folder)}}
    alone = gradindex.build(str(model_folder), data_file, tmp_path / "alone", **how)
    gradindex.build(str(model_folder), data_file, tmp_path / "index", ray=cluster.address, **how)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "alone")
    shared = gradindex.open(tmp_path / "index", ray=cluster.address)
    shared.snapshot.pool.patience = shared.snapshot.pool.back = HANG
    for members in (None, "last=1,base=-0.5", "base"):
        found, expected = (one.search(**QUESTION, k=10, shortlist="all", members=members)
                           for one in (shared, alone))
        scores = {hit.id: hit for hit in expected}
        for hit in found:
            assert hit.influence == pytest.approx(scores[hit.id].influence, rel=1e-4, abs=1e-3)
            assert hit.member_influence == pytest.approx(
                scores[hit.id].member_influence, rel=1e-3, abs=1e-2)
