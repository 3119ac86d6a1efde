"""Background queries: what is kept of them, the generic rate, and that it finds what is generic."""

import gc
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.draws import Stream, choose
from gradindex.errors import DamagedIndexError
from gradindex.results import GENERIC
from gradindex.storage import background_file, layout, manifest
from gradindex.storage.background_file import BackgroundQueries, thresholds
from gradindex.storage.files import facts_of
from indexer import background_queries as background_module
from search.ask.controls import Controls
from search.ask.settings import settle
from search.rank.generic_rate import all_rates
from search.study.describe import describe, summary
from support.documents import FRUIT, PLACES, save, small_documents, tiny_tokens
from support.indexes import TINY, files_of
from support.kills import KilledError
from support.models import labels_of, random_network, tiny_network
from support.reference import sequence_gradient

QUESTION = {"token_ids": [3, 1, 4, 1, 5]}
ROWS = 150  # so that a hundredth of the others is two
TOKENS = tiny_tokens(0, ROWS)
TOKENS[70:75] = TOKENS[3]


@pytest.fixture(scope="module")
def network():
    return random_network("gpt_neox", torch.float64, num_hidden_layers=1)


@pytest.fixture(scope="module")
def built(network, tmp_path_factory):
    """150 sequences in four segments, in float64; six are equal.

    With the MLPs alone no threshold is the score of those six.
    """
    folder = tmp_path_factory.mktemp("generic")
    gradindex.build(network, save(folder / "a.npy", TOKENS), folder / "index",
                    modules="mlp", **{**TINY, "segment_size": 40})
    return folder / "index"


def queries_of(index):
    facts = manifest.load(index)
    return background_file.load(index / layout.BACKGROUND, facts.background["queries"], 512)


def decoded(searcher):
    """What each code means, from its bytes: float64 [rows, K]."""
    length = searcher.manifest.code["length"]
    rows = []
    for codes in searcher.snapshot.segments():
        for code in codes.codes(list(range(len(codes)))):
            bits = [(int(code[place // 8]) >> place % 8) & 1 for place in range(length)]
            scale = float(code[-4:].copy().view(np.float32)[0]) / length**0.5
            rows.append([scale * (2 * bit - 1) for bit in bits])
    return np.array(rows)


def plain_thresholds(scores):
    """Halfway between the last of the first hundredth and the next, from either end."""
    falling = sorted(scores, reverse=True)
    top = next(n for n in range(1, len(scores) + 1) if n * 100 >= len(scores))
    next_one = min(top, len(scores) - 1)
    return ((falling[top - 1] + falling[next_one]) / 2,
            (falling[-top] + falling[-1 - next_one]) / 2)


def plain_rates(queries, codes, tokens, query_tokens):
    """Each sequence's rates by counting, [2][n]."""
    rates = [[], []]
    for code, own in zip(codes, tokens, strict=True):
        asked = [(float(queries.vectors[q].astype(np.float64) @ code), q)
                 for q in range(len(queries)) if query_tokens[q] != own]
        rates[0].append(np.mean([score >= queries.upper[q] for score, q in asked]))
        rates[1].append(np.mean([score <= queries.lower[q] for score, q in asked]))
    return rates


def test_the_queries_are_later_halves_given_the_first(built, network):
    """v_q / ‖v_q‖ of the gradient that torch.func gives, in float16."""
    queries, index = queries_of(built), gradindex.open(built, model=network).snapshot
    assert len(queries) == 64
    assert queries.ids.tolist() == choose(Stream.BACKGROUND_QUERIES, 0, ROWS, 64)
    names = [module.name for module in index.manifest.modules]
    for number in range(0, 64, 9):
        ids = TOKENS[queries.ids[number]].astype(np.int32)
        labels = labels_of(ids, np.arange(6) >= 3)  # of the five that are predicted, the last three
        gradients = sequence_gradient(network, names, torch.tensor(ids).long(), labels)
        coordinates = {name: index.ekfac[name].coordinates(g, 0.1)[None]
                       for name, g in gradients.items()}
        v = index.codes.query_vectors(coordinates)[0].double().numpy()
        np.testing.assert_allclose(queries.vectors[number], v / np.linalg.norm(v), rtol=1e-3,
                                   atol=1e-7)


def test_thresholds_and_rates_are_the_plain_ones(built, network):
    queries, searcher = queries_of(built), gradindex.open(built, model=network)
    codes, tokens = decoded(searcher), TOKENS.tolist()
    asked = [tokens[one] for one in queries.ids]
    for number, vector in enumerate(queries.vectors.astype(np.float64)):
        others = [float(vector @ code) for code, own in zip(codes, tokens, strict=True)
                  if own != asked[number]]
        upper, lower = plain_thresholds(others)
        scale = max(map(abs, others))
        assert queries.upper[number] == pytest.approx(upper, abs=1e-5 * scale)
        assert queries.lower[number] == pytest.approx(lower, abs=1e-5 * scale)
        above = np.array(others) - queries.upper[number], queries.lower[number] - np.array(others)
        # two are beyond; of equal sequences, which have equal codes, all are or none
        tie = 1e-6 * scale  # thresholds are float32
        assert all((part > tie).sum() <= 2 <= (part >= -tie).sum() for part in above)
    found, expected = all_rates(searcher.snapshot), plain_rates(queries, codes, tokens, asked)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.mean() == pytest.approx(0.0135, abs=0.001)  # 2 of 149, or of 144
    equal = set(range(70, 75)) | {3}
    assert len({tuple(found[:, one]) for one in equal}) == 1


def test_the_thresholds_of_few_scores():
    assert thresholds(np.array([3.0], np.float32)) == (3, 3)
    assert thresholds(np.array([1.0, 5.0], np.float32)) == (3, 3)
    assert thresholds(np.arange(100, dtype=np.float32)[::-1].copy()) == (98.5, 0.5)
    assert thresholds(np.arange(101, dtype=np.float32)) == (98.5, 1.5)


def test_every_hit_has_its_rate(built, network):
    searcher = gradindex.open(built, model=network)
    rates = all_rates(searcher.snapshot)
    for controls in ({}, {"rescore": False}, {"opponents": True}, {"normalize": "cosine"},
                     {"opponents": True, "rescore": False}, {"shortlist": "all", "k": 144}):
        hits = searcher.search(**QUESTION, **controls).hits
        for hit in hits:
            assert hit.generic_rate == rates[int(hit.influence < 0), hit.id]
    ids = [149, 0, 70, 3]
    for hit, one in zip(searcher.rescore(**QUESTION, ids=ids), ids, strict=True):
        assert hit.generic_rate == rates[int(hit.influence < 0), one]
    [result] = searcher.search_many([QUESTION])
    content = json.loads(result.to_json())["hits"][0]
    assert content["generic_rate"] == rates[int(content["influence"] < 0), content["id"]]
    stages = searcher.stages([searcher.make_query(**QUESTION)],
                             settle(Controls(k=3), searcher.manifest))
    approximate = next(stage.provisional for stage in stages
                       if stage.name == "approximate").hits
    assert all(hit.generic_rate is not None for hit in approximate)


def test_an_equal_sequence_is_known_though_the_query_s_is_gone(built, network, tmp_path):
    """Deleted, compacted away and appended again: the query made of it still doesn't count."""
    index = shutil.copytree(built, tmp_path / "index")
    queries = queries_of(index)
    gone = int(queries.ids[5])
    gradindex.delete(index, [gone])
    gradindex.compact(index)
    grown = gradindex.append(index, save(tmp_path / "b.npy", TOKENS[[gone, 0]]), model=network)
    tokens = [TOKENS[one].tolist() for one in range(ROWS) if one != gone]
    tokens += [TOKENS[gone].tolist(), TOKENS[0].tolist()]
    asked = [TOKENS[one].tolist() for one in queries.ids]
    expected = plain_rates(queries, decoded(grown), tokens, asked)
    np.testing.assert_allclose(all_rates(grown.snapshot), expected, rtol=1e-12)
    assert files_of(index)[layout.BACKGROUND] == files_of(built)[layout.BACKGROUND]
    assert gradindex.verify(index, model=network).sound


def test_a_planted_generic_sequence_is_flagged(tmp_path):
    """One text says twelve times what each of the others says once, so all of them find it."""
    draw = np.random.default_rng(4)

    def sentence():
        return f"The {draw.choice(FRUIT)} {draw.integers(99)} {draw.choice(PLACES)}."

    texts = [sentence() for _ in range(160)]
    texts[50] = " ".join(sentence() for _ in range(12))
    tokenizer = train_tokenizer([one["text"] for one in small_documents()], 400)
    network = random_network("gpt_neox", torch.float32, num_hidden_layers=1,
                             vocab_size=len(tokenizer))
    searcher = gradindex.build(network, [{"text": one} for one in texts], tmp_path / "index",
                               tokenizer=tokenizer, seq_len=60, bits=512)
    upper = all_rates(searcher.snapshot)[0]
    assert np.flatnonzero(upper >= GENERIC).tolist() == [50] and upper[50] > 0.35
    hits = searcher.search(prompt="The pear", completion=" 11 harbour.", shortlist="all", k=150)
    assert [hit.id for hit in hits if hit.generic and hit.influence > 0] == [50]


def test_an_index_of_one_sequence_has_no_rate(tmp_path):
    tokens = save(tmp_path / "a.npy", tiny_tokens(0, 1))
    searcher = gradindex.build(tiny_network(), tokens, tmp_path / "index", **TINY)
    assert searcher.manifest.background == {"queries": 0, "sample": 1}
    assert searcher.search(**QUESTION)[0].generic_rate is None
    assert np.isnan(all_rates(searcher.snapshot)).all()
    assert gradindex.verify(tmp_path / "index", model=tiny_network()).sound
    assert "background queries: 0 of" in summary(describe(tmp_path / "index"))


def test_a_query_made_of_the_only_other_sequence_counts(tmp_path):
    tokens = save(tmp_path / "a.npy", tiny_tokens(0, 2))
    searcher = gradindex.build(tiny_network(), tokens, tmp_path / "index", **TINY)
    np.testing.assert_array_equal(all_rates(searcher.snapshot), np.ones((2, 2)))


def test_the_thresholds_of_many_are_those_of_a_part(network, tmp_path, monkeypatch):
    monkeypatch.setattr(background_module, "LARGEST_SAMPLE", 60)
    searcher = gradindex.build(network, save(tmp_path / "a.npy", TOKENS), tmp_path / "index",
                               **{**TINY, "segment_size": 40})
    assert searcher.manifest.background == {"queries": 64, "sample": 60}
    queries, codes = queries_of(tmp_path / "index"), decoded(searcher)
    part = choose(Stream.BACKGROUND_QUERY_SCORES, 0, ROWS, 60)
    for number, vector in enumerate(queries.vectors.astype(np.float64)):
        others = [float(vector @ codes[one]) for one in part
                  if TOKENS[one].tolist() != TOKENS[queries.ids[number]].tolist()]
        np.testing.assert_allclose(
            [queries.upper[number], queries.lower[number]], plain_thresholds(others),
            atol=1e-5 * np.abs(others).max())
    assert "64 of the index's own sequences, thresholds of 60" in summary(
        describe(tmp_path / "index"))


def test_a_build_killed_after_the_queries_ends_with_the_same_bytes(
    built, network, tmp_path, monkeypatch
):
    data = save(tmp_path / "a.npy", TOKENS)
    options = {**TINY, "segment_size": 40, "modules": "mlp"}
    gradindex.build(network, data, tmp_path / "whole", **options)
    real = background_file.save

    def killed(path, queries):
        real(path, queries)
        raise KilledError

    monkeypatch.setattr(background_file, "save", killed)
    with pytest.raises(KilledError):
        gradindex.build(network, data, tmp_path / "index", **options)
    monkeypatch.undo()
    (tmp_path / "index" / layout.BACKGROUND).write_bytes(b"damaged meanwhile")
    gradindex.build(network, data, tmp_path / "index", **options)
    whole, found = files_of(tmp_path / "whole"), files_of(tmp_path / "index")
    assert found == whole
    assert found[layout.BACKGROUND] == files_of(built)[layout.BACKGROUND]


# ---- the file


@pytest.fixture
def queries(built):
    return queries_of(built)


def test_what_is_written_is_read(queries, tmp_path):
    facts = background_file.save(tmp_path / "b.safetensors", queries)
    assert facts == facts_of(tmp_path / "b.safetensors")
    again = background_file.load(tmp_path / "b.safetensors", 64, 512)
    for name in ("vectors", "upper", "lower", "ids", "digests"):
        one, other = getattr(queries, name), getattr(again, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def spoiled(queries):
    """Files that a search must not take for background queries."""
    nan = np.full(64, np.nan, np.float32)
    halves = {name: getattr(queries, name)[:32]
              for name in ("vectors", "upper", "lower", "ids", "digests")}
    yield replace(queries, upper=nan)
    yield replace(queries, vectors=np.full_like(queries.vectors, np.inf))
    yield replace(queries, vectors=queries.vectors.view(np.int16))
    yield replace(queries, vectors=queries.vectors[:, :256].copy())
    yield replace(queries, upper=queries.lower, lower=queries.upper)
    yield replace(queries, ids=queries.ids[::-1].copy())
    yield replace(queries, ids=queries.ids - 100)
    yield BackgroundQueries(**halves)


def test_a_file_of_something_else_is_refused(built, queries, network, tmp_path):
    for wrong in spoiled(queries):
        index = shutil.copytree(built, tmp_path / "index")
        background_file.save(index / layout.BACKGROUND, wrong)
        with pytest.raises(DamagedIndexError, match=r"expected finite .* Copy the index again"):
            background_file.load(index / layout.BACKGROUND, 64, 512)
        reseal(index)
        found = gradindex.verify(index, model=network)
        assert [one.what for one in found.findings] == [layout.BACKGROUND]
        with pytest.raises(DamagedIndexError, match="expected finite"):
            gradindex.open(index, model=network).search(**QUESTION)
        shutil.rmtree(index)


def reseal(index, **changes):
    """Seal the index as it is now, as a hostile or a wrong writer would."""
    facts = manifest.load(index)
    files = {name: facts_of(index / name) for name in facts.files}
    manifest.commit(index, replace(facts, files=files, **changes))


def test_queries_of_something_else_are_found_though_sealed(built, queries, network, tmp_path):
    for wrong in (replace(queries, vectors=np.roll(queries.vectors, 1, axis=0)),
                  replace(queries, digests=np.roll(queries.digests, 1, axis=0))):
        index = shutil.copytree(built, tmp_path / "index")
        background_file.save(index / layout.BACKGROUND, wrong)
        reseal(index)
        assert gradindex.verify(index, no_model=True).sound
        found = gradindex.verify(index, model=network)
        assert [one.what for one in found.findings] == [layout.BACKGROUND]
        assert f"sequence {queries.ids[0]} comes out otherwise" in found.findings[0].wrong
        shutil.rmtree(index)


@pytest.mark.parametrize("change, says", [
    ({"background": None}, "lists files that don't fit"),
    ({"background": {"queries": 5000, "sample": 150}}, r"background\.queries: Input should be"),
    ({"background": {"queries": 64, "sample": -1}}, r"background\.sample: Input should be"),
    ({"background": {"queries": 3, "sample": 150}}, r"gives background\.safetensors .* bytes, mor"),
])
def test_a_manifest_that_says_otherwise_is_refused(built, tmp_path, change, says):
    index = shutil.copytree(built, tmp_path / "index")
    if change["background"] == {"queries": 3, "sample": 150}:  # beyond the margin
        with (index / layout.BACKGROUND).open("ab") as file:
            file.write(bytes(1 << 16))
    reseal(index, **change)
    with pytest.raises(DamagedIndexError, match=says):
        manifest.load(index)


def test_the_queries_stay_whatever_is_written(built, network, tmp_path):
    index = shutil.copytree(built, tmp_path / "index")
    before = (index / layout.BACKGROUND).read_bytes()
    gradindex.append(index, save(tmp_path / "b.npy", tiny_tokens(1, 6)), model=network)
    gradindex.delete(index, [0, 41])
    gradindex.compact(index)
    path = index / "segments" / manifest.load(index).segments[1].name / "vectors.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    gc.collect()
    assert gradindex.verify(index, model=network, rebuild=True).rebuilt
    assert (index / layout.BACKGROUND).read_bytes() == before
    assert manifest.load(index).background == {"queries": 64, "sample": 150}
