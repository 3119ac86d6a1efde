"""What a reference gives the answers of preference pairs: a pass forward over every pair.

Sequences are read into `reference.partial/` first. Each of its segments then goes on to the index
with what the reference gave its answers, as the offsets of its records; nothing after that needs
the reference. A segment that is there is done: who goes on after a kill begins with the next one.
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gradindex.errors import InputError
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.memory import available, resident, return_freed
from gradindex.model.adapters import without_adapters
from gradindex.model.config import is_quantised, vocabulary_size
from gradindex.model.devices import DTYPES, free_on, on_host
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.saved_files import tensor_shapes
from gradindex.objective.pairs import Preference
from gradindex.progress import Progress
from gradindex.storage import layout, segments
from gradindex.storage.build_plan import Plan
from gradindex.storage.files import make_folders
from gradindex.storage.manifest import Segment
from gradindex.storage.records import Record
from gradindex.transfers import Arriving, as_they_arrive
from indexer.read import ingest
from indexer.read.corpus import Corpus, CorpusFacts
from indexer.read.ingest import Run
from indexer.reference import Reference

USUAL = 4096  # padded tokens a batch
LITTLE = 1 << 30  # bytes that a batch may take
HIDDEN = 32  # numbers of a hidden size each that a layer holds for a token, roughly


def read_records(corpus: Corpus, run: Run, progress: Progress) -> CorpusFacts:
    """Read everything into segments of records, as `ingest.write_records`, or for the reference.

    Raises as that does.
    """
    drop_unasked(run)
    ingest.remove_unsealed(run.index, run.number)
    if corpus.settings.reference is None:
        return ingest.write_records(corpus, run, progress)
    unasked = _unasked(run)
    make_folders(unasked.index / layout.SEGMENTS)
    return ingest.write_records(corpus, unasked, progress)


def drop_unasked(run: Run) -> None:
    """Remove what was read for a reference: it was asked, or isn't to be."""
    if (folder := _unasked(run).index).exists():
        ingest.remove_any(folder)


def _unasked(run: Run) -> Run:
    """The same sequences, before the reference was asked about them."""
    return replace(run, index=run.index / layout.REFERENCE_PARTIAL)


def waiting(run: Run) -> list[Segment]:
    """The segments that a reference has yet to be asked about."""
    if not _unasked(run).index.is_dir():
        return []
    return [segment for segment in run.segments
            if not (run.folder(segment) / layout.NOTES.name).is_file()]


def ask_reference(
    run: Run, reference: Reference, policy: ModelSource, model: LanguageModel | None, plan: Plan,
    progress: Progress,
) -> None:
    """Ask a reference about the segments that wait for it, and hand them on to the index.

    `model` is the policy, where it stays loaded. Raises InputError for a reference that can't be
    loaded, or gives an answer no finite number; ResourceError.
    """
    if waiting(run):
        make_way()
        if reference.source is None:
            assert model is not None
            with without_adapters(model.network):
                _ask(run, model, plan, policy.max_memory, progress)
        else:
            _ask(run, load_reference(reference.source, plan, progress), plan, policy.max_memory,
                 progress)
        make_way()
    drop_unasked(run)


def load_reference(source: ModelSource, plan: Plan, progress: Progress) -> LanguageModel:
    """A reference, in the dtype of a plan where it has none of its own. Raises InputError."""
    progress.say(f"reference: loading {source.name}")
    quantised = is_quantised(source.load_config())  # such weights have a dtype of their own
    return LanguageModel.load(source, "auto" if quantised else plan.dtype)


def _ask(
    run: Run, model: LanguageModel, plan: Plan, bound: int | None, progress: Progress
) -> None:
    left, unasked = waiting(run), _unasked(run)
    batch_tokens = plan.batch_tokens or tokens_of_batch(model, bound)
    progress.start("reference", run.count, "sequences",
                   done=run.count - sum(segment.rows for segment in left))
    for segment in left:
        records = unasked.reader(segment).records(range(segment.rows))
        _add_offsets(model, records, unasked.folder(segment), batch_tokens, progress)
        if (folder := run.folder(segment)).exists():  # left before its notes were written
            ingest.remove_any(folder)
        ingest.write_partial(run.index, segment.name, records)
    progress.finish()


def _add_offsets(
    model: LanguageModel, records: list[Record], folder: Path, batch_tokens: int, progress: Progress
) -> None:
    """Give records their offsets; the splits of their batches are noted in the old `folder`."""
    facts = segments.read_facts(folder)

    def keep(halved: list[tuple[int, int]]) -> None:
        facts.splits = halved
        segments.write_facts(folder, facts)

    for rows, sums in answer_sums(model, records, batch_tokens, Splits(facts.splits, keep)):
        if not np.isfinite(sums).all():
            part = records[rows[int(np.flatnonzero(~np.isfinite(sums).all(1))[0])]].parts[0]
            raise InputError(
                f"{part.source}:{part.row}: the reference {model.source.name} gives its answers no "
                f"finite log p in {str(model.dtype).removeprefix('torch.')}. Take the row out, or "
                "look at the reference's weights; a new build may have another --dtype.")
        # in float64, as columns of a file would be read and taken off each other
        for row, (chosen, rejected) in zip(rows, sums.tolist(), strict=True):
            records[row].offset = chosen - rejected
        progress.update(len(rows))


def answer_sums(
    model: LanguageModel, records: list[Record], batch_tokens: int, splits: Splits
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Σ log p that a model gives each pair's answers, batch by batch: float64 [b, 2].

    Yields which of the records a batch holds with them. A GPU is at work on the next batch by then.
    """
    objective = model.objective
    assert isinstance(objective, Preference)

    def run(rows: list[int]) -> Arriving:
        with model.one_at_a_time, torch.no_grad():
            batch = model.batch([records[row] for row in rows])
            return Arriving([objective.answers(model.network, batch)])

    batches = in_batches(model.lengths(records), batch_tokens, splits, run)
    for rows, [sums] in as_they_arrive(batches):
        yield rows, sums


# ---- memory


def tokens_of_batch(model: LanguageModel, bound: int | None) -> int:
    """The padded tokens of a batch that is only run forward.

    They follow from the model's shape and the bound of the command, and not from what is free now:
    who goes on after a kill has the same batches.
    """
    config = model.network.config.get_text_config()
    hidden = getattr(config, "hidden_size", 0) or 0
    # logits, and what one layer holds: nothing waits for a backward pass
    each = model.dtype.itemsize * (2 * vocabulary_size(config) + HIDDEN * hidden)
    most = LITTLE if bound is None else min(LITTLE, max(0, bound - model.bytes) // 4)
    return max(1, min(USUAL, most // each))


def may_stay(model: LanguageModel, run: Run, reference: Reference, plan: Plan) -> bool:
    """Whether memory holds a reference beside the policy, or none has to be asked any more."""
    source, bound = reference.source, model.source.max_memory
    if source is None or model.source.is_object or not waiting(run):
        return True  # it is the policy, or the user holds that
    needed = LITTLE + (weight_bytes(source, plan.dtype) or model.bytes)
    if bound is not None:
        return model.bytes + needed <= bound
    free = available() - resident() if on_host(model.devices) else sum(map(free_on, model.devices))
    return needed <= free


def weight_bytes(source: ModelSource, dtype: str) -> int:
    """Bytes that a model's weights take in memory; 0 where that can't be told beforehand."""
    if source.is_object:
        return 0
    whole = source if source.adapter is None else source.base
    files = whole.weight_files()
    if is_quantised(source.load_config()) or any(file.suffix != ".safetensors" for file in files):
        return sum(file.stat().st_size for file in files)
    return DTYPES[dtype].itemsize * sum(map(math.prod, tensor_shapes(files).values()))


def make_way() -> None:
    """Give back the memory of a model that nothing holds any more."""
    gc.collect()
    return_freed()
