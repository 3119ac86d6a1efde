"""Text that comes from data, made safe to print: what a terminal would obey is shown as an escape.

Hidden are the characters of Unicode's categories Cc, Cf, Co, Cs, Zl and Zp: control characters,
direction and zero-width marks, private use, lone surrogates, line and paragraph separators.
"""

import json
import os
import re
import shlex
from typing import Any

# All of them but tab and newline. Written out, for asking unicodedata about every code point takes
# a tenth of a second; tests/test_terminal.py compares. A stranger's training text may hold any of
# them, and a terminal obeys some: it would move its cursor, or write a line that nobody said.
_HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    r"\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ud800-\uf8ff\ufeff\ufff9-\ufffb"
    r"\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e007f\U000f0000-\U0010ffff"
)
_IN_LINES = re.compile(f"[{_HIDDEN}]")
_IN_A_LINE = re.compile(rf"[\t\n{_HIDDEN}]")


def visible(text: str) -> str:
    r"""Text as one line: newlines as ⏎, tabs as →, other hidden characters as escapes.

    Escapes are \xNN, \uNNNN or \UNNNNNNNN.

    >>> print(visible("two\nlines, \x1b[31mred"))
    two⏎lines, \x1b[31mred
    """
    return _IN_A_LINE.sub(_escape, text)


def visible_lines(text: str) -> str:
    r"""Text with newlines and tabs as they are, and other hidden characters as escapes.

    For messages, CSV and HTML.

    >>> print(visible_lines("\u202eevil"))
    \u202eevil
    """
    return _IN_LINES.sub(_escape, text)


def shell_word(path: str | os.PathLike[str]) -> str:
    r"""A path as one word of a command for a shell, however it is called.

    >>> print(shell_word("my index"), shell_word("-x"), shell_word("it's\n2"))
    'my index' ./-x $'it\x27s\x0a2'
    """
    text = os.fspath(path)
    if text.startswith("-"):
        text = f"./{text}"  # or it would be read as a flag
    if _IN_A_LINE.search(text) is None:
        return shlex.quote(text)
    return "$'" + re.sub(rf"['\\\t\n{_HIDDEN}]", _octets, text) + "'"


def _octets(match: re.Match[str]) -> str:
    return "".join(f"\\x{octet:02x}" for octet in os.fsencode(match[0]))


def json_text(value: Any, **options: Any) -> str:
    r"""JSON that parses to `value`, readable, with hidden characters as \uNNNN.

    `options` are those of json.dumps. Raises ValueError for NaN and infinities. A lone high
    surrogate followed by a lone low one parses as the character that the two encode: JSON can't
    tell these apart.

    >>> print(json_text({"text": "a\u200bb"}))
    {"text": "a\u200bb"}
    """
    # json.dumps escapes newlines and tabs itself, so those that are left belong to the indentation.
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
