"""What runs out or goes wrong during the work: memory, the disk, numbers, time."""

import errno
import functools
import io
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import gradindex
from gradindex.draws import Stream, choose
from gradindex.errors import GradindexError, InputError, ResourceError
from gradindex.influence import gradients
from gradindex.influence.batches import Splits
from gradindex.progress import Progress
from gradindex.storage import files, manifest, segments
from indexer import background, calibrate
from indexer.fit import eigen
from indexer.fit.eigen import eigenvectors
from indexer.fit.notes import FitNotes
from search.study.describe import describe, summary
from support.documents import save, tiny_tokens
from support.indexes import TINY, add, files_of
from support.kills import KilledError, each_kill
from support.models import random_network, tiny_network
from support.waiting import struck

QUESTION = {"token_ids": [3, 1, 4, 1, 5]}


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    """A build asks two queries each and computes in one thread, for time."""
    monkeypatch.setattr(calibrate, "CALIBRATION_QUERIES", 2)
    monkeypatch.setattr(background, "BACKGROUND_QUERIES", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- memory

OPTIONS = {**TINY, "batch_tokens": 24, "segment_size": 8}


@pytest.fixture
def data(tmp_path):
    return save(tmp_path / "data.npy", tiny_tokens(0))


def build(data, out, **options):
    return gradindex.build(tiny_network(), data, out, **{**OPTIONS, **options})


class Memory:
    """Runs out at the n-th pass or module of it, or wherever `most` sequences are too many."""

    def __init__(self, monkeypatch, at=None, most=None):
        self.calls, self.struck = 0, None
        self.sizes = []  # sequences of each pass
        real = gradients._backward

        def backward(model, modules, batch, each, uniforms):
            def reach(where):
                if at == self.calls or (most is not None and len(batch.tokens) > most):
                    self.struck = (where, len(batch.tokens))
                    self.calls += 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                self.calls += 1

            def counted(module, a, d):
                reach("module")  # what the one before added is there already
                each(module, a, d)

            self.sizes.append(len(batch.tokens))
            reach("pass")
            return real(model, modules, batch, counted, uniforms)

        monkeypatch.setattr(gradients, "_backward", backward)


def scores(searcher):
    """Exact influence of every sequence on a query, by id."""
    ids = searcher.index.contents.ids.tolist()
    return np.array([hit.influence for hit in searcher.rescore(**QUESTION, ids=ids)])


def noted(out):
    """The splits noted by the fit, and by the segments."""
    fitted = FitNotes.read(out / "curvature").splits
    return fitted, {folder.name: segments.read_facts(folder).splits
                    for folder in sorted((out / "segments").iterdir())}


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_memory_that_runs_out_anywhere_in_a_build_halves_the_batch(
    every, data, tmp_path, monkeypatch
):
    """At every pass and every module of it; killed after the split was noted, the bytes are equal.

    Where one sequence alone is too much, as for a query of the calibration, that is said; the same
    command goes on once there is room.
    """
    whole = build(data, tmp_path / "whole")
    expected, right = files_of(tmp_path / "whole"), scores(whole)
    assert noted(tmp_path / "whole") == ({}, {"000000": []})
    stages = dict.fromkeys(("fit", "encode", "calibrate", "single"), 0)
    for at in itertools.count(step=every):
        out = tmp_path / f"at-{at}"
        with monkeypatch.context() as patch:
            memory = Memory(patch, at)
            try:
                built = build(data, out)
            except ResourceError as error:
                assert memory.struck[1] == 1, memory.struck
                assert "on a batch of 1 × 6 tokens" in str(error) and error.exit_code == 4
                assert "Use smaller --batch-tokens (one sequence is the least)" in str(error)
                built = None
        if memory.struck is None:
            break
        if built is None:
            stages["single"] += 1
            build(data, out)
            assert files_of(out) == expected, at
            continue
        found = scores(built)
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
        fitted, encoded = noted(out)
        halved = [one for splits in (fitted, encoded) for made in splits.values() for one in made]
        assert halved in ([(0, 4)], [(4, 4)], []), (at, halved)
        stages["fit" if fitted else "encode" if halved else "calibrate"] += 1
        if halved:
            again = tmp_path / f"again-{at}"
            _killed_after_a_split(data, again, at, monkeypatch)
            build(data, again)
            assert files_of(again) == files_of(out), at
            shutil.rmtree(again)
        shutil.rmtree(out)
    assert all(stages.values()), stages


def _killed_after_a_split(data, out, at, monkeypatch):
    real = Splits.add

    def add_split(self, batch):
        real(self, batch)
        raise KilledError

    with monkeypatch.context() as patch:
        Memory(patch, at)
        patch.setattr(Splits, "add", add_split)
        with pytest.raises(KilledError):
            build(data, out)


def test_where_only_one_sequence_fits_each_batch_is_halved_down_to_it(data, tmp_path, monkeypatch):
    whole = build(data, tmp_path / "whole")
    right = scores(whole)
    said = io.StringIO()
    with monkeypatch.context() as patch:
        Memory(patch, most=1)
        built = build(data, tmp_path / "index", progress=Progress(said))
        result = built.search(**QUESTION)
    fitted, encoded = noted(tmp_path / "index")
    splits = [(0, 4), (0, 2), (2, 2), (4, 4), (4, 2), (6, 2)]
    assert encoded == {"000000": splits}
    assert fitted == {"covariance 0": splits, "eigenvalues 0": splits}
    assert "memory ran out on 12 batches of the fit" in said.getvalue()
    assert "memory ran out on 6 batches, which were halved; smaller --batch-tokens" in \
        said.getvalue()
    np.testing.assert_allclose(scores(built), right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
    assert "memory ran out on 12 batches, which were halved" in result.warnings[0]  # 6, and hits
    assert gradindex.verify(tmp_path / "index", model=tiny_network()).sound
    with monkeypatch.context() as patch:
        Memory(patch, most=0)
        with pytest.raises(ResourceError, match=r"batch of 1 × 6 tokens .*--batch-tokens"):
            build(data, tmp_path / "none")


def test_memory_that_runs_out_anywhere_in_a_search_changes_no_answer(data, tmp_path, monkeypatch):
    searcher = build(data, tmp_path / "index")
    right = searcher.search(**QUESTION, normalize="relatif")
    scale = max(abs(hit.influence) for hit in right)
    struck = {1: 0, 8: 0}
    for at in itertools.count():
        with monkeypatch.context() as patch:
            memory = Memory(patch, at)
            try:
                result = searcher.search(**QUESTION, normalize="relatif")
            except ResourceError as error:
                assert memory.struck[1] == 1 and "--batch-tokens" in str(error)
                struck[1] += 1
                continue
        if memory.struck is None:
            break
        struck[8] += 1
        assert [hit.id for hit in result] == [hit.id for hit in right]
        for one, other in zip(result, right, strict=True):
            assert one.influence == pytest.approx(other.influence, rel=1e-5, abs=1e-5 * scale)
            assert one.relatif == pytest.approx(other.relatif, rel=1e-4, abs=1e-6)
            np.testing.assert_allclose(one.token_influence, other.token_influence, rtol=1e-3,
                                       atol=1e-5 * scale)
    assert all(struck.values()), struck


def test_memory_that_runs_out_on_several_queries_halves_them(data, tmp_path, monkeypatch):
    searcher = build(data, tmp_path / "index")
    queries = [{"token_ids": tokens} for tokens in tiny_tokens(8, 4).tolist()]
    right = [[hit.influence for hit in result] for result in searcher.search_many(queries)]
    with monkeypatch.context() as patch:
        Memory(patch, most=2)
        found = [[hit.influence for hit in result] for result in searcher.search_many(queries)]
    np.testing.assert_allclose(found, right, rtol=1e-4)


def test_memory_that_runs_out_in_an_append_is_noted_and_replayed(data, tmp_path, monkeypatch):
    build(data, tmp_path / "index")
    more = save(tmp_path / "more.npy", tiny_tokens(1, 6))
    resumed = shutil.copytree(tmp_path / "index", tmp_path / "resumed")
    with monkeypatch.context() as patch:
        memory = Memory(patch, most=3)
        add(tmp_path / "index", more)
    assert memory.sizes[:4] == [4, 2, 2, 2]
    assert noted(tmp_path / "index")[1] == {"000000": [], "000001": [(0, 4)]}
    with monkeypatch.context() as patch:
        Memory(patch, most=3)
        real = Splits.add

        def killed(self, batch):
            real(self, batch)
            raise KilledError

        patch.setattr(Splits, "add", killed)
        with pytest.raises(KilledError):
            add(resumed, more)
    with monkeypatch.context() as patch:
        memory = Memory(patch)
        add(resumed, more)
    assert memory.sizes[:3] == [2, 2, 2]  # though there is room for four now
    assert files_of(resumed) == files_of(tmp_path / "index")


# ---- numbers

RARE = 36


@functools.cache
def poisoned(value):
    """tiny_network with an embedding of `value` for one token."""
    network = random_network("gpt_neox", torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        network.gpt_neox.embed_in.weight[RARE, 3] = value
    return network


def with_rare(seed, rows, bad):
    """Sequences of which some hold the rare token, first, in the middle or last."""
    tokens = tiny_tokens(seed, rows)
    for number, row in enumerate(bad):
        tokens[row, (0, 2, 5)[number % 3]] = RARE
    return tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sequences_whose_gradient_is_not_finite_are_quarantined(value, tmp_path):
    """Exactly those: in the fit, in the codes, in what is said of the index, and in no answer."""
    bad = [1, 6, 7, 13]
    tokens = with_rare(0, 20, bad)
    tokens[7] = tokens[6]  # equal, and both without a code
    tokens[15] = tokens[14]
    said, out = io.StringIO(), tmp_path / "index"
    searcher = gradindex.build(poisoned(value), save(tmp_path / "a.npy", tokens), out,
                               progress=Progress(said), **TINY)
    facts = manifest.load(out)
    assert (facts.sequences, facts.quarantined, facts.rows) == (16, 4, 20)
    assert len(searcher) == 16 and facts.duplicates == 1
    assert facts.fit["sequences"] == 16
    assert sorted(FitNotes.read(out / "curvature").quarantined) == bad
    listed = describe(out)["quarantined"]
    assert sorted(listed) == bad and all("not finite" in why for why in listed.values())
    assert "4 sequences have no code: 1 (" in summary(describe(out))
    assert "4 sequences are quarantined; they are in no answer" in said.getvalue()
    for controls in ({}, {"rescore": False}, {"candidates": "both"}, {"opponents": True}):
        result = searcher.search(**QUESTION, k=15, **controls)
        seen = {one for hit in result for one in [hit.id, *hit.duplicates]}
        assert seen == set(range(20)) - set(bad)
        assert result.sequences == 16
        assert np.isfinite([hit.influence for hit in result]).all()
    with pytest.raises(InputError, match="no sequence has the id 6"):
        searcher.rescore(**QUESTION, ids=[6])
    with pytest.raises(InputError, match="the query's gradient is not finite"):
        searcher.search(token_ids=[3, RARE, 4])
    assert gradindex.verify(out, model=poisoned(value)).sound

    # and they are still, after all that may be done to the index
    more = save(tmp_path / "more.npy", with_rare(1, 8, [0, 5]))
    gradindex.append(out, more, model=poisoned(value))
    assert sorted(describe(out)["quarantined"]) == [*bad, 20, 25]
    assert gradindex.delete(out, [6, 8]).deleted == 2
    assert sorted(describe(out)["quarantined"]) == [1, 7, 13, 20, 25]
    why = describe(out)["quarantined"]
    gradindex.compact(out)
    facts = manifest.load(out)
    assert (facts.sequences, facts.quarantined, facts.rows) == (21, 5, 26)
    assert describe(out)["quarantined"] == why
    assert gradindex.verify(out, model=poisoned(value)).sound
    result = gradindex.open(out, model=poisoned(value)).search(**QUESTION, shortlist="all", k=20)
    assert {one for hit in result for one in [hit.id, *hit.duplicates]} == \
        set(range(28)) - {1, 6, 7, 8, 13, 20, 25}


def test_the_good_of_an_index_with_bad_sequences_score_as_without_them(tmp_path):
    """The fit is that of the good sequences: labels are drawn by id, which differ; data's don't."""
    bad = [0, 3, 11]
    tokens = with_rare(0, 12, bad)
    good = [one for one in range(12) if one not in bad]
    options = {**TINY, "fit_labels": "data"}
    mixed = gradindex.build(poisoned(float("nan")), save(tmp_path / "a.npy", tokens),
                            tmp_path / "mixed", **options)
    pure = gradindex.build(poisoned(float("nan")), save(tmp_path / "b.npy", tokens[good]),
                           tmp_path / "pure", **options)
    expected, found = scores(pure), scores(mixed)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_too_many_bad_sequences_are_an_error_that_can_be_allowed(tmp_path):
    tokens = save(tmp_path / "a.npy", with_rare(0, 30, range(0, 24, 2)))
    network, said = poisoned(float("nan")), r"12 of 30 sequences of the fit have .*not finite " \
        r"\(sequence 0: .*\); at most 10 are left out.*--max-bad"
    with pytest.raises(GradindexError, match=said):
        gradindex.build(network, tokens, tmp_path / "index", **TINY)
    resumed = gradindex.build(network, tokens, tmp_path / "index", max_bad=0.4, **TINY)
    assert (len(resumed), resumed.manifest.quarantined) == (18, 12)
    gradindex.build(network, tokens, tmp_path / "whole", max_bad=0.4, **TINY)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")
    # seen while encoding alone, where the fit is on few sequences
    seed = next(seed for seed in itertools.count() if not any(
        one % 2 == 0 and one < 24 for one in choose(Stream.FIT_SEQUENCES, seed, 30, 3)))
    some = {**TINY, "fit_sequences": 3, "seed": seed}
    with pytest.raises(GradindexError, match=r"of 30 sequences to be indexed .*--max-bad"):
        gradindex.build(network, tokens, tmp_path / "few", **some)
    assert len(gradindex.build(network, tokens, tmp_path / "few", max_bad=0.4, **some)) == 18


@pytest.mark.parametrize("rows", [1, 6])
def test_all_bad_sequences_are_an_error_whatever_is_allowed(rows, tmp_path):
    tokens = save(tmp_path / "a.npy", with_rare(0, rows, range(rows)))
    with pytest.raises(GradindexError, match=rf"of {rows} sequences of the fit .*not finite"):
        gradindex.build(poisoned(float("nan")), tokens, tmp_path / "index", max_bad=1.0, **TINY)


@pytest.mark.parametrize("every", [9, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_anywhere_with_bad_sequences_it_ends_with_the_same_bytes(
    every, tmp_path, monkeypatch
):
    tokens = save(tmp_path / "a.npy", with_rare(0, 6, [1, 4]))
    network = poisoned(float("nan"))
    options = {**TINY, "segment_size": 3, "modules": "dense_h_to_4h"}
    gradindex.build(network, tokens, tmp_path / "whole", **options)
    expected = files_of(tmp_path / "whole")
    for which, out in each_kill(
            monkeypatch, lambda n: tmp_path / f"killed-{n}",
            lambda out: gradindex.build(network, tokens, out, **options), every=every):
        gradindex.build(network, tokens, out, **options)
        assert files_of(out) == expected, f"killed at sync {which}"
    assert which > 50


# ---- eigenvectors


def covariance():
    random = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return random.T @ random / 40


def truth(matrix):
    """NumPy's eigenvectors, their largest entry positive."""
    _, vectors = np.linalg.eigh(matrix.numpy())
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return vectors * np.where(largest < 0, -1, 1)


def fails(*_, **__):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def garbage(matrix, *_, **__):
    return torch.linalg.eigvalsh(matrix), torch.eye(len(matrix), dtype=matrix.dtype)


def not_numbers(matrix, *_, **__):
    return torch.full((len(matrix),), torch.nan), torch.full_like(matrix, torch.nan)


@pytest.mark.parametrize("broken", [fails, garbage, not_numbers])
def test_eigenvectors_come_from_the_fallback_where_the_first_method_fails(broken, monkeypatch):
    usual = eigenvectors(covariance(), "m/A")
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    fallback = eigenvectors(covariance(), "m/A")
    np.testing.assert_allclose(usual, truth(covariance()), atol=1e-10)
    np.testing.assert_allclose(fallback, truth(covariance()), atol=1e-10)


def test_eigenvectors_are_tried_once_more_on_a_matrix_that_is_moved_a_little(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    tries, real = [], scipy.linalg.eigh

    def eigh(matrix, driver):
        tries.append(matrix.copy())
        if len(tries) == 1:
            raise scipy.linalg.LinAlgError("no convergence")
        return real(matrix, driver=driver)

    monkeypatch.setattr(eigen.scipy.linalg, "eigh", eigh)
    found = eigenvectors(covariance(), "m/A")
    np.testing.assert_allclose(found, truth(covariance()), atol=1e-9)
    moved = tries[1] - tries[0]
    mean = float(covariance().diagonal().mean())
    np.testing.assert_allclose(moved, 1e-12 * mean * np.eye(12), atol=1e-15)


def test_a_build_on_fallback_eigenvectors_gives_the_same_scores(data, tmp_path, monkeypatch):
    right = scores(build(data, tmp_path / "whole"))
    monkeypatch.setattr(torch.linalg, "eigh", garbage)
    found = scores(build(data, tmp_path / "index"))
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4 * np.abs(right).max())


def test_eigenvectors_that_cannot_be_found_name_the_module(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        patch.setattr(eigen.scipy.linalg, "eigh", fails)
        with pytest.raises(GradindexError, match=(
                r"covariance gpt_neox\.layers\.0\.mlp\.dense_h_to_4h/A has no eigendecomposition "
                r"\(the algorithm failed to converge; .*--modules REGEX.*--fit-sequences")):
            build(data, tmp_path / "index")
    build(data, tmp_path / "index")
    build(data, tmp_path / "whole")
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")


def test_a_module_without_a_gradient_is_left_out_and_said(data, tmp_path):
    network = random_network("gpt_neox", torch.float32)
    with torch.no_grad():  # nothing of what dense_h_to_4h gives reaches the logits
        network.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.zero_()
    said, out = io.StringIO(), tmp_path / "index"
    searcher = gradindex.build(network, data, out, progress=Progress(said), **TINY)
    facts, gone = manifest.load(out), "gpt_neox.layers.1.mlp.dense_h_to_4h"
    assert [module.name for module in facts.modules] == [
        f"gpt_neox.layers.{place}" for place in ("0.mlp.dense_h_to_4h", "0.mlp.dense_4h_to_h",
                                                 "1.mlp.dense_4h_to_h")]
    assert list(facts.fit["left_out"]) == [gone]
    assert not (out / "curvature" / f"{gone}.safetensors").exists()
    assert f"module {gone} is left out: it has no gradient on any of the 8 fit" in said.getvalue()
    assert describe(out)["fit"]["left_out"] == facts.fit["left_out"]
    found = searcher.search(**QUESTION)
    alone = gradindex.build(network, data, tmp_path / "alone",
                            modules=r"0\.mlp|1\.mlp\.dense_4h", **TINY)
    for hit, expected in zip(found, alone.search(**QUESTION), strict=True):
        assert hit.id == expected.id
        assert hit.influence == pytest.approx(expected.influence, rel=1e-5)
    assert gradindex.verify(out, model=network).sound
    gradindex.append(out, save(tmp_path / "more.npy", tiny_tokens(1, 2)), model=network)
    with pytest.raises(GradindexError, match=r"no tracked module has a gradient.*--modules"):
        gradindex.build(network, data, tmp_path / "none", modules=r"1\.mlp\.dense_h", **TINY)


# ---- the disk

LEAST = {"modules": "dense_h_to_4h", "batch_tokens": 4096}  # one module, one batch: for time
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_is_said_wherever_it_fills_and_the_build_goes_on(
    every, data, tmp_path, monkeypatch
):
    """At every sync; then again with room, which ends with the same bytes."""
    build(data, tmp_path / "whole", **LEAST)
    expected = files_of(tmp_path / "whole")
    for which, out in each_kill(monkeypatch, lambda n: tmp_path / f"full-{n}",
                                lambda out: build(data, out, **LEAST), FULL, every):
        build(data, out, **LEAST)
        assert files_of(out) == expected, f"full at sync {which}"
    assert which > 30


def test_a_full_disk_in_an_append_a_deletion_and_a_compaction(data, tmp_path, monkeypatch):
    start = tmp_path / "start"
    build(data, start, **LEAST)
    gradindex.delete(start, [1])
    more = save(tmp_path / "more.npy", tiny_tokens(1, 6))
    for place, run in enumerate((lambda out: add(out, more),
                                 lambda out: gradindex.delete(out, [2, 5]), gradindex.compact)):
        whole = shutil.copytree(start, tmp_path / "whole")
        run(whole)
        expected, before = files_of(whole), gradindex.open(start).index.digest
        after = gradindex.open(whole).index.digest
        for which, out in each_kill(monkeypatch,
                                    lambda n, place=place: shutil.copytree(
                                        start, tmp_path / f"full-{place}-{n}"),
                                    run, FULL):
            assert gradindex.open(out).index.digest in (before, after)
            run(out)
            gradindex.delete(out, [])
            shutil.rmtree(out / "deleted", ignore_errors=True)
            assert files_of(out) == {name: content for name, content in expected.items()
                                     if not name.startswith("deleted")}, f"full at sync {which}"
            shutil.rmtree(out)
        shutil.rmtree(whole)


def test_a_disk_that_fills_while_a_file_is_written_says_the_bytes_needed(
    data, tmp_path, monkeypatch
):
    """At every write of ours, those that FAISS asks for among them; no half a file is left."""
    build(data, tmp_path / "whole", **LEAST)
    expected, real = files_of(tmp_path / "whole"), files.Writer.write
    sizes = {name.rsplit("/", 1)[-1]: len(content) for name, content in expected.items()}
    names, out = set(), tmp_path / "index"
    for which in itertools.count():
        left = [which]

        def write(self, content, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise FULL
            return real(self, content)

        with monkeypatch.context() as patch:
            patch.setattr(files.Writer, "write", write)
            try:
                build(data, out, **LEAST)
                break
            except ResourceError as error:
                said = str(error)
        name = said.split(" could not be written")[0].rsplit("/", 1)[1]
        names.add(name)
        needed = int(said.split("which needs ")[1].split(" bytes")[0].replace(",", ""))
        if name in ("rows.npy", "tokens.npz", "manifest.json"):
            assert needed == sizes[name], name
        assert needed > 0 and "run the same command again" in said
        assert not list(out.rglob("*.tmp")), said
        if which % 4 == 0:
            build(data, out, **LEAST)
            assert files_of(out) == expected, which
        shutil.rmtree(out)
    sums = {name.partition("-")[0] for name in names if "-" in name}
    assert sums >= {"covariance", "eigenvalues"}
    assert {"build.json", "fit.json", "vectors.faiss", "rows.npy", "tokens.npz", "segment.json",
            "manifest.json"} <= names


@pytest.mark.parametrize("limit, name", [(1 << 13, "records.lmdb"), (3 << 14, "covariance")])
def test_the_systems_own_limit_reaches_lmdb_and_faiss_alike(limit, name, tmp_path):
    """A real EFBIG from write(2), within LMDB and within our own writer."""
    tokens = save(tmp_path / "a.npy", tiny_tokens(0, 40))
    options = {**TINY, "segment_size": 40, "bits": 1 << 14}
    network = random_network("gpt_neox", torch.float32, num_hidden_layers=1,
                             intermediate_size=90)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ResourceError, match=rf"the disk is full: .*{name}.* which needs "
                                                r"[\d,]+ bytes .*File too large"):
            gradindex.build(network, tokens, tmp_path / "index", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gradindex.build(network, tokens, tmp_path / "index", **options)
    gradindex.build(network, tokens, tmp_path / "whole", **options)
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")


def test_a_disk_that_fails_is_told_from_a_full_one(data, tmp_path, monkeypatch):
    failed = OSError(errno.EIO, os.strerror(errno.EIO))

    def fsync(_):
        raise failed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ResourceError, match=r"the disk failed: .*Nothing committed before was"):
            build(data, tmp_path / "index")
    assert len(build(data, tmp_path / "index")) == 8


def test_a_compaction_without_room_is_refused_before_it_writes(data, tmp_path, monkeypatch):
    index = tmp_path / "index"
    build(data, index)
    gradindex.delete(index, [1, 6])
    before = files_of(index)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"compacting writes at most .* has 1 kB free"):
        gradindex.compact(index)
    more = save(tmp_path / "more.npy", tiny_tokens(1, 30))
    with pytest.raises(ResourceError, match=r"the codes need .* has 1 kB free"):
        add(index, more)
    assert {name: one for name, one in files_of(index).items() if name in before} == before
    monkeypatch.undo()
    assert len(add(index, more)) == 36


# ---- time


def seconds_worked_by_children():
    """Seconds of the processor, whatever else the machine does, of children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds_worked(process):
    """The same of a process that is there."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_command_that_is_told_to_stop_stops_within_seconds_and_goes_on(
    index_folder, model_folder, tmp_path
):
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({
        "text": f"A late plum ripens in the garden, number {n}. " * 3, "url": f"late/{n}",
        "place": "garden"}) + "\n" for n in range(40)))
    index, worked = tmp_path / "index", {}
    whole = shutil.copytree(index_folder, tmp_path / "whole")

    def fresh():
        shutil.rmtree(index, ignore_errors=True)
        shutil.copytree(index_folder, index)
        worked["by others"] = seconds_worked_by_children()

    def begun(child):
        if found := list((index / "segments").glob("*.partial")):
            worked["until then"] = seconds_worked(child.pid)
        return found

    child = struck([sys.executable, "-m", "gradindex", "append", str(index), str(more)],
                   signal.SIGTERM, begun, fresh, cwd=Path(__file__).parent.parent)
    assert child.returncode == 130, child.stderr
    assert seconds_worked_by_children() - sum(worked.values()) < 10
    said = child.stderr
    assert "an append" in said and "goes on when the same command runs again" in said
    assert "Traceback" not in said
    assert (index / "append.json").is_file() and not (index / "writer.json").exists()
    assert len(gradindex.open(index)) == len(gradindex.open(index_folder))
    gradindex.append(index, more)
    gradindex.append(whole, more)
    assert files_of(index) == files_of(whole)
