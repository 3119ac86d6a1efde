"""Totals by group and their standard errors against plain sums; who counts, what is refused."""

import json
import math
import shutil
from collections import defaultdict

import numpy as np
import pytest
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.errors import InputError
from gradindex.influence.codes import score_error
from gradindex.terminal import visible
from search.ask.controls import Controls
from search.ask.settings import settle
from search.rank.group_totals import GROUPS_KEPT, total_groups
from search.rank.grouping import Grouping
from search.rank.query_gradient import form_gradients
from search.rank.ranking import CodeRanking
from search.rank.shortlist import Shortlist
from search.show import wording
from search.show.terminal_text import group_lines
from support.documents import small_documents
from support.indexes import APPLES, QUESTION, SMALL
from support.scores import codes_of, exact

FRUIT = {"prompt": "The plum", "completion": " number 2"}  # fits in eight tokens
SHORT = {"k": 5, "shortlist": 15}


@pytest.fixture(scope="module")
def many(model_folder, data_file, tmp_path_factory):
    """The same documents in shorter sequences: more of them than are in the random sample."""
    return gradindex.build(str(model_folder), data_file, tmp_path_factory.mktemp("many") / "index",
                           **{**SMALL, "seq_len": 8})


@pytest.fixture
def copied(index_folder, tmp_path):
    return shutil.copytree(index_folder, tmp_path / "copy")


def shares_by(index, key):
    """{place: {value: share of its tokens}}, from the records."""
    found = []
    for record in index.snapshot.records(range(len(index))):
        own = defaultdict(float)
        for number, part in enumerate(record.parts):
            last = number + 1 == len(record.parts)
            end = len(record.tokens) if last else record.parts[number + 1].token
            own[key(part)] += (end - part.token) / len(record.tokens)
        found.append(dict(own))
    return found


def noise_of(index, question):
    """σ_m of every sequence."""
    settings = settle(Controls(), index.manifest)
    [target], _ = form_gradients(index.snapshot, [index.make_query(**question)], settings, 96)
    return score_error(index.manifest.calibration["c"], float(np.linalg.norm(target.vector)),
                       index.snapshot.norms, len(target.vector))


def reference(index, estimate, variance, shares):
    """{value: (total, standard error, sequences, excess, its error)}, a sum at a time.

    The same of the whole, which has no excess.
    """
    # row i of the identity asks for coordinate i of what every code stands for
    identity = np.eye(index.manifest.code["length"], dtype=np.float32)
    codes = index.snapshot.code_scores(identity).T.astype(np.float64)
    values = list(dict.fromkeys(value for own in shares for value in own))
    totals = {}
    for value in [*values, "whole"]:
        weight = [1.0 if value == "whole" else own.get(value, 0.0) for own in shares]
        total = sum(w * one for w, one in zip(weight, estimate, strict=True))
        joined = np.sum([w * code for w, code in zip(weight, codes, strict=True)], axis=0)
        apart = sum(w**2 * (code**2).sum() for w, code in zip(weight, codes, strict=True))
        independent = sum(w**2 * one for w, one in zip(weight, variance, strict=True))
        totals[value] = (total, math.sqrt((joined**2).sum() / apart * independent),
                         sum(w > 0 for w in weight))
        if value != "whole":
            totals[value] += excess_of_weights(np.array(weight), estimate, variance, codes)
    return totals


def excess_of_weights(weight, estimate, variance, codes):
    """A group's excess and its standard error, with every sequence's own coefficient."""
    n, part = len(weight), sum(weight) / len(weight)
    coefficients = weight - part
    low, high = np.quantile(estimate, [0.025, 0.975])
    typical = np.var([min(max(one, low), high) for one in estimate])
    summed = (codes.sum(0) ** 2).sum() / (codes**2).sum()
    away = estimate - estimate.mean()
    typical *= max(0.0, 1 - (1 - summed / n) * variance.sum() / (away**2).sum())
    spread = 0.0
    for inside in (weight > 0, weight == 0):
        if inside.any():
            own, many = estimate[inside], inside.sum()
            alike = max(1, summed * many / n)
            if weight[inside].all():
                together = ((weight[:, None] * codes).sum(0) ** 2).sum()
                alike = together / (weight[:, None]**2 * codes**2).sum()
            around = sum((one - own.mean()) ** 2 for one in own)
            around -= variance[inside].sum() * max(0.0, 1 - alike / many)
            spread += max(0.0, 8 * typical + around) / (7 + many) * (coefficients[inside]**2).sum()
    independent = (coefficients**2 * variance).sum()
    joined = ((coefficients[:, None] * codes).sum(0) ** 2).sum()
    apart = (coefficients[:, None]**2 * codes**2).sum()
    ratio = joined / apart if part < 1 else 1.0
    error = math.sqrt(spread + independent * ratio)
    return sum(estimate * weight) - estimate.sum() / n * sum(weight), error


def assert_equal_to(result, expected):
    whole = expected.pop("whole")
    assert {group.value for group in result.groups} == set(expected)
    assert result.group_count == len(expected)
    scale = max(abs(own[0]) for own in expected.values())
    for group, own in [*((group, expected[group.value]) for group in result.groups),
                       (result.total, whole)]:
        total, error, count = own[:3]
        assert group.influence == pytest.approx(total, rel=1e-3, abs=1e-4 * scale)
        assert group.standard_error == pytest.approx(error, rel=1e-3, abs=1e-6 * scale)
        assert group.sequences == count
        assert group.nats is None  # N_train was not given
        if own[3:]:
            excess, error = own[3:]
            assert group.excess == pytest.approx(excess, rel=1e-3, abs=1e-4 * scale)
            assert group.excess_error == pytest.approx(error, rel=2e-3, abs=1e-6 * scale)
            z = group.excess / error if error > 1e-6 * scale else 0.0
            assert group.z == pytest.approx(z, rel=2e-3)
            assert group.unsure == (abs(group.z) < 2)
    assert result.total.value is None and result.total.hits == [hit.id for hit in result]
    assert (result.total.excess, result.total.z, result.total.unsure) == (None, None, False)
    assert_in_order(result)


def assert_in_order(result):
    """By z, most of what is looked for first; groups of few after the others."""
    sign = -1 if result.opponents else 1
    order = [(group.sequences < 5, -sign * group.z) for group in result.groups]
    assert order == sorted(order)


def estimates(index, truth, codes, noise, length):
    """What is known of every sequence after a search, and its variance, one after the other."""
    order = np.argsort(-codes, kind="stable")
    cutoff = codes[order[length]]
    sample = index.snapshot.random_sample()
    known = []
    for place, (influence, code, sigma) in enumerate(zip(truth, codes, noise, strict=True)):
        if place in sample:
            known.append((influence, 0.0))
        elif place in order[:length]:
            z = (influence - cutoff) / sigma
            chance = 0.5 * math.erfc(-z / math.sqrt(2))
            mean = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / chance
            known.append((influence + sigma * mean, sigma**2 * mean * (mean + z)))
        else:
            known.append((code, sigma**2))
    return np.array(known).T


def of_field(part):
    return part.fields["place"]


@pytest.mark.parametrize("by, key", [
    ("place", of_field), ("document", lambda part: f"doc/{part.document}"),
    ("source", lambda part: part.source)])
def test_totals_of_codes(index, by, key):
    codes, noise = codes_of(index, QUESTION).astype(np.float64), noise_of(index, QUESTION)
    result = index.search(**QUESTION, k=5, rescore=False, group_by=by)
    expected = reference(index, codes, noise**2, shares_by(index, key))
    assert_equal_to(result, expected)
    assert result.controls["group_by"] == by


def test_totals_after_rescoring(many):
    codes, noise = codes_of(many, FRUIT).astype(np.float64), noise_of(many, FRUIT)
    known = estimates(many, exact(many, FRUIT), codes, noise, 15)
    left = known[1] / noise**2
    assert (left == 1).sum() > 20 and ((left > 0) & (left < 1)).sum() > 2
    result = many.search(**FRUIT, **SHORT, group_by="place")
    assert_equal_to(result, reference(many, *known, shares_by(many, of_field)))
    for group in result.groups:
        assert group.hits == [hit.id for hit in result if hit.fields["place"] == group.value]


def test_totals_where_all_is_exact(index):
    truth, shares = exact(index, QUESTION), shares_by(index, of_field)
    for sign, opponents in ((1, False), (-1, True)):
        result = index.search(**QUESTION, k=5, shortlist="all", group_by="place",
                              opponents=opponents)
        for group in [*result.groups, result.total]:
            own = [one for one, share in zip(truth, shares, strict=True)
                   if group is result.total or group.value in share]
            assert group.influence == pytest.approx(sum(own), rel=1e-3)
            assert group.standard_error == 0 and group.sequences == len(own)
            assert math.isfinite(group.z or 0)
        assert_in_order(result)
        assert result.groups[0].z * sign > 0 and all(
            group.excess_error > 0 for group in result.groups)


@pytest.mark.parametrize("controls", [
    {"opponents": True}, {"normalize": "cosine"}, {"candidates": "tfidf"}, {"candidates": "both"}])
def test_the_hits_stay_as_they_are(index, controls):
    plain = index.search(**QUESTION, **SHORT, **controls)
    assert plain.groups == [] and plain.total is None
    result = index.search(**QUESTION, **SHORT, **controls, group_by="place")
    assert result.hits == plain.hits and result.recall == plain.recall
    assert sum(len(group.hits) for group in result.groups) == len(result)
    assert sum(group.influence for group in result.groups) == pytest.approx(result.total.influence)


def test_what_is_deleted_does_not_count(copied):
    gone = [0, 5, 17, 20, 33]
    gradindex.delete(copied, gone)
    index = gradindex.open(copied)
    assert len(index) == index.manifest.next_id - len(gone)
    codes, noise = codes_of(index, QUESTION).astype(np.float64), noise_of(index, QUESTION)
    expected = reference(index, codes, noise**2, shares_by(index, of_field))
    result = index.search(**QUESTION, k=5, rescore=False, group_by="place")
    assert result.total.sequences == len(index)
    assert_equal_to(result, expected)
    gradindex.compact(copied)
    compacted = gradindex.open(copied).search(**QUESTION, k=5, rescore=False, group_by="place")
    for group, other in zip(result.groups, compacted.groups, strict=True):
        assert group.value == other.value and group.sequences == other.sequences
        assert group.influence == pytest.approx(other.influence, rel=1e-4)
        assert group.standard_error == pytest.approx(other.standard_error, rel=1e-4)


def test_damaged_segments_are_left_out(copied):
    path = copied / "segments" / "000001" / "records.lmdb"
    path.write_bytes(path.read_bytes()[:-1])
    index = gradindex.open(copied, allow_damaged=True)
    codes, noise = codes_of(index, QUESTION).astype(np.float64), noise_of(index, QUESTION)
    expected = reference(index, codes, noise**2, shares_by(index, of_field))
    result = index.search(**QUESTION, k=5, rescore=False, group_by="place")
    assert result.total.sequences == len(index) == index.snapshot.coverage.of_sequences - 16
    assert_equal_to(result, expected)


def test_what_was_appended_counts(copied, more_data):
    before = gradindex.open(copied).search(**QUESTION, k=5, shortlist="all", group_by="place")
    index = gradindex.append(copied, more_data)
    result = index.search(**QUESTION, k=5, rescore=False, group_by="place")
    counted = {group.value: group.sequences for group in result.groups}
    assert counted == {group.value: group.sequences + 4 for group in before.groups}


def test_packed_sequences_count_by_their_shares(model_folder, tmp_path):
    """And values of every kind are told apart: 1 and true are two, equal lists one."""
    kinds = [1, True, "1", None, ["a", {"b": 1}]]
    rows = [{"text": document["text"], "kind": kinds[n % 5]}
            for n, document in enumerate(small_documents()[:20])]
    for row in rows[3::5]:
        del row["kind"]
    index = gradindex.build(str(model_folder), rows, tmp_path / "packed", pack=True, **{
        **SMALL, "id_field": None, "keep_fields": ["kind"]})
    shares = shares_by(index, lambda part: json.dumps(part.fields["kind"]))
    assert max(map(len, shares)) > 2
    codes, noise = codes_of(index, QUESTION).astype(np.float64), noise_of(index, QUESTION)
    result = index.search(**QUESTION, k=5, rescore=False, group_by="kind")
    assert sorted(json.dumps(group.value) for group in result.groups) == \
        sorted(json.dumps(kind) for kind in kinds)
    hits = {hit.id for hit in result}
    for group in result.groups:
        group.value = json.dumps(group.value)
        places = [place for place, own in enumerate(shares) if group.value in own]
        assert set(group.hits) == hits & set(places)
    assert_equal_to(result, reference(index, codes, noise**2, shares))
    by_document = index.search(**QUESTION, k=1, rescore=False, group_by="document")
    assert {group.value.rpartition(":")[2] for group in by_document.groups} == \
        {str(n) for n in range(1, 21)}


def test_unknown_fields_are_refused_before_the_model(index_folder, tmp_path):
    index = gradindex.open(index_folder, model=tmp_path / "nowhere")
    said = r"^group_by url: expected document, source or a field that was kept at the build " \
        r"\(kept were place\)"
    with pytest.raises(InputError, match=said):
        index.search(**QUESTION, group_by="url")
    for wrong in (3, ["place"]):
        with pytest.raises(InputError, match="expected document, source or a field"):
            index.search(**QUESTION, group_by=wrong)


@pytest.mark.parametrize("opponents", [False, True])
def test_the_first_groups_are_kept_and_those_with_hits(opponents):
    random = np.random.default_rng(5)
    influence = random.standard_normal(300)
    sign = -1.0 if opponents else 1.0
    grouping = Grouping(list(range(300)), np.arange(300), np.arange(300), np.ones(300),
                        np.full(300, 2.0), np.ones(300), 3.0)
    order = np.argsort(-sign * influence)
    last = int(order[-1])
    groups, total = total_groups(grouping, sign * influence, np.full(300, 0.25), sign,
                                 {7: last, 8: int(order[3])}, lambda total: (total / 100, None))
    assert [group.value for group in groups] == [*order[:GROUPS_KEPT], last]
    assert [group.hits for group in groups if group.hits] == [[8], [7]]
    assert groups[0].influence == influence[order[0]]
    assert groups[0].standard_error == pytest.approx(math.sqrt(2 * 0.25))
    assert total.influence == pytest.approx(influence.sum())
    assert total.standard_error == pytest.approx(math.sqrt(3 * 300 * 0.25))


@pytest.mark.parametrize("by_norm, listed", [(False, 0), (True, 0), (False, 60)])
def test_estimates_have_no_bias_and_the_variance_they_say(by_norm, listed):
    """Where the exact scores alone, put in for the codes of the shortlist, have one."""
    random = np.random.default_rng(11)
    n, length, draws = 1000, 200, 1500
    norms = random.uniform(0.5, 2.0, n)
    influence = norms * (random.standard_t(4, n) - 0.1)
    errors, plain, said = [], [], []
    for _ in range(draws):
        codes = influence + 2.0 * norms * random.standard_normal(n)
        chosen = random.choice(n, listed, replace=False)
        shortlist = Shortlist(CodeRanking(codes, norms, by_norm=by_norm), 2.0, length,
                              chosen if listed else None)
        rescored = set(shortlist.places(length))
        counted = shortlist.advance(rescored, length)
        sample = random.choice(n, 64, replace=False).tolist()
        estimate, variance = shortlist.estimates(codes, counted, influence[counted], sample,
                                                 influence[sample])
        errors.append((estimate - influence).sum())
        said.append(variance.sum())
        codes[counted] = influence[counted]
        plain.append((codes - influence).sum())
    deviation = math.sqrt(np.mean(said))
    assert abs(np.mean(errors)) < 4 * deviation / math.sqrt(draws) + 0.02 * deviation
    assert np.mean(plain) < -deviation
    assert np.std(errors) == pytest.approx(deviation, rel=0.08)


def test_group_lines(index):
    result = index.search(**QUESTION, **SHORT, group_by="document")
    lines = group_lines(result, 100)
    assert len(lines) == 2 + wording.GROUPS_SHOWN + 4
    first, total = result.groups[0], result.total
    assert lines[2].split() == [
        wording.standard_errors(first), wording.number(first.influence),
        wording.unsigned(first.standard_error),
        *wording.nats(first, result, "").split(), str(first.sequences),
        str(len(first.hits)), first.value]
    assert lines[-4].split() == ["and", "20", "more"]
    assert lines[-3].split()[-5:] == [str(total.sequences), "5", "all", "40", "together"]
    unsure = sum(abs(one.z) < 2 for one in result.groups[:wording.GROUPS_SHOWN])
    assert lines[-1] == "groups of fewer than 5 sequences (20 of these) come last"
    assert unsure and lines[-2].startswith(f"? {unsure} of the 20 shown are within 2 standard")
    assert sum("? " in line for line in lines[2:-4]) == unsure
    result.groups[0].value = hostile = "\x1b[2J\nnext\u202e"
    result.groups[1].value = None
    lines = group_lines(result, 100)
    assert lines[2].endswith(f"  {visible(hostile)}") and lines[3].endswith("  no document")
    narrow = group_lines(result, 78)
    assert [line for line in narrow if "no document" in line] == [lines[3][:78]]
    assert all(character.isprintable() for line in lines for character in line)
    assert max(map(len, narrow)) <= 78
    assert group_lines(index.search(**QUESTION, **SHORT), 100) == []
    for group in result.groups:
        group.unsure = False
        group.sequences = 5
    assert group_lines(result, 100)[-1].endswith("all 40 together")


def test_the_flag(index_folder):
    arguments = ["search", str(index_folder), "-p", QUESTION["prompt"], "-c",
                 QUESTION["completion"], "-k", "2", "--group-by"]
    ran = CliRunner().invoke(main_group, [*arguments, "place", "--format", "json"])
    content = json.loads(ran.stdout)
    assert len(content["groups"]) == content["group_count"] == 5
    assert content["total"]["sequences"] == content["sequences"]
    assert content["controls"]["group_by"] == "place"


def test_group_lines_on_a_narrow_terminal(index):
    """No table: each group's numbers stand under its name, none of them cut off."""
    result = index.search(**APPLES, k=12, group_by="place")
    for width in (24, 40, 60):
        lines = group_lines(result, width)
        assert max(map(len, lines)) <= width
        text = " ".join(" ".join(lines).split())
        for group in result.groups:
            hits = "1 hit" if len(group.hits) == 1 else f"{len(group.hits)} hits"
            z = wording.standard_errors(group)
            assert f"{group.value} z {z}, {wording.number(group.influence)} ± " in text
            assert f"{group.sequences:,} sequences, {hits}" in text
        assert f"all {result.group_count} together" in text
