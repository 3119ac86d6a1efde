"""New documents for a finished index: new segments under the curvature of the build.

The plan is the build's, only the data are new. An append resumes like a build (`append.json`), and
is one commit. Since the curvature stays, its eigenvalues may no longer be those of the new data:
that is measured, and said.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradindex.draws import Stream, choose
from gradindex.errors import InputError
from gradindex.influence.exact import Rescorer, self_influence
from gradindex.influence.fitted_model import FittedModel
from gradindex.memory import parse_bound
from gradindex.model.model_source import ModelSource
from gradindex.progress import Progress
from gradindex.storage.contents import Contents
from gradindex.storage.layout import APPEND
from gradindex.storage.records import Record
from indexer import defaults
from indexer.ask_reference import ask_reference, drop_unasked, may_stay, read_records
from indexer.build_request import check_numbers, open_corpus
from indexer.encode import encode_run, quarantined_of
from indexer.fit.batch_sums import fit_batch
from indexer.read import ingest
from indexer.read.corpus import CorpusFacts
from indexer.read.ingest import Run
from indexer.reference import reference_at_build
from indexer.state import AppendPlan, AppendState, finished_append
from indexer.upkeep.commit import commit_segments, writing

DRIFT_SAMPLE = 256  # sequences of each, old and new
DRIFTED = 1.25  # Λ of the new data by this factor larger or smaller: warn, if it is no accident
SURE = 3.0  # standard errors


def append(
    index: str | Path,
    data: Any = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    limit: int | None = None,
    strict: bool = False,
    max_bad: float = defaults.MAX_BAD,
    device: str = defaults.AUTO,
    device_map: str | None = None,
    discard: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    max_memory: str | int | None = None,
    adapter: str | None = None,
    reference: Any = None,
    progress: Progress | None = None,
) -> ModelSource | None:
    """Encode new documents into the index; resumable. Returns what opens the index.

    Fields, lengths and settings are the build's; `model` says where its model is now, `reference`
    where the reference of its preference pairs is. With `discard` an unfinished append is dropped
    first; without data that is all (returns None).
    Raises InputError for unusable data, or other data than an unfinished append's;
    IndexMismatchError for another model or tokenizer; DamagedIndexError; ResourceError.
    """
    progress, folder = progress or Progress(), Path(index)
    check_numbers(limit=limit, max_bad=max_bad)
    source = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle,
                         parse_bound(max_memory), adapter, device_map)
    only_discard = discard and data is None  # which a damaged index allows
    with writing(folder, "gradindex append", progress, only_discard, discard) as contents:
        if data is None and not discard:
            raise InputError("no data given; expected files to append.")
        if data is not None:
            # held by nothing here: it may have to make way for a reference
            _append(contents, FittedModel(contents.manifest, contents.files, source), data,
                    reference, limit, strict, max_bad, progress)
    return None if only_discard else replace(source, max_memory=None)


def _append(
    contents: Contents, fitted: FittedModel, data: Any, asked: Any, limit: int | None,
    strict: bool, max_bad: float, progress: Progress,
) -> None:
    """The journey of an append, in numbered steps; every step resumes."""
    index, manifest, plan = contents.root, contents.manifest, contents.manifest.plan

    # 1) what is asked for: other data, and all else as at the build
    _ = fitted.tokenizer  # refused here, before anything is read, if it is another
    reference = reference_at_build(plan.reference, asked, fitted.source, manifest.dtype)
    corpus = open_corpus(data, fitted.source, replace(plan.corpus, limit=limit), reference, strict)
    if corpus.kind != manifest.kind:
        raise InputError(
            f"the data holds {corpus.kind}, the index was built on {manifest.kind}; append the "
            "same kind, or build another index."
        )
    for note in corpus.notes:
        progress.say(note)
    append_plan = AppendPlan(corpus.data_facts(), limit, manifest.next_id)
    if finished_append(index, append_plan):
        (index / APPEND).unlink()
        progress.say(f"{index} has these data: they were appended already; nothing to do.")
        return
    progress.say(f"model: loading {fitted.source.name} as {manifest.dtype}")
    _ = fitted.model  # refused before anything is read, too
    state = AppendState.open(index, append_plan, manifest.threads)
    torch.set_num_threads(state.threads)

    # 2) text → sequences, on disk as records
    run = Run(index, manifest.next_id, manifest.next_segment, 0, plan.segment_size)
    if state.corpus is None:
        corpus.documents_before = manifest.documents
        with _all_or_nothing(state, run):
            state.corpus = read_records(corpus, run, progress)
        state.save()
    run = replace(run, count=state.corpus.sequences)
    ingest.report_read(state.corpus, plan, progress)
    if reference is not None:
        stays = may_stay(fitted.model, run, reference, plan)
        if not stays:  # loaded again when it is used again
            fitted = FittedModel(manifest, contents.files, fitted.source)
        with _all_or_nothing(state, run):
            ask_reference(run, reference, fitted.source, fitted.model if stays else None, plan,
                          progress)
    ingest.check_disk(run, manifest.code["length"], fit=0)

    # 3) every sequence → a code
    encode_run(fitted.model, fitted.codes, run, manifest.batch_tokens, max_bad, progress)
    quarantined = quarantined_of(run, max_bad, progress)

    # 4) how far the curvature is from that of the new data; nothing else depends on it
    ids = [sequence for sequence in range(run.first, run.first + run.count)
           if sequence not in quarantined]
    seed = manifest.code["seed"]
    drift = measure_drift(fitted, contents.records(_sample(contents.places, seed)),
                          run.records(_sample(np.array(ids), seed)))
    _report_drift(drift, progress)

    # 5) the commit; append.json goes last, so that one killed in between knows it is done
    _commit(contents, run, append_plan, state.corpus, drift)
    (index / APPEND).unlink()
    progress.say(f"index: {run.count:,} sequences appended, ids {run.first} to "
                 f"{run.first + run.count - 1}")


@contextlib.contextmanager
def _all_or_nothing(state: AppendState, run: Run) -> Iterator[None]:
    """Let data that can't be used leave nothing of an append that had to be discarded."""
    try:
        yield
    except InputError:
        state.path.unlink()
        ingest.remove_unsealed(run.index, run.number)
        drop_unasked(run)
        raise


def _commit(
    contents: Contents, run: Run, plan: AppendPlan, corpus: CorpusFacts, drift: "Drift"
) -> None:
    """Make the new segments a part of the index."""
    manifest = contents.manifest
    skipped = {reason: manifest.skipped.get(reason, 0) + corpus.skipped.get(reason, 0)
               for reason in {*manifest.skipped, *corpus.skipped}}
    commit_segments(
        contents, manifest.segments + run.segments, set(contents.deleted.tolist()),
        ingest.file_facts(run),
        np.concatenate([contents.rows, *(run.rows(segment) for segment in run.segments)]),
        documents=manifest.documents + corpus.documents, tokens=manifest.tokens + corpus.tokens,
        scored_tokens=manifest.scored_tokens + corpus.scored_tokens, skipped=skipped,
        next_id=run.first + run.count, next_segment=run.number + len(run.segments),
        appended=[*manifest.appended, {
            "data": plan.data, "first": run.first, "sequences": run.count,
            "drift": round(drift.ratio, 4), "drift_error": round(drift.error, 4),
        }],
    )


def _sample(among: np.ndarray, seed: int) -> list[int]:
    """A fixed random part of some ids or rows."""
    return [int(among[number])
            for number in choose(Stream.DRIFT_SAMPLE, seed, len(among), DRIFT_SAMPLE)]


# ---- drift


@dataclass(frozen=True)
class Drift:
    """How Λ of new data compares with that of what was indexed before.

    `ratio` = E_new[s] / E_old[s], where s = ∇ᵀ(G+λ)⁻¹∇ per token for labels drawn from the model:
    what the index's curvature makes of a gradient's size, 1 where the new data are like the old.
    `error` is the ratio's standard error; `sample` sequences of each were measured.
    """

    ratio: float
    error: float
    sample: int

    @property
    def warns(self) -> bool:
        """Whether it is beyond 1.25 (or below 1 / 1.25), and not by accident."""
        size = abs(np.log(self.ratio))
        return bool(size > np.log(DRIFTED) and size > SURE * self.error / self.ratio)


def measure_drift(fitted: FittedModel, old: list[Record], new: list[Record]) -> Drift:
    """Compare a sample of what was indexed before with one of new sequences, see Drift."""
    before, now = _token_sizes(fitted, old), _token_sizes(fitted, new)
    # nothing new that could be encoded, or nothing old that is left
    if not len(before) or not len(now) or before.mean() == 0 or now.mean() == 0:
        return Drift(1.0, 0.0, 0)
    return drift_of(before, now)


def drift_of(old: np.ndarray, new: np.ndarray) -> Drift:
    """The ratio of two samples' means, neither of them 0, and its standard error.

    >>> drift_of(np.array([1.0, 3.0]), np.array([4.0, 4.0]))  # 4 / 2, the old mean ± 1
    Drift(ratio=2.0, error=1.0, sample=2)
    """
    ratio = float(new.mean() / old.mean())
    # relative variances of the means add up; one sequence alone has none that is known
    variance = sum(float(sizes.var(ddof=1)) / len(sizes) / float(sizes.mean()) ** 2
                   for sizes in (old, new) if len(sizes) > 1)
    return Drift(ratio, ratio * variance**0.5, min(len(old), len(new)))


def _token_sizes(fitted: FittedModel, records: list[Record]) -> np.ndarray:
    """s of each sequence, see Drift: float64 [n]."""
    manifest, model = fitted.manifest, fitted.model
    by = Rescorer(model, manifest.modules, fitted.ekfac, manifest.damping, manifest.batch_tokens)
    sizes = self_influence(by, records, lambda batch: fit_batch(
        model, batch, "model", manifest.code["seed"], Stream.DRIFT_LABELS))
    # per token, or longer documents would look like other ones
    counted = [model.objective.predictions(record) for record in records]
    return sizes / np.maximum(1, counted)


def _report_drift(drift: Drift, progress: Progress) -> None:
    """Say how the new data's Λ compares, and what follows where that is another."""
    if not drift.sample:
        progress.say("curvature: nothing to compare the new data's Λ with")
        return
    measured = f"Λ of the new data is {drift.ratio:.2f} ± {drift.error:.2f} times that of the " \
               f"old ({drift.sample} sequences of each)"
    if not drift.warns:
        progress.say(f"curvature: {measured}")
        return
    progress.say(
        f"warning: the curvature was fitted on other data: {measured}. Scores of the new sequences "
        "are exact for this index's curvature, but that is less and less the model's own; a new "
        "build on all data fits it again."
    )
