"""What can go wrong, as one tree; each leaf has the exit code the command line ends with.

GradindexError            1   anything below, and failures with no better place
├── InputError            2   a flag, a file, a record or a query that can't be used
│   └── BadRowError           a row of data alone, which who reads many leaves out and counts
├── IndexMismatchError    3   index and model (or tokenizer, or format) don't belong together
├── DamagedIndexError     3   a file of the index is missing or not what the manifest says
└── ResourceError         4   the machine refuses: memory, disk, a right, a limit, a mount

Every message says what was found, what was expected and what to do.
"""

import contextlib
from collections.abc import Iterator


class GradindexError(Exception):
    """Base of every error that gradindex raises on purpose."""

    exit_code = 1


class InputError(GradindexError):
    """A flag, a file, a record or a query can't be used as it is.

    `argument` names the one that can't, where who catches it has to know.
    """

    exit_code = 2

    def __init__(self, message: str, argument: str | None = None):
        super().__init__(message)
        self.argument = argument


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Say of an InputError that it is about `what`.

    >>> with about("--reference"):
    ...     raise InputError("no such folder")
    Traceback (most recent call last):
    gradindex.errors.InputError: --reference: no such folder
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


class BadRowError(InputError):
    """A row that can't be used, with the reason."""


class IndexMismatchError(GradindexError):
    """The index was built with another model, tokenizer or format than it is used with now."""

    exit_code = 3


class DamagedIndexError(GradindexError):
    """A file of the index is missing, cut short or changed.

    `wrong` says what is wrong without advice, for reports that give their own.
    """

    exit_code = 3

    def __init__(self, message: str, wrong: str | None = None):
        super().__init__(message)
        self.wrong = message if wrong is None else wrong


class ResourceError(GradindexError):
    """Memory or disk ran out, or the system refuses a file; what was committed before is intact."""

    exit_code = 4
