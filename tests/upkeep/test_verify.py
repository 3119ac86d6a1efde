"""Verify: what is damaged, what to do about it, and that doing it mends the index."""

import gc
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import gradindex
from gradindex.cli import main_group
from gradindex.errors import DamagedIndexError, GradindexError, IndexMismatchError, InputError
from gradindex.storage import layout, manifest, records, row_file, segments, token_file
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.files import facts_of
from gradindex.storage.integrity import SMALL
from gradindex.storage.locks import only_writer
from gradindex.storage.tensors import write_tensors
from indexer.upkeep import append as append_module
from indexer.upkeep import verify as verify_module
from indexer.upkeep.delete import give_up
from search.show import html
from search.show.terminal_text import render_terminal
from search.study.describe import describe
from support.documents import save, tiny_tokens
from support.indexes import TINY, add, answer, files_of, unlisted
from support.kills import KilledError, each_kill
from support.models import random_network, tiny_network

QUESTION = {"token_ids": [3, 1, 4, 1, 5]}
TOKENS = tiny_tokens(0, 12)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Twelve sequences in three segments, two of them deleted: 1 and 6."""
    folder = tmp_path_factory.mktemp("verify")
    gradindex.build(tiny_network(), save(folder / "a.npy", TOKENS), folder / "index", **TINY)
    gradindex.delete(folder / "index", [1, 6])
    return folder / "index"


@pytest.fixture
def index(built, tmp_path):
    return shutil.copytree(built, tmp_path / "index")


def verify(index, **options):
    return gradindex.verify(index, model=tiny_network(), **options)


def searcher(index, **options):
    return gradindex.open(index, model=tiny_network(), **options)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def lose(path):
    path.unlink()


def link(path):
    moved = path.rename(path.with_name("moved"))
    path.symlink_to(moved)


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {flip: "was changed", cut: "bytes, expected", lose: "is missing",
          link: "without following links", folder: "is not a regular file"}


def reseal(index, **changes):
    """Seal the index as it is now, as a hostile or a wrong writer would."""
    facts = manifest.load(index)
    files = {name: facts_of(index / name) for name in facts.files}
    manifest.commit(index, replace(facts, files=files, **changes))


# ---- what is sound


def test_a_sound_index_is_sound(built):
    found = verify(built)
    facts = manifest.load(built)
    assert found.sound and found.findings == [] and found.rebuilt == []
    assert found.files == len(facts.files)
    assert found.bytes == sum((built / name).stat().st_size for name in facts.files)
    assert found.records == 12 and found.encoded == 10
    assert found.same_bits == 1.0
    assert found.scores >= 2 and found.score_error < 1e-6
    assert found.to_dict()["sound"] and found.to_dict()["schema"] == 1
    without = gradindex.verify(built, no_model=True)
    assert without.sound and without.records == 12
    assert (without.encoded, without.same_bits, without.score_error) == (0, None, None)


def test_the_command_says_sound_or_what_is_damaged(model_folder, index_folder, tmp_path):
    run = CliRunner()
    done = run.invoke(main_group, ["verify", str(index_folder)], standalone_mode=False)
    assert done.return_value == 0 and done.stdout.splitlines()[-1] == "sound"
    assert "100.0000% of their bits are the same" in done.stdout
    index = shutil.copytree(index_folder, tmp_path / "index")
    flip(index / "segments" / "000001" / "vectors.faiss")
    done = run.invoke(main_group, ["verify", str(index), "--no-model"], standalone_mode=False)
    assert done.return_value == 3
    assert "damaged: segment 000001\n" in done.stdout
    assert f"gradindex verify {index} --rebuild" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 damaged"
    done = run.invoke(main_group, ["verify", str(index), "--no-model", "--format", "json"],
                      standalone_mode=False)
    content = json.loads(done.stdout)
    assert done.return_value == 3 and not content["sound"]
    assert content["findings"][0]["what"] == "segment 000001"
    done = run.invoke(main_group, ["verify", str(index), "--rebuild"], standalone_mode=False)
    assert done.return_value == 0 and done.stdout.startswith("rebuilt: 000001\n")


# ---- every kind of damage


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [one.name for one in layout.SEGMENT_FILES])
def test_damage_of_a_segment_is_named_with_what_to_do(index, file, damage):
    name = f"segments/000001/{file}"
    damage(index / name)
    found = gradindex.verify(index, no_model=True)
    [finding] = found.findings
    assert finding.what == "segment 000001" and not found.sound
    assert name in finding.wrong and DAMAGE[damage] in finding.wrong
    if file == "records.lmdb":
        assert "take segments/000001 from a copy" in finding.do
        assert f"gradindex delete {index} --segment 000001" in finding.do
    else:
        assert f"`gradindex verify {index} --rebuild`" in finding.do
    assert found.records == 8  # of the other two


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_what_every_search_needs_is_named(index, damage):
    facts = manifest.load(index)
    for name in (layout.curvature_file(facts.modules[1]), layout.FIT, layout.BACKGROUND,
                 facts.deleted_file):
        assert (index / name).is_file()
        kept = (index / name).read_bytes()
        damage(index / name)
        for rebuild in (False, True):
            found = verify(index, rebuild=rebuild)
            assert [one.what for one in found.findings] == [name]
            assert DAMAGE[damage] in found.findings[0].wrong
            assert "take it from a copy of the index, or build again" in found.findings[0].do
            assert found.encoded == 0 and found.rebuilt == []
        for options in ({}, {"allow_damaged": True}):
            with pytest.raises(DamagedIndexError, match=rf"{name}.*`gradindex verify"):
                searcher(index, **options).search(**QUESTION)
        if (index / name).is_dir():
            (index / name).rmdir()
        (index / name).unlink(missing_ok=True)
        (index / name).write_bytes(kept)
    (index / facts.deleted_file).with_name("moved").unlink(missing_ok=True)
    assert verify(index).sound


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_the_manifest_is_named(index, damage):
    damage(index / layout.MANIFEST)
    found = verify(index, rebuild=True)
    assert [one.what for one in found.findings] == ["manifest.json"]
    assert "take it from a copy of the index" in found.findings[0].do
    for use in (lambda: searcher(index), lambda: searcher(index, allow_damaged=True),
                lambda: gradindex.delete(index, [1]), lambda: gradindex.compact(index),
                lambda: describe(index)):
        with pytest.raises(DamagedIndexError, match=r"manifest\.json"):
            use()


def _rows(index, change):
    path = index / "segments" / "000001" / "rows.npy"
    rows = row_file.parse_array(path.read_bytes(), row_file.ROW, path).copy()
    change(rows)
    row_file.write_rows(path, rows)


def _digest(rows):
    rows["digest"][2] += 1


def _norm(rows):
    rows["norm"][2] = np.nan


def _ids(rows):
    rows["id"] -= 2


def _contradiction(index, what):
    inside = index / "segments" / "000001"
    if what == "tokens":
        token_file.write(inside / "tokens.npz", [np.array([1, 2])] * 4, 37)
    elif what == "scale":
        contents = Contents(index, manifest.load(index))
        codes = contents.reader(contents.segments[1]).codes(contents.manifest.code["length"])
        stored = codes.codes([0, 1, 2, 3]).copy()
        stored[3, -4:] = np.array([np.nan], np.float32).view(np.uint8)
        wrong = CodeIndex(512)
        wrong.add(stored)
        wrong.write(inside / "vectors.faiss")
    elif what == "records":
        path = inside / "records.lmdb"
        held = records.read(path, range(4))
        held[0].tokens[0] += 1
        records.write(path, held)
    elif what == "reasons":
        segments.write_facts(inside, segments.SegmentFacts(4, quarantined={5: "because"}))
    else:
        _rows(index, {"digest": _digest, "norm": _norm, "ids": _ids}[what])


@pytest.mark.parametrize("what, said", [
    ("digest", "another sequence 6 than rows.npy"), ("norm", "why each row without a code"),
    ("ids", "ids that don't follow"), ("tokens", "other tokens than record 0"),
    ("scale", "a scale that is not finite"), ("records", "another sequence 4 than rows.npy"),
    ("reasons", "why each row without a code"),
])
def test_files_that_contradict_each_other_are_found_though_sealed(index, what, said):
    _contradiction(index, what)
    reseal(index)
    found = gradindex.verify(index, no_model=True)
    assert [one.what for one in found.findings] == ["segment 000001"]
    assert said in found.findings[0].wrong


def test_a_manifest_that_miscounts_is_found_though_sealed(index):
    facts = manifest.load(index)
    manifest.commit(index, replace(facts, sequences=11, deleted=1))
    found = gradindex.verify(index, no_model=True)
    assert [one.what for one in found.findings] == [facts.deleted_file]
    reseal(index, sequences=facts.sequences, deleted=facts.deleted, next_id=11)
    with pytest.raises(DamagedIndexError, match="counts"):
        gradindex.open(index)


# ---- mending


def test_rebuilding_mends_what_can_be_mended(index):
    """Codes of one segment, rows and words of another: answers are as they were."""
    before = answer(searcher(index), QUESTION)
    ids = searcher(index).snapshot.contents.ids.tolist()
    gc.collect()
    flip(index / "segments" / "000000" / "vectors.faiss")
    lose(index / "segments" / "000002" / "rows.npy")
    cut(index / "segments" / "000002" / "tokens.npz")
    flip(index / "segments" / "000002" / "segment.json")
    with pytest.raises(DamagedIndexError):
        searcher(index)
    found = verify(index, rebuild=True)
    assert found.rebuilt == ["000000", "000002"] and found.sound and found.same_bits == 1.0
    facts = manifest.load(index)
    assert [one.name for one in facts.segments] == ["000003", "000001", "000004"]
    assert facts.deleted == 2 and facts.next_segment == 5
    assert searcher(index).snapshot.contents.ids.tolist() == ids
    assert answer(searcher(index), QUESTION) == before
    gc.collect()
    gradindex.delete(index, [])
    assert unlisted(index) == set()
    assert verify(index, rebuild=True).rebuilt == []


def test_what_cannot_be_rebuilt_is_given_up_first(index, tmp_path):
    flip(index / "segments" / "000000" / "vectors.faiss")
    flip(index / "segments" / "000001" / "records.lmdb")
    flip(rows := index / "segments" / "000001" / "rows.npy")
    before = files_of(index)
    with pytest.raises(DamagedIndexError, match=r"records are lost too.*--segment 000001"):
        verify(index, rebuild=True)
    assert files_of(index) == before
    flip(rows)  # what is flipped twice is whole: it can be counted, and stays a finding
    half = shutil.copytree(index, tmp_path / "half")
    found = verify(half, rebuild=True)
    assert found.rebuilt == ["000000"] and [one.what for one in found.findings] == [
        "segment 000001"]
    with pytest.raises(InputError, match="--segment 000007: no such segment; expected one of"):
        give_up(index, ["000007"])
    done = CliRunner().invoke(main_group, ["delete", str(index), "--segment", "000001"])
    assert done.exit_code == 0 and "4 sequences given up" in done.stderr
    assert verify(index, rebuild=True).rebuilt == ["000000"]
    facts = manifest.load(index)
    assert (facts.sequences, facts.deleted, facts.rows) == (7, 1, 8)
    assert searcher(index).snapshot.contents.ids.tolist() == [0, 2, 3, 8, 9, 10, 11]
    gc.collect()
    grown = add(index, save(tmp_path / "again.npy", TOKENS[4:8]))
    assert grown.snapshot.contents.ids.tolist() == [0, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]
    assert verify(index).sound


def test_records_that_are_lost_alone_are_not_rebuilt(index):
    flip(index / "segments" / "000001" / "records.lmdb")
    before = files_of(index)
    found = verify(index, rebuild=True)
    assert found.rebuilt == [] and [one.what for one in found.findings] == ["segment 000001"]
    assert files_of(index) == before
    assert found.encoded == 7 and found.same_bits == 1.0  # the other segments' are looked at


def test_a_rebuild_killed_anywhere_leaves_an_index_that_can_be_rebuilt(
    index, tmp_path, monkeypatch
):
    flip(index / "segments" / "000001" / "rows.npy")
    whole = shutil.copytree(index, tmp_path / "whole")
    verify(whole, rebuild=True)
    gc.collect()
    gradindex.delete(whole, [])
    expected = files_of(whole)
    for which, here in each_kill(
            monkeypatch, lambda n: shutil.copytree(index, tmp_path / f"killed-{n}"),
            lambda here: verify(here, rebuild=True, no_model=True)):
        verify(here, rebuild=True, no_model=True)
        gradindex.delete(here, [])
        assert files_of(here) == expected, f"killed at sync {which}"
    assert which > 10


def test_a_rebuild_is_the_only_writer(index):
    flip(index / "segments" / "000001" / "rows.npy")
    before = files_of(index)
    with only_writer(index, "a test"), pytest.raises(
            GradindexError, match=rf"writing to .*: a test in process {os.getpid()}"):
        verify(index, rebuild=True)
    assert files_of(index) == before


def test_an_unfinished_append_is_finished_or_dropped_before_a_rebuild(
    index, tmp_path, monkeypatch
):
    """Its segments have the numbers that would be next; a damaged index lets it be dropped."""
    more = save(tmp_path / "more.npy", tiny_tokens(1, 6))
    monkeypatch.setattr(append_module, "measure_drift",
                        lambda *_: (_ for _ in ()).throw(KilledError()))
    with pytest.raises(KilledError):
        add(index, more)
    monkeypatch.undo()
    flip(index / "segments" / "000001" / "vectors.faiss")
    with pytest.raises(InputError, match=r"unfinished append.*--discard"):
        verify(index, rebuild=True)
    with pytest.raises(DamagedIndexError, match="gradindex verify"):
        add(index, more)
    done = CliRunner().invoke(main_group, ["append", str(index), "--discard"])
    assert "what an unfinished append did is dropped" in done.stderr
    assert done.exception is None
    assert not (index / "append.json").exists()
    assert verify(index, rebuild=True).rebuilt == ["000001"]
    assert len(add(index, more)) == 16


def test_an_index_that_is_compacted_meanwhile_is_sound(index, monkeypatch):
    """Verify reads what was listed when it began."""
    real = verify_module.find_damage

    def meanwhile(*arguments):
        assert gradindex.compact(index) == 2
        return real(*arguments)

    monkeypatch.setattr(verify_module, "find_damage", meanwhile)
    assert verify(index).sound
    monkeypatch.undo()
    gc.collect()
    gradindex.delete(index, [])
    assert unlisted(index) == set() and verify(index).sound


# ---- searching what is left


@pytest.mark.parametrize("file", [one.name for one in layout.SEGMENT_FILES])
def test_a_damaged_segment_is_refused_by_name_or_left_out(index, file):
    whole = {hit.id: hit.influence for hit in searcher(index).search(**QUESTION, k=10)}
    flip(index / "segments" / "000001" / file)
    with pytest.raises(DamagedIndexError) as refused:
        searcher(index).search(**QUESTION)
    for part in (f"segments/000001/{file} was changed", f"`gradindex verify {index}`",
                 "--allow-damaged"):
        assert part in str(refused.value)
    assert refused.value.exit_code == 3
    rest = searcher(index, allow_damaged=True)
    result = rest.search(**QUESTION, k=7)
    assert len(rest) == result.sequences == 7
    assert result.coverage == 0.7 and result.damaged == ["000001"]
    assert sorted(hit.id for hit in result) == [0, 2, 3, 8, 9, 10, 11]
    scale = max(map(abs, whole.values()))
    for hit in result:
        assert abs(hit.influence - whole[hit.id]) < 1e-5 * scale
    assert result.recall.estimate == 1.0  # of the rest
    said = "coverage 70.0%: 7 of 10 sequences are searched; segment 000001 is damaged and left " \
        "out, and the recall statement is about the rest"
    assert result.warnings[0] == said
    assert said in " ".join(render_terminal(result).split())
    assert said in html.render_html(result)
    assert result.to_dict()["coverage"] == 0.7 and result.to_dict()["damaged"] == ["000001"]
    with pytest.raises(InputError, match=r"no sequence has the id 5 \(it was deleted, or is in no"):
        rest.rescore(**QUESTION, ids=[5])
    approximate = rest.search(**QUESTION, rescore=False)
    assert approximate.warnings[0] == said and approximate.coverage == 0.7


def test_the_coverage_is_said_on_standard_error_where_hits_alone_are_printed(
    index_folder, tmp_path
):
    index = shutil.copytree(index_folder, tmp_path / "index")
    query = ["search", str(index), "-p", "The plum", "-c", " number", "-k", "2"]
    large = index / "segments" / "000002" / "records.lmdb"
    assert large.stat().st_size > SMALL  # which opening without the flag doesn't digest
    flip(large)
    flip(index / "segments" / "000000" / "tokens.npz")
    run = CliRunner()
    done = run.invoke(main_group, query, standalone_mode=False)
    assert isinstance(done.exception, DamagedIndexError) and done.stdout == ""
    said = r"coverage 38\.5%: 20 of 52 sequences are searched; segments 000000, 000002 are damaged"
    for form in ("jsonl", "csv", "json", "auto"):
        done = run.invoke(main_group, [*query, "--allow-damaged", "--format", form],
                          standalone_mode=False)
        assert re.search(said, done.stderr), form
        there = re.search(said, " ".join(done.stdout.split())) is not None
        assert there == (form in ("json", "auto")), form
    assert json.loads(run.invoke(main_group, [*query, "--allow-damaged", "--format", "json"],
                                 standalone_mode=False).stdout)["damaged"] == ["000000", "000002"]


def test_an_index_of_which_every_segment_is_damaged_is_not_searched(index):
    for segment in manifest.load(index).segments:
        cut(index / "segments" / segment.name / "rows.npy")
    with pytest.raises(DamagedIndexError, match=r"every segment of .* is damaged.*gradindex ver"):
        searcher(index, allow_damaged=True)
    assert len(verify(index).findings) == 3


def test_a_sound_index_is_covered_in_full(index):
    result = searcher(index, allow_damaged=True).search(**QUESTION)
    assert result.coverage == 1.0 and result.damaged == []
    assert not any("coverage" in warning for warning in result.warnings)
    assert answer(searcher(index, allow_damaged=True), QUESTION) == answer(
        searcher(index), QUESTION)


@pytest.mark.parametrize("write", [
    lambda index, data: add(index, data), lambda index, _: gradindex.delete(index, [0]),
    lambda index, _: gradindex.compact(index)])
def test_no_writer_builds_on_a_damaged_index(index, write, tmp_path):
    flip(index / "segments" / "000001" / "rows.npy")
    before = files_of(index)
    with pytest.raises(DamagedIndexError, match=r"segments/000001/rows\.npy"):
        write(index, save(tmp_path / "more.npy", tiny_tokens(1, 2)))
    assert files_of(index) == before


def test_damage_that_comes_while_the_index_is_open_is_found_when_it_is_read(index):
    opened = searcher(index)
    assert len(opened) == 10
    flip(index / "segments" / "000001" / "records.lmdb")
    with pytest.raises(DamagedIndexError, match=r"records\.lmdb was changed"):
        opened.search(**QUESTION)


# ---- with the model


def test_another_model_is_a_mismatch_and_no_damage(index, tmp_path):
    other = random_network("gpt_neox", torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(IndexMismatchError, match="is not the one the index was built with"):
        gradindex.verify(index, model=other)
    with pytest.raises(InputError, match="was built from a model object; pass the model"):
        gradindex.verify(index)
    assert gradindex.verify(index, no_model=True).sound


def test_tensors_that_only_their_digest_tells_apart_are_found(index, monkeypatch):
    """Files may be taken for the build's by a remembered digest; verify looks at the tensors."""
    monkeypatch.setattr(verify_module, "tensors_digest", lambda _: "0" * 64)
    found = verify(index)
    assert [one.what for one in found.findings] == ["the model"]
    assert found.findings[0].do == "Pass the right one with --model."


def test_codes_of_other_sequences_are_found_though_sealed(index):
    facts = manifest.load(index)
    codes = Contents(index, facts).reader(facts.segments[2]).codes(facts.code["length"])
    wrong = CodeIndex(512)
    wrong.add(np.roll(codes.codes([0, 1, 2, 3]), 1, axis=0))
    wrong.write(index / "segments" / "000002" / "vectors.faiss")
    reseal(index)
    assert gradindex.verify(index, no_model=True).sound
    found = verify(index)
    assert [one.what for one in found.findings] == ["sequence 8"]
    assert "of the bits that encoding it again gives" in found.findings[0].wrong
    assert found.same_bits < 0.9 and not found.sound


def test_norms_of_other_sequences_are_found_though_sealed(index):
    def halve(rows):
        rows["norm"] *= 0.5

    _rows(index, halve)
    reseal(index)
    assert gradindex.verify(index, no_model=True).sound
    found = verify(index)
    assert [one.what for one in found.findings] == ["sequence 4"] and found.same_bits == 1.0


def test_curvature_of_another_fit_is_found_though_sealed(index):
    """Eigenvalues in another order: codes and scores both come out differently."""
    name = layout.curvature_file(manifest.load(index).modules[0])
    tensors = load_file(index / name)
    tensors["eigenvalues"] = tensors["eigenvalues"].flip(0).contiguous()
    write_tensors(index / name, tensors)
    reseal(index)
    assert gradindex.verify(index, no_model=True).sound
    found = verify(index)
    kinds = [one.wrong for one in found.findings]
    assert any("of the bits that encoding it again" in wrong for wrong in kinds)
    assert any("its influence on sequence" in wrong for wrong in kinds)
    assert found.score_error > 1e-3


def test_scores_that_come_out_differently_are_found_though_sealed(index):
    facts = manifest.load(index)
    query, other, score = facts.calibration["anchors"][0]
    largest = max(abs(one[2]) for one in facts.calibration["anchors"])
    anchors = [(query, other, score + 0.01 * largest), *facts.calibration["anchors"][1:]]
    reseal(index, calibration={**facts.calibration, "anchors": anchors})
    found = verify(index)
    assert [one.what for one in found.findings] == [f"sequence {other}"]
    assert f"{score + 0.01 * largest:.6g} at the build and is" in found.findings[0].wrong
    assert found.same_bits == 1.0 and found.score_error == pytest.approx(0.01, rel=0.02)


def test_scores_of_the_build_are_measured_as_long_as_their_sequences_are_there(index):
    anchors = manifest.load(index).calibration["anchors"]
    assert verify(index).scores == len(anchors)  # deleted ones are still there
    gradindex.delete(index, {one for anchor in anchors for one in anchor[:2]})
    gradindex.compact(index)
    found = verify(index)
    assert found.sound and (found.scores, found.score_error) == (0, None)


def test_looking_changes_nothing(index):
    before = files_of(index)
    times = {path: path.stat().st_mtime_ns for path in index.rglob("*")}
    verify(index)
    describe(index)
    answer(searcher(index), QUESTION)
    assert files_of(index) == before
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*")} == times
    index.chmod(0o555)
    try:
        assert verify(index).sound
    finally:
        index.chmod(0o755)
