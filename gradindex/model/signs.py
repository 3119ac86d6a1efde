"""Signs put into a chat, to see where a template shows what."""

from typing import Any


def signs_for(text: str) -> tuple[str, str]:
    """Two code points that Unicode never assigns, and that a text doesn't hold."""
    opening, closing, *_ = (sign for sign in map(chr, range(0xFDD0, 0xFDF0)) if sign not in text)
    return opening, closing


def signed(value: Any, sign: str) -> Any:
    """A text, parts or an object with a sign behind the last word: templates may trim the rest."""
    if isinstance(value, dict):
        return {**value, sign: sign}
    if isinstance(value, list):
        *parts, last = value
        return [*parts, {**last, "text": signed(last["text"], sign)}]
    word = len(value.rstrip())
    return value[:word] + sign + value[word:]
