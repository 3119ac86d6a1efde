"""The keywords of a search: what is asked and how, shown by every function that takes them.

`Question` and `Controls` hold names, types and defaults. A function that takes them all says
`**arguments: Unpack[SearchArguments]`, by which type checkers and editors know its keywords;
`with_keywords` tells the same to whoever looks at the function itself (`help`, notebooks).
`Unpack` takes no dataclass, so `QuestionOptions` and `ControlArguments` say names and types twice;
`test_the_keywords_are_the_fields` holds them equal.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_type_hints

from typing_extensions import TypedDict

from search.ask.controls import ControlArguments, Controls
from search.ask.question import Question

Function = TypeVar("Function", bound=Callable[..., Any])


class QuestionOptions(TypedDict, total=False):
    """The fields of `Question` that are given by keyword only, beside a prompt and a completion."""

    token_ids: Sequence[int] | None
    labels: Sequence[int] | None
    messages: list[dict[str, Any]] | None
    tools: list[Any] | None
    chat_template_kwargs: dict[str, Any] | None
    versus: str | None
    score_on: str | None
    text: str | None
    text_b: str | None
    label: str | int | None
    versus_label: str | int | None
    chosen: Any
    rejected: Any
    response: Any
    margin: float | None


class SearchArguments(QuestionOptions, ControlArguments, total=False):
    """All that a search takes by keyword."""


KEYWORD_DEFAULTS = {one.name: one.default for kind in (Question, Controls) for one in fields(kind)}


def with_keywords(function: Function) -> Function:
    """Show what `**arguments: Unpack[…]` takes in a function's signature, with its defaults."""
    # the annotation is the class itself, not a text: nothing here has postponed annotations
    signature = inspect.signature(function)
    *others, last = signature.parameters.values()
    assert last.kind is inspect.Parameter.VAR_KEYWORD
    [arguments] = get_args(last.annotation)
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY,
                                  default=KEYWORD_DEFAULTS[name], annotation=kind)
                for name, kind in get_type_hints(arguments).items()]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*others, *keywords])
    return function


def split(
    prompt: str | None, completion: str | None, arguments: SearchArguments
) -> tuple[Question, Controls]:
    """What is asked, and how to search for it."""
    about: dict[str, Any] = {}
    how: dict[str, Any] = {}
    for name, value in arguments.items():
        # what nobody knows goes to Controls, which refuses it as Python does
        (about if name in QuestionOptions.__annotations__ else how)[name] = value
    return Question(prompt, completion, **about), Controls(**how)
