"""JSON files that end with their own digest, so that a changed one is noticed without another file.

The digest is that of the content in canonical form: a file that is laid out otherwise and says the
same is the same. It shows accidents, not intent: whoever changes a file can write its digest too.

>>> sealed = with_digest({"rows": 3})
>>> print(sealed.decode(), end="")
{
 "rows": 3,
 "sha256": "6be9fd7b507835859340615ecefe438360285057c821cda96d549216c91cb02d"
}
>>> check(parse(sealed)) == canonical({"rows": 3})
True
>>> check(parse(sealed.replace(b"3", b"4")))
Traceback (most recent call last):
    ...
ValueError: it was changed after it was written (its own digest differs)
"""

import hashlib
import json
from typing import Any

from gradindex.terminal import json_text

KEY = "sha256"


def canonical(content: dict[str, Any]) -> bytes:
    """Content as JSON, in the same bytes whatever the order of its entries.

    >>> canonical({"b": 1, "a": 2})
    b'{\\n "a": 2,\\n "b": 1\\n}'
    """
    return json_text(content, indent=1, sort_keys=True).encode()


def digest_of(content: dict[str, Any]) -> str:
    """The SHA-256, in hex, of content in canonical form."""
    return hashlib.sha256(canonical(content)).hexdigest()


def with_digest(content: dict[str, Any]) -> bytes:
    """The bytes of a file that holds `content` and its digest."""
    return canonical({**content, KEY: digest_of(content)}) + b"\n"


def parse(raw: bytes) -> dict[str, Any]:
    """What the bytes of a file hold, its digest still in it, unchecked.

    Raises ValueError where that is no JSON object.
    """
    try:
        content = json.loads(raw, parse_constant=_refuse)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        # Tried here, where errors are expected: JSON can be nested too deeply to be written again.
        canonical(content)
    except (RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None
    return content


def check(content: dict[str, Any]) -> bytes:
    """Parsed content without its digest, in canonical form. Raises ValueError if it was changed."""
    inner = {name: value for name, value in content.items() if name != KEY}
    if content.get(KEY) != digest_of(inner):
        raise ValueError("it was changed after it was written (its own digest differs)")
    return canonical(inner)


def _refuse(constant: str) -> None:
    # Python would read NaN and Infinity, which no JSON has and no bound catches.
    raise ValueError(f"{constant} is no number")
