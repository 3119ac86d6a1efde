"""Which sequences go through a model together, and what happens where memory doesn't hold them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from gradindex.errors import ResourceError

T = TypeVar("T")


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, most: int | None = None
) -> list[list[int]]:
    """Group sequences of like length, longest first, at most `batch_tokens` padded tokens each.

    And at most `most` sequences. A function of the lengths alone. One sequence longer than that has
    a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens and (
                most is None or len(batches[-1]) < most):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class BatchTooLargeError(ResourceError):
    """Memory ran out on a batch; half of it may fit."""


@contextlib.contextmanager
def out_of_memory(rows: int, length: int) -> Iterator[None]:
    """Tell memory that ran out on a batch, on whatever device, from other errors."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and \
                "allocate memory" not in text:
            raise
        raise BatchTooLargeError(
            f"memory ran out on a batch of {rows} × {length} tokens "
            f"({text.partition(chr(10))[0][:120]}). Use smaller --batch-tokens "
            "(one sequence is the least), fewer --modules, or --dtype bfloat16."
        ) from error


class Splits:
    """Which batches were halved because memory ran out, as (first row, rows) of their segment.

    `keep` is called before a half is tried, to write the split down: whoever replays `made` forms
    the same batches, so the same sums in the same order.
    """

    def __init__(
        self, made: Iterable[tuple[int, int]] = (),
        keep: Callable[[list[tuple[int, int]]], object] = lambda _: None,
    ):
        self.made = list(made)
        self._keep = keep

    def add(self, batch: tuple[int, int]) -> None:
        self.made.append(batch)
        self._keep(self.made)


def in_batches(
    lengths: Sequence[int], batch_tokens: int, splits: Splits, run: Callable[[list[int]], T],
    most: int | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Plan batches (`plan_batches`), and yield each batch's rows and what `run` gave for them.

    A batch on which memory runs out is halved, again and again; that is noted in `splits`. So `run`
    must leave nothing behind when it fails. Raises ResourceError where one sequence is too much.
    """
    waiting = plan_batches(lengths, batch_tokens, most)[::-1]
    while waiting:
        rows = waiting.pop()
        found = None
        if (batch := (rows[0], len(rows))) not in splits.made:
            try:
                with out_of_memory(len(rows), lengths[rows[0]]):
                    found = run(rows)
            except BatchTooLargeError:
                if len(rows) == 1:
                    raise
                splits.add(batch)
        # halved here, and not above: an exception at hand holds the failed batch's tensors
        if batch in splits.made:
            half = (len(rows) + 1) // 2
            waiting += [rows[half:], rows[:half]]
        else:
            assert found is not None
            yield rows, found
