"""Which part of a rendered chat is the assistant's, where the template doesn't mark it.

An answer begins behind the words that open one, as the template writes them to ask for it, and ends
where the chat up to it ends. For most templates both are beginnings of the whole chat's text. Some
render the same turn in another way if it is the last, or drop reasoning once a user has gone on. Of
those, the text around the same word of a message is compared: a sign put behind the message's last
word shows where that is, in the whole chat as in a part of it.
"""

from collections.abc import Iterator
from typing import Any

from gradindex.model.messages import REASONING
from gradindex.model.rendering import ChatTemplateError, Renderer, Stretch
from gradindex.model.signs import signed, signs_for
from gradindex.model.tokenise import common_characters, common_tokens

Messages = list[dict[str, Any]]
THOUGHT = ("<think>", "</think>")


def turns(renderer: Renderer, chosen: list[bool]) -> list[Stretch]:
    """The stretches of the text that chosen messages of the assistant fill, in order.

    Raises ChatTemplateError where the template hides one.
    """
    stretches = []
    for number, message in enumerate(renderer.chat.messages):
        if not chosen[number] or message["role"] != "assistant":
            continue
        start, end = _start(renderer, number), _end(renderer, number)
        start = None if start is None else _before_thought(renderer.text, start)
        # all that is shown of the message has to be inside: some templates part it (Gemma 4 puts
        # a content behind what the tools gave)
        words = ends_of_words(renderer, renderer.chat.messages, number, renderer.text)
        if start is None or end is None or not all(start <= word <= end for word in words):
            reason = ("the chat template, which has no {% generation %} marks, hides which words "
                      f"are the assistant's (message {number + 1})")
            raise ChatTemplateError(
                f"{reason}. Give a template that marks them (--chat-template), or the records as "
                "prompt and completion.", reason)
        stretches.append((start, end))
    return stretches


def end_of_message(
    renderer: Renderer, messages: Messages, number: int, text: str, answer: bool = False
) -> int | None:
    """Where the last word of a message ends in the text of `messages`; None if it isn't in it."""
    return next(ends_of_words(renderer, messages, number, text, answer), None)


def ends_of_words(
    renderer: Renderer, messages: Messages, number: int, text: str, answer: bool = False
) -> Iterator[int]:
    """Where the last word of each part of a message ends: calls, content, reasoning."""
    sign, _ = signs_for(text)
    found = False
    for changed in _with_sign(messages[number], sign):
        # an empty content has no words, and is looked for only where nothing else is shown
        if found and changed.get("content") == sign + str(messages[number].get("content")):
            continue
        other = _rendered(
            renderer, [*messages[:number], changed, *messages[number + 1:]], answer)
        if other is not None and sign in other:
            found = True
            yield common_characters(text, other)


def _with_sign(message: dict[str, Any], sign: str) -> Iterator[dict[str, Any]]:
    """The message with a sign behind its last word, put where a template may show it."""
    if calls := message.get("tool_calls"):
        *others, last = calls
        if function := _signed_function(last.get("function", last), sign):
            changed = {**last, "function": function} if "function" in last else function
            yield {**message, "tool_calls": [*others, changed]}
    if function := _signed_function(message.get("function_call"), sign):
        yield {**message, "function_call": function}
    if message.get("content") or isinstance(message.get("content"), str):
        yield {**message, "content": signed(message["content"], sign)}
    for name in REASONING:
        if isinstance(message.get(name), str):
            yield {**message, name: signed(message[name], sign)}


def _signed_function(function: Any, sign: str) -> dict[str, Any] | None:
    """A call's function with a sign behind its name; None where it has no name."""
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return {**function, "name": function["name"] + sign}
    return None


def _start(renderer: Renderer, number: int) -> int | None:
    """Where an answer begins in the text; None where that can't be told."""
    messages, text = renderer.chat.messages, renderer.text
    if not number:
        return _behind_header(renderer, number, 0)
    before = messages[:number]
    place = end_of_message(renderer, messages, number - 1, text)
    opened = _rendered(renderer, before, answer=True)
    if opened is None:  # some refuse a chat that only a system has begun
        return _behind_header(renderer, number, place)
    if text.startswith(opened):
        return _behind_unasked(renderer, before, opened, len(opened))
    # What opens an answer may go on with words that this one doesn't have (<think>). As in TRL, the
    # answer begins with the first token that differs.
    other = end_of_message(renderer, before, number - 1, opened, answer=True)
    if place is None or other is None:
        return None
    start = _behind(renderer, opened[other:], text[place:], place)
    return None if start is None else _behind_unasked(renderer, before, opened, start)


def _behind_unasked(renderer: Renderer, before: Messages, opened: str, start: int) -> int:
    """Where an answer begins that would begin at `start` if its template could ask for one.

    A template without `add_generation_prompt` writes what opens an answer only before the answer's
    own words.
    """
    if opened != _rendered(renderer, before):
        return start
    [sign, _] = signs_for(renderer.text)
    plain = _rendered(renderer, [*before, {"role": "assistant", "content": sign}]) or ""
    header = plain[len(opened):].partition(sign)[0] if plain.startswith(opened) else ""
    return start + len(header) if header.strip() and renderer.text.startswith(header, start) \
        else start


def _before_thought(text: str, start: int) -> int:
    """Where an answer begins with the thought that the words asking for one may open (<think>).

    Training by marks counts it: TRL's templates have their marks before it.
    """
    opened = text[:start].rstrip()
    return opened.rfind(THOUGHT[0]) if opened.endswith(THOUGHT) and THOUGHT[0] in opened else start


def _behind(renderer: Renderer, opening: str, text: str, place: int) -> int | None:
    """Where a text that stands at a place goes on behind the first tokens that it has in common."""
    tokens, spans = renderer.tokens(text)
    same = common_tokens(renderer.tokens(opening)[0], tokens)
    return place + int(spans[same - 1, 1]) if same else None


def _behind_header(renderer: Renderer, number: int, place: int | None) -> int | None:
    """Where an answer begins by the words that would open another one behind the whole chat."""
    messages, text = renderer.chat.messages, renderer.text
    end = end_of_message(renderer, messages, number, text)
    header = _header(renderer, messages) or _header(renderer, messages[: number + 1])
    if place is None or end is None or not header:
        return None
    # the longest beginning of them that is there, for they may go on with <think>
    for length in reversed(renderer.tokens(header)[1][:, 1].tolist()):
        found = text.rfind(header[:length], place, end)
        if found >= 0:
            return int(found + length)
    return None


def _header(renderer: Renderer, messages: Messages) -> str | None:
    """The words that open an answer to some messages; None where they change what is before."""
    text = _rendered(renderer, messages)
    opened = _rendered(renderer, messages, answer=True)
    if text is None or opened is None or not opened.startswith(text):
        return None
    return opened[len(text):]


def _end(renderer: Renderer, number: int) -> int | None:
    """Where an answer ends in the text; None where that can't be told."""
    messages, text = renderer.chat.messages, renderer.text
    until = messages[: number + 1]
    if len(until) == len(messages):
        return len(text)
    closed = _rendered(renderer, until)
    if closed is not None and text.startswith(closed):
        return len(closed)
    place = end_of_message(renderer, messages, number, text)
    if place is None:
        return None
    # what stands behind the answer's last word where it is the chat's last message, and where the
    # words that open another follow (gpt-oss closes the two differently)
    last = _behind_word(renderer, until, closed, answer=False)
    amid = _behind_word(renderer, until, _rendered(renderer, until, answer=True), answer=True)
    header = _header(renderer, messages[:number])
    if amid is not None:
        amid = amid.removesuffix(header) if header and amid.endswith(header) else None
    for tail in (last, amid):
        if tail is not None and text.startswith(tail, place):
            return place + len(tail)
    # some close the chat itself behind its last message (Phi-3)
    return None if last is None else _behind(renderer, last, text[place:], place)


def _behind_word(
    renderer: Renderer, messages: Messages, text: str | None, answer: bool
) -> str | None:
    """What the text of some messages has behind the last word of the last of them."""
    if text is None:
        return None
    place = end_of_message(renderer, messages, len(messages) - 1, text, answer)
    return None if place is None else text[place:]


def _rendered(renderer: Renderer, messages: Messages, answer: bool = False) -> str | None:
    """The text of some of the messages; None where the template refuses to render only these."""
    try:
        return renderer.render(messages, answer)
    except ChatTemplateError:
        return None
