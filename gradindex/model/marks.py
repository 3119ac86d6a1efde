"""Which messages the {% generation %} marks of a rendered chat belong to."""

from gradindex.model.rendering import ChatTemplateError, Renderer, Stretch
from gradindex.model.turns import ends_of_words


def stretches_of(renderer: Renderer, marked: list[Stretch], chosen: list[bool]) -> list[Stretch]:
    """Those of the marked stretches that belong to the chosen messages.

    Raises ChatTemplateError where one holds words of a chosen message and of another.
    """
    if all(chosen):
        return marked
    messages = renderer.chat.messages
    words = [(place, number) for number in range(len(messages))
             for place in ends_of_words(renderer, messages, number, renderer.text)]
    kept = []
    for start, end in marked:
        held = {number for place, number in words if start < place <= end}
        wanted = {chosen[number] for number in held or {_turn(renderer, words, start)}}
        if len(wanted) > 1:
            reason = ("the chat template's {% generation %} marks hold messages that are learned "
                      "and others together")
            raise ChatTemplateError(f"{reason}. Give one that marks each by itself "
                                    "(--chat-template).", reason)
        if wanted == {True}:
            kept.append((start, end))
    return kept


def _turn(renderer: Renderer, words: list[tuple[int, int]], start: int) -> int:
    """The message in whose turn a stretch begins that holds no message's last word.

    It opens the answer whose words come next, or closes the one before.
    """
    messages = renderer.chat.messages
    _, after = min(((place, number) for place, number in words if place > start),
                   default=(start, len(messages)))
    if after < len(messages) and messages[after]["role"] == "assistant":
        return after
    _, before = max(((place, number) for place, number in words if place <= start
                     and messages[number]["role"] == "assistant"), default=(start, after))
    return min(before, len(messages) - 1)
