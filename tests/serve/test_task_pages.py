"""The page and its API where an index's task is not the next token: what they ask and answer."""

import csv
import html
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import torch
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from gradindex.results import Result
from search.ask.naming import LABELS, as_arguments, as_labels
from search.engine import Searcher
from search.serve.examples import examples
from search.serve.request import SearchRequest, from_form
from search.show.data_files import csv_table
from search.show.html import document
from search.show.terminal_text import render_terminal
from support.server import OWN, Running, same
from support.task_models import (
    answers,
    network_of_texts,
    policy,
    save,
    sentences,
    tokenizer_of_texts,
)

SMALL: dict[str, Any] = {"bits": 512, "fit_sequences": 20, "batch_tokens": 64, "seq_len": 16}
NAMES = {"id2label": {0: "negative", 1: "positive", 2: "<so> & so"},
         "label2id": {"negative": 0, "positive": 1, "<so> & so": 2}}
CLASS = {"text": "the film was so great", "label": "positive"}
PAIR = {"prompt": "why was it", "chosen": " a great film", "rejected": " a bad film"}
ONE = {"prompt": "why was it", "response": " a great film"}


def built(folder: Path, network: Any, rows: list[dict[str, Any]], **more: Any) -> Searcher:
    tokenizer = tokenizer_of_texts()
    if more.get("task") == "preference":
        tokenizer.eos_token = "[SEP]"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return gradindex.build(save(folder / "model", network, tokenizer), folder / "rows.jsonl",
                           folder / "index", **{**SMALL, **more})


@pytest.fixture(scope="module")
def searchers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Searcher]:
    folders = {name: tmp_path_factory.mktemp(name)
               for name in ("classification", "stars", "two texts", "reward", "preference")}
    stars = {"id2label": {n: str(n + 1) for n in range(3)},
             "label2id": {str(n + 1): n for n in range(3)}}
    two = [{"premise": row["sentence"], "hypothesis": "it was good", "label": row["label"]}
           for row in sentences(20)]
    return {
        "classification": built(folders["classification"], network_of_texts("bert", 3, **NAMES),
                                [*sentences(20), {**sentences(1)[0], "label": "<so> & so"}],
                                keep_fields=["number"]),
        "stars": built(folders["stars"], network_of_texts("bert", 3, **stars),
                       [{**row, "label": n % 3 + 1} for n, row in enumerate(sentences(20))]),
        "two texts": built(folders["two texts"], network_of_texts("bert", 3, **NAMES), two),
        "reward": built(folders["reward"], network_of_texts("bert", 1), answers(20)),
        "preference": built(folders["preference"], policy(torch.float32), answers(20),
                            task="preference"),
    }


@pytest.fixture(scope="module")
def servers(searchers: dict[str, Searcher]) -> Iterator[dict[str, Running]]:
    for searcher in searchers.values():  # transformers loads no two models at a time
        searcher.snapshot.load()
    made = {name: Running(searcher) for name, searcher in searchers.items()}
    yield made
    for one in made.values():
        one.stop()


@pytest.mark.parametrize("name, asked", [
    ("classification", CLASS), ("classification", {"text": "the film was so great"}),
    ("classification", {**CLASS, "label": 0}), ("classification", {**CLASS, "label": 2.0}),
    ("classification", {**CLASS, "label": "2"}),
    ("classification", {**CLASS, "versus_label": "negative", "opponents": True, "k": 3}),
    ("two texts", {**CLASS, "text_b": "it was good"}),
    ("reward", PAIR), ("reward", {**ONE, "rescore": False}), ("preference", PAIR),
    ("preference", ONE)])
def test_what_is_asked_is_answered_as_python_answers(
    name: str, asked: dict[str, Any], servers: dict[str, Running], searchers: dict[str, Searcher],
) -> None:
    """By the API, the page, its address, its command and its Python."""
    running, searcher = servers[name], searchers[name]
    expected = searcher.search(**asked)
    same(running.search(asked), expected)
    request = SearchRequest(**asked)
    form = from_form(parse_qsl(urlsplit(request.url()).query))
    assert {**form.given(), "label": str(form.label)} == \
        {**request.given(), "label": str(request.label)}
    page = running.ask("GET", request.url(), OWN).text
    job = re.search(r'data-job="(\w+)"', page)
    assert job is not None
    running.wait(job[1])
    page = running.ask("GET", request.url(), OWN).text
    assert 'data-state="done"' in page and page.count("<article") == len(expected)
    assert "ompletion" not in page
    words = shlex.split(request.command(str(searcher.snapshot.path)))
    done = CliRunner().invoke(main_group, [*words[1:], "--format", "json"])
    assert [hit["id"] for hit in json.loads(done.stdout)["hits"]] == [hit.id for hit in expected]
    space: dict[str, Any] = {}
    exec(request.python(str(searcher.snapshot.path)), space)
    assert [hit.id for hit in space["result"]] == [hit.id for hit in expected]


def test_the_form_follows_the_task(servers: dict[str, Running]) -> None:
    for name, fields in (
        ("classification", {"text", "label", "versus_label"}),
        ("two texts", {"text", "text_b", "label", "versus_label"}),
        ("reward", {"prompt", "chosen", "rejected", "response"}),
        ("preference", {"prompt", "chosen", "rejected", "response"}),
    ):
        page = servers[name].ask("GET", "/").text
        form = page[page.index("<form") : page.index("</form>")]
        own = re.findall(r'name="(\w+)"', form)
        assert fields == set(own[: len(fields)]) and len(set(own)) == len(own)
        assert not {"completion", "compare", "versus", "score"} & set(own)
        assert "ompletion" not in page
    page = servers["classification"].ask(
        "GET", "/search?" + urlencode({**CLASS, "label": 2, "versus_label": "negative"}), OWN).text
    first, second = re.findall(r"<select id=\"(?:versus_)?label\".*?</select>", page)
    options = re.findall(r'<option value="(.*?)" *(selected)? *>(.*?)</option>', first)
    assert options == [
        ("", "", "the model’s own"), ("negative", "", "negative"), ("positive", "", "positive"),
        ("&lt;so&gt; &amp; so", "selected", "&lt;so&gt; &amp; so")]
    assert re.findall(r'value="(\w+)" selected', second) == ["negative"]
    # a class that is called by a number isn't the one of that place
    page = servers["stars"].ask("GET", "/search?" + urlencode({**CLASS, "label": "2"}), OWN).text
    chosen = re.search(r"<select id=\"label\".*?</select>", page)
    assert chosen and re.findall(r'value="(\w+)" selected', chosen[0]) == ["2"]


@pytest.mark.parametrize("name, asked, said", [
    ("classification", {"label": "positive"}, "--text is missing"),
    ("classification", {"text_b": "good"}, "--text is missing, the text that"),
    ("classification", {**CLASS, "label": "neutral"}, "outside the model's classes"),
    ("classification", {**CLASS, "label": 7}, "expected 0 to 2"),
    ("classification", {**CLASS, "versus_label": "positive"}, "is the label itself"),
    ("classification", {**CLASS, "prompt": "good"}, "--prompt has no use"),
    ("classification", {"text": "so", "label": 0, "versus_label": 0}, "--versus-label 0 is the la"),
    ("classification", {**CLASS, "damping": 0.1, "group_by": "so"}, "--group-by so: expected doc"),
    ("classification", {"completion": "good"}, "no use with an index of the task classification"),
    ("classification", {**CLASS, "compare": "negative"}, "compare sets two completions"),
    ("classification", {"compare": "negative"}, "compare sets two completions"),
    ("classification", {**CLASS, "score_on": "0"}, "--score-on has no use"),
    ("classification", {**CLASS, "response": " good"}, "--response has no use"),
    ("classification", {**CLASS, "text": "so good " * 40}, "more than the model's context"),
    ("reward", {"prompt": "why"}, "--chosen is missing. Ask with a prompt with --chosen"),
    ("reward", {**PAIR, "response": " good"}, "give one kind"),
    ("reward", {**PAIR, "rejected": PAIR["chosen"]}, "--rejected is --chosen itself"),
    ("reward", CLASS, "--text has no use"),
    ("preference", {**PAIR, "versus": " a"}, "--versus has no use"),
    ("preference", {"chosen": " a great film"}, "--rejected is missing. Ask with"),
])
def test_what_a_task_cant_be_asked_is_refused_by_name(
    name: str, asked: dict[str, Any], said: str, servers: dict[str, Running],
) -> None:
    found = servers[name].ask("POST", "/api/search", body=asked)
    assert found.status == 422 and as_arguments(said) in found.json["error"]
    page = servers[name].ask("GET", "/search?" + urlencode(asked), OWN)
    assert page.status == 422 and 'role="alert"' in page.text
    assert as_labels(said) in page.text.replace("&#39;", "'")
    assert "--" not in found.json["error"] and not re.search(r'role="alert">[^<]* --', page.text)


def test_a_label_that_is_none_is_said(servers: dict[str, Running]) -> None:
    def ask(label: Any) -> Any:
        return servers["classification"].ask("POST", "/api/search", body={**CLASS, "label": label})

    for label in (0.5, [1], {"a": 1}):
        found = ask(label)
        assert found.status == 422 and found.json["error"].startswith(
            f"label: Value error, expected a class by name or number, found {label!r}")
    assert ask(None).status == 202 == ask("positive").status
    assert "outside the model's classes (found 'true'" in ask(True).json["error"]


def test_errors_name_what_the_form_shows(servers: dict[str, Running], running: Running) -> None:
    forms = "".join(server.ask("GET", "/").text for server in (*servers.values(), running))
    for name, label in LABELS.items():
        told = as_labels(f"give --{name.replace('_', '-')}, not `a --k`.")
        assert told == f"give “{label}”, not `a --k`."
        # a choice among models where there are several alone
        assert (f">{label}" in forms) == (name != "members")
        assert name == "members" or f'name="{"score" if name == "score_on" else name}' in forms
    asked = {"text": "a good film", "label": "positive", "versus_label": 1}
    page = servers["classification"].ask("GET", "/search?" + urlencode(asked), OWN).text
    assert "“rather than” 1 is the label itself" in page


def test_routes_that_have_no_use_say_so(servers: dict[str, Running], running: Running) -> None:
    for name, example in (("classification", "a text and a label"), ("reward", "with chosen and")):
        empty = servers[name].ask("POST", "/api/search", body={"k": 3})
        assert empty.status == 422 and example in empty.json["error"]
        tokens = servers[name].ask("POST", "/api/tokens", body={"completion": " good"})
        assert tokens.status == 422 and "tokens are those of a completion" in tokens.json["error"]
    for foreign in (CLASS, ONE):
        found = running.ask("POST", "/api/search", body=foreign)
        assert found.status == 422 and "no use with an index of the task causal" in \
            found.json["error"]


def test_sequences_have_their_label_and_border(
    servers: dict[str, Running], searchers: dict[str, Searcher],
) -> None:
    for name, label in (("classification", "negative"), ("two texts", "negative"),
                        ("reward", None)):
        record, = searchers[name].snapshot.records([0])
        found = servers[name].ask("GET", f"/api/sequence/{record.id}").json
        assert (found["label"], found["border"]) == (label, record.border)
    assert found["border"] == found["tokens"].index(" [CLS]")


def test_examples_are_questions_of_the_task(searchers: dict[str, Searcher]) -> None:
    """Each can be asked, and of a text that is indexed whole the first hit may be itself."""
    for name, fields in (("classification", {"text", "label"}),
                         ("two texts", {"text", "text_b", "label"}),
                         ("reward", {"prompt", "chosen", "rejected"}),
                         ("preference", {"prompt", "chosen", "rejected"})):
        made = examples(searchers[name])
        assert len(made) == 3 and all(set(one.given()) == fields for one in made), name
        for one in made:
            query = searchers[name].make_query(**one.given())
            assert query.tokens in [record.tokens.tolist() for record in searchers[
                name].snapshot.records(range(20))] or name == "preference"


def text_of(page: str) -> str:
    """What a person reads of a page."""
    bare = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(bare).split())


def test_a_hit_shows_its_label_and_whether_it_is_the_one_asked_about(
    searchers: dict[str, Searcher],
) -> None:
    searcher = searchers["classification"]
    result = searcher.search(**CLASS, k=21)
    shown, page = render_terminal(result, 300), text_of(document(result))
    for hit in result:
        compared = "like the query's" if hit.label == "positive" else "unlike the query's"
        said = f"label {hit.label}, {compared}, its log p {hit.log_p:.2f} nats"
        assert said in shown
        assert said in page
        assert f"number {hit.fields['number']}" in page
    assert {hit.label for hit in result} == {"negative", "positive", "<so> & so"}
    assert "text:  [CLS] the film was so great [SEP]\nlabel: positive\n" in shown
    assert "a head's at the text's first" in " ".join(shown.split())
    assert "layers 0 to 1 and head, damping" in shown
    blocks = render_terminal(searcher.search(**CLASS, k=1, modules="mlp"), 300)
    assert "a head's" not in blocks and "layers 0 to 1, damping" in blocks
    own = searcher.search(text=CLASS["text"])
    versus = searcher.search(**CLASS, versus_label="negative")
    for result, said in ((own, f"{own.query.label_name}, the model's own"),
                         (versus, "positive, rather than negative")):
        assert f"label: {said}\n" in render_terminal(result, 300)
        assert said in text_of(document(result))
    assert "completion" not in page + shown
    for hit in versus:
        compared = {"positive": "like the query's", "negative": "the one that it is compared with"}
        assert f"label {hit.label}, {compared.get(hit.label, 'unlike the query')}" in \
            render_terminal(versus, 300)
    for result, asked, effect in (
        (versus, "[log p(positive | text) − log p(negative | text)]",
         "log p(positive) rise against log p(negative), by"),
        (own, "log p(label | text)", "the label more likely, by"),
        (next(searcher.search_many([CLASS, CLASS], aggregated=True)), "Σ log p(label | text)",
         "the label more likely, summed over 2 queries, by"),
        (next(searcher.search_many([{**CLASS, "versus_label": 0}] * 2, aggregated=True)),
         "Σ [log p(label | text) − log p(other label | text)]",
         "log p(label) rise against log p(other label), summed over 2 queries, by")):
        assert f"I = ∇{asked}ᵀ (G+λI)⁻¹" in result.units
        assert f"would make {effect} I / N_train nats" in result.units


def test_a_pair_shows_both_its_texts(searchers: dict[str, Searcher]) -> None:
    for name in ("reward", "preference"):
        result = searchers[name].search(**PAIR, k=2)
        assert ("a head's at" in text_of(document(result))) == (name == "reward")
        page, shown = document(result), render_terminal(result, 300)
        lines = [re.sub(r"\[[+-]|\]", "", line) for line in shown.split("\n")]
        for hit in result:
            assert hit.border is not None
            sides = "".join(hit.tokens[: hit.border]), "".join(hit.tokens[hit.border :])
            assert (hit.chosen, hit.rejected) == (sides[0], sides[1].removeprefix(" "))
            assert hit.text == "".join(sides) and hit.text_b is None
            for side, text in zip(("chosen", "rejected"), sides, strict=True):
                assert f"     {side}: {text.strip().replace(']', '')}" in lines
                assert f"{side} {text.strip()}" in re.sub(r" +", " ", text_of(page))
        assert "its log p" in shown and "completion" not in shown + text_of(page)
        for side in ("chosen", "rejected"):
            assert re.search(rf"^{side}: .*{PAIR[side]}", shown, re.MULTILINE)


def test_hits_have_their_texts_in_every_form(searchers: dict[str, Searcher]) -> None:
    for name, asked, columns in (("reward", PAIR, {"chosen", "rejected"}),
                                 ("two texts", {**CLASS, "text_b": "good"}, {"text_b"}),
                                 ("classification", CLASS, set[str]())):
        found = searchers[name].search(**asked, k=2)
        [first, _] = csv.DictReader(io.StringIO(csv_table(found)))
        again = Result.from_json(found.to_json())
        frame = found.to_pandas()
        for column in ("text_b", "chosen", "rejected"):
            value = getattr(found[0], column)
            assert (value is not None) is (column in columns)
            assert first[column] == (value or "").replace("\n", "\\n")
            assert getattr(again[0], column) == value == frame[column].iloc[0]


def test_one_text_asked_of_an_index_of_two_is_said(
    searchers: dict[str, Searcher], tmp_path: Path,
) -> None:
    one, two = searchers["classification"], searchers["two texts"]
    pair, missing = {**CLASS, "text_b": "it was good"}, "the query has one text, and the sequences"
    spare = "the query has two texts, and the sequences of this index have one"
    assert one.search(**pair, k=1).warnings[0].startswith(spare)
    assert two.search(**CLASS, k=1).warnings[0].startswith(missing)
    assert two.search(**CLASS, k=1, rescore=False).warnings[0].startswith(missing)
    for index, asked in ((one, CLASS), (two, pair)):
        assert not [told for told in index.search(**asked, k=1).warnings if "the query has" in told]
    file = tmp_path / "queries.jsonl"
    file.write_text(json.dumps(CLASS) + "\n")
    for words in (["rescore", "--text", "good", "--ids", "-"], ["eval", "--queries", str(file)],
                  ["audit", "--against", str(file), "--exact", "1"]):
        words.insert(1, str(two.snapshot.path))
        done = CliRunner().invoke(main_group, words, input="0\n", catch_exceptions=False)
        assert f"warning: {missing}" in done.stderr


def test_two_texts_are_told_apart(searchers: dict[str, Searcher]) -> None:
    result = searchers["two texts"].search(**CLASS, text_b="it was good", k=1)
    shown = render_terminal(result, 300)
    assert "\nsecond text: it was good [SEP]\nlabel: positive\n" in shown
    assert re.search(r"^     second text: .*good", shown, re.MULTILINE)


def test_units_are_those_of_what_is_asked(searchers: dict[str, Searcher]) -> None:
    """Nats of a preference, units of reward of an answer: where they are known and where not."""
    pair, one = (searchers["reward"].search(**asked, k=2, train_sequences=10**9, group_by="source")
                 for asked in (PAIR, ONE))
    assert f"{pair[0].nats:+.3g} first-order nats" in render_terminal(pair, 300)
    assert "log p(chosen over rejected) = " in render_terminal(pair, 300)
    for result in (one, searchers["preference"].search(**PAIR, k=2, train_sequences=10**9)):
        shown, page = render_terminal(result, 300), document(result)
        assert f"{result[0].nats:+.3g} first-order reward" in shown
        assert f"{result[0].nats:+.3g} first-order reward" in text_of(page)
        assert 'data-room="Infinity Infinity" data-unit="reward"' in page
        assert " nats" not in re.sub(r"its log p \S+ nats", "", shown)
    assert re.search(r"influence +± +first-order reward +sequences", render_terminal(one, 300))
    assert '<th class="n">first-order reward</th>' in document(one)
    unknown = render_terminal(searchers["reward"].search(**ONE, k=2), 300)
    assert "change unknown" in unknown and "units of reward are left out" in unknown
    rescored = CliRunner().invoke(main_group, [
        "rescore", str(searchers["reward"].snapshot.path), "-p", "why", "--response", " good",
        "--ids", "-"], input="3\n")
    assert "∇r(answer)" in json.loads(rescored.stdout.splitlines()[0])["units"]
