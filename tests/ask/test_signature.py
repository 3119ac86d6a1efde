"""Python, flags, form and JSON say the same of Question and Controls."""

import inspect
from dataclasses import fields
from typing import get_args, get_type_hints

import click
import pydantic
import pytest

from gradindex.cli import main_group
from gradindex.errors import InputError
from search.ask.controls import CONTROLS, DEFAULTS, TYPES, ControlArguments, Controls, flag_of
from search.ask.keywords import QuestionOptions, split
from search.ask.question import Question
from search.ask.settings import settle
from search.engine import Searcher
from search.serve.request import SearchRequest

QUESTION = {"prompt", "completion", "token_ids", "labels", "messages", "tools",
            "chat_template_kwargs", "versus", "score_on", "text", "text_b", "label", "versus_label",
            "chosen", "rejected", "response", "margin"}
BY_NAME = {"prompt", "completion", "id"}  # not among the options


def flags_of(command):
    """The options of a command by their longest flag."""
    parameters = main_group.get_command(None, command).params
    return {max(one.opts, key=len): one for one in parameters if isinstance(one, click.Option)}


def test_the_keywords_are_the_fields():
    assert get_type_hints(ControlArguments) == get_type_hints(Controls) == TYPES
    hints = get_type_hints(Question)
    assert get_type_hints(QuestionOptions) == {
        name: kind for name, kind in hints.items() if name not in BY_NAME}
    assert {field.name for field in fields(Question)} == {*QUESTION, "id"}


@pytest.mark.parametrize("name, others", [
    ("search", set()), ("search_many", QUESTION), ("rescore", set()),
    ("compare", QUESTION - {"prompt", "score_on"})])
def test_functions_show_every_keyword_with_its_type_and_default(name, others):
    shown = inspect.signature(getattr(Searcher, name)).parameters
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in shown.values())
    for control in fields(Controls):
        assert shown[control.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[control.name].default == control.default
        assert shown[control.name].annotation == TYPES[control.name]
    assert QUESTION - others <= set(shown)
    for one in (QUESTION - others) & set(QuestionOptions.__annotations__):
        assert shown[one].default is None


def test_keywords_are_split_into_what_and_how():
    question, controls = split("a", None, {"labels": [1], "token_ids": [1], "k": 3})
    assert question == Question("a", None, [1], [1]) and controls == Controls(k=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kk'"):
        split("a", "b", {"kk": 3})


def test_the_flags_are_those_of_the_table():
    flags = flags_of("search")
    for name, control in CONTROLS.items():
        flag, default = flags[flag_of(name)], getattr(DEFAULTS, name)
        assert flag.help == control.help
        assert flag.is_flag == (TYPES[name] is bool)
        if TYPES[name] is bool:
            assert flag_of(name).startswith("--no-") == default
        else:
            assert (flag.default or None) == default
            number = {int: click.INT, float: click.FLOAT}
            expected = [kind for kind in get_args(TYPES[name]) if kind in number]
            text = str in get_args(TYPES[name]) or not expected
            assert flag.type == (click.STRING if text else number[expected[0]])
            assert flag.metavar == control.unit
    for command in ("rescore", "eval", "report"):
        for text, flag in flags_of(command).items():
            if text in flags and text not in ("--queries", "--output", "--format"):
                assert flag.help == flags[text].help


def test_a_request_has_the_defaults_and_bounds_of_the_table():
    schema = SearchRequest.model_json_schema()["properties"]
    asked = SearchRequest(prompt="x")
    controls = set(CONTROLS) & set(SearchRequest.model_fields)
    assert set(CONTROLS) - controls == {"time_limit", "rank", "train_sequences"}
    for name in controls:
        assert getattr(asked, name) == getattr(DEFAULTS, name)
        shown, bounds = schema[name], CONTROLS[name].page
        kinds = shown.get("anyOf", [shown])
        for key, bound in (("minimum", bounds.least), ("exclusiveMinimum", bounds.above),
                           ("maximum", bounds.most), ("maxLength", bounds.letters),
                           ("description", CONTROLS[name].api)):
            assert next((kind[key] for kind in kinds if key in kind), None) == bound, (name, key)
        choices = tuple(shown.get("enum", ()))
        assert choices == CONTROLS[name].choices
    assert asked.controls() == DEFAULTS
    with pytest.raises(pydantic.ValidationError, match="pattern"):
        SearchRequest(prompt="x", modules="(a+)+b")


@pytest.mark.parametrize("name, wrong, expected", [
    ("k", True, "-k True: expected a whole number"),
    ("rank", 2.0, "--rank 2.0: expected a whole number"),
    ("train_sequences", -3, "--train-sequences -3: expected a number above 0"),
    ("damping", float("inf"), "--damping inf: expected a number above 0"),
    ("time_limit", "2", "--time-limit 2: expected a number above 0"),
    ("recall", 1.01, "--recall 1.01: expected a share above 0, at most 1"),
    ("normalize", None, "--normalize None: expected none, cosine or relatif"),
])
def test_bounds_hold_whoever_asks(name, wrong, expected):
    with pytest.raises(InputError) as raised:
        settle(Controls(**{name: wrong}), None)
    assert str(raised.value) == f"{expected}."
