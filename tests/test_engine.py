"""A search end to end on a small index: stages, sums, statement, refusals, renderings."""

import csv
import io
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError
from gradindex.first_order import room, within
from gradindex.influence.exact import chunk_ends, exact_scores
from gradindex.influence.preconditioned import Preconditioned, precondition, query_coordinates
from gradindex.objective.batch import Text
from gradindex.results import Result
from gradindex.storage import records
from gradindex.storage.upgrades import FORMAT
from search.ask.controls import Controls
from search.ask.settings import _sizes, settle
from search.engine import drain
from search.show import html, wording
from search.show.data_files import csv_table, json_lines, parquet
from search.show.terminal_text import _wrap, layer_strip, render_terminal
from support.documents import save, small_documents, tiny_tokens
from support.fits import records_of
from support.indexes import QUESTION, SMALL, TINY
from support.models import random_network, tiny_network
from support.scores import codes_of


@pytest.fixture(scope="module")
def truth(index, index_folder):
    """Exact influence of every sequence on QUESTION, by the many-query routine."""
    query = index.make_query(**QUESTION)
    scored = np.array(query.labels) != -100
    batch = index.model.batch([Text(np.array(query.tokens, np.int32), scored)])
    ekfac = index.snapshot.ekfac
    c, _ = query_coordinates(index.model, index.manifest.modules, ekfac, batch, 0.1)
    p = Preconditioned(precondition(ekfac, c))
    stored = [r for s in index.manifest.segments for r in records.read(
        index_folder / "segments" / s.name / "records.lmdb", range(s.rows))]
    return exact_scores(index.model, index.manifest.modules, p, stored, 96)[0]


def ranking(truth, stored_duplicates, sign=1):
    """Ids by influence, later copies of equal sequences left out."""
    order = sorted(range(len(truth)), key=lambda n: (-sign * truth[n], n))
    return [n for n in order if n not in stored_duplicates]


@pytest.mark.parametrize("opponents", [False, True])
def test_a_complete_search_is_the_exact_ranking(index, truth, opponents):
    result = index.search(**QUESTION, shortlist="all", k=10, opponents=opponents)
    copies = {copy for hit in result for copy in hit.duplicates}
    expected = ranking(truth, copies, -1 if opponents else 1)[:10]
    assert [hit.id for hit in result] == expected
    np.testing.assert_allclose([hit.influence for hit in result], truth[expected], rtol=1e-3)
    assert result.recall.estimate == 1 and result.recall.cutoff is None
    assert result.rescored == result.shortlist == result.sequences == len(index)


def test_terms_sum_to_the_influence(index):
    for hit in index.search(**QUESTION, k=5):
        assert sum(hit.token_influence) == pytest.approx(hit.influence, rel=1e-5)
        assert sum(hit.layer_influence) == pytest.approx(hit.influence, rel=1e-5)
        assert sum(hit.module_influence.values()) == pytest.approx(hit.influence, rel=1e-5)
        terms = np.array(hit.token_layer_influence)
        np.testing.assert_allclose(terms.sum(0), hit.layer_influence, rtol=1e-5)
        np.testing.assert_allclose(terms.sum(1), hit.token_influence, rtol=1e-5)
        assert "".join(hit.tokens) == hit.text and len(hit.tokens) == len(hit.token_ids)
        assert hit.nats is None  # nobody said on how many sequences the model was trained


def test_nats_are_told_where_they_can_be(index):
    """I / N_train, unless that is more than log p has room for; whether in hits or in groups."""
    asked = dict(**QUESTION, k=6, shortlist="all", group_by="document")
    influence = [hit.influence for hit in index.search(**asked)]
    gain = -index.search(**asked).query.log_p
    # so that the first two gain more than there is, and the others less
    trained = int((influence[1] + influence[2]) / 2 / gain)
    assert gain > 0 and influence[1] > trained * gain > influence[2]
    result = index.search(**asked, train_sequences=trained)
    expected = [None if one > trained * gain else pytest.approx(one / trained) for one in influence]
    assert [hit.influence for hit in result] == pytest.approx(influence)
    assert [hit.nats for hit in result] == expected and expected.count(None) == 2
    held = [group.nats for group in result.groups]
    assert None in held and any(nats is not None for nats in held)
    for group in [*result.groups, result.total]:
        nats = group.influence / trained
        assert group.nats == (pytest.approx(nats) if within(result.query, nats) else None)
    for shown in (render_terminal(result, 120), csv_table(result), html.render_html(result)):
        assert shown.count("beyond first order") >= 2 and "nats unknown" not in shown
        assert wording.number(influence[0] / trained) + " nats" not in shown
    assert [hit.no_nats for hit in result] == [
        "beyond first order" if one is None else None for one in expected]
    saved = json.loads(result.to_json())
    assert saved["hits"][0]["nats"] is None
    lines = [json.loads(line) for line in json_lines(result.hits, "").splitlines()]
    for told in (saved["hits"], result.to_list(), saved["groups"], lines,
                 pyarrow.parquet.read_table(io.BytesIO(parquet(result))).to_pylist()):
        assert all((one["no_nats"] == "beyond first order") == (one["nats"] is None)
                   for one in told) and any(one["no_nats"] for one in told)
    again = Result.from_json(result.to_json())
    assert [wording.nats(hit, again) for hit in again][:2] == ["beyond first order"] * 2
    unknown = index.search(**asked)
    assert {hit.no_nats for hit in unknown} == {wording.nats(hit, unknown) for hit in unknown} == \
        {group.no_nats for group in [*unknown.groups, unknown.total]} == {"nats unknown"}
    assert "N_train is unknown" in render_terminal(unknown)
    [named] = index.rescore(**QUESTION, ids=[result[0].id], train_sequences=trained)
    assert named.nats is None


def test_opponents_lose_what_there_is_to_lose(index):
    """Beyond chance a loss means nothing, either; a difference gains what the other one loses."""
    result = index.search(**QUESTION, k=3, shortlist="all", opponents=True, train_sequences=1,
                          modules="mlp")
    assert result[0].influence < 0
    loss = 12 * result.query.scored + result.query.log_p
    assert room(result.query) == pytest.approx((-result.query.log_p, loss))
    assert [hit.nats for hit in result] == [
        pytest.approx(hit.influence) if -hit.influence <= loss else None for hit in result]
    versus = index.search(**QUESTION, versus=" by the hill.", k=1, shortlist="all").query
    [other] = versus.others
    first, second = sum(versus.token_log_p), sum(other.token_log_p)
    assert room(versus) == pytest.approx((-first + 12 * other.scored + second,
                                         12 * versus.scored + first - second))


def test_a_short_shortlist_says_what_it_holds(index, truth):
    result = index.search(**QUESTION, k=5, shortlist=8, candidates="code")
    codes = codes_of(index, QUESTION)
    order = np.argsort(-codes, kind="stable")
    assert {hit.id for hit in result} <= set(order[:8].tolist())
    assert result.recall.cutoff == pytest.approx(codes[order[8]])
    assert 0 < result.recall.estimate < 1
    assert [hit.influence for hit in result] == sorted((h.influence for h in result), reverse=True)
    for hit in result:
        assert hit.code_rank == order.tolist().index(hit.id) + 1
        assert hit.code_score == pytest.approx(codes[hit.id])
        assert hit.influence == pytest.approx(truth[hit.id], rel=1e-3)


def test_equal_sequences_are_one_hit(index):
    result = index.search(**QUESTION, k=len(index), shortlist="all")
    assert result.recall.estimate == 1
    texts = [hit.text for hit in result]
    assert len(texts) == len(set(texts)) < len(index)
    assert sum(1 + len(hit.duplicates) for hit in result) == len(index)
    folded = next(hit for hit in result if hit.document == 9)
    assert folded.text == small_documents()[17]["text"]
    for copy in index.rescore(**QUESTION, ids=folded.duplicates):
        assert copy.document == 17 and copy.text == folded.text
        assert copy.influence == pytest.approx(folded.influence, rel=1e-4)


def test_stages_stream(index):
    query = index.make_query(**QUESTION)
    stages = list(index.stages([query], settle(Controls(k=3, shortlist=20), index.manifest)))
    assert [stage.name for stage in stages[:2]] == ["gradient", "approximate"]
    assert {stage.name for stage in stages[2:-1]} == {"exact"}
    assert [stage.done for stage in stages[2:]] == sorted(stage.done for stage in stages[2:])
    assert stages[-2].done == stages[-2].total == 20
    assert stages[-1].result.query.log_p == pytest.approx(sum(query.token_log_p))
    approximate = stages[1].provisional.hits
    assert [hit.exact for hit in approximate] == [False] * 3
    assert [hit.code_rank for hit in approximate] == [1, 2, 3]
    assert all(hit.exact for hit in stages[-1].result.hits)


def test_interrupted_it_returns_what_is_exact(index, truth):
    def follow(stage):
        if stage.name == "exact" and stage.done >= 20:
            raise KeyboardInterrupt

    settings = settle(Controls(k=5, shortlist="all"), index.manifest)
    with pytest.raises(KeyboardInterrupt):  # a file of queries is to be gone on with instead
        drain(index.stages([index.make_query(**QUESTION)], settings), follow)
    stages = index.stages([index.make_query(**QUESTION)], settings, conclude_early=True)
    result = drain(stages, follow)
    assert result.interrupted and 12 <= result.rescored < len(index)
    assert f"interrupted: {result.rescored} of" in result.warnings[-1]
    assert result.recall.cutoff is not None and result.recall.estimate < 1
    for hit in result:
        assert hit.code_rank <= result.rescored
        assert hit.influence == pytest.approx(truth[hit.id], rel=1e-3)


def test_interrupted_before_rescoring_it_stops(index):
    def follow(stage):
        if stage.name == "gradient":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drain(index.stages([index.make_query(**QUESTION)], settle(Controls(), index.manifest)),
              follow)


def test_rescore_scores_what_is_named(index, truth):
    hits = index.rescore(**QUESTION, ids=[7, 3, 7])
    assert [hit.id for hit in hits] == [7, 3, 7]
    np.testing.assert_allclose([hit.influence for hit in hits], truth[[7, 3, 7]], rtol=1e-3)
    assert index.rescore(**QUESTION, ids=[]) == []
    by_array = index.rescore(**QUESTION, ids=np.array([3, 7]))
    assert [hit.id for hit in by_array] == [3, 7]
    for wrong in (-1, len(index), "3", 1.0, True):
        with pytest.raises(InputError, match=f"no sequence has the id {wrong!r}; expected 0 to"):
            index.rescore(**QUESTION, ids=[wrong])


def test_batches_do_not_matter(model_folder, data_file, index, tmp_path):
    other = gradindex.build(str(model_folder), data_file, tmp_path / "one", **{
        **SMALL, "batch_tokens": 1, "segment_size": 7})
    found, expected = (one.search(**QUESTION, k=20, shortlist="all") for one in (other, index))
    assert [hit.id for hit in found][:10] == [hit.id for hit in expected][:10]
    np.testing.assert_allclose([hit.influence for hit in found],
                               [hit.influence for hit in expected], rtol=2e-3)


def test_searches_in_threads_take_turns(index):
    expected = [hit.influence for hit in index.search(**QUESTION, k=3)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: index.search(**QUESTION, k=3), range(8)))
    for result in results:
        assert [hit.influence for hit in result] == expected


def test_chunks_grow():
    assert chunk_ends(0) == [] and chunk_ends(3) == [3] and chunk_ends(9) == [4, 9]
    assert chunk_ends(400) == [4, 12, 28, 60, 124, 252, 380, 400]


@pytest.mark.parametrize("asked, total, expected", [
    ({}, 10**6, (20, 40, 1000, 0.99)), (dict(k=200), 10**6, (200, 400, 2000, 0.99)),
    (dict(k=3), 10**6, (3, 16, 1000, 0.99)), ({}, 7, (7, 7, 7, 0.99)),
    (dict(shortlist=500), 10**6, (20, 500, 500, None)),
    (dict(shortlist=500), 50, (20, 50, 50, None)),
    (dict(k=5, shortlist="all"), 10**6, (5, 10**6, 10**6, None)),
    (dict(recall=0.9), 10**6, (20, 40, 10_000, 0.9)),
    (dict(recall=0.9, k=1000), 10**6, (1000, 2000, 100_000, 0.9)),
    (dict(recall=0.9, shortlist=500), 10**6, (20, 40, 500, 0.9)),
    (dict(recall=0.9), 30, (20, 30, 30, 0.9)),
    (dict(candidates="tfidf"), 10**6, (20, 1000, 1000, None)),
    (dict(rescore=False), 10**6, (20, 1000, 1000, None)),
])
def test_default_sizes(asked, total, expected):
    assert _sizes(Controls(**asked), total) == expected


def test_hits_of_the_other_sign_are_pointed_out(index, truth):
    result = index.search(**QUESTION, k=len(index), shortlist="all", modules="mlp")
    wrong = sum(hit.influence <= 0 for hit in result)
    assert wrong and result.warnings[0].startswith(f"{wrong} of these hits have influence of the")


def test_defaults_shrink_with_the_index(index):
    result = index.search(**QUESTION)
    assert len(result) == 20 and result.shortlist <= len(index)
    assert index.search(**QUESTION, k=len(index)).shortlist == len(index)
    for arguments, message in [
        (dict(k=0), "^k 0: expected 1 to"), (dict(k=10**6), "expected 1 to"),
        (dict(k=9, shortlist=8), "expected at least k, 9"),
        (dict(shortlist="most"), "expected a number or all"),
        (dict(train_sequences=-3), "^train_sequences -3: expected a number above 0"),
    ]:
        with pytest.raises(InputError, match=message):
            index.search(**QUESTION, **arguments)


def test_an_index_of_three_sequences(model_folder, tmp_path):
    rows = [{"text": f"one small document, the {n}th"} for n in range(3)]
    index = gradindex.build(str(model_folder), rows, tmp_path / "index", bits=512)
    result = index.search(prompt="one small", completion=" document")
    assert len(result) == 3 and result.recall.estimate == 1 and result.recall.k == 3


def test_an_index_of_ten_sequences(model_folder, tmp_path):
    """Defaults shrink with the index; a short shortlist, opponents and --recall work on it."""
    rows = [{"text": f"one small document, the {n}th of ten"} for n in range(10)]
    index = gradindex.build(str(model_folder), rows, tmp_path / "index", bits=512)
    question = dict(prompt="one small", completion=" document")
    whole = index.search(**question)
    assert len(whole) == whole.shortlist == whole.rescored == 10 and whole.recall.estimate == 1
    order = [hit.id for hit in whole]
    assert [hit.id for hit in index.search(**question, opponents=True)] == order[::-1]
    short = index.search(**question, k=2, shortlist=4)
    assert short.rescored == 4 and 0 < short.recall.estimate <= 1
    assert [hit.id for hit in short] == [one for one in order if one in {hit.id for hit in short}]
    grown = index.search(**question, k=2, recall=1.0)
    assert [hit.id for hit in grown] == order[:2] and grown.recall.estimate == 1
    assert [result.rescored for result in index.search_many([question] * 2, k=10)] == [10, 10]


def test_queries_that_can_not_be_scored(index):
    tokens = index.make_query(**QUESTION).tokens
    for arguments, message in [
        (dict(), "give one query"),
        (dict(prompt="a", token_ids=[1, 2]), "give one query"),
        (dict(prompt="a", completion=""), "completion is empty"),
        (dict(prompt="", completion="The"), "no token of the query can be scored"),
        (dict(prompt="word " * 90, completion=" x"), "more than the model's context of 64"),
        (dict(prompt="word " * 90), "no room for a continuation"),
        (dict(prompt="caf\udcff", completion="x"), "not valid UTF-8"),
        (dict(token_ids=[1, 2], labels=[1]), "as many as token_ids"),
        (dict(token_ids=[1, 2], labels=[1, 3]), "each the token itself or −100"),
        (dict(token_ids=[1, 10**6]), "outside the vocabulary"),
        (dict(messages=[{"role": "user", "content": "hi"}]), "no chat template"),
    ]:
        with pytest.raises(InputError, match=message):
            index.search(**arguments)
    by_tokens = index.search(token_ids=tokens, labels=index.make_query(**QUESTION).labels, k=3)
    by_text = index.search(**QUESTION, k=3)
    assert [h.influence for h in by_tokens] == [h.influence for h in by_text]


def test_without_a_completion_the_models_own_is_explained(index):
    result = index.search(prompt="The plum", k=1)
    query = result.query
    assert query.generated and query.scored >= 1
    tokens = torch.tensor([query.tokens])
    greedy = index.model.network(tokens, use_cache=False).logits[0].argmax(-1).tolist()
    first = query.labels.index(next(label for label in query.labels if label != -100))
    assert query.tokens[first:] == greedy[first - 1 : -1]


def test_model_and_index_can_be_moved_but_not_exchanged(
    model_folder, index_folder, tmp_path, truth
):
    moved = shutil.copytree(index_folder, tmp_path / "elsewhere")
    model = shutil.copytree(model_folder, tmp_path / "weights")
    result = gradindex.open(moved, model=str(model)).search(**QUESTION, k=1)
    assert result[0].influence == pytest.approx(truth.max(), rel=1e-3)
    other = random_network("gpt_neox", torch.float32, vocab_size=len(
        gradindex.open(moved, model=str(model)).model.tokenizer))
    with torch.no_grad():
        other.gpt_neox.layers[0].mlp.dense_h_to_4h.weight[0, 0] += 1e-6
    other.save_pretrained(model)
    with pytest.raises(IndexMismatchError, match=r"weights have digest .* the index expects"):
        gradindex.open(moved, model=str(model)).search(**QUESTION)
    with pytest.raises(IndexMismatchError, match="loaded as float64, the index was built with"):
        gradindex.open(moved, model=other.double()).search(token_ids=[1, 2, 3])


def test_another_tokenizer_is_refused(model_folder, index_folder, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "weights")
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(IndexMismatchError, match=r"tokenizer .* is not the one"):
        gradindex.open(index_folder, model=str(model)).search(**QUESTION)


def test_damage_is_found_on_opening(index_folder, tmp_path):
    for name, change, message in [
        ("segments/000000/vectors.faiss", lambda b: b[:-1], "has .* bytes, expected"),
        ("segments/000001/rows.npy", lambda b: b[:-1] + b"x", "was changed after it was written"),
        ("manifest.json", lambda b: b[:100], "can't be read"),
        ("manifest.json", lambda b: b.replace(b'"dtype"', b'"type"', 1), "its own digest differs"),
        ("manifest.json", lambda b: b.replace(b'"curvature/', b'"../curvature/', 1), "differs"),
    ]:
        broken = shutil.copytree(index_folder, tmp_path / "broken")
        path = broken / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DamagedIndexError, match=message):
            gradindex.open(broken)
        shutil.rmtree(broken)
    broken = shutil.copytree(index_folder, tmp_path / "broken")
    (broken / "segments/000000/records.lmdb").unlink()
    with pytest.raises(DamagedIndexError, match=r"records\.lmdb is missing"):
        gradindex.open(broken)
    content = (index_folder / "manifest.json").read_text()
    (broken / "manifest.json").write_text(content.replace(f'"format": {FORMAT}', '"format": 9'))
    with pytest.raises(IndexMismatchError, match=rf"has format 9; .* formats 1 to {FORMAT}. Run `"):
        gradindex.open(broken)
    with pytest.raises(InputError, match="no index"):
        gradindex.open(tmp_path)


def test_records_are_checked_when_read(tmp_path, sequences):
    path = tmp_path / "records.lmdb"
    stored = records_of(sequences)
    records.write(path, stored)
    for found, record in zip(records.read(path, range(len(stored))), stored, strict=True):
        assert (found.id, found.parts) == (record.id, record.parts)
        np.testing.assert_array_equal(found.tokens, record.tokens)
        np.testing.assert_array_equal(found.scored, record.scored)
    content = path.read_bytes()
    records.write(tmp_path / "again.lmdb", stored)
    assert (tmp_path / "again.lmdb").read_bytes() == content
    place = content.index(stored[2].tokens.tobytes())
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(DamagedIndexError, match="record 2 is damaged"):
        records.read(path, [0, 2])


# ---- renderings


def test_json_holds_everything(index):
    result = index.search(**QUESTION, k=2, shortlist=10)
    content = json.loads(result.to_json())
    assert content["schema"] == 2 and "exact for this index's" in content["units"]
    assert content["query"]["completion"] == " by the river."
    assert content["recall"]["estimate"] == result.recall.estimate
    hit = content["hits"][0]
    assert hit["user_id"] == small_documents()[hit["document"]]["url"]
    assert hit["fields"] == {"place": small_documents()[hit["document"]]["place"]}
    assert sum(hit["token_influence"]) == pytest.approx(hit["influence"], rel=1e-5)
    assert np.array(hit["token_layer_influence"]).shape == (len(hit["tokens"]), 3)
    assert result.to_list()[1]["id"] == result[1].id
    assert result.to_pandas()["influence"].tolist() == [hit.influence for hit in result]


def test_terminal_says_what_matters(index):
    result = index.search(**QUESTION, k=2, shortlist=10)
    shown = render_terminal(result, width=90)
    assert max(len(line) for line in shown.splitlines()) <= 90
    assert "\x1b" not in shown
    for needed in ("⟦ by the river.⟧", "tokens scored", wording.share(result.recall.estimate),
                   "one more copy of the sequence would make the completion more likely",
                   "N_train is unknown", result[0].user_id, "nats"):
        assert needed.replace(" ", "") in shown.replace("\n", "").replace(" ", ""), needed
    assert "[+" in shown
    assert "\x1b[44;97;1m" in render_terminal(result, width=90, color=True)
    complete = render_terminal(index.search(**QUESTION, k=2, shortlist="all"), width=90)
    assert "recall: complete" in complete


def test_hostile_text_is_shown_not_run(index):
    result = index.search(**QUESTION, k=1)
    result[0].tokens = ["<script>alert(1)</script>", "\x1b]0;x\x07", "\u202e", "\n"]
    result[0].token_influence = [1.0, -2.0, 0.5, 0.1]
    result[0].user_id = "=cmd()"
    result[0].source = "<b>\x1b[2J"
    shown = render_terminal(result, width=90)
    assert "\x1b" not in shown and "\\x1b]0;x\\x07" in shown and "\\u202e" in shown
    page = result._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>\x1b" not in page
    table = list(csv.DictReader(io.StringIO(csv_table(result))))
    assert table[0]["user_id"] == "'=cmd()"


def test_wrapping_never_cuts_a_colour():
    colored = "aaa \x1b[44;97;1mbbb ccc\x1b[0m ddd"
    assert _wrap(colored, 8) == ["aaa \x1b[44;97;1mbbb\x1b[0m",
                                 "\x1b[44;97;1mccc\x1b[0m ddd"]
    assert _wrap("a" * 12, 5) == ["aaaaa", "aaaaa", "aa"]


def test_layer_strip_shows_size_and_sign():
    assert layer_strip([0.0, 1.0, -0.5]) == "▁█(▅)"
    assert layer_strip([]) == ""


def test_equal_sequences_are_one_hit_that_names_all_copies(tmp_path):
    """By a digest taken at the build, also where the copies are no part of the shortlist."""
    tokens = tiny_tokens(7, 30)
    copies = [3, 4, 11, 20, 29]
    tokens[copies] = tokens[3]
    nearly = 12
    tokens[nearly] = tokens[3]
    tokens[nearly, -1] += 1
    searcher = gradindex.build(tiny_network(), save(tmp_path / "a.npy", tokens),
                               tmp_path / "index", **TINY)
    assert searcher.manifest.duplicates == len(tokens) - len({tuple(row) for row in tokens}) == 4
    for controls in ({"k": 1, "shortlist": 1}, {"k": 2, "shortlist": 2}, {"k": 3, "rescore": False},
                     {"k": 30, "shortlist": "all"}):
        result = searcher.search(token_ids=tokens[3], normalize="cosine", **controls)
        of_them = [hit for hit in result if hit.id in copies]
        assert len(of_them) == 1
        assert sorted([of_them[0].id, *of_them[0].duplicates]) == copies, controls
        assert all(hit.duplicates == [] for hit in result if hit.id not in copies)
    assert result[0].id == 3 and len(result) == 26
    [hit] = searcher.rescore(token_ids=tokens[3], ids=[20])
    assert (hit.id, hit.duplicates) == (20, [3, 4, 11, 29])
    lines = re.findall(r"equal an earlier one", json.dumps(result.to_dict()))
    assert not lines  # said by the build and by info alone
    done = CliRunner().invoke(main_group, ["info", str(tmp_path / "index")])
    assert "4 sequences equal an earlier one" in done.output
