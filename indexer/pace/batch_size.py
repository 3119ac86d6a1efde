"""How many tokens a batch should hold: the fewest with which the model is about as fast as it gets.

What a batch costs in memory grows with its tokens, mostly activations that wait for the backward
pass: 1.8 MB a token for a model of 135 M parameters. What it gains in speed ends early on a CPU,
whose cores are busy with few hundred tokens, and late on a GPU.

Where a batch of the usual size takes little memory, it is taken unmeasured: equal builds of small
models then give equal bytes, for sums depend on batches through rounding.
"""

import itertools
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradindex.influence.gradients import backward
from gradindex.influence.split_batches import BatchTooLargeError, plan_batches
from gradindex.model.config import vocabulary_size
from gradindex.model.devices import wait_for
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.storage.records import Record
from indexer.fit.batch_memory import available_on

USUAL = 4096  # padded tokens
LITTLE = 1 << 30  # bytes: what the usual batch may take without being measured
SMALLEST, LARGEST = 256, {"cpu": 1 << 14, "cuda": 1 << 17}  # padded tokens that are tried
NEAR = 0.95  # of the best throughput: as good as it
MOST = 1 / 8  # of the memory to be had: for a batch
QUICK, REPEATS = 1.0, 3  # seconds: a batch that took less is run again, the fastest run counts


def choose_batch_tokens(
    model: LanguageModel, modules: Sequence[Module], sample: list[Record], bound: int | None,
    progress: Progress,
) -> int:
    """The padded tokens a batch, for the lengths that some sequences have.

    They are a power of two, or what one sequence has; `bound` is the most bytes of memory that the
    whole process may take [what there is]. Raises ResourceError where memory doesn't hold one
    sequence.
    """
    smallest = max(SMALLEST, *model.lengths(sample))
    each = held_bytes_a_token(model, modules, _batch_of(model, sample, SMALLEST))
    most = MOST * (available_on(model.devices) if bound is None else bound)
    if smallest <= USUAL and USUAL * each <= min(LITTLE, most):
        return USUAL
    sizes = [smallest, *(size for size in _doubled(SMALLEST, LARGEST[model.device.type])
                         if smallest < size and size * each <= most)]
    progress.start("batches", 0, "passes to find their best size")
    chosen = fewest_near_best(_throughputs(model, modules, sample, sizes, progress))
    progress.finish(f"{chosen:,} padded tokens each, the fewest near the best speed")
    return chosen


def fewest_near_best(throughputs: Iterator[tuple[int, float]]) -> int:
    """The first of some sizes, ascending, whose throughput is near the best of all.

    No further one is asked for after two in a row that brought no more.

    >>> fewest_near_best(iter([(256, 70.0), (512, 96.0), (1024, 100.0), (2048, 99.0), (4096, 0)]))
    512
    """
    found: list[tuple[int, float]] = []
    best, in_vain = 0.0, 0
    for size, throughput in throughputs:
        found.append((size, throughput))
        # measured against what counts as near: a gain that wouldn't change the choice is none
        in_vain = 0 if throughput * NEAR > best else in_vain + 1
        best = max(best, throughput)
        if in_vain == 2:
            break
    return next(size for size, throughput in found if throughput >= NEAR * best)


def held_bytes_a_token(
    model: LanguageModel, modules: Sequence[Module], records: list[Record]
) -> float:
    """Bytes a padded token that a batch holds at the end of its forward pass, logits included.

    They are counted and not watched, so that two machines count alike. Raises ResourceError.
    """
    held: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.tensors()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = model.batch(records)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.no_grad():
        backward(model, modules, batch, lambda *_: None)
    logits = vocabulary_size(model.network.config) * model.dtype.itemsize
    return sum(held.values()) / batch.tokens.numel() + logits


def _doubled(first: int, last: int) -> Iterator[int]:
    return itertools.takewhile(lambda size: size <= last,
                               (first << number for number in itertools.count()))


def _throughputs(
    model: LanguageModel, modules: Sequence[Module], sample: list[Record], sizes: list[int],
    progress: Progress,
) -> Iterator[tuple[int, float]]:
    """Padded tokens a second of batches of each size, as far as memory holds them."""
    for size in sizes:
        records, taken = _batch_of(model, sample, size), list[float]()
        try:
            while len(taken) < REPEATS and sum(taken) < QUICK:
                taken.append(seconds_of_pass(model, modules, records))
                progress.update(1)
        except BatchTooLargeError:
            if size == sizes[0]:
                raise
            return
        yield size, len(records) * max(model.lengths(records)) / min(taken)


def seconds_of_pass(
    model: LanguageModel, modules: Sequence[Module], records: list[Record]
) -> float:
    """Seconds of one forward and backward pass of a batch."""
    batch = model.batch(records)
    start = time.perf_counter()
    with torch.no_grad():
        backward(model, modules, batch, lambda *_: None)
    wait_for(model.devices)
    return time.perf_counter() - start


def _batch_of(model: LanguageModel, sample: list[Record], size: int) -> list[Record]:
    """A batch of `size` padded tokens, from the middle of those that a long run would have."""
    # few sequences are repeated, until they fill several batches
    times = -(-4 * size // sum(model.lengths(sample)))
    many = sample * max(1, times)
    plan = plan_batches(model.lengths(many), size)
    return [many[row] for row in plan[len(plan) // 2]]
