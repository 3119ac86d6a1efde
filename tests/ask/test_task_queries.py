"""Queries of other tasks than the next token: files of rows, and what can't be asked."""

import csv
import gzip
import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import gradindex
from gradindex.errors import InputError
from gradindex.storage.build_plan import CorpusSettings
from search.ask.query_files import make_queries, read_queries
from search.ask.question import Question
from support.task_models import (
    NAMES,
    SMALL,
    answers,
    network_of_texts,
    policy,
    save,
    sentences,
    tokenizer_of_texts,
    written,
)

CLASSES = CorpusSettings(16, task="classification", labels=("negative", "positive"))

# the tokenizer joins the end of the prompt and one of the answers
ACROSS = {"prompt": "why was no", "chosen": "t good", "rejected": " bad"}


def asked(path, settings, *, unread=()):
    """The questions of a file, without their ids where these are their numbers."""
    found = read_queries(path, settings=settings)
    assert found.problems == [] and found.unread == list(unread)
    return [question.given() for question in found.questions.values()]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """An index of a classifier, of a reward model, and of a policy."""
    folder, tokenizer = tmp_path_factory.mktemp("indexes"), tokenizer_of_texts()
    ended = tokenizer_of_texts()
    ended.eos_token = "[SEP]"
    models = {
        "classification": save(folder / "c", network_of_texts("bert", 2, torch.float32, **NAMES),
                               tokenizer),
        "reward": save(folder / "r", network_of_texts("bert", 1, torch.float32), tokenizer),
        "preference": save(folder / "p", policy(torch.float32), ended)}
    rows = {"classification": sentences(30), "reward": answers(12),
            "preference": [*answers(12), {
                **ACROSS, "ref_chosen_logps": -5, "ref_rejected_logps": -5}]}
    return {task: gradindex.build(model, written(folder / f"{task}.jsonl", rows[task]),
                                  folder / task, task=task, **SMALL)
            for task, model in models.items()}


# ---- files


def tables(folder, rows):
    """The same rows as JSON lines, CSV, TSV and Parquet."""
    paths = [written(folder / "rows.jsonl", rows)]
    for name, separator in (("rows.csv", ","), ("semicolons.csv", ";"), ("rows.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            table.writeheader()
            table.writerows(rows)
        paths.append(folder / name)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return [*paths, folder / "rows.parquet"]


def test_rows_of_labelled_texts_are_queries(tmp_path):
    rows = [{"sentence": "good film", "label": "positive", "idx": "a"},
            {"sentence": "bad; very, \"bad\"", "label": "0", "idx": "b"}]
    for path in tables(tmp_path, rows):
        assert asked(path, CLASSES, unread=["idx"]) == [
            {"text": "good film", "label": "positive"},
            {"text": "bad; very, \"bad\"", "label": "0"}]
    path = written(tmp_path / "two.jsonl", [
        {"premise": "good", "hypothesis": "bad", "label": 1, "versus_label": 0, "id": "x"},
        {"sentence": "good"}, {"text": "good", "label": None}])
    found = read_queries(path, settings=CLASSES)
    assert list(found.questions) == ["x", 2, 3] and found.problems == found.unread == []
    assert found.questions["x"] == Question(
        text="good", text_b="bad", label=1, versus_label=0, id="x")
    assert found.questions[2].given() == {"text": "good"} == found.questions[3].given()


def test_fields_are_called_as_the_build_has_them(tmp_path):
    named = CorpusSettings(16, task="classification", text_field="body", label_field="stars")
    path = written(tmp_path / "rows.jsonl", [{"body": "good", "stars": 1},
                                             {"text": "bad", "label": 0}])
    assert asked(path, named) == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    pairs = CorpusSettings(16, task="reward", chosen_field="win", rejected_field="lose",
                           prompt_field="ask", margin_field="gap")
    path = written(tmp_path / "pairs.jsonl", [
        {"ask": "why", "win": "good", "lose": "bad", "gap": 0.5, "who": 1},
        {"prompt": "why", "response": "good"}])
    assert asked(path, pairs, unread=["who"]) == [
        {"prompt": "why", "chosen": "good", "rejected": "bad", "margin": 0.5},
        {"prompt": "why", "response": "good"}]


def test_rows_of_pairs_are_queries(tmp_path):
    [row] = answers(1)
    taken = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    for path in tables(tmp_path, [row]):
        [found] = asked(path, CorpusSettings(16, task="reward"),
                        unread=["ref_chosen_logps", "ref_rejected_logps"])
        assert {**found, "margin": float(found["margin"])} == {**taken, "margin": 0.0}
        [found] = asked(path, CorpusSettings(16, task="preference"),
                        unread=["margin", "ref_chosen_logps", "ref_rejected_logps"])
        assert found == taken


def test_a_table_may_hold_pairs_and_single_answers(indexes, tmp_path):
    """Where a row has nothing it asks about nothing; a row with both is refused as flags are."""
    pair = {"prompt": "why", "chosen": " good", "rejected": " bad", "response": None}
    single = {"prompt": "why", "chosen": None, "rejected": None, "response": " good"}
    for path in tables(tmp_path, [pair, single, {**pair, "response": " so"}]):
        found = read_queries(path, settings=CorpusSettings(16, task="reward"))
        made = make_queries(indexes["reward"].snapshot, found, set())
        assert [(query.id, query.unit, len(query.others)) for query in made] == [
            (1, "nats", 0), (2, "reward", 0)] and not found.unread
        assert [str(problem) for problem in found.problems] == [
            f"{path}:3: response asks about one answer, chosen and rejected about two; give one "
            "kind."]


def test_labels_that_count_from_1_are_not_taken_for_others(indexes, tmp_path):
    rows = [{"text": "good", "label": 1 + n % 2} for n in range(6)]
    found = read_queries(written(tmp_path / "rows.jsonl", rows), settings=CLASSES)
    with pytest.raises(InputError, match=r"rows.jsonl: the labels are the numbers 1, 2.*is read as "
                       "a place among them, from 0 on"):
        make_queries(indexes["classification"].snapshot, found, set())


def test_files_that_hold_no_rows_are_refused(tmp_path):
    empty, packed = tmp_path / "empty.jsonl", tmp_path / "rows.jsonl.gz"
    empty.touch()
    packed.write_bytes(gzip.compress(b'{"text": "good"}'))
    with pytest.raises(InputError, match="no query; expected JSON lines with a text and a label"):
        read_queries(empty, settings=CLASSES)
    with pytest.raises(InputError, match=r"rows.jsonl.gz is compressed; expected JSON lines\. Unp"):
        read_queries(packed, settings=CLASSES)


def test_rows_that_cannot_be_asked_are_said_with_their_place(indexes, tmp_path):
    path = written(tmp_path / "rows.jsonl", [
        {"sentence": "good", "label": "positive"}, {"sentence": "good", "lable": 1},
        {"sentence": "good", "label": [1]}, {"sentence": "good", "label": "nope"},
        {"sentence": " ", "label": 1}, {"sentence": "good " * 40, "label": 1},
        {"sentence": "good", "label": -1}, {"prompt": "good", "completion": " film"}])
    found = read_queries(path, settings=CLASSES)
    assert [str(problem) for problem in found.problems] == [
        f"{path}:2: a text without a label, and a field 'lable': a label that is misspelt? Call it "
        "label, or leave it out to ask about the model's own",
        f"{path}:3: field 'label' is not text or a number",
        f"{path}:8: prompt has no use with an index of the task classification. Ask with "
        "a text and a label (text, label)"]
    made = make_queries(indexes["classification"].snapshot, found, set())
    assert [(query.id, query.label_name) for query in made] == [(1, "positive")]
    for number, reason in [(4, "outside the model's classes"), (5, "empty text"),
                           (6, "42 tokens, more than the model's context of 32"),
                           (7, "unlabelled")]:
        [problem] = [one.why for one in found.problems if one.number == number]
        assert reason in problem
    table = tmp_path / "rows.csv"
    table.write_bytes(b"text,label\ngood,1\ngood\nb\xffd,1\n,1\n")
    found = read_queries(table, settings=CLASSES)
    assert list(found.questions) == [1] and [one.number for one in found.problems] == [
        2, 3, 4]
    for name, content in (("a.csv", b"text,text\n1,2\n"), ("a.parquet", b"text"),
                          ("b.csv", b'text\n"open\n')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"--queries .*{name} can't be read as a table"):
            read_queries(tmp_path / name)


# ---- questions


@pytest.mark.parametrize("task, question, reason", [
    ("classification", {"text": "\ud800"}, "a lone surrogate in text"),
    ("classification", {"text": 5}, "text is not text"),
    ("classification", {"text": "good", "text_b": 4}, "text_b is not text"),
    ("classification", {"text": "good", "text_b": " "}, "empty text_b"),
    ("classification", {"text": "good", "label": 10**400}, "found a huge number"),
    ("classification", {"text": "good", "label": 1, "versus_label": "positive"}, "nothing to comp"),
    ("reward", {"prompt": "why", "response": " good", "margin": 1.0}, "^margin goes with"),
    ("reward", {"prompt": "why", "chosen": " good", "rejected": " bad", "margin": float("inf")},
     "'margin' is no number"),
    ("reward", {"prompt": "why", "chosen": " good" * 40, "rejected": " bad"}, "43 tokens, more"),
    ("reward", {"prompt": "why", "chosen": " good", "rejected": " good"}, "nothing to compare"),
    ("preference", {"prompt": "why", "chosen": " good", "rejected": " good"}, "nothing to compare"),
    ("preference", {"prompt": "why", "chosen": " zzz", "rejected": " yyy"}, "same .as tokens"),
    ("preference", {"prompt": [{"role": "user", "content": "why"}],
                    "response": [{"role": "assistant", "content": "so"}]}, "no chat template"),
])
def test_questions_that_cannot_be_asked(task, question, reason, indexes):
    with pytest.raises(InputError, match=reason):
        indexes[task].search(**question)


def test_a_pair_is_asked_about_as_the_same_row_was_learned(indexes):
    """Both answers begin where the first of them does; of a single one nothing else is known."""
    index = indexes["preference"]
    query = index.make_query(**ACROSS)
    assert [text.token_texts[text.tokens.index(next(filter(lambda one: one >= 0, text.labels)))]
            for text in query.texts] == [" not", " no"]
    result = index.search(**ACROSS, k=13)
    [own] = [hit for hit in result if hit.id == 12]
    assert math.log(1 / (1 + math.exp(-result.query.log_p))) == pytest.approx(own.log_p, rel=1e-5)
    assert own.cosine == pytest.approx(1, abs=1e-5)
    single = index.make_query(prompt=ACROSS["prompt"], response=ACROSS["rejected"])
    assert [token for token in single.labels if token >= 0] == query.others[0].tokens[-2:]


def test_an_index_of_chats_is_asked_with_chats(tmp_path):
    """As lists, or JSON text of them; a plain text is answered, and what is wrong with it said."""
    def chat(role, content):
        return [{"role": role, "content": content}]

    rows = [{"prompt": chat("user", row["prompt"]), "chosen": chat("assistant", row["chosen"]),
             "rejected": chat("assistant", row["rejected"])} for row in answers(12)]
    index = gradindex.build(
        network_of_texts("bert", 1, torch.float32), rows, tmp_path / "index",
        tokenizer=tokenizer_of_texts(), chat_template="{% for m in messages %}{{ m['role'] }} "
        "{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}",
        **SMALL)
    asked = {"prompt": rows[3]["prompt"], "response": rows[3]["chosen"]}
    pair = {name: rows[3][name] for name in ("prompt", "chosen", "rejected")}
    for question in (asked, pair):
        found = index.search(**question)
        as_text = {name: json.dumps(value) for name, value in question.items()}
        again = index.search(**as_text)
        assert [hit.influence for hit in again] == [hit.influence for hit in found]
        assert again.query == found.query and found.query.tokens[0] == 1  # a role, unknown here
        assert not any("chats" in warning for warning in found.warnings)
    plain = index.search(prompt="why was it", response=" a great film")
    [said] = [warning for warning in plain.warnings if "as chats do, and the query" in warning]
    assert "begin with '[UNK] why was it [UNK]', as" in said
    assert said.endswith("on a command line as JSON")


@pytest.mark.parametrize("task", ["reward", "preference"])
def test_pairs_and_single_answers_share_a_session(task, indexes):
    index, prompt = indexes[task], "why was it"
    pair = {"prompt": prompt, "chosen": " a great film", "rejected": " an awful plot"}
    several = [pair, {"prompt": prompt, "response": " so great"}, pair,
               {"prompt": prompt, "response": " an awful plot"}]
    together = list(index.search_many(several, k=len(index)))
    for question, found in zip(several, together, strict=True):
        alone = index.search(**question, k=len(index))
        assert found.query.log_p == pytest.approx(alone.query.log_p, abs=1e-5)
        assert found.query.unit == alone.query.unit
        scores = {hit.id: hit.influence for hit in alone}
        np.testing.assert_allclose([hit.influence for hit in found],
                                   [scores[hit.id] for hit in found], rtol=1e-3, atol=1e-3)
    if task == "reward":  # log p of a pair in nats, and a reward
        with pytest.raises(InputError, match="some of these queries is in nats and on others in u"):
            next(index.search_many(several, aggregated=True))
        several, together = several[1::2], together[1::2]
    [total] = index.search_many(several, aggregated=True, k=len(index))
    for hit in total:
        assert hit.influence == pytest.approx(sum(
            {one.id: one.influence for one in found}[hit.id] for found in together),
            rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("task, rows, said", [
    ("classification", [{"prompt": "a", "completion": f" {n}"} for n in range(7)],
     "7 rows (1, 2, 3, 4, 5, …): prompt has no use with an index of the task classification. Ask "
     "with a text and a label (text, label)."),
    ("classification", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2,
     "2 rows (1, 2): prompt has no use"),
    ("reward", [{"sentence": "good", "label": 1}] * 3,
     "3 rows (1, 2, 3): unknown field 'sentence'; expected some of prompt, chosen, rejected, "
     "response, margin, id."),
    ("preference", [{"text": "good"}, {"text": "bad"}], "2 rows (1, 2): text has no use with"),
    ("causal", [{"text": "good", "label": 1}], ":1: text has no use with an index of the "
     "task causal. Ask with a prompt and a completion (prompt, completion)."),
    ("reward", [{"prompt": "a", "completion": " b"}, {"prompt": "a", "chosen": 5}],
     "response; {path}:2: field 'chosen' is not text or a list."),
])
def test_a_file_for_another_task_is_refused_once(task, rows, said, tmp_path):
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError) as raised:
        read_queries(path, settings=CorpusSettings(16, task=task))
    message = str(raised.value)
    assert message.startswith(f"--queries: no row of {path} can be used. {path}:")
    assert said.format(path=path) in message and message.count("Ask with") <= 1


def test_what_is_wrong_with_many_rows_is_said_once(indexes, tmp_path):
    path = written(tmp_path / "rows.jsonl", [
        {"text": "good", "label": "x"}, {"text": "good", "label": 1}, {"text": "so", "label": "x"},
        {"text": "good", "versus_label": 5, "id": "one", "label": 1}, "good"])
    found = read_queries(path, settings=CLASSES)
    assert len(make_queries(indexes["classification"].snapshot, found, set())) == 1
    said = found.complaints()
    assert len(said) == 3 and said[2].startswith(f"{path}:5: expected an object")
    assert said[0].startswith(f"{path}: 2 rows (1, 3): the query can't be read: a label outside")
    assert said[1].startswith(f"{path}:4: query 'one': the query can't be read: a label outside")


def test_a_label_is_not_compared_with_itself(indexes):
    index = indexes["classification"]
    own = index.search(text="good film", k=1).query.label_name
    with pytest.raises(InputError, match=f"^versus_label {own} is the model's own label, which is "
                       "asked about where label names none: there is nothing to compare. Give an"):
        index.search(text="good film", versus_label=own)
    with pytest.raises(InputError, match=r"^versus_label 1 is the label itself: there is nothing"):
        index.search(text="good film", label="positive", versus_label=1)
