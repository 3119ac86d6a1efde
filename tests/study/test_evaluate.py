"""An evaluation against plain counts, and what it refuses."""

import json

import numpy as np
import pytest

from gradindex.errors import InputError
from search.ask.controls import Controls
from search.ask.settings import settle
from search.study import evaluate
from support.indexes import OTHER, QUESTION
from support.scores import codes_of, exact


def test_an_evaluation_is_the_plain_counts(index, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "LENGTHS", (12, 30))
    monkeypatch.setattr(evaluate, "TOPS", (5,))
    queries = [index.make_query(**QUESTION), index.make_query(**OTHER)]
    steps = []
    settings = settle(Controls(), index.manifest)
    found = evaluate.evaluate(index, queries, settings, None,
                              lambda done, total: steps.append((done, total)))
    assert steps[-1] == (2 * len(index), 2 * len(index))
    truths = [exact(index, question) for question in (QUESTION, OTHER)]
    codes = [codes_of(index, question) for question in (QUESTION, OTHER)]
    words = [index.snapshot.tables.tokens.scores(query.scored_tokens) for query in queries]
    for one in found.measures:
        shares = []
        for truth, code, word in zip(truths, codes, words, strict=True):
            by_code = np.argsort(-code, kind="stable").tolist()
            by_words = np.argsort(-word, kind="stable").tolist()
            listed = by_words[: {"code": 0, "tfidf": one.shortlist,
                                 "both": one.shortlist // 5}[one.method]]
            rest = [place for place in by_code if place not in listed]
            taken = {*listed, *rest[: one.shortlist - len(listed)]}
            best = np.argsort(-truth, kind="stable")[:5].tolist()
            shares.append(len(taken & set(best)) / 5)
        assert one.recall == pytest.approx(np.mean(shares))
        assert one.recall_interval[0] <= one.recall <= one.recall_interval[1]
        assert (one.claimed is None) == (one.method == "tfidf")
    assert {(one.method, one.shortlist) for one in found.measures} == {
        (method, length) for method in ("code", "tfidf", "both") for length in (12, 30)}
    result = index.search(**QUESTION, k=5, shortlist=12)
    claims = [claim for claim, _ in found.pairs["both"]]
    assert any(claim == pytest.approx(result.recall.estimate, abs=0.02) for claim in claims)
    assert "2 queries, every sequence scored exactly" in evaluate.table(found)
    # one query at a time, at full rank
    monkeypatch.setattr("search.rank.query_gradient.LARGEST_IN_FULL", 1)
    again = evaluate.evaluate(index, queries, settings, None, lambda done, total: None)
    for one, other in zip(found.measures, again.measures, strict=True):
        assert one.recall == other.recall and one.claimed == pytest.approx(other.claimed, abs=0.02)
    evaluate.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(found.to_dict(), allow_nan=False)


def test_ndcg_by_hand(index):
    comparison = evaluate.Shortlists(np.arange(3), np.array([3.0, -1.0, 2.0]), np.zeros(3),
                                     np.ones(3), 1.0, np.zeros(3), 1.0, np.zeros(0, np.int64))
    found = comparison.ndcg(np.array([1.0, 2.0, 3.0]))  # order: 2, 1, 0
    gains = (2 + 0 + 3 / np.log2(4)) / (3 + 2 / np.log2(3))
    assert found == pytest.approx(gains)


def test_a_part_stands_for_the_whole():
    """The highest of a random part, looked up in the whole index's shortlist."""
    random = np.random.default_rng(2)
    n, share, errors = 2000, 0.2, []
    for _ in range(200):
        truth = random.standard_t(2.5, n) * random.pareto(3, n)
        codes = truth + 2.0 * random.standard_normal(n)
        whole = evaluate.Shortlists(np.arange(n), truth, codes, np.ones(n), 2.0, codes, 1.0,
                                    np.zeros(0, np.int64))
        ids = np.sort(random.choice(n, 400, replace=False))
        part = evaluate.Shortlists(ids, truth[ids], codes, np.ones(n), 2.0, codes, share,
                                   np.zeros(0, np.int64))
        actual, claimed = whole.measure("code", 100, 200)
        found = part.measure("code", 20, 200)
        errors.append((found[0] - actual, found[1] - claimed))
    assert (np.abs(np.mean(errors, axis=0)) < 0.03).all()
    asked = part.compare()
    assert {(top, length) for _, top, length in asked.pairs} == {
        (100, length) for length in (100, 200, 500, 1000)}  # 2 of 400 are too few for a top 10
    summary = evaluate._summary(evaluate.Evaluation(1, n, 400, 0.1, 1), [asked])
    for one in summary.measures:  # a single query: what the interval shows is the draw of the part
        low, high = one.recall_interval
        assert low < one.recall < high or one.recall in (0.0, 1.0)


def test_an_evaluation_refuses_what_says_nothing(index):
    settings = settle(Controls(), index.manifest)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate.evaluate(index, [], settings, None, lambda done, total: None)
    queries = [index.make_query(**QUESTION)]
    with pytest.raises(InputError, match=r"--sample 2: too few of 52 .* at least 3"):
        evaluate.evaluate(index, queries, settings, 2, lambda done, total: None)
    found = evaluate.evaluate(index, queries, settings, 30, lambda done, total: None)
    assert found.scored == 30 and "a random 30 of 52" in evaluate.table(found)
    assert "nothing to compare" in evaluate.table(found)
