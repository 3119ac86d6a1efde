"""A search over Ray, two machines on this one: the answers of one process, whoever dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import gradindex
from gradindex.errors import DamagedIndexError, GradindexError, InputError
from gradindex.model.model_source import ModelSource
from gradindex.progress import duration
from search.ask.controls import Controls
from search.ask.settings import settle
from search.engine import Searcher
from search.rank.coverage import LostError
from search.rank.query_gradient import form_gradients
from search.rank.ray_pool import deal
from search.rank.ray_search import SharedRanking
from search.rank.session import Session
from search.rank.snapshot import SegmentSubset, Snapshot
from support.clusters import two_nodes
from support.indexes import QUESTION
from support.needed import library
from support.server import Running
from support.waiting import HANG

ray = library("ray")

OTHERS = [{"prompt": "The fig number 3", "completion": " grows by the harbour."},
          {"prompt": "The lime number", "completion": " 4"},
          {"prompt": "A mango", "completion": " grows by the hill. The mango"}]
MANY = {"k": 5, "shortlist": 20}


@pytest.fixture(scope="module")
def cluster():
    with two_nodes(num_cpus=3, num_gpus=0) as cluster:
        yield cluster
        ray.shutdown()


@pytest.fixture(scope="module")
def alone(index_folder):
    return gradindex.open(index_folder)


@pytest.fixture(scope="module")
def shared(cluster, index_folder):
    searcher = gradindex.open(index_folder, ray=cluster.address)
    searcher.snapshot.pool.patience = searcher.snapshot.pool.back = HANG
    searcher.snapshot.load()
    return searcher


@pytest.fixture
def workers(shared):
    """The process ids of the two workers, which are whole before and after."""
    yield whole(shared)
    whole(shared)


def whole(searcher):
    """Wait for every worker, and return their process ids."""
    for worker in searcher.snapshot.pool.workers:
        worker.until = max(worker.until, time.monotonic() + HANG)
    searcher.snapshot.load()
    assert all(worker.ready for worker in searcher.snapshot.pool.workers)
    return ray.get([worker.actor.__ray_call__.remote(lambda _: os.getpid())
                    for worker in searcher.snapshot.pool.workers])


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def rest_of(index_folder, searcher, number):
    """A local searcher of what worker `number` has, as if the index held no more."""
    subset = SegmentSubset(searcher.snapshot.contents.manifest,
                           searcher.snapshot.pool.workers[number].segments)
    index = Snapshot(index_folder, ModelSource(), subset=subset)
    return Searcher(index, searcher.batch_tokens)


def stages_of(searcher, questions, conclude_early=False, **controls):
    """The stages of a search, one after the other."""
    queries = [searcher.make_query(**question) for question in questions]
    return searcher.stages(queries, settle(Controls(**controls), searcher.manifest),
                           conclude_early)


def same(found, expected):
    """Assert that two results say the same, to rounding."""
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.influence == pytest.approx(other.influence, rel=1e-5)
        assert one.code_score == other.code_score and one.code_rank == other.code_rank
        assert one.text == other.text and one.duplicates == other.duplicates
        assert one.generic_rate == other.generic_rate and one.tfidf_rank == other.tfidf_rank
        assert one.lexical == pytest.approx(other.lexical) and one.exact == other.exact
        if one.exact:
            np.testing.assert_allclose(one.token_layer_influence, other.token_layer_influence,
                                       rtol=1e-3, atol=1e-5 * abs(other.influence))
            assert one.percentile == other.percentile
            assert one.cosine == pytest.approx(other.cosine, rel=1e-5)
            assert one.relatif == pytest.approx(other.relatif, rel=1e-5)
    mine, theirs = found.recall, expected.recall
    assert (mine.k, mine.cutoff, mine.asked) == (theirs.k, theirs.cutoff, theirs.asked)
    assert mine.shortlist_for_95 == theirs.shortlist_for_95
    for one, other in ((mine.estimate, theirs.estimate), (mine.c_here, theirs.c_here)):
        assert (one is None and other is None) or one == pytest.approx(other, rel=1e-5)
    assert (found.sequences, found.rescored, found.shortlist, found.coverage) == \
        (expected.sequences, expected.rescored, expected.shortlist, expected.coverage)
    np.testing.assert_allclose(found.exact_influence, expected.exact_influence, rtol=1e-4)
    np.testing.assert_allclose(found.sample_influence, expected.sample_influence, rtol=1e-4)
    assert [group.value for group in found.groups] == [group.value for group in expected.groups]
    np.testing.assert_allclose([group.influence for group in found.groups],
                               [group.influence for group in expected.groups], rtol=1e-4)


# ---- the answers of one process


@pytest.mark.parametrize("controls", [
    MANY, {"k": 3, "shortlist": "all"}, {**MANY, "opponents": True}, {**MANY, "recall": 0.9},
    {**MANY, "normalize": "cosine"}, {**MANY, "normalize": "relatif", "opponents": True},
    {**MANY, "group_by": "place"}, {**MANY, "candidates": "both"}, {**MANY, "candidates": "tfidf"},
    {"k": 5, "rescore": False}, {**MANY, "modules": "1", "damping": 0.01},
], ids=str)
def test_a_search(alone, shared, controls):
    found, expected = (one.search(**QUESTION, **controls) for one in (shared, alone))
    same(found, expected)
    assert found.warnings == expected.warnings and found.controls == expected.controls


@pytest.mark.parametrize("sign, by_norm", [(1.0, False), (-1.0, False), (1.0, True)])
def test_rankings_are_merged_from_those_of_the_workers(alone, shared, sign, by_norm):
    random = np.random.default_rng(1)
    queries = random.standard_normal((2, alone.manifest.code["length"])).astype(np.float32)
    pairs = zip(*(one.snapshot.rankings(queries, sign, by_norm) for one in (shared, alone)),
                strict=True)
    for mine, theirs in pairs:
        for count in (1, 7, len(alone), 2 * len(alone)):
            for one, other in zip(mine.best(count), theirs.best(count), strict=True):
                np.testing.assert_array_equal(one, other)
        places = random.permutation(len(alone)).tolist()
        assert mine.ranks(places) == theirs.ranks(places)
        assert sorted(mine.ranks(places)) == [*range(1, len(alone) + 1)]
        _, values = theirs.best(len(alone))
        where = np.repeat(places[:3], len(values)), np.tile(values, 3)
        np.testing.assert_array_equal(mine.before(*where[::-1]), theirs.before(*where[::-1]))
        np.testing.assert_array_equal(mine.scores_at(places), theirs.scores_at(places))
        np.testing.assert_array_equal(mine.scores(), theirs.scores())
    np.testing.assert_array_equal(shared.snapshot.code_scores(queries),
                                  alone.snapshot.code_scores(queries))


@pytest.mark.parametrize("controls", [
    {**MANY, "recall": 0.9}, {**MANY, "candidates": "both"}, {"k": 5, "rescore": False}], ids=str)
def test_no_search_fetches_every_score(alone, shared, monkeypatch, controls):
    """Each worker's best cross the network: only groups are totals of all."""
    monkeypatch.setattr(SharedRanking, "scores", None)
    same(shared.search(**QUESTION, **controls), alone.search(**QUESTION, **controls))
    with pytest.raises(TypeError, match="NoneType"):
        shared.search(**QUESTION, **MANY, group_by="place")


@pytest.mark.parametrize("rank", [None, 2])
def test_many_queries_together(alone, shared, rank):
    found, expected = (list(one.search_many([QUESTION, *OTHERS], rank=rank, **MANY))
                       for one in (shared, alone))
    for mine, theirs in zip(found, expected, strict=True):
        same(mine, theirs)
        assert mine.warnings == theirs.warnings


def test_a_comparison(alone, shared):
    found, expected = (one.compare(QUESTION["prompt"], [" by the river.", " on the hill."], **MANY)
                       for one in (shared, alone))
    for mine, theirs in zip(found.results, expected.results, strict=True):
        same(mine, theirs)
    assert list(found.influence) == list(expected.influence)
    np.testing.assert_allclose(list(found.influence.values()),
                               list(expected.influence.values()), rtol=1e-4, atol=1e-3)


def test_named_sequences_in_the_order_given_twice_too(alone, shared):
    ids = [50, 3, 17, 3, 44, 0]
    found, expected = (one.rescore(**QUESTION, ids=ids, normalize="cosine")
                       for one in (shared, alone))
    assert [hit.id for hit in found] == ids
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.influence == pytest.approx(theirs.influence, rel=1e-5)
        assert mine.cosine == pytest.approx(theirs.cosine, rel=1e-5)
        assert (mine.code_score, mine.text) == (theirs.code_score, theirs.text)


def test_a_time_limit_leaves_a_prefix_of_the_shortlist(shared):
    result = shared.search(**QUESTION, k=5, shortlist="all", time_limit=1e-6)
    assert result.timed_out and 0 < result.rescored + 1 < result.shortlist
    assert result.recall.cutoff is not None and result.coverage == 1


def test_an_interrupted_search_concludes_from_what_is_exact(shared, alone):
    stages = stages_of(shared, [QUESTION], conclude_early=True, shortlist="all")
    stage = next(one for one in stages if one.name == "exact")
    assert stage.influence
    stage = stages.throw(KeyboardInterrupt())
    assert stage.result.interrupted and stage.result.recall.cutoff is not None
    same(shared.search(**QUESTION, **MANY), alone.search(**QUESTION, **MANY))


def test_the_page_asks_the_workers(shared, alone):
    running = Running(shared)
    try:
        found = running.search({**QUESTION, **MANY})
    finally:
        running.stop()
    expected = alone.search(**QUESTION, **MANY)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in expected]
    np.testing.assert_allclose([hit["influence"] for hit in found["hits"]],
                               [hit.influence for hit in expected], rtol=1e-5)


def test_the_command_line_starts_workers_here(alone, index_folder, tmp_path):
    out = tmp_path / "result.json"
    ended = subprocess.run(
        [sys.executable, "-m", "gradindex.cli", "search", str(index_folder), "-o", str(out),
         "-p", QUESTION["prompt"], "-c", QUESTION["completion"], "-k", "5", "--shortlist", "20",
         "--ray", "--ray-workers", "2"], capture_output=True, text=True, timeout=HANG)
    assert ended.returncode == 0 and ended.stdout == "", ended.stderr
    assert "ray" not in ended.stderr.lower(), ended.stderr
    found, expected = json.loads(out.read_text()), alone.search(**QUESTION, **MANY)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in expected]


# ---- whoever dies


def partial(result, shared, lost):
    """Assert that a result is of all but worker `lost`, and says so."""
    left = sum(len(rest.segments) for number, rest in enumerate(shared.snapshot.pool.workers)
               if number != lost)
    segments = shared.snapshot.contents.segments
    assert 0 < left < len(segments) and not result.damaged
    assert result.sequences < len(shared) and result.coverage == result.sequences / len(shared)
    warning = result.warnings[0]
    assert f"{result.sequences} of {len(shared)} sequences are searched" in warning
    assert all(name in warning for name in shared.snapshot.pool.workers[lost].segments)
    assert f"worker {lost + 1} of 2 on " in warning
    return warning


def test_a_worker_killed_between_searches(shared, alone, index_folder, workers, capsys):
    kill(workers[1])
    result = shared.search(**QUESTION, **MANY)
    assert "is gone" in partial(result, shared, 1)
    result.coverage = 1.0
    same(result, rest_of(index_folder, shared, 0).search(**QUESTION, **MANY))
    same(shared.search(**QUESTION, **MANY), alone.search(**QUESTION, **MANY))  # it is back
    assert capsys.readouterr().out == ""  # where the command line writes results


@pytest.mark.parametrize("controls", [
    {**MANY, "recall": 0.9, "group_by": "place"},
    {**MANY, "candidates": "both", "opponents": True}], ids=str)
def test_a_worker_killed_while_it_rescores(shared, alone, index_folder, workers, controls):
    result, killed = None, False
    for stage in stages_of(shared, [QUESTION], **controls):
        if stage.name == "approximate":  # or it could be through before it dies
            os.kill(workers[0], signal.SIGSTOP)
        elif stage.name == "exact" and not killed:
            kill(workers[0])
            killed = True
        result = stage.result
    assert killed and "is gone" in partial(result, shared, 0)
    result.coverage = 1.0
    same(result, rest_of(index_folder, shared, 1).search(**QUESTION, **controls))
    same(shared.search(**QUESTION, **controls), alone.search(**QUESTION, **controls))


def test_a_worker_killed_before_the_hits_are_shown(shared, index_folder, workers):
    killed = False
    for stage in stages_of(shared, [QUESTION], **MANY):
        if stage.name == "exact" and stage.done == stage.total and not killed:
            kill(workers[1])  # all is exact, but for the random sample and the terms of hits
            killed = True
    partial(stage.result, shared, 1)
    stage.result.coverage = 1.0
    expected = rest_of(index_folder, shared, 0).search(**QUESTION, **MANY)
    same(stage.result, expected)


def test_a_worker_killed_before_hits_by_code_alone_are_shown(shared, alone, workers):
    controls = {"k": 5, "rescore": False}
    results, stages = [], []
    for stage in stages_of(shared, [QUESTION, OTHERS[0]], **controls):
        stages.append(stage.name)
        if stage.name == "approximate":
            kill(workers[1])
        elif stage.name == "result":
            results.append(stage.result)
    for result in results:
        partial(result, shared, 1)
        assert result.rescored == 0 and not any(hit.exact for hit in result)
    assert stages == ["gradient", "approximate", "result", "result"]


def test_an_interrupt_while_others_move_up_changes_nothing(
    shared, index_folder, workers, monkeypatch
):
    """Loss, interrupt before the rest is scored again: what is known stays as it was."""
    [target], preconditioned = form_gradients(
        shared.snapshot, [shared.make_query(**QUESTION)], settle(Controls(**MANY), shared.manifest),
        shared.batch_tokens)
    session = Session(shared.snapshot, settle(Controls(**MANY), shared.manifest), [target],
                      preconditioned, shared.batch_tokens)
    [track], common = session.tracks, session.common
    for _ in session.rescore(track):
        pass
    before = dict(common.exact), common.snapshot, track.shortlist
    lost = LostError(frozenset(shared.snapshot.pool.workers[1].segments), "it is gone")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SharedRanking, "best", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session._go_on_without(lost)
    assert (common.exact, common.snapshot, track.shortlist) == before
    session._go_on_without(lost)
    same_rest = rest_of(index_folder, shared, 0).search(**QUESTION, **MANY)
    for _ in session.rescore(track):
        pass
    assert [hit.id for hit in session.conclude(track, False)] == [hit.id for hit in same_rest]


def test_a_worker_that_gives_no_sign_is_given_up(shared, alone, workers):
    for patience in (2.0, 20.0, 200.0):  # within which the other has to answer
        os.kill(workers[1], signal.SIGSTOP)
        shared.snapshot.pool.patience = patience
        try:
            result = shared.search(**QUESTION, **MANY)
            break
        except GradindexError as error:
            assert "worker 1 of 2" in str(error) and patience < 200.0
        finally:
            shared.snapshot.pool.patience = HANG
        workers = whole(shared)
    assert "worker 2 of 2" in (warning := partial(result, shared, 1))
    assert f"gave no sign for {duration(patience)}" in warning
    same(shared.search(**QUESTION, **MANY), alone.search(**QUESTION, **MANY))


def test_named_sequences_of_a_lost_worker_are_an_error(shared, workers):
    kill(workers[1])
    with pytest.raises(LostError, match=r"worker 2 of 2 on .* is gone .*Try again"):
        shared.rescore(**QUESTION, ids=[0, len(shared) - 1])


def test_without_any_worker_there_is_an_error(shared, alone, workers):
    for pid in workers:
        kill(pid)
    with pytest.raises(GradindexError, match=r"nothing is left to search: worker 1 of 2 on .*; "
                                             r"worker 2 of 2 on .*Try again"):
        shared.search(**QUESTION, **MANY)
    same(shared.search(**QUESTION, **MANY), alone.search(**QUESTION, **MANY))


# ---- what can't be


def damage(index):
    file = index / "segments" / "000001" / "vectors.faiss"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_segment(cluster, index_folder, tmp_path):
    copy = tmp_path / "index"
    shutil.copytree(index_folder, copy)
    searcher = gradindex.open(copy, ray=cluster.address)
    damage(copy)
    for _ in range(2):
        with pytest.raises(DamagedIndexError, match=r"^worker 1 of 2 on .*/vectors.faiss was cha"):
            searcher.search(**QUESTION)
    found, expected = (
        gradindex.open(copy, allow_damaged=True, ray=where).search(**QUESTION, **MANY)
        for where in (cluster.address, False))
    same(found, expected)
    assert found.damaged == ["000001"] and found.warnings == expected.warnings


def test_what_is_refused_before_anything_starts(cluster, index_folder, alone):
    with pytest.raises(InputError, match=r"with ray the model can't be an object .*folder"):
        gradindex.open(index_folder, alone.model.network, ray=cluster.address)
    for address in ("train.index", "somewhere", "host:port"):
        with pytest.raises(InputError, match=f"--ray {address}: expected auto or host:port"):
            gradindex.open(index_folder, ray=address)
    with pytest.raises(InputError, match=r"--ray 127\.0\.0\.1:1: no cluster is there"):
        gradindex.open(index_folder, ray="127.0.0.1:1")
    with pytest.raises(InputError, match="ray_workers 7: the cluster has 6 CPUs"):
        gradindex.open(index_folder, ray=cluster.address, ray_workers=7).search(**QUESTION)
    for number, where in ((0, cluster.address), (2, False)):
        with pytest.raises(InputError, match=r"--ray-workers .: expected a number above 0, and"):
            gradindex.open(index_folder, ray=where, ray_workers=number)


@pytest.mark.parametrize("rows, count, expected", [
    ([4, 4, 4, 4], 2, [2, 2]), ([4, 4, 4], 2, [2, 1]), ([9, 1, 1, 1], 2, [1, 3]),
    ([1, 1, 1, 9], 3, [2, 1, 1]), ([5], 1, [1]), ([1, 9, 1], 3, [1, 1, 1]),
])
def test_segments_are_dealt_in_runs_none_empty(rows, count, expected):
    runs = deal(rows, count)
    assert [len(rows[run]) for run in runs] == expected
    assert [row for run in runs for row in rows[run]] == rows
