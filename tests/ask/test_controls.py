"""Every control of a search against the formulas, on a small index; refusals before any model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gradindex
from gradindex.errors import InputError
from gradindex.influence.preconditioned import query_coordinates
from gradindex.modules import numbers_in
from gradindex.objective.batch import Text
from search.ask.controls import Controls
from search.ask.query_files import ResultsFile, make_queries, read_queries
from search.ask.question import Question
from search.ask.settings import settle
from search.engine import drain
from search.show import html
from search.show.terminal_text import render_terminal
from support.indexes import OTHER, QUESTION
from support.scores import codes_of, exact


def by_id(result):
    """Influence by id, equal sequences included."""
    return {one: hit.influence for hit in result for one in (hit.id, *hit.duplicates)}


def assert_equal_to(result, truth):
    found = by_id(result)
    assert sorted(found) == list(range(len(truth)))
    np.testing.assert_allclose([found[one] for one in range(len(truth))], truth, rtol=2e-3,
                               atol=2e-4 * np.abs(truth).max())


def whole(index, question, **controls):
    return index.search(**question, k=len(index), shortlist="all", **controls)


@pytest.mark.parametrize("damping", [0.001, 10.0])
def test_damping_is_the_querys(index, damping):
    truth = exact(index, QUESTION, damping)
    assert not np.allclose(truth, exact(index, QUESTION), rtol=0.1)
    result = whole(index, QUESTION, damping=damping)
    assert_equal_to(result, truth)
    assert result.controls["damping"] == damping
    codes = codes_of(index, QUESTION, damping=damping)
    assert np.corrcoef(codes, truth)[0, 1] > 0.6


@pytest.mark.parametrize("choice, wanted", [
    ("0", {0}), ("1-1", {1}), ("0-1", {0, 1}), ("4h_to_h", {0, 1}), ("mlp", {0, 1})])
def test_modules_are_the_querys(index, choice, wanted):
    modules = [m for m in index.manifest.modules
               if m.layer in wanted and ("4h_to_h" not in choice or "4h_to_h" in m.name)]
    result = whole(index, QUESTION, modules=choice)
    assert_equal_to(result, exact(index, QUESTION, modules=modules))
    assert result.controls["modules"] == [m.name for m in modules]
    assert set(result[0].module_influence) == {m.name for m in modules}
    assert result.layers == sorted(wanted) and len(result[0].layer_influence) == len(wanted)


def step_of(index, hit):
    """‖(G+λ)⁻¹ ∇m‖ of a hit, as the query that it would be."""
    ids = np.array(hit.token_ids, np.int32)
    batch = index.model.batch([Text(ids, np.ones(len(ids), bool))])
    c, _ = query_coordinates(index.model, index.manifest.modules, index.snapshot.ekfac, batch, 0.1)
    return sum(float(part.square().sum()) for part in c.values()) ** 0.5


@pytest.mark.parametrize("normalize", ["cosine", "relatif"])
@pytest.mark.parametrize("opponents", [False, True])
def test_normalised_rankings(index, normalize, opponents):
    """Orders by the ratios that the hits report, each checked against its definition."""
    result = whole(index, QUESTION, normalize=normalize, opponents=opponents)
    plain = whole(index, QUESTION)
    assert by_id(result) == pytest.approx(by_id(plain), rel=1e-3, abs=1e-2)
    sign = -1 if opponents else 1
    values = [sign * getattr(hit, normalize) for hit in result]
    assert values == sorted(values, reverse=True)
    assert [hit.id for hit in result] != [hit.id for hit in plain][::sign]
    query = index.make_query(**QUESTION)
    batch = index.model.batch(
        [Text(np.array(query.tokens, np.int32), np.array(query.labels) != -100)])
    c, _ = query_coordinates(index.model, index.manifest.modules, index.snapshot.ekfac, batch, 0.1)
    squared = sum(float((part.square() * index.snapshot.ekfac[name].damped(0.1)).sum())
                  for name, part in c.items())
    sample = index.snapshot.random_sample()
    shares = []
    for hit in result:
        assert hit.cosine == pytest.approx(
            hit.influence / (squared * hit.self_influence) ** 0.5, rel=1e-4)
        assert abs(hit.cosine) <= 1
        assert hit.relatif == pytest.approx(hit.influence / step_of(index, hit), rel=1e-3)
        shares.append(hit.percentile)
    assert shares == sorted(shares, reverse=True) and shares[0] == 100
    values = {one: sign * getattr(hit, normalize) for hit in result
              for one in (hit.id, *hit.duplicates)}
    third = result[3]
    expected = np.mean([values[one] <= values[third.id] for one in sample]) * 100
    assert third.percentile == pytest.approx(expected, abs=100.1 / len(sample))
    # the influence of a sequence on itself is its self-influence
    one = next(hit for hit in plain if hit.start == 0)
    itself = index.search(token_ids=one.token_ids, labels=one.token_ids, k=1, shortlist="all",
                          normalize="cosine")
    assert itself[0].token_ids == one.token_ids
    assert itself[0].cosine == pytest.approx(1, rel=1e-3)
    assert itself[0].self_influence == pytest.approx(itself[0].influence, rel=1e-3)


def test_a_normalised_shortlist_is_ordered_by_score_over_norm(index):
    result = index.search(**QUESTION, k=3, shortlist=12, normalize="cosine", candidates="code")
    statistic = codes_of(index, QUESTION) / index.snapshot.norms
    order = np.argsort(-statistic, kind="stable")
    assert {hit.id for hit in result} <= set(order[:12].tolist())
    assert result.recall.cutoff == pytest.approx(statistic[order[12]], rel=1e-5)
    assert all(hit.code_rank == order.tolist().index(hit.id) + 1 for hit in result)


def test_versus_is_the_difference(index):
    other = {**QUESTION, "completion": " by the hill."}
    truth = exact(index, QUESTION) - exact(index, other)
    result = whole(index, QUESTION, versus=" by the hill.")
    assert_equal_to(result, truth)
    first, second = index.search(**QUESTION, k=1), index.search(**other, k=1)
    assert result.query.log_p == pytest.approx(first.query.log_p - second.query.log_p, rel=1e-5)
    shown = render_terminal(result, width=100)
    assert "versus The plum number 26 grows⟦ by the hill.⟧" in shown
    assert "log p − log p(versus)" in shown


def test_scoring_some_tokens_adds_up(index):
    """log p is a sum over tokens, so the influence on parts of a completion adds to the whole's."""
    query = index.make_query(**QUESTION)
    parts = [whole(index, QUESTION, score_on=chosen)
             for chosen in ("0", f"1-{query.scored - 1}")]
    assert [part.query.scored for part in parts] == [1, query.scored - 1]
    truth = exact(index, QUESTION)
    sums = np.array([by_id(parts[0])[n] + by_id(parts[1])[n] for n in range(len(index))])
    np.testing.assert_allclose(sums, truth, rtol=2e-3, atol=2e-4 * np.abs(truth).max())
    for wrong in ("9", "a", "2-1"):
        with pytest.raises(InputError, match=r"^score_on"):
            index.search(**QUESTION, score_on=wrong)
    tokens = index.make_query(**QUESTION, score_on="0")
    assert "⟦" + tokens.token_texts[query.labels.index(next(
        label for label in query.labels if label != -100))] + "⟧" in render_terminal(parts[0])


def test_without_rescoring_it_says_so(index):
    result = index.search(**QUESTION, k=5, rescore=False)
    codes = codes_of(index, QUESTION)
    order = np.argsort(-codes, kind="stable")[:5]
    assert [hit.id for hit in result] == order.tolist()
    assert [hit.influence for hit in result] == pytest.approx(codes[order].tolist())
    assert not any(hit.exact for hit in result)
    assert result.recall.estimate is None and result.rescored == 0
    assert "recall: unknown, nothing was rescored" in render_terminal(result)
    assert "approximate, by code alone" in render_terminal(result)
    assert "≈" in render_terminal(result) and "estimated by code" in result.to_json()
    assert "exact for this" not in render_terminal(result)
    assert 'class="hit approximate"' in html.render_html(result)
    assert 'class="hit approximate"' not in html.render_html(index.search(**QUESTION, k=1))


def test_recall_is_reached_or_the_limit_is_said(index, monkeypatch):
    from search.ask import settings

    monkeypatch.setattr(settings, "SMALLEST_SHORTLIST", 6)
    lengths = []
    for goal in (0.3, 0.6, 0.9, 1.0):
        result = index.search(**QUESTION, k=3, recall=goal)
        assert result.recall.asked == goal and result.recall.estimate >= goal
        # sure, and not only likely
        assert goal <= result.recall.lower <= result.recall.estimate
        assert result.rescored == result.shortlist
        lengths.append(result.rescored)
        again = index.search(**QUESTION, k=3, shortlist=result.rescored)
        assert [hit.id for hit in again] == [hit.id for hit in result]
        assert again.recall.estimate == pytest.approx(result.recall.estimate)
    assert lengths == sorted(lengths) and lengths[0] < 20 < lengths[-1]
    limited = index.search(**QUESTION, k=3, recall=1.0, shortlist=6)
    assert limited.rescored == 6 and limited.recall.estimate < 1
    assert "short of being sure of 100.0%; rescoring ended at its limit, --shortlist 6" in \
        " ".join(render_terminal(limited).split())


def test_by_default_rescoring_ends_when_it_is_sure(index, monkeypatch):
    """At .99, or at the limit; a number that was asked for is kept whatever it says."""
    sure = index.search(**OTHER, k=1)
    assert sure.controls["recall"] == sure.recall.asked == 0.99
    assert sure.recall.lower >= 0.99 and 16 <= sure.rescored < len(index)
    truth = exact(index, OTHER)
    assert sure[0].id == int(np.argmax(truth))
    fixed = index.search(**OTHER, k=1, shortlist=30)
    assert fixed.rescored == fixed.shortlist == 30 and fixed.recall.asked is None
    monkeypatch.setattr("search.ask.settings.DEFAULT_SHORTLIST", 10)
    monkeypatch.setattr("search.ask.settings.SHORTLIST_FOR_HIT", 1)
    limited = index.search(**QUESTION, k=8)
    assert limited.rescored == 10 and limited.recall.lower < 0.99
    assert "short of being sure of 99.0%; rescoring ended at its limit, --shortlist 10" in \
        " ".join(render_terminal(limited).split())


def test_the_random_sample_is_heard_before_a_search_ends(index, monkeypatch):
    """What it says of the code's error may make a search less sure, which then goes on."""
    from search.rank.shortlist import Shortlist

    alone = Shortlist.statement
    seen = []

    def doubtful(self, places, influence, k, sample, of_sample):
        made = alone(self, places, influence, k, sample, of_sample)
        seen.append((len(sample), len(places)))
        return replace(made, error=0.5 if sample and len(places) < 40 else made.error)

    monkeypatch.setattr(Shortlist, "statement", doubtful)
    result = index.search(**OTHER, k=1)
    without = [length for sample, length in seen if not sample]
    within = [length for sample, length in seen if sample]
    assert without and within[0] == without[-1] < 40 <= within[-1]
    assert result.recall.lower >= 0.99 and not result.timed_out


def test_a_time_limit_ends_rescoring(index):
    result = index.search(**QUESTION, k=3, shortlist="all", time_limit=1e-6)
    assert 0 < result.rescored < len(index) and result.recall.estimate < 1
    assert result.timed_out and not result.interrupted
    assert f"--time-limit reached: {result.rescored} of {len(index)}" in result.warnings[-1]


def test_candidates_by_words_alone_and_joined(index):
    query = index.make_query(**QUESTION)
    scores = index.snapshot.tables.tokens.scores(query.scored_tokens)
    words = np.argsort(-scores, kind="stable")[:9].tolist()
    truth = exact(index, QUESTION)

    alone = index.search(**QUESTION, k=3, shortlist=9, candidates="tfidf")
    assert {one for hit in alone for one in (hit.id, *hit.duplicates)} <= set(words)
    assert alone.rescored == 9 and alone.recall.estimate is None
    assert "recall: unknown; who else there is" in render_terminal(alone)
    assert [hit.tfidf_rank for hit in alone] == [words.index(hit.id) + 1 for hit in alone]

    joined = index.search(**QUESTION, k=3, shortlist=9, candidates="both")
    assert index.search(**QUESTION, k=3, shortlist=9).hits == joined.hits  # as by default
    assert joined.rescored == 9
    order = np.argsort(-codes_of(index, QUESTION), kind="stable").tolist()
    together = {words[0], *[one for one in order if one != words[0]][:8]}
    best = sorted(together, key=lambda one: (-truth[one], one))
    assert joined[0].id == best[0]
    left_out = next(one for one in order if one not in together)
    assert joined.recall.cutoff == pytest.approx(codes_of(index, QUESTION)[left_out])
    everyone = index.search(**QUESTION, k=3, shortlist="all", candidates="tfidf")
    assert everyone.recall.estimate == 1 and everyone.recall.cutoff is None
    assert "recall: complete" in render_terminal(everyone)


def test_a_hopeless_search_says_what_would_help(index, monkeypatch):
    monkeypatch.setattr("search.rank.conclusion.HOPELESS", 0.9)
    result = index.search(**QUESTION, k=10, shortlist=10, modules="1", damping=1e-4,
                          candidates="code")
    assert result.recall.estimate < 0.9 and result.recall.shortlist_for_95 > 10
    assert "the code's noise hides this answer" in result.warnings[-1]
    assert "--shortlist" in result.warnings[-1] and "--bits" in result.warnings[-1]


@pytest.mark.parametrize("asked, message", [
    (dict(damping=0), r"^damping 0: expected a number above 0"),
    (dict(damping=-1.0), r"^damping -1.0"), (dict(damping=float("nan")), "^damping nan"),
    (dict(recall=0), "^recall 0: expected a share"), (dict(recall=1.5), "^recall 1.5"),
    (dict(recall=0.9, candidates="tfidf"), "^recall needs candidates code or both"),
    (dict(rescore=False, recall=0.9), "rescore=False ranks by code alone"),
    (dict(rescore=False, normalize="relatif"), "rescore=False ranks by code alone"),
    (dict(normalize="l2"), "^normalize l2: expected none, cosine or relatif"),
    (dict(candidates="bm25"), "^candidates bm25: expected code, tfidf or both"),
    (dict(modules="7-9"), r"^modules '7-9' matches none of the indexed .* in layers 0 to 2"),
    (dict(modules="attention"), "matches none"), (dict(modules="("), "regular expression"),
    (dict(k=10**6), "expected 1 to"), (dict(rank=0), "^rank 0"),
    (dict(time_limit=-1), "time_limit -1"), (dict(k=2.5), "k 2.5: expected a whole number"),
    (dict(damping="0.1"), "^damping 0.1: expected a number"),
])
def test_controls_are_checked_before_the_model_is_loaded(index_folder, asked, message):
    fresh = gradindex.open(index_folder, model="/nowhere")
    with pytest.raises(InputError, match=message):
        fresh.search(**QUESTION, **asked)
    with pytest.raises(InputError, match=message):
        fresh.search_many([QUESTION], **asked)


@pytest.mark.parametrize("question, message", [
    ({**QUESTION, "completion": ""}, "completion is empty"),
    ({**QUESTION, "versus": ""}, "^versus: the completion is empty"),
    ({**QUESTION, "versus": QUESTION["completion"]}, "nothing to compare"),
    ({**QUESTION, "score_on": "x"}, "^score_on 'x'"), (dict(prompt="a", versus="b"), "^versus"),
    (dict(token_ids=[1.5, 2]), "token_ids must be a list of whole numbers"),
    (dict(token_ids=5), "whole numbers"), ({**QUESTION, "labels": [1]}, "labels go with"),
    (dict(messages=[{"role": "user", "content": "\ud800"}]), "not valid UTF-8"),
    (dict(token_ids=[1, 2], labels="ab"), "labels must be"),
])
def test_queries_are_checked_before_the_model_is_loaded(index_folder, question, message):
    with pytest.raises(InputError, match=message):
        gradindex.open(index_folder, model="/nowhere").search(**question)


def test_a_long_query_is_refused_without_the_weights(index_folder, model_folder, tmp_path):
    """Its length, and how it is split into tokens, need the tokenizer and the configuration."""
    light = shutil.copytree(model_folder, tmp_path / "light")
    (light / "model.safetensors").unlink()
    index = gradindex.open(index_folder, model=str(light))
    with pytest.raises(InputError, match="more than the model's context of 64"):
        index.search(prompt="word " * 90, completion=" x")
    with pytest.raises(InputError, match=r"^score_on 99: the completion has"):
        index.search(**QUESTION, score_on="99")
    assert index.make_query(**QUESTION).scored > 0


def test_numbers_in():
    assert numbers_in("0-9999999999") is None
    assert numbers_in("3") == {3} and numbers_in("0,2-4") == {0, 2, 3, 4}
    assert numbers_in("8-7") == set() and numbers_in("a") is numbers_in("1-") is None


def test_a_token_over_the_border_is_said(index):
    pieces = index.make_query(prompt="The", completion=" plum").token_texts
    merged = index.search(prompt="The pl", completion="um number", k=1)
    assert " plum" in pieces
    assert "' plum'; it is scored as part of the completion" in merged.warnings[0]
    assert "The⟦ plum number⟧" in render_terminal(merged)
    for controls in (dict(rescore=False), dict(versus="ot")):
        again = index.search(prompt="The pl", completion="um number", k=1, **controls)
        assert "' plum'; it is scored" in again.warnings[0]


# ---- many queries


QUERIES = [{**QUESTION, "id": "a"}, {**OTHER, "id": 7}, {"prompt": "The lime", "id": "c"},
           {**QUESTION, "versus": " by the hill.", "id": "d"}, {**OTHER, "score_on": "0", "id": 9}]


@pytest.mark.parametrize("controls", [
    dict(k=4, shortlist=15), dict(k=4, recall=0.9), dict(k=3, shortlist=10, normalize="cosine"),
    dict(k=3, shortlist=9, candidates="both", opponents=True)])
def test_many_queries_are_answered_as_one_by_one(index, controls):
    results = list(index.search_many(QUERIES, **controls))
    assert [result.query.id for result in results] == [one["id"] for one in QUERIES]
    for one, result in zip(QUERIES, results, strict=True):
        alone = index.search(**{name: value for name, value in one.items() if name != "id"},
                             **controls)
        assert [hit.id for hit in result] == [hit.id for hit in alone]
        assert [hit.influence for hit in result] == pytest.approx(
            [hit.influence for hit in alone], rel=1e-3)
        assert result.recall.estimate == pytest.approx(alone.recall.estimate, abs=0.02)
        assert result.query.log_p == pytest.approx(alone.query.log_p, rel=1e-5)


def test_the_top_of_low_rank_gradients_is_exact(index):
    """At rank 1 the order is rough; what is shown was scored again at full rank."""
    truth = exact(index, QUESTION)
    rough, _ = index.search_many([QUESTION, OTHER], rank=1, k=3, shortlist="all")
    assert [hit.influence for hit in rough] == pytest.approx(
        truth[[hit.id for hit in rough]].tolist(), rel=1e-3)
    assert rough[0].influence >= 0.5 * truth.max()
    full, _ = index.search_many([QUESTION, OTHER], rank=100, k=3, shortlist="all")
    assert full[0].influence == pytest.approx(truth.max(), rel=1e-3)


def test_gradients_that_do_not_fit_are_reduced_and_it_is_said(index, monkeypatch):
    from search.rank import query_gradient

    assert not any("reduced" in warning for result in index.search_many([QUESTION, OTHER], k=2)
                   for warning in result.warnings)
    monkeypatch.setattr(query_gradient, "LARGEST_IN_FULL", 1)
    monkeypatch.setattr(query_gradient, "LOW_RANK", 2)
    truth = exact(index, OTHER)
    for result in index.search_many([OTHER, QUESTION], k=2, shortlist="all"):
        assert "with the query's gradient reduced to rank 2 a module" in result.warnings[-1]
    first = next(index.search_many([OTHER, QUESTION], k=2, shortlist="all"))
    for hit in first:
        assert hit.influence == pytest.approx(truth[hit.id], rel=1e-3)


def test_one_search_for_a_set(index):
    [result] = index.search_many([QUESTION, OTHER], aggregated=True, k=len(index), shortlist="all")
    assert_equal_to(result, exact(index, QUESTION) + exact(index, OTHER))
    assert len(result.query.texts) == 2
    by_cosine = dict(k=len(index), shortlist="all", normalize="cosine")
    [summed] = index.search_many([QUESTION, OTHER], aggregated=True, **by_cosine)
    alone = [{hit.id: hit.cosine for hit in one}
             for one in index.search_many([QUESTION, OTHER], **by_cosine)]
    first = next(iter(index.search_many([QUESTION], **by_cosine)))
    # cosine = I / (‖q̃‖ ‖m̃‖) with the sum's own ‖q̃‖: beside one query's it is a constant
    size = {hit.id: hit.influence / hit.cosine for hit in first}
    both = [hit for hit in summed if hit.id in alone[0] and hit.id in alone[1]]
    ratios = [hit.influence / hit.cosine / size[hit.id] for hit in both]
    assert len(both) > 30 and ratios == pytest.approx([ratios[0]] * len(both), rel=1e-3)
    added = [alone[0][hit.id] + alone[1][hit.id] for hit in both]
    assert [hit.cosine for hit in both] != pytest.approx(added, rel=0.05)
    with pytest.raises(InputError, match="no query"):
        index.search_many([], aggregated=True)
    joined = [dict(prompt="The pl", completion="um number"), QUESTION]
    [noted] = index.search_many([QUESTION, *joined], aggregated=True, k=1)
    assert len([one for one in noted.warnings if "it is scored as part" in one]) == 1


def test_an_unpacked_scan_gives_the_same_scores(index):
    vectors = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    one_by_one = np.concatenate([index.snapshot.code_scores(vector[None]) for vector in vectors])
    together = index.snapshot.code_scores(vectors)
    spread = one_by_one.std()
    np.testing.assert_allclose(together, one_by_one, atol=0.05 * spread)
    assert np.corrcoef(together.ravel(), one_by_one.ravel())[0, 1] > 0.9999


def test_a_file_of_queries_is_read_line_by_line(index, tmp_path):
    path = tmp_path / "queries.jsonl"
    lines = [json.dumps(one) for one in QUERIES]
    path.write_bytes("\n".join([
        *lines[:2], "", "no json", json.dumps({"promt": "x"}), json.dumps([1]), lines[0],
        json.dumps({"prompt": 3}), json.dumps({"id": "e"}), json.dumps({"prompt": "x", "id": [1]}),
        json.dumps({"prompt": "The plum", "completion": ""}), lines[4],
        json.dumps({"token_ids": ["a"]}), json.dumps({"token_ids": 5}),
        json.dumps({"prompt": "x", "id": True}), '{"prompt": "x", "id": "\\ud800"}', "[" * 100000,
    ]).encode() + b"\n\xff\n")
    read = read_queries(path)
    assert list(read.questions) == ["a", 7, 11, 9, 13]
    made = make_queries(index.snapshot, read, {"a"})
    assert [query.id for query in made] == [7, 9]
    for number, message in [(4, "not JSON"), (5, "unknown field 'promt'"), (6, "an object"),
                            (7, "the id 'a' was there before"), (8, "'prompt' is not text"),
                            (9, "expected a prompt and a completion"), (10, "neither text nor"),
                            (14, "'token_ids' is not a list"), (15, "neither text nor"),
                            (16, "surrogates not allowed"), (17, "not JSON"),
                            (18, "not JSON in UTF-8")]:
        [problem] = [str(one) for one in read.problems if one.number == number]
        assert message in problem
    assert ":11: the completion is empty" in str(read.problems[-2])
    assert ":13: token_ids must be a list of whole numbers" in str(read.problems[-1])
    absent = gradindex.open(index.snapshot.path, model="/nowhere")
    with pytest.raises(InputError, match="the model /nowhere can't be loaded"):
        make_queries(absent.snapshot, read, set())
    with pytest.raises(InputError, match="No such file"):
        read_queries(tmp_path / "none.jsonl")


def test_results_on_disk_are_gone_on_with(index, tmp_path):
    path, settings = tmp_path / "results.jsonl", settle(Controls(k=2, shortlist=9), index.manifest)
    digest = index.snapshot.digest
    asked = {one["id"]: Question(**one) for one in QUERIES[:3]}
    results = list(index.search_many(QUERIES[:3], k=2, shortlist=9))
    first = ResultsFile(path, digest, settings, asked)
    assert first.done == set()
    first.write(results[0])
    first.write(results[1])
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])  # killed while it wrote
    second = ResultsFile(path, digest, settings, asked)
    assert second.done == {"a", 7}
    second.write(results[2])
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["query"]["id"] for line in lines] == ["a", 7, "c"]
    assert lines[0]["hits"][0]["influence"] == results[0][0].influence
    with pytest.raises(InputError, match=r"another search \(k: 2 there, 3 now\)"):
        ResultsFile(path, digest, settle(Controls(k=3, shortlist=9), index.manifest), asked)
    for change in ({**asked, "a": Question(**OTHER)},
                   {**asked, "a": replace(asked["a"], versus=" x")},
                   {one: asked[one] for one in (7, "c")}):
        with pytest.raises(InputError, match=r"a query 'a' that is not, or no longer the same"):
            ResultsFile(path, digest, settings, change)
    for foreign in ("something else\n", "no end of line", "a\rb", '{"asked": 1}\n'):
        path.write_text(foreign, newline="")
        with pytest.raises(InputError, match="holds something else than results"):
            ResultsFile(path, digest, settings, asked)
        assert path.read_bytes() == foreign.encode()
    nowhere = ResultsFile(Path("/dev/null"), digest, settings, asked)
    nowhere.write(results[0])
    nowhere.close()


def test_controls_show_in_every_result(index):
    settings = settle(Controls(k=2, modules="1", damping=0.5, normalize="relatif"), index.manifest)
    result = drain(index.stages([index.make_query(**QUESTION)], settings))
    content = json.loads(result.to_json())
    assert content["controls"] == json.loads(json.dumps(settings.facts()))
    shown = " ".join(render_terminal(result, width=100).split())
    assert "ranked by θ-RelatIF; 2 modules in layer 1, damping 0.5 × mean eigenvalue" in shown
