"""JSON files that end with their own digest, so that a changed one is noticed without another file.

The digest is of the content in canonical form: laid out otherwise, the same content is the same.
"""

import hashlib
import json
from typing import Any

from gradindex.terminal import json_text

KEY = "sha256"


def canonical(content: dict[str, Any]) -> bytes:
    """Content as JSON, always in the same bytes."""
    return json_text(content, indent=1, sort_keys=True).encode()


def digest_of(content: dict[str, Any]) -> str:
    """The hex SHA-256 of content in canonical form."""
    return hashlib.sha256(canonical(content)).hexdigest()


def sign(content: dict[str, Any]) -> bytes:
    """The bytes of a file that holds `content` and its digest."""
    return canonical({**content, KEY: digest_of(content)}) + b"\n"


def parse(raw: bytes) -> dict[str, Any]:
    """What such a file holds, its digest still in it. Raises ValueError for anything else."""
    try:
        content = json.loads(raw, parse_constant=_refuse)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        canonical(content)
    except (RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None
    return content


def check(content: dict[str, Any]) -> bytes:
    """Parsed content without its digest, in canonical form. Raises ValueError if it changed."""
    inner = {name: value for name, value in content.items() if name != KEY}
    if content.get(KEY) != digest_of(inner):
        raise ValueError("it was changed after it was written (its own digest differs)")
    return canonical(inner)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
