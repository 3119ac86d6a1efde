"""New documents for a finished index: new segments under the curvature of the build.

The plan is the build's, only the data are new. An append resumes like a build (`append.json`), and
is one commit. Since the curvature stays, its eigenvalues may no longer be those of the new data:
that is measured, and said.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradindex.draws import Stream, choose
from gradindex.errors import InputError
from gradindex.influence.codes import Codes
from gradindex.influence.exact import Rescorer, self_influence
from gradindex.influence.fitted import FittedModel
from gradindex.memory import parse_bound
from gradindex.model.source import ModelSource
from gradindex.progress import Progress
from gradindex.storage.contents import Contents
from gradindex.storage.layout import APPEND
from gradindex.storage.records import Record
from indexer import defaults
from indexer.build_request import check_numbers, open_corpus
from indexer.fit.steps import fit_batch
from indexer.read import ingest
from indexer.read.ingest import Run
from indexer.state import AppendPlan, AppendState, finished_append
from indexer.upkeep.commit import commit, writing

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
    discard: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    max_memory: str | int | None = None,
    progress: Progress | None = None,
) -> ModelSource | None:
    """Encode new documents into the index; resumable. Returns the index, open.

    Fields, lengths and settings are the build's; `model` says where its model is now. With
    `discard` an unfinished append is dropped first; without data that is all (returns None).
    Raises InputError for unusable data, or other data than an unfinished append's;
    IndexMismatchError for another model or tokenizer; DamagedIndexError; ResourceError.
    """
    progress, folder = progress or Progress(), Path(index)
    check_numbers(limit=limit, max_bad=max_bad)
    given = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle,
                        parse_bound(max_memory))
    only_discard = discard and data is None  # which a damaged index allows
    with writing(folder, "gradindex append", progress, only_discard, discard) as contents:
        if data is None and not discard:
            raise InputError("no data given; expected files to append.")
        if data is not None:
            fitted = FittedModel(contents.manifest, contents.files, given)
            _append(contents, fitted, data, limit, strict, max_bad, progress)
    return None if only_discard else replace(given, max_memory=None)


def _append(
    contents: Contents, fitted: FittedModel, data: Any, limit: int | None, strict: bool,
    max_bad: float, progress: Progress,
) -> None:
    facts, plan = contents.manifest, contents.manifest.plan
    _ = fitted.tokenizer  # refused here, before anything is read, if it is another
    corpus = open_corpus(data, fitted.source, fitted.config, replace(plan.corpus, limit=limit),
                         strict)
    if corpus.task != facts.task:
        raise InputError(
            f"the data holds {corpus.task}, the index was built on {facts.task}; append the same "
            "kind, or build another index."
        )
    appending = AppendPlan(corpus.data_facts(), limit, facts.next_id)
    if finished_append(contents.root, appending):
        (contents.root / APPEND).unlink()
        progress.say(f"{contents.root} has these data: they were appended already; nothing to do.")
        return
    progress.say(f"model: loading {fitted.source.name} as {facts.dtype}")
    _ = fitted.model  # as is another model
    state = AppendState.open(contents.root, appending, facts.threads)
    torch.set_num_threads(state.threads)
    run = Run(contents.root, facts.next_id, facts.next_segment, 0, plan.segment_size)
    if state.corpus is None:
        corpus.documents_before = facts.documents
        try:
            state.corpus = ingest.write_records(corpus, run, progress)
        except InputError:  # data that can't be used leave nothing that had to be discarded
            state.path.unlink()
            ingest.remove_unsealed(contents.root, run.number)
            raise
        state.save()
    run = replace(run, count=state.corpus.sequences)
    ingest.report_read(state.corpus, facts.sequence_length, progress)
    ingest.check_disk(run, facts.code["length"], 0)

    codes = fitted.codes
    ingest.encode_run(fitted.model, codes, run, facts.batch_tokens, max_bad, progress)
    quarantined = ingest.quarantined(run, max_bad, progress)
    good = [run.first + place for place in range(run.count) if run.first + place not in quarantined]
    drift = measure_drift(fitted, codes, _some(contents.places, facts.code["seed"]),
                          _some(np.array(good), facts.code["seed"]), contents, run)
    _say_drift(drift, progress)
    new = state.corpus
    skipped = {reason: facts.skipped.get(reason, 0) + new.skipped.get(reason, 0)
               for reason in {*facts.skipped, *new.skipped}}
    commit(
        contents, facts.segments + run.segments, set(contents.deleted.tolist()),
        ingest.file_facts(run),
        np.concatenate([contents.rows, *(run.rows(one) for one in run.segments)]),
        documents=facts.documents + new.documents, tokens=facts.tokens + new.tokens,
        scored_tokens=facts.scored_tokens + new.scored_tokens, skipped=skipped,
        next_id=run.first + run.count, next_segment=run.number + len(run.segments),
        appended=[*facts.appended, {
            "data": appending.data, "first": run.first, "sequences": run.count,
            "drift": round(drift.ratio, 4), "drift_error": round(drift.error, 4),
        }],
    )
    (contents.root / APPEND).unlink()
    progress.say(f"index: {run.count:,} sequences appended, ids {run.first} to "
                 f"{run.first + run.count - 1}")


def _some(among: np.ndarray, seed: int) -> list[int]:
    """A fixed random part of some ids or rows."""
    return [int(among[one]) for one in choose(Stream.DRIFT_SAMPLE, seed, len(among), DRIFT_SAMPLE)]


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


def measure_drift(
    fitted: FittedModel, codes: Codes, old_rows: list[int], new_ids: list[int],
    contents: Contents, run: Run,
) -> Drift:
    """Compare a sample of the index's rows with one of a run's ids, see Drift."""
    old = _sizes(fitted, codes, contents.records(old_rows))
    new = _sizes(fitted, codes, run.records(new_ids))
    if not len(old) or not len(new) or old.mean() == 0 or new.mean() == 0:
        return Drift(1.0, 0.0, 0)
    ratio = float(new.mean() / old.mean())
    variance = sum(float(one.var(ddof=1)) / len(one) / float(one.mean()) ** 2
                   for one in (old, new) if len(one) > 1)
    return Drift(ratio, ratio * variance**0.5, min(len(old), len(new)))


def _sizes(fitted: FittedModel, codes: Codes, members: list[Record]) -> np.ndarray:
    """s of each sequence, see Drift: float64 [n]."""
    manifest, model = fitted.manifest, fitted.model
    by = Rescorer(model, codes.modules, fitted.ekfac, manifest.damping, manifest.batch_tokens)
    sizes = self_influence(by, members, lambda records: fit_batch(
        model, records, "model", manifest.code["seed"], Stream.DRIFT_LABELS))
    counted = [model.objective.counted(one.scored).sum() for one in members]
    return sizes / np.maximum(1, counted)


def _say_drift(drift: Drift, progress: Progress) -> None:
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


