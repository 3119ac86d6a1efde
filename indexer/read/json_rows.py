"""JSON → rows: an object a line, or objects in one array or one after the other.

A line that can't be used costs that row alone. Where objects span lines, nothing tells where the
next one begins after a fault, so that the file is refused.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradindex.errors import BadRowError, InputError
from indexer.read import rows
from indexer.read.compressed import opened
from indexer.read.rows import Row, as_object

CHUNK = 1 << 16  # bytes read at once of a file whose objects span lines
SPACE = " \t\n\r"


def jsonl_rows(path: Path) -> Iterator[Row | None]:
    """Rows of a file of JSON objects, a line each; None for a blank line. Raises InputError."""
    longest = rows.LONGEST_LINE
    with opened(path) as file:
        while line := file.readline(longest):  # bounded: a damaged file may have no lines
            whole = True
            # the rest of a line that is too long is read away, a piece at a time
            while len(line) == longest and not line.endswith(b"\n"):
                line, whole = file.readline(longest), False
            yield _parse_line(line) if whole else BadRowError(
                f"line longer than {longest:,} bytes")


def _parse_line(line: bytes) -> Row | None:
    try:
        content = line.decode("utf-8-sig").strip()  # with or without a byte order mark
        return as_object(json.loads(content)) if content else None
    except UnicodeDecodeError as error:
        return BadRowError(f"invalid UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRowError(f"invalid JSON ({error})")


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a file that holds one array of objects, or objects that span lines.

    It is read a piece at a time. Raises InputError for what is no JSON.
    """
    with opened(path) as file:
        # what no UTF-8 stands for becomes halves of characters, which are looked for in each row
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        chunks = iter(lambda: file.read(CHUNK), b"")
        reader = _Reader((decoder.decode(chunk) for chunk in chunks), path)
        in_array = reader.take("[")
        while (content := reader.value(in_array)) is not _END:
            yield BadRowError("invalid UTF-8") if _has_bad_bytes(content) else as_object(content)


_END = object()


class _Reader:
    """JSON values of a text that comes a chunk at a time."""

    def __init__(self, chunks: Iterator[str], path: Path):
        self._chunks, self._path = chunks, path
        self._text, self._start, self._ended, self._done = "", 0, False, 0

    def take(self, sign: str) -> bool:
        """Whether that sign comes next; it is passed over."""
        self._skip("\ufeff" + SPACE if self._done == 0 else SPACE)
        if self._text[self._start : self._start + 1] != sign:
            return False
        self._start += 1
        return True

    def value(self, in_array: bool) -> Any:
        """The next value, _END behind the last. Raises InputError."""
        if (in_array and self.take("]")) or (not in_array and self._at_end()):
            if in_array and not self._at_end():
                raise self._broken("something follows the array")
            return _END
        if in_array and self._done and not self.take(","):
            raise self._broken("a comma or ] is missing")
        self._skip(SPACE)
        wanted = CHUNK
        while True:
            try:
                content, end = json.JSONDecoder().raw_decode(self._text, self._start)
                # a number may go on in the next chunk; what ends in a bracket or quote is whole
                if end < len(self._text) or self._ended or self._text[end - 1] in '}]"':
                    self._start, self._done = end, self._done + 1
                    return content
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    raise self._broken(str(error)) from None
            # twice as much each time: a value that is tried again after every chunk takes
            # quadratic time
            self._more(wanted)
            wanted *= 2
            if len(self._text) > rows.LONGEST_LINE:
                raise self._broken(f"a value longer than {rows.LONGEST_LINE:,} bytes")

    def _at_end(self) -> bool:
        self._skip("\ufeff" + SPACE if self._done == 0 else SPACE)
        return self._start >= len(self._text)

    def _skip(self, signs: str) -> None:
        while True:
            while self._start < len(self._text) and self._text[self._start] in signs:
                self._start += 1
            if self._start < len(self._text) or self._ended:
                return
            self._more(CHUNK)

    def _more(self, wanted: int) -> None:
        """Read on; what was passed over is forgotten."""
        text, self._start = [self._text[self._start :]], 0
        while wanted > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._ended = True
                break
            text.append(chunk)
            wanted -= len(chunk)
        self._text = "".join(text)

    def _broken(self, why: str) -> InputError:
        return InputError(
            f"{self._path} is no JSON behind record {self._done}: {why}. Expected an object a "
            "line, or one array of objects; correct it, or write it again."
        )


def _has_bad_bytes(content: Any) -> bool:
    """Whether a value holds what stands for a byte that is no UTF-8."""
    if isinstance(content, str):
        return any("\udc80" <= letter <= "\udcff" for letter in content) \
            if not content.isascii() else False
    if isinstance(content, dict):
        return any(map(_has_bad_bytes, content)) or any(map(_has_bad_bytes, content.values()))
    return isinstance(content, list) and any(map(_has_bad_bytes, content))
