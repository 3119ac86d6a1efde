"""What a chat says and its template doesn't show, so that a model never trained on it.

A template reads the fields that it knows and is silent of all others: of tools, of calls, of
messages whose role it has no words for. Trainers are as silent, so a row is indexed as the template
writes it, and what is missing is said.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from gradindex.model.messages import REASONING, Chat
from gradindex.model.signs import signed, signs_for

ARGUMENTS = "the arguments of "
Text = Callable[[Chat], str | None]  # a chat as its template writes it; None where that refuses it
Path = tuple[str | int, ...]  # of something in a chat: the keys and numbers that lead to it


def unshown(chat: Chat, plain: str, text: Text) -> tuple[str, ...]:
    """What of a chat isn't in its text, in words: the first of each kind, none where all of it is.

    `plain` is its text, `text` writes a chat that differs from it.
    """
    said = dict(_said(chat))
    [sign, _] = signs_for(repr((chat.messages, chat.tools)))
    # one rendering shows all of it, unless the template is a rare one
    marks = {path: f"{sign}{number}{sign}" for number, path in enumerate(said)}
    whole = text(_marked(chat, marks)) or ""
    doubtful = [path for path, mark in marks.items() if mark not in whole]
    lost: dict[str, str] = {}  # by its kind: of a long chat one message of each is enough
    for path in doubtful:
        kind = said[path].partition(" (")[0]
        if not {kind, kind.removeprefix(ARGUMENTS)} & lost.keys() and \
                text(_marked(chat, {path: sign})) == plain:
            lost[kind] = said[path]
    others = (_lost_reasoning(chat, sign, text), _lost_option(chat, plain, text))
    return (*lost.values(), *(other for other in others if other is not None))


def _lost_reasoning(chat: Chat, sign: str, text: Text) -> str | None:
    """The last reasoning of a chat if not even the answer's own turn shows it, in words.

    That of earlier turns many templates leave out, as their models want it.
    """
    for number, message in reversed(list(enumerate(chat.messages))):
        names = [name for name in REASONING if _says(message.get(name))]
        if names:
            turn = chat.until(number + 1)
            plain = text(turn)
            paths: list[Path] = [("messages", number, name) for name in names]
            if any(text(_marked(turn, {path: sign})) != plain for path in paths):
                return None
            return f"{names[0]} (message {number + 1})"
    return None


def _lost_option(chat: Chat, plain: str, text: Text) -> str | None:
    """A list or object that the template was told and doesn't show, such as documents, in words."""
    for name, value in chat.options.items():
        if isinstance(value, (list, dict)) and value:
            without = replace(chat, options={**chat.options, name: type(value)()})
            if text(without) == plain:
                return f"what chat_template_kwargs holds ({name})"
    return None


def _said(chat: Chat) -> Iterator[tuple[Path, str]]:
    """What a chat says, by its place: contents, calls with their arguments, tools by name."""
    for number, message in enumerate(chat.messages):
        where = f"(message {number + 1})"
        if _says(message.get("content")):
            yield ("messages", number, "content"), f"the content of role {message['role']} {where}"
        calls: list[tuple[Path, str, Any]] = [
            (("messages", number, "tool_calls", place), "tool_calls", call)
            for place, call in enumerate(message.get("tool_calls") or [])]
        calls.append((("messages", number, "function_call"), "function_call",
                      message.get("function_call")))
        for path, name, call in calls:
            path, call = _function(path, call)
            for key, words in (("name", name), ("arguments", ARGUMENTS + name)):
                if isinstance(call, dict) and _says(call.get(key)):
                    yield (*path, key), f"{words} {where}"
    for place, tool in enumerate(chat.tools or []):
        path, tool = _function(("tools", place), tool)
        if _says(tool.get("name")):
            yield (*path, "name"), f"the tools ({tool['name']})"


def _function(path: Path, value: Any) -> tuple[Path, Any]:
    """The function of a call or tool, which may stand in a field of this name."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        return (*path, "function"), value["function"]
    return path, value


def _says(value: Any) -> bool:
    """Whether a value is a text, or holds anything."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list):
        return any(_says(part.get("text")) for part in value)
    return isinstance(value, dict) and bool(value)


def _marked(chat: Chat, marks: dict[Path, str]) -> Chat:
    """The chat with marks behind what stands at these places."""
    whole: Any = {"messages": chat.messages, "tools": chat.tools}
    for path, mark in marks.items():
        whole = _put(whole, path, mark)
    return replace(chat, **whole)


def _put(holder: Any, path: Path, mark: str) -> Any:
    """What holds something, copied on the way to it: an object may stand in several places."""
    if not path:
        return signed(holder, mark)
    changed = copy.copy(holder)
    changed[path[0]] = _put(holder[path[0]], path[1:], mark)
    return changed
