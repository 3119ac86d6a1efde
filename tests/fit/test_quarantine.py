"""Sequences whose gradient is not finite: what keeps them apart, and how many there may be."""

import functools
import io
import itertools

import numpy as np
import pytest
import torch

import gradindex
from gradindex.draws import Stream, choose
from gradindex.errors import GradindexError, InputError
from gradindex.progress import Progress
from gradindex.storage import manifest
from indexer.fit.notes import FitNotes
from search.study.describe import describe, summary
from support.documents import save, tiny_tokens
from support.indexes import TINY, TINY_QUESTION, files_of, scores
from support.kills import each_kill
from support.models import random_network

pytestmark = pytest.mark.usefixtures("few_queries")
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
        result = searcher.search(**TINY_QUESTION, k=15, **controls)
        seen = {one for hit in result for one in [hit.id, *hit.duplicates]}
        assert seen == set(range(20)) - set(bad)
        assert result.sequences == 16
        assert np.isfinite([hit.influence for hit in result]).all()
    with pytest.raises(InputError, match="no sequence has the id 6"):
        searcher.rescore(**TINY_QUESTION, ids=[6])
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
    searcher = gradindex.open(out, model=poisoned(value))
    result = searcher.search(**TINY_QUESTION, shortlist="all", k=20)
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
    options = {**TINY, "segment_size": 3, "modules": "dense_h_to_4h", "bits": 256}
    gradindex.build(network, tokens, tmp_path / "whole", **options)
    expected = files_of(tmp_path / "whole")
    for which, out in each_kill(
            monkeypatch, lambda n: tmp_path / f"killed-{n}",
            lambda out: gradindex.build(network, tokens, out, **options), every=every):
        gradindex.build(network, tokens, out, **options)
        assert files_of(out) == expected, f"killed at sync {which}"
    assert which > 50
