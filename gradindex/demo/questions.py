"""What the demo asks its index, as a user would type it, and what to try next."""

import shlex
from collections.abc import Iterable
from pathlib import Path

# (prompt, completion): what the demo asks about. Each was told by several documents: a sentence in
# other words than theirs, a fact that is only code, and an idiom.
QUERIES = (
    ("Write a message with severity", " 'ERROR' on the root logger"),
    ("weekdays = ['Mon', 'Tue',", " 'Wed', 'Thu', 'Fri'"),
    ("if self.closed:\n    raise", ' ValueError("I/O operation on closed file'),
)


# (text, label, rather than which): what the classifying demo asks about; without a label, its own
LABEL_QUERIES: tuple[tuple[str, str | None, str | None], ...] = (
    ("Connect to the server at host and port, and return its reply.", "network", None),
    ("Return the mean of the numbers, rounded to an integer.", None, None),
    ("Wait until a thread has read the reply of the server.", "processes", "network"),
)


def label_arguments(index: Path, text: str, label: str | None, versus: str | None) -> list[str]:
    """What `gradindex` is called with to ask the classifying demo's index."""
    asked = ["search", str(index), "--text", text]
    asked += [] if label is None else ["--label", label]
    asked += [] if versus is None else ["--versus-label", versus]
    return [*asked, "-k", "3"]


def search_arguments(index: Path, prompt: str, completion: str) -> list[str]:
    """What `gradindex` is called with to ask the demo's index."""
    return ["search", str(index), "-p", prompt, "-c", completion, "-k", "3"]


def as_typed(arguments: list[str]) -> str:
    """The command as a user would type it.

    >>> print(as_typed(["search", "a b", "-p", "it's"]))
    gradindex search 'a b' -p "it's"
    """
    return " ".join(["gradindex", *map(_quoted, arguments)])


def _quoted(argument: str) -> str:
    """For a shell, in double quotes where that is enough: they read better around 'Mon'."""
    if "'" in argument and not set(argument) & set('"$`\\!'):
        return f'"{argument}"'
    return shlex.quote(argument)


def try_next(index: Path) -> list[str]:
    """Commands to go on with, each with what it shows."""
    own = (
        (["search", str(index), "-p", "def __enter__(self):"],
         "what the model goes on to say, and why"),
        (["search", str(index), "-p", "weekdays =", "-c", " ['Mon'", "--opponents"],
         "what spoke against it"),
        (["search", str(index), "-p", "severity", "-c", " 'ERROR'", "--versus", " 'INFO'"],
         "rather than that"),
        (["view", str(index)], "all of this in a page"),
        (["info", str(index)], "what is in the index"),
    )
    return _explained(own)


def try_next_with_labels(index: Path) -> list[str]:
    """The same for the classifying demo."""
    text = LABEL_QUERIES[1][0]
    return _explained((
        (["search", str(index), "--text", text, "--opponents"], "what spoke against it"),
        (["search", str(index), "--text", text, "--group-by", "planted"],
         "how much the wrong labels say"),
        (["audit", str(index), "--truth", "planted", "-o", "suspects.html"],
         "whose labels look wrong, and how many of them are"),
        (["view", str(index)], "all of this in a page"),
        (["info", str(index)], "what is in the index"),
    ))


def _explained(own: Iterable[tuple[list[str], str]]) -> list[str]:
    lines = [(as_typed(arguments), what) for arguments, what in own]
    lines.append(("gradindex build YOUR_MODEL YOUR.jsonl -o your.index", "your own"))
    return [f"  {line:<76} # {what}" for line, what in lines]
