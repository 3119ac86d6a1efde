"""What asking a reference takes, measured on two batches of pairs."""

import time
from dataclasses import dataclass

from gradindex.influence.split_batches import Splits, plan_batches
from gradindex.memory import resident
from gradindex.model.devices import on_host
from gradindex.model.network import LanguageModel
from gradindex.storage.build_plan import Plan
from gradindex.storage.records import Record
from indexer.ask_reference import answer_sums, tokens_of_batch
from indexer.dry_run.most_memory import Memory
from indexer.fit.batch_memory import forget_peak, peak, used
from indexer.pace.speed import Work, in_groups


@dataclass(frozen=True)
class ReferencePrice:
    """Seconds of the passes over all pairs, bytes of the weights, and memory while they run."""

    seconds: float
    weights: int
    memory: Memory


def price(
    model: LanguageModel, plan: Plan, sample: list[Record], lengths: list[int], bound: int | None
) -> ReferencePrice:
    """What a reference that is loaded takes for pairs of some padded lengths.

    Measured on the batches of the longest and of the most pairs of a sample, after one that warms
    up. Raises ResourceError.
    """
    batch_tokens = plan.batch_tokens or tokens_of_batch(model, bound)
    batches = plan_batches(model.lengths(sample), batch_tokens)
    forget_peak(model.devices)
    base, tokens, seconds = used(model.devices), 0, 0.0
    for number, rows in enumerate((batches[0], batches[0], max(batches, key=len))):
        records = [sample[row] for row in rows]
        start = time.perf_counter()
        for _ in answer_sums(model, records, batch_tokens, Splits()):
            pass  # its numbers are on the host by then: a GPU is done
        if number:
            seconds += time.perf_counter() - start
            tokens += len(records) * max(model.lengths(records))
    work = Work.of(list(in_groups(lengths, plan.segment_size)), batch_tokens)
    on_top = max(0, peak(model.devices) - base)
    host = on_host(model.devices)
    return ReferencePrice(
        seconds * work.padded_tokens / tokens, model.bytes,
        Memory(base + on_top if host else resident(), 0 if host else base + on_top))
