"""Which sequences go through a model together, and what happens where memory doesn't hold them.

Gradients depend a little on what else is in a batch, through rounding. So batches are a function of
the sequences' lengths alone, and a batch that had to be halved is noted: repeating the work gives
the same sums, bit by bit.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from gradindex.errors import ResourceError
from gradindex.memory import ran_out

T = TypeVar("T")


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, most: int | None = None
) -> list[list[int]]:
    """Group sequences of like length into batches, as lists of their numbers, longest first.

    `lengths` are in tokens. A batch holds at most `batch_tokens` tokens, padding counted, and at
    most `most` sequences [any number]. A sequence longer than `batch_tokens` has its own batch.

    >>> plan_batches([3, 9, 4, 4], batch_tokens=8)
    [[1], [2, 3], [0]]
    """
    # The number breaks ties, so that equal lengths come in one order whoever sorts them.
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches: list[list[int]] = []
    for number in order:
        # The first of a batch is its longest, and all others are padded to it.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens and (
                most is None or len(batches[-1]) < most):
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


class BatchTooLargeError(ResourceError):
    """Memory ran out on a batch; half of it may fit."""


@contextlib.contextmanager
def out_of_memory(rows: int, length: int) -> Iterator[None]:
    """Turn memory that runs out on a batch of `rows` sequences of `length` tokens into one error.

    Raises BatchTooLargeError for that, on a CPU and on a GPU, and other errors as they are.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise BatchTooLargeError(
            f"memory ran out on a batch of {rows} × {length} tokens "
            f"({str(error).partition(chr(10))[0][:120]}). Use smaller --batch-tokens "
            "(one sequence is the least) or --seq-len, fewer --modules, --max-memory SIZE (which "
            "keeps less beside), or --dtype bfloat16."
        ) from error


class Splits:
    """Which batches were halved because memory ran out, as (first row, rows) of their segment.

    `keep` is called before a half is tried, to write all splits down. A later run that is given
    them as `halved` forms the same batches, and so the same sums in the same order.
    """

    def __init__(
        self, halved: Iterable[tuple[int, int]] = (),
        keep: Callable[[list[tuple[int, int]]], object] = lambda _: None,
    ):
        self.halved = list(halved)
        self._keep = keep

    def add(self, batch: tuple[int, int]) -> None:
        """Note that a batch, (first row, rows), is halved."""
        self.halved.append(batch)
        # Before the half runs: a process killed on it would otherwise forget the split, and with
        # more memory next time give other bytes.
        self._keep(self.halved)


def in_batches(
    lengths: Sequence[int], batch_tokens: int, splits: Splits, run: Callable[[list[int]], T],
    most: int | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Plan batches (`plan_batches`), and yield each batch's rows with what `run` returned for them.

    A batch on which memory runs out is halved as often as it takes, and noted in `splits`. So `run`
    must leave nothing behind when it fails. Raises ResourceError where one sequence is too much.

    >>> splits = Splits(halved=[(0, 4)])  # memory ran out on all four, in an earlier run
    >>> list(in_batches([5, 5, 5, 5], 20, splits, run=sum))
    [([0, 1], 1), ([2, 3], 5)]
    """
    waiting = plan_batches(lengths, batch_tokens, most)[::-1]
    while waiting:
        rows = waiting.pop()
        result = None
        if (batch := (rows[0], len(rows))) not in splits.halved:
            try:
                with out_of_memory(len(rows), lengths[rows[0]]):
                    result = run(rows)
            except BatchTooLargeError:
                if len(rows) == 1:
                    raise
                splits.add(batch)
        # halved here, and not above: an exception at hand holds the failed batch's tensors
        if batch in splits.halved:
            half = (len(rows) + 1) // 2
            waiting += [rows[half:], rows[:half]]  # the first half is popped first
        else:
            assert result is not None
            yield rows, result
