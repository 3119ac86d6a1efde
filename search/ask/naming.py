"""What an argument is called where it is given: a flag, a keyword, a field of the page's form.

Errors are worded for the command line. Who asks in Python, in the API's JSON or in a file of
queries reads the argument's own name in the place of its flag; who fills the page's form the label
that stands there.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

from gradindex.errors import InputError

SHORT = {"-p": "prompt", "-c": "completion", "-k": "k", "--no-rescore": "rescore=False"}
# by argument, the label of the page's form
LABELS = {
    "prompt": "Prompt", "completion": "Completion", "compare": "side by side with",
    "versus": "or the difference, log p less that of", "score_on": "scored tokens",
    "text": "Text", "text_b": "Second text", "label": "Label", "versus_label": "rather than",
    "chosen": "Chosen", "rejected": "Rejected", "response": "Response",
    "k": "hits", "shortlist": "shortlist", "recall": "recall", "damping": "damping",
    "modules": "modules", "members": "models", "normalize": "rank by", "candidates": "candidates",
    "group_by": "group by", "rescore": "score", "opponents": "show",
}
# a flag that stands by itself: in quotes it may be what somebody typed
_FLAG = re.compile(r"(?<![\w'\"-])(--[a-z]+(?:-[a-z]+)*|-[pck])(?![\w-])")


def as_arguments(message: str) -> str:
    """A message with the names that Python and JSON know in the place of flags.

    Commands, which stand between backticks, stay as they are.

    >>> as_arguments("--text-b goes with --text, -k 0 doesn't: `gradindex info --format json`.")
    "text_b goes with text, k 0 doesn't: `gradindex info --format json`."
    """
    return _renamed(message, lambda flag: SHORT.get(flag) or _argument(flag))


def as_labels(message: str) -> str:
    """A message with the labels of the page's form in the place of flags and arguments.

    >>> as_labels("--text-b goes with --text; --tokenizer is no field of the form.")
    '“Second text” goes with “Text”; --tokenizer is no field of the form.'
    """
    def label(flag: str) -> str:
        name = "rescore" if flag == "--no-rescore" else SHORT.get(flag) or _argument(flag)
        return f"“{LABELS[name]}”" if name in LABELS else flag

    return _renamed(message, label)


def _argument(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _renamed(message: str, name: Callable[[str], str]) -> str:
    """A message whose flags have other names, but for commands."""
    parts = message.split("`")
    parts[::2] = [_FLAG.sub(lambda found: name(found[1]), part) for part in parts[::2]]
    return "`".join(parts)


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Say what is wrong with arguments, an InputError, as users of Python call these."""
    try:
        yield
    except InputError as error:
        error.args = (as_arguments(str(error)), *error.args[1:])
        raise
