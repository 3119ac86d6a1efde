"""The report's numbers against plain recomputation, and a page on which hostile text is inert."""

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.draws import Stream, generator
from gradindex.errors import InputError
from gradindex.progress import Progress
from search.ask.controls import Controls
from search.ask.settings import settle
from search.rank.generic_rate import all_rates
from search.show import html
from search.study import exact_sample, texts
from search.study.gradient_sizes import outer_fence
from search.study.report import render_report
from search.study.survey import survey
from search.study.tail import fit_tail, half
from support.documents import small_documents
from support.indexes import SMALL

BAD = '</style></pre></title><script>alert(1)</script><img src=x onerror=alert(2)>"\'&{{7*7}}{%'
SHORT = "</pre><script>a()"  # of few tokens
HIDDEN = "\u202e\x1b[2J\u200b\x07"


def survey_of(index, queries=None, sample=None, **controls):
    settings = settle(Controls(**controls), index.manifest)
    return survey(index, queries, sample, settings, Progress(None))


@pytest.fixture(scope="module")
def found(index):
    return survey_of(index)


@pytest.fixture(scope="module")
def truth(index, found):
    """Of each query, hits of every sequence by another way: one query, by token and module."""
    ids = index.snapshot.contents.ids.tolist()
    return [index.rescore(token_ids=one.query.tokens, labels=one.query.labels, ids=ids,
                          normalize="cosine") for one in found.queries]


def own_ids(index, one):
    """The ids of the query's own sequence and its equals."""
    place = index.snapshot.contents.place_of(one.origin)
    return {one.origin, *index.snapshot.copies(place)}


# ---- texts


def test_texts_are_counted_as_in_the_file(index, found, data_file):
    documents, length = small_documents(), SMALL["seq_len"]
    lengths = [len(index.snapshot.tokenizer(one["text"])["input_ids"]) for one in documents]
    windows = [-(-n // length) for n in lengths]
    [source] = found.texts.sources
    assert source.name == str(data_file)
    assert (source.documents, source.sequences, source.token_count) == (
        40, sum(windows), sum(lengths))
    [field] = found.texts.fields
    assert field.name == "place" and len(field.values) == 5
    for one in field.values:
        chosen = [n for n, document in enumerate(documents) if document["place"] == one.name]
        assert (one.documents, one.sequences, one.token_count) == (
            len(chosen), sum(windows[n] for n in chosen), sum(lengths[n] for n in chosen))
    counts = [one.sequences for one in field.values]
    assert counts == sorted(counts, reverse=True)
    assert found.texts.lengths.sum() == sum(lengths)
    assert found.texts.scored == index.manifest.scored_tokens
    assert Counter(found.texts.lengths.tolist()) == Counter(
        min(length, n - start) for n in lengths for start in range(0, n, length))


def test_packed_sequences_count_for_each_of_their_documents(model_folder, tmp_path):
    data = []
    for name in ("a", "b"):
        data.append(tmp_path / f"{name}.jsonl")
        data[-1].write_text("".join(json.dumps({"text": f"{name} plum {n}", "kind": [n % 2]}) + "\n"
                                    for n in range(9)))
    index = gradindex.build(str(model_folder), data, tmp_path / "index", pack=True,
                            **{**SMALL, "keep_fields": ["kind"], "id_field": None})
    read = texts.read_texts(index.snapshot, Progress(None))
    records = index.snapshot.records(range(len(index)))
    for source, path in zip(sorted(read.sources, key=lambda one: one.name), data, strict=True):
        assert source.name == str(path)
        assert source.sequences == sum(any(part.source == str(path) for part in record.parts)
                                       for record in records)
        assert source.documents == len({part.document for record in records
                                        for part in record.parts if part.source == str(path)})
    assert sum(one.sequences for one in read.sources) > len(index)  # one holds the border
    assert sum(one.token_count for one in read.sources) == read.lengths.sum()
    assert {one.name for one in read.fields[0].values} == {"[0]", "[1]"}


def test_too_many_values_are_not_told_apart(index, monkeypatch):
    monkeypatch.setattr(texts, "MOST_VALUES", 4)
    [field] = texts.read_texts(index.snapshot, Progress(None)).fields
    assert field.name == "place" and field.values is None


# ---- sizes


def test_sizes_are_exact_where_they_say_so(index, found, truth):
    exact = {hit.id: hit.self_influence for hit in truth[0]}
    ids, sample = index.snapshot.contents.ids, index.snapshot.random_sample()
    assert found.sizes.random_sample == sample
    np.testing.assert_allclose(found.sizes.exact, [exact[ids[place]] for place in sample],
                               rtol=1e-5)
    assert len(found.sizes.largest) == 10
    for one, estimate, size in found.sizes.largest:
        assert size == pytest.approx(exact[one.id], rel=1e-5)
        assert estimate == index.snapshot.norms[index.snapshot.contents.place_of(one.id)] ** 2
    listed = [estimate for _, estimate, _ in found.sizes.largest]
    first = index.snapshot.contents.first_equal == np.arange(len(index))
    assert listed == sorted((index.snapshot.norms[first] ** 2).tolist(), reverse=True)[:10]
    expected = [index.snapshot.norms[place] ** 2 / exact[ids[place]] for place in sample]
    np.testing.assert_allclose(found.sizes.ratios, expected, rtol=1e-5)
    assert 0.8 < np.median(found.sizes.ratios) < 1.25


def test_outliers_lie_beyond_the_fence():
    values = np.exp(np.concatenate([np.linspace(0, 1, 101), [5.0]]))
    fence = outer_fence(values)
    low, high = np.quantile(np.log(values), [0.25, 0.75])
    assert np.log(fence) == pytest.approx(high + 3 * (high - low))
    assert (values > fence).sum() == 1 and outer_fence(np.zeros(3)) == np.inf


# ---- influence


def test_queries_are_second_halves_of_different_sequences(index, found):
    assert len(found.queries) == 16
    owns = [one.origin for one in found.queries]
    first = [int(index.snapshot.contents.first_equal[index.snapshot.contents.place_of(one)])
             for one in owns]
    assert len(set(first)) == 16
    snapshot = index.snapshot
    for one, [record] in ((one, snapshot.records([snapshot.contents.place_of(one.origin)]))
                          for one in found.queries):
        assert one.query.tokens == record.tokens.tolist()
        positions = [n for n in range(1, len(record.tokens)) if record.scored[n]]
        half_of = positions[len(positions) // 2 :]
        assert [n for n, label in enumerate(one.query.labels) if label != -100] == half_of
    assert [one.origin for one in survey_of(index).queries] == owns


def test_influence_is_exact_and_leaves_out_a_querys_own(index, found, truth):
    assert found.sample == found.total == found.scored == len(index)
    for one, hits in zip(found.queries, truth, strict=True):
        own, seen, values, everything = own_ids(index, one), set(), [], []
        for hit in hits:
            if hit.id in own:
                continue
            everything.append(hit.influence)
            if not seen & {hit.id, *hit.duplicates}:
                values.append(hit.influence)
            seen.add(hit.id)
        assert one.sequences == len(everything) == len(index) - len(own)
        scale = max(map(abs, everything))
        np.testing.assert_allclose(sorted(one.values), sorted(values), atol=1e-5 * scale)
        assert one.half == half(np.array(everything), np.ones(len(everything)))
        assert one.interval is None and one.tail == fit_tail(one.values)


def test_shares_by_layer_and_kind(index, found, truth):
    kinds = {module.name: (module.layer, module.kind) for module in index.manifest.modules}
    assert found.groups == list(dict.fromkeys(kinds.values()))
    absolute, proponents = [], []
    for one, hits in zip(found.queries, truth, strict=True):
        own, sums, good = own_ids(index, one), Counter(), Counter()
        others = [hit for hit in hits if hit.id not in own]
        top = sorted(others, key=lambda hit: -hit.code_score)[: exact_sample.TOP_BY_CODE]
        for hit in others:
            groups = Counter()
            for name, value in hit.module_influence.items():
                groups[kinds[name]] += value
            for group, value in groups.items():
                sums[group] += abs(value)
                good[group] += value if hit in top and hit.influence > 0 else 0
        absolute.append([sums[group] / sum(sums.values()) for group in found.groups])
        proponents.append([good[group] / sum(good.values()) for group in found.groups])
    np.testing.assert_allclose(found.shares("absolute"), np.mean(absolute, axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.shares("proponents"), np.mean(proponents, axis=0), rtol=1e-4)
    assert found.shares("absolute").sum() == pytest.approx(1)


def test_a_sample_and_the_best_by_code_stand_for_all(index, found, truth, monkeypatch):
    monkeypatch.setattr(exact_sample, "TOP_BY_CODE", 6)
    some = survey_of(index, sample=20)
    assert some.sample == 20 and 20 < some.scored <= 20 + 16 * 6
    ids = index.snapshot.contents.ids
    random = generator(Stream.REPORT_SAMPLE, index.manifest.code["seed"])
    drawn = set(ids[np.sort(random.choice(len(index), 20, replace=False))].tolist())
    for one, hits in zip(some.queries, truth, strict=True):
        own = own_ids(index, one)
        others = [hit for hit in hits if hit.id not in own]
        top = sorted(others, key=lambda hit: -hit.code_score)[:6]
        rest = [hit for hit in others if hit.id in drawn and hit not in top]
        weight = (len(others) - 6) / len(rest)
        known = [(hit.influence, 1.0) for hit in top] + [(hit.influence, weight) for hit in rest]
        values, weights = (np.array(column) for column in zip(*known, strict=True))
        assert one.half == half(values, weights)
        low, high = one.interval
        assert low <= one.half <= high
        assert len(one.values) <= len([hit for hit in others if hit.id in drawn])


def test_a_sample_of_all_is_all(index, found):
    again = survey_of(index, sample=len(index))
    assert [one.half for one in again.queries] == [one.half for one in found.queries]
    np.testing.assert_array_equal(again.queries[0].values, found.queries[0].values)


def test_the_most_generic_are_those_with_the_highest_rates(index, found):
    everyone = index.rescore("The plum", " number 2", ids=range(len(index)))
    rates = all_rates(index.snapshot)[0]
    first = [hit.id for hit in everyone if not any(one < hit.id for one in hit.duplicates)]
    expected = sorted((rates[one] for one in first if rates[one] > 0.01), reverse=True)
    assert expected and [rate for _, rate in found.generic] == expected[:10]
    assert all(rates[one.id] == rate for one, rate in found.generic)


def test_queries_of_the_user(index):
    made = [index.make_query("The plum number 26 grows", " by the river.", id="q")]
    found = survey_of(index, made, train_sequences=500)
    [one] = found.queries
    assert one.origin is None and one.sequences == len(index)
    hits = index.rescore("The plum number 26 grows", " by the river.",
                         ids=index.snapshot.contents.ids.tolist())
    assert one.half == half(np.array([hit.influence for hit in hits]), np.ones(len(hits)))
    page = render_report(found)
    assert "yours" in page and "N_train = 500:" in page and "<mark> by the river.</mark>" in page


@pytest.mark.parametrize("queries, sample, said", [
    ([], None, "0 queries can be scored"), (None, 0, "--sample 0: expected a number above 0"),
])
def test_what_cannot_be_surveyed(index, queries, sample, said):
    with pytest.raises(InputError, match=said):
        survey_of(index, queries, sample)


# ---- the page


class Page(HTMLParser):
    """Elements with their attributes, and all text, as a browser would see them."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.text, self.styles, self._inside = [], "", [], None
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "style":
            self.styles.append(data)
        else:
            self.text += data


TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "h1",
    "h2", "h3", "p", "b", "a", "dl", "div", "dt", "dd", "small", "figure", "figcaption", "svg", "g",
    "rect", "line", "circle", "text", "table", "thead", "tbody", "tr", "th", "td", "ol", "li",
    "pre", "mark", "bdi", "span", "sub", "sup", "details", "summary",
}


def check_inert(content):
    """No script, no inline style, no address but the page's own, and a policy that says so."""
    page = Page(content)
    for tag, attributes in page.elements:
        assert tag in TAGS
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"style", "src", "srcset", "action", "background"} & set(attributes)
        assert attributes.get("href", "#")[0] == "#"
    [style] = page.styles
    assert "url(" not in style and "@import" not in style and "<" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    [policy] = [attributes["content"] for tag, attributes in page.elements
                if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy == (f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
                      "form-action 'none'")
    assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u202e]", content)
    return page


def test_the_page_says_what_was_found(found):
    page = check_inert(render_report(found))
    text = " ".join(page.text.split())
    assert f"{found.total:,} training sequences of model" in text
    assert "positive means that one more copy of the sequence would make the completion" in text
    for one in found.queries:
        assert f"{one.half} of {one.sequences}" in text
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    assert links == ids
    plots = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert all(one["role"] == "img" and one["aria-label"] for one in plots) and len(plots) > 20
    assert render_report(found) == render_report(found)


def test_classes_of_the_page_have_a_style(found):
    content = render_report(found)
    style = Page(content).styles[0]
    used = {name for classes in re.findall(r'class="([^"]*)"', content) for name in classes.split()}
    assert all(name == "gradindex-plot" or name.startswith(("r-", "plot-")) for name in used)
    assert {name for name in used if f".{name}" not in style} <= {"plot-value", "plot-name"}


def test_hostile_text_is_inert(model_folder, tmp_path):
    folder = tmp_path / "data<b>&"
    folder.mkdir()
    data = folder / "x'onload=.jsonl"
    data.write_text("".join(json.dumps({
        "text": f"{SHORT} {HIDDEN} plum {n} {{{{7*7}}}}", "id": f"{BAD}{HIDDEN}{n}",
        f"{BAD}{HIDDEN}": [BAD, HIDDEN, n % 3], "rtl": "\u05d0\u05d1 \u2067\ud800",
    }) + "\n" for n in range(12)))
    out = tmp_path / "<i>index&"
    index = gradindex.build(str(model_folder), data, out, seq_len=64, bits=512, segment_size=16,
                            batch_tokens=256, id_field="id",
                            keep_fields=[f"{BAD}{HIDDEN}", "rtl"])
    queries = [index.make_query(f"{SHORT}{HIDDEN}", f" plum{SHORT}", id=BAD)]
    for found in (survey_of(index), survey_of(index, queries)):
        content = render_report(found)
        page = check_inert(content)
        assert "<i>index&" in page.text
        assert BAD in page.text and SHORT in page.text
        assert "\\u202e\\x1b[2J\\u200b\\x07" in page.text and "{{7*7}}" in page.text
        content.encode()


def small_part(index_folder, tmp_path, left):
    """A copy of the index with all but the first `left` sequences deleted."""
    shutil.copytree(index_folder, tmp_path / "index")
    total = len(gradindex.open(index_folder))
    gradindex.delete(tmp_path / "index", ids=list(range(left, total)))
    return gradindex.open(tmp_path / "index"), total


@pytest.mark.parametrize("left", [1, 2, 7])
def test_an_index_of_few(index_folder, tmp_path, left):
    index, total = small_part(index_folder, tmp_path, left)
    found = survey_of(index)
    assert len(found.queries) == left and found.queries[0].sequences == left - 1
    text = " ".join(check_inert(render_report(found)).text.split())
    assert f"{left} of {left} sequences" in text
    assert f"deleted, text still here{total - left}" in text.replace(" deleted", "deleted")
    assert "No power law was fitted" in text


def test_damage_is_said(index_folder, tmp_path):
    shutil.copytree(index_folder, tmp_path / "index")
    [first, *_] = sorted((tmp_path / "index" / "segments").iterdir())
    (first / "vectors.faiss").write_bytes(b"no")
    index = gradindex.open(tmp_path / "index", allow_damaged=True)
    found = survey_of(index)
    text = " ".join(check_inert(render_report(found)).text.split())
    assert found.total == len(index) < found.coverage.of_sequences
    assert f"coverage {found.coverage.share:.1%}" in text
    assert f"damaged segments1: {first.name}" in text.replace("segments 1", "segments1")


# ---- the command


def run(*arguments):
    return CliRunner().invoke(main_group, ["report", *map(str, arguments)],
                              standalone_mode=False)


def test_the_command_writes_a_page(index_folder, tmp_path):
    out = tmp_path / "page.html"
    done = run(index_folder, "-o", out, "--sample", "12")
    assert done.return_value == 0 and done.stdout == "" and f"the report is in {out}" in done.stderr
    content = out.read_text(encoding="utf-8")
    check_inert(content)
    assert "a random 12 of" in content
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_command_takes_queries(index_folder, tmp_path):
    queries, out = tmp_path / "queries.jsonl", tmp_path / "page.html"
    queries.write_text('{"prompt": "The plum", "completion": " number 2 grows"}\n{"prompt": 3}\n')
    done = run(index_folder, "--queries", queries, "-o", out)
    assert done.return_value == 2 and "left out" in done.stderr
    assert "<mark> number 2 grows</mark>" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments, said", [
    (["--sample", "few"], "--sample few: expected a number above 0, or all"),
    (["-o", "missing/page.html"], "there is no folder missing"),
])
def test_the_command_refuses(index_folder, arguments, said):
    done = run(index_folder, *arguments)
    assert said in str(done.exception)


def test_the_template_is_part_of_the_package():
    folder = Path(html.__file__).parent / "page"
    assert {"report.html", "report.css", "plots.css"} <= {path.name for path in folder.iterdir()}
