"""Delete: gone from every answer at once, from the index's whole life on."""

import gc
import io
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import InputError
from gradindex.progress import Progress
from gradindex.storage import manifest
from indexer.upkeep.delete import Deleted
from search.ask.controls import Controls
from search.ask.settings import settle
from search.study.evaluate import evaluate
from support.documents import NEW
from support.indexes import QUESTION, add, answer, files_of, influences, records_in, unlisted
from support.models import tiny_network
from support.reference import plain_score


def test_deleted_sequences_are_in_no_answer_at_once(index, place):
    """Not in a search, a rescoring, a count of words, a random sample or an evaluation."""
    searcher = gradindex.open(index, **place)
    first = searcher.search(**QUESTION, k=3)
    gone = sorted(hit.id for hit in first)
    expected = {one: score for one, score in influences(searcher).items() if one not in gone}
    assert gradindex.delete(index, gone).deleted == 3
    searcher = gradindex.open(index, **place)
    found = influences(searcher)
    assert found.keys() == expected.keys()
    scale = max(map(abs, expected.values()))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-5 * scale)
    everything = [QUESTION, {"shortlist": "all", "k": len(searcher)}]
    for controls in ({}, {"rescore": False}, {"candidates": "tfidf"}, {"candidates": "both"}):
        result = searcher.search(**everything[0], **{**everything[1], **controls})
        seen = {one for hit in result for one in [hit.id, *hit.duplicates]}
        assert seen == set(expected), controls
        assert result.sequences == len(expected) == len(searcher)
    with pytest.raises(InputError, match=rf"no sequence has the id {gone[1]} \(it was deleted"):
        searcher.rescore(**QUESTION, ids=[0, gone[1]])
    held = [set(record.tokens.tolist()) for record in records_in(searcher)]
    assert len(held) == len(expected)
    tokens = searcher.make_query(**QUESTION).scored_tokens
    np.testing.assert_allclose(
        searcher.snapshot.tables.tokens.scores(tokens),
        [plain_score(tokens, held, place) for place in range(len(held))], rtol=1e-12)
    drawn = searcher.snapshot.contents.ids[searcher.snapshot.random_sample()]
    assert set(drawn.tolist()) <= set(expected)
    made = [searcher.make_query(**QUESTION)]
    evaluated = evaluate(searcher, made, settle(Controls(), searcher.manifest), None,
                         lambda *_: None)
    assert (evaluated.sequences, evaluated.scored) == (len(expected), len(expected))


def test_deleting_names_equal_sequences_that_stay(index, place):
    """Documents 9 and 17 of the index are equal."""
    searcher = gradindex.open(index, **place)
    of = {}
    for record in records_in(searcher):
        of.setdefault(record.parts[0].document, []).append(record.id)
    assert len(of[9]) == len(of[17]) and manifest.load(index).duplicates >= len(of[9])
    copies = dict(zip(of[9], of[17], strict=True))
    hit = next(hit for hit in searcher.search(**QUESTION, k=len(searcher), shortlist="all")
               if hit.id == of[9][0])
    assert hit.duplicates == [copies[hit.id]]
    done = gradindex.delete(index, [of[9][0]])
    assert done == Deleted(1, 0, [copies[of[9][0]]])
    searcher = gradindex.open(index, **place)
    hit = next(hit for hit in searcher.search(**QUESTION, k=len(searcher), shortlist="all")
               if hit.id == copies[of[9][0]])
    assert hit.duplicates == []
    assert gradindex.delete(index, [copies[of[9][0]]]) == Deleted(1, 0, [])


def test_deleting_twice_and_what_never_was(tiny, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    assert gradindex.delete(index, [5, 2, 5]) == Deleted(2, 0, [])
    assert gradindex.delete(index, [2, 3]) == Deleted(1, 1, [])
    gradindex.delete(index, [])  # cleans: the list before the last goes
    before = files_of(index)
    assert gradindex.delete(index, [2, 3, 5]) == Deleted(0, 3, [])
    assert gradindex.delete(index, []) == Deleted(0, 0, [])
    for wrong in (8, -1):
        with pytest.raises(InputError, match=rf"has the id {wrong}; expected 0 to 7. Nothing was"):
            gradindex.delete(index, [0, wrong])
    with pytest.raises(InputError, match=r"'x' of your own. Nothing was deleted.*--id-field"):
        gradindex.delete(index, [0], user_ids=["x"])
    assert files_of(index) == before
    gradindex.compact(index)
    assert gradindex.delete(index, [2, 3, 5]) == Deleted(0, 3, [])
    assert gradindex.open(index).snapshot.contents.ids.tolist() == [0, 1, 4, 6, 7]


def test_deleting_by_the_users_own_id_takes_every_sequence_of_the_document(index, place):
    searcher = gradindex.open(index, **place)
    own = {}
    for record in records_in(searcher):
        own.setdefault(record.parts[0].user_id, set()).add(record.id)
    assert len(own["doc/2"]) > 1
    ids = searcher.snapshot.contents.ids.tolist()
    gone = own["doc/2"] | own["doc/5"] | {0}
    done = gradindex.delete(index, [0], user_ids=["doc/2", "doc/5"])
    assert (done.deleted, done.already) == (len(gone), 0)
    left = gradindex.open(index, **place).snapshot.contents.ids.tolist()
    assert left == [one for one in ids if one not in gone]
    before = files_of(index)
    assert gradindex.delete(index, user_ids=["doc/2"]).already == len(own["doc/2"])
    with pytest.raises(InputError, match="no document has the id 'doc/99' of your own"):
        gradindex.delete(index, user_ids=["doc/1", "doc/99"])
    assert files_of(index) == before


def test_the_command_line_deletes_what_standard_input_names(index, place):
    run = CliRunner()
    done = run.invoke(main_group, ["delete", str(index), "--ids", "-"], input='3\n{"id": 4}\n')
    assert done.exit_code == 0 and "2 sequences deleted" in done.stderr
    assert f"gradindex compact {index}" in done.stderr
    done = run.invoke(main_group, ["delete", str(index), "--user-ids", "-"], input="doc/9\n")
    assert "with the same tokens stay" in done.stderr and done.exit_code == 0
    done = run.invoke(main_group, ["delete", str(index)])
    assert done.exit_code == 2 and "say what to delete" in done.output
    assert {3, 4}.isdisjoint(gradindex.open(index, **place).snapshot.contents.ids.tolist())
    done = run.invoke(main_group, ["compact", str(index)])
    assert done.exit_code == 0 and unlisted(index) == set()


def test_an_open_searcher_keeps_its_view(index, place):
    """Through a deletion, an append and a compaction, whose old files wait for it."""
    searcher = gradindex.open(index, **place)
    before = answer(searcher, k=5)
    old = [one.name for one in searcher.manifest.segments]
    late = gradindex.open(index, **place)  # which has read nothing yet
    gone = [hit["id"] for hit in before["hits"]]
    gradindex.delete(index, gone)
    gradindex.append(index, NEW[:1], **place)
    said = io.StringIO()
    assert gradindex.compact(index, Progress(said)) >= 2
    assert "stay on the disk while the index is open" in said.getvalue()
    assert answer(late, k=5) == answer(searcher, k=5) == before
    now = [hit.id for hit in gradindex.open(index, **place).search(**QUESTION, k=5)]
    assert set(now).isdisjoint(gone)
    gradindex.delete(index, [])  # a writer, while they are open
    assert all((index / "segments" / name).is_dir() for name in old)
    del searcher, late
    gc.collect()
    gradindex.delete(index, [])
    assert unlisted(index) == set()


def test_an_index_of_which_all_is_deleted_says_so_and_can_be_appended_to(tiny, more, tmp_path):
    index = shutil.copytree(tiny, tmp_path / "index")
    assert gradindex.delete(index, range(8)).deleted == 8
    for compacted in (False, True):
        if compacted:
            assert gradindex.compact(index) == 2
            assert list((index / "segments").iterdir()) == []
        with pytest.raises(InputError, match=r"holds no sequence any more.*gradindex append"):
            gradindex.open(index, model=tiny_network()).search(token_ids=[1, 2, 3])
        with pytest.raises(InputError, match="no sequence has the id 3"):
            gradindex.open(index, model=tiny_network()).rescore(token_ids=[1, 2, 3], ids=[3])
        found = gradindex.verify(index, model=tiny_network())
        assert found.sound and found.encoded == 0
        done = CliRunner().invoke(main_group, ["info", str(index)])
        assert done.exit_code == 0 and "0 of at most 6 tokens" in done.output
        grown = shutil.copytree(index, tmp_path / f"grown-{compacted}")
        said = io.StringIO()
        searcher = add(grown, more, progress=Progress(said))
        assert "curvature: nothing to compare" in said.getvalue()
        assert [hit.id for hit in sorted(searcher.search(token_ids=[1, 2, 3]),
                                         key=lambda hit: hit.id)] == list(range(8, 14))
