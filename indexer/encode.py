"""One pass over the sequences: gradients become codes, segment after segment.

A segment is written in `NNNNNN.partial/` (its records are there already) and renamed when whole.
Its batches are a function of its sequences' lengths, and of the splits noted in its segment.json.
What is found of one is packed, digested and written while the next one's passes run.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradindex.influence.codes import Codes
from gradindex.influence.gradients import backward, why_not_finite
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.influence.vocabulary import OutputGradients
from gradindex.memory import threads
from gradindex.model.config import vocabulary_size
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.storage import row_file, segments, token_file
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.files import rename_folder
from gradindex.storage.layout import CODES, ROWS, TOKENS, code_bytes
from gradindex.storage.manifest import Segment
from gradindex.storage.records import Record
from gradindex.storage.segments import SegmentFacts
from gradindex.transfers import Arriving, as_they_arrive
from indexer.fit.quarantine import check_quarantine
from indexer.read.ingest import Run, is_sealed
from indexer.shards import Shard, Share

MOST_NAMED = 20  # quarantined sequences that are said one by one


def encode_run(
    model: LanguageModel, codes: Codes, run: Run, batch_tokens: int, bad: float, progress: Progress,
    share: Share | None = None,
) -> None:
    """Encode what isn't encoded yet of this process's `share` [all], and seal it.

    Raises GradindexError where more than the share `bad` is quarantined, ResourceError.
    """
    share, reasons = share or Shard(), dict[int, str]()
    mine = [segment for number, segment in enumerate(run.segments) if share.takes(number)]
    sealed = [segment for segment in mine if is_sealed(run.index, segment)]
    progress.start("encode", sum(segment.rows for segment in mine), "sequences",
                   done=sum(segment.rows for segment in sealed))
    with ThreadPoolExecutor(1) as pool:  # whose one thread seals them in order
        sealing: Future[None] | None = None
        for segment in mine:
            if segment in sealed:
                facts = segments.read_facts(run.folder(segment))
            else:
                facts, seal_it = encode_one(
                    model, codes, run, segment, batch_tokens, progress, sealing)
                if sealing is not None:
                    sealing.result()  # of the one before: no more than two are held
                if threads(2) > 1:
                    sealing = pool.submit(seal_it)
                else:
                    seal_it()
            # after each: a model that is wrong throughout shouldn't take a night to be noticed
            reasons |= facts.quarantined
            check_quarantine(reasons, run.count, bad, "to be indexed")
        if sealing is not None:
            sealing.result()
    progress.finish()


def encode_one(
    model: LanguageModel, codes: Codes, run: Run, segment: Segment, batch_tokens: int,
    progress: Progress, before: Future[None] | None = None,
) -> tuple[SegmentFacts, Callable[[], None]]:
    """Encode a segment of a run; what seals it comes with its facts.

    Raises ResourceError, and what sealing the one `before` raises as soon as it does.
    """
    records = run.reader(segment).records(range(segment.rows))
    return encode_segment(
        model, codes, records, run.folder(segment), batch_tokens, progress, before)


def quarantined_of(run: Run, bad: float, progress: Progress) -> dict[int, str]:
    """Which ids were quarantined while a run was encoded, and why; says so.

    Raises GradindexError where they are more than the share `bad`.
    """
    encoded = [segments.read_facts(run.folder(segment)) for segment in run.segments]
    reasons = {sequence: why for facts in encoded for sequence, why in facts.quarantined.items()}
    check_quarantine(reasons, run.count, bad, "to be indexed")
    for sequence, reason in list(reasons.items())[:MOST_NAMED]:  # segment.json has the others
        progress.say(f"sequence {sequence} is quarantined: {reason}")
    if reasons:
        progress.say(f"{len(reasons)} sequences are quarantined; they are in no answer (`gradindex "
                     "info` lists them)")
    if halved := sum(len(facts.splits) for facts in encoded):
        progress.say(f"memory ran out on {halved} batches, which were halved; smaller "
                     "--batch-tokens avoid that")
    return reasons


def encode_segment(
    model: LanguageModel, codes: Codes, records: list[Record], folder: Path, batch_tokens: int,
    progress: Progress, before: Future[None] | None = None,
) -> tuple[SegmentFacts, Callable[[], None]]:
    """Encode a segment's records in `folder` (…/NNNNNN.partial): its facts, and what seals it.

    A sequence whose gradient is not finite has no code: its row's norm is NaN, and segment.json
    says why. Raises ResourceError, here and when it is sealed.
    """
    facts = segments.read_facts(folder)  # with the splits of an earlier attempt
    code_index = CodeIndex(codes.settings.length)
    stored = np.zeros((len(records), code_bytes(codes.settings.length)), dtype=np.uint8)
    norms = np.zeros(len(records), dtype=np.float32)

    def keep(halved: list[tuple[int, int]]) -> None:
        facts.splits = halved
        segments.write_facts(folder, facts)

    # noted before a half is tried, so that who goes on after a kill forms the same batches
    splits = Splits(facts.splits, keep)
    for rows, vectors in encode_batches(model, codes, records, batch_tokens, splits):
        with np.errstate(over="ignore", invalid="ignore"):  # norms that float32 can't hold, too
            norms[rows] = np.linalg.norm(vectors.astype(np.float64), axis=1)
        finite = np.isfinite(norms[rows])
        stored[np.array(rows)[finite]] = code_index.encode(vectors[finite])
        for row in np.array(rows)[~finite].tolist():
            facts.quarantined[records[row].id] = _why(model, codes, records[row])
            norms[row] = np.nan
        progress.update(len(rows))
        if before is not None and before.done():
            before.result()
    code_index.add(stored)
    return facts, partial(
        seal, folder, facts, code_index, row_file.make_rows(records, norms),
        [record.tokens for record in records], vocabulary_size(model.network.config))


def seal(
    folder: Path, facts: SegmentFacts, codes: CodeIndex, rows: np.ndarray,
    sequences: list[np.ndarray], vocabulary: int,
) -> None:
    """Write what a segment has besides its records, then rename its folder: it is whole.

    Raises ResourceError.
    """
    files = facts.files
    files[CODES.name] = codes.write(folder / CODES.name)
    files[ROWS.name] = row_file.write_rows(folder / ROWS.name, rows)
    files[TOKENS.name] = token_file.write(folder / TOKENS.name, sequences, vocabulary)
    # last, since it says what the others are; the new name says that all are there
    segments.write_facts(folder, facts)
    rename_folder(folder, folder.with_suffix(""))


def _why(model: LanguageModel, codes: Codes, record: Record) -> str:
    """Why a sequence has no code."""
    batch = model.batch([record])
    # gradients may be finite, and their sums in a bucket too large
    return why_not_finite(model, codes.modules, batch) or "its code's norm is not finite"


def encode_batches(
    model: LanguageModel, codes: Codes, records: list[Record], batch_tokens: int, splits: Splits,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield, batch by batch, which of the records it holds and their vectors, float32 [b, K].

    `splits` are the batches that are halved, and those that have to be on the way. A GPU is at work
    on the next batch by then. Raises ResourceError.
    """
    def run(rows: list[int]) -> Arriving:
        # float32 for FAISS, whatever the model computes in
        return Arriving([encode_batch(model, codes, [records[row] for row in rows]).float()])

    batches = in_batches(model.lengths(records), batch_tokens, splits, run)
    for rows, [vectors] in as_they_arrive(batches):
        yield rows, vectors


def encode_batch(model: LanguageModel, codes: Codes, records: list[Record]) -> Tensor:
    """Vectors [b, K] of sequences, from one forward and one backward pass."""
    batch = model.batch(records)
    vectors = codes.empty(len(records))  # each module adds its part as soon as it arrives

    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        codes.add(vectors, module, a, d)

    with torch.no_grad():
        backward(model, codes.modules, batch, each)
    return vectors
