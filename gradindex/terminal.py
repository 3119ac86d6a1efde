"""Text that comes from data, made safe to print: what a terminal would obey is shown as an escape.

Hidden are the characters of Unicode's categories Cc, Cf, Co, Cs, Zl and Zp: control characters,
direction and zero-width marks, private use, lone surrogates, line and paragraph separators.
"""

import json
import re
from typing import Any

# All of them but tab and newline. Written out, for asking unicodedata about every code point takes
# a tenth of a second; tests/test_terminal.py compares.
_HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    r"\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ud800-\uf8ff\ufeff\ufff9-\ufffb"
    r"\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e007f\U000f0000-\U0010ffff"
)
_IN_LINES = re.compile(f"[{_HIDDEN}]")
_IN_A_LINE = re.compile(rf"[\t\n{_HIDDEN}]")


def visible(text: str) -> str:
    r"""One line: newlines as ⏎, tabs as →, other hidden characters as \xNN, \uNNNN, \UNNNNNNNN."""
    return _IN_A_LINE.sub(_escape, text)


def visible_lines(text: str) -> str:
    """The same with newlines and tabs as they are: for messages, CSV and HTML."""
    return _IN_LINES.sub(_escape, text)


def json_text(value: Any, **options: Any) -> str:
    r"""JSON that parses to `value`, readable, with hidden characters as \uNNNN.

    `options` are of json.dumps; NaN and infinities raise ValueError. (JSON has no words for a high
    lone surrogate followed by a low one: they parse as the character that the two encode.)
    """
    # json.dumps escapes newlines and tabs itself: those left are of the indentation.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    return _IN_LINES.sub(_json_escape, text)


def _escape(match: re.Match[str]) -> str:
    letter = match[0]
    if letter in "\t\n":
        return "→" if letter == "\t" else "⏎"
    code = ord(letter)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]  # a pair of surrogates beyond the BMP
