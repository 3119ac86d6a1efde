"""Reports of other tasks than the next token."""


import pytest
import torch
from click.testing import CliRunner

import gradindex
from gradindex.cli import main_group
from support.task_models import (
    NAMES,
    SMALL,
    answers,
    network_of_texts,
    policy,
    sentences,
    tokenizer_of_texts,
    written,
)

PAIR = {"prompt": "why was it", "chosen": " so great", "rejected": " an awful film"}
ONE = {"prompt": "why was it", "response": " so great"}
REWARD = "positive means that one more copy of the sequence would make the answer's reward larger"


def page_of(index, queries, folder):
    """The page of a report on an index, without its markup."""
    out = folder / "page.html"
    done = CliRunner().invoke(main_group, [
        "report", str(index), "--queries", str(written(folder / "queries.jsonl", queries)),
        "-o", str(out)], standalone_mode=False)
    assert done.return_value == 0, done.exception
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """An index of a reward model, and one of a policy, with a derived field."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{**row, "margin": 0.0} for row in answers(16)]
    rows[-1]["chosen"] = " so"  # the only one that isn't longer
    made = {"reward": network_of_texts("bert", 1, torch.float32),
            "preference": policy(torch.float32)}
    for task, network in made.items():
        network.save_pretrained(folder / f"{task} model")
        tokenizer_of_texts().save_pretrained(folder / f"{task} model")
        gradindex.build(str(folder / f"{task} model"), rows, folder / task, task=task,
                        derive=["longer-chosen"], **SMALL)
    return folder


@pytest.mark.parametrize("task, query, said", [
    ("reward", ONE, "reward = "), ("preference", ONE, "β log π = "),
    ("preference", PAIR, "β log π(chosen) − β log π(rejected) = "),
])
def test_rewards_are_called_rewards(task, query, said, pairs, tmp_path):
    page = page_of(pairs / task, [query, query | {"prompt": "why"}], tmp_path)
    assert page.count(f'<p class="r-who">{said}') == 2
    assert "units of reward to first order" in page and "is one unit of reward a copy" in page
    assert "log p =" not in page and "nat a copy" not in page


def test_both_texts_of_a_pair_are_shown_and_bounded(pairs, tmp_path):
    page = page_of(pairs / "reward", [PAIR], tmp_path)
    assert "log p(chosen over rejected) = −" in page.replace("= -", "= −")
    assert "is one nat a copy" in page
    records = gradindex.open(pairs / "reward").snapshot.records(range(16))
    longest = max(max(one.border, len(one.tokens) - one.border) for one in records)
    assert longest < SMALL["seq_len"] <= max(len(one.tokens) for one in records)
    assert f"no text fills the sequence length of {SMALL['seq_len']}." in page
    assert "<b>chosen</b> [CLS] why was it" in page and "\n<b>rejected</b> [CLS] why was it" in page
    assert "Sequences by field “longer-chosen”" in page


def test_the_label_of_a_text_is_shown(tmp_path):
    network_of_texts("bert", 2, torch.float32, **NAMES).save_pretrained(tmp_path / "model")
    tokenizer_of_texts().save_pretrained(tmp_path / "model")
    gradindex.build(str(tmp_path / "model"), sentences(16), tmp_path / "index", **SMALL)
    page = page_of(tmp_path / "index", [{"text": "a great plot", "label": "positive"}], tmp_path)
    assert " · label <bdi>negative</bdi> · " in page and "log p(positive) = " in page
