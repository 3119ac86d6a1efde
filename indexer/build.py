"""The journey of a build, in numbered steps; every step resumes.

    build.json                     the plan: what was asked for, resolved
    segments/NNNNNN.partial/       records only: read, not yet encoded
    curvature.partial/             the fit's running sums
    curvature/, segments/NNNNNN/   done
    background.safetensors         done, though a killed build makes it again
    manifest.json                  the index exists; build.json goes

The same command run again goes on where the last one stopped; a different one is refused. Several
processes can share the fit and the encoding (`shards.py`); `merge` does what comes after. Step
1, what is asked for, is in `build_request.py`.
"""

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gradindex.errors import GradindexError, InputError
from gradindex.influence.codes import Codes
from gradindex.influence.curvature import Ekfac
from gradindex.memory import parse_bound, return_freed
from gradindex.model.config import vocabulary_size
from gradindex.model.identity import check_identity, files_digest
from gradindex.model.network import LanguageModel
from gradindex.model.source import ModelSource
from gradindex.model.tracked import (
    parameter_share,
)
from gradindex.modules import Module
from gradindex.progress import Progress, size
from gradindex.storage import background_file, code_file, layout, manifest, row_file
from gradindex.storage.files import disk_errors, facts_of, make_folder, make_folders
from gradindex.storage.integrity import refuse_links
from gradindex.storage.layout import BUILD
from gradindex.storage.locks import is_lock, one_of_writers, only_writer
from gradindex.storage.manifest import (
    BackgroundFacts,
    Calibration,
    CodeFacts,
    FitFacts,
    Manifest,
    ModelFacts,
)
from gradindex.version import VERSION
from indexer.background import make_background
from indexer.build_request import BuildRequest, anywhere
from indexer.calibrate import calibrate
from indexer.fit.notes import FitNotes
from indexer.fit.schedule import fit
from indexer.prepare import Prepared, make_codes, prepare
from indexer.read import ingest
from indexer.read.ingest import Run
from indexer.shards import OVER_RAY, Shard, Share, Stage
from indexer.state import BuildState


def build(request: BuildRequest) -> ModelSource | None:
    """Do what is asked for, or this process's share of it, from what is there already on.

    Returns with what the finished index can be opened, None where it is yet to be merged. Raises
    as `gradindex.build`.
    """
    # 1) what is asked for was settled when the request was made (`build_request.py`)
    index, progress, shard = request.index, request.progress, request.shard
    with _writing(request) as state:
        if manifest.exists(index):
            if shard.first:
                _check_finished(index, request)
            progress.say(f"{index} is complete; nothing to do.")
            return _whole(request)
        if shard.first:
            state.request = request.facts
            state.save()

        # 2) text → sequences, on disk as records; the other shards began when this was done
        if state.corpus is None:
            assert shard.first
            if not (index / "segments").is_dir():
                make_folder(index / "segments")
            empty = Run(index, 0, 0, 0, request.plan.segment_size)
            state.corpus = ingest.write_records(request.corpus, empty, progress)
            state.save()
        ingest.report_read(state.corpus, state.plan.sequence_length, progress)

        # 3) the model and its tracked modules
        about = prepare(index, request.source, request.dtype, state, progress, shard.of)
        with _shared_out(request) as share:

            # 4) EK-FAC curvature
            fitted = _fit(index, about, share, progress)

            # 5) every sequence → a code
            if request.ray is None:
                ingest.encode_run(about.model, _codes(fitted, state), about.run,
                                  state.plan.batch_tokens, request.facts.max_bad, progress, share)
            else:
                share.wait(Stage("encode"), lambda: ingest.unsealed(about.run))
        return_freed()
        if shard.of > 1:
            progress.say(f"shard {shard.number}/{shard.of} is done; when all are: gradindex merge "
                         f"{index}")
            return None

        # 6) and 7) how good the codes are, and the commit
        _complete(index, fitted, state, progress)
    return _whole(request)


def _whole(request: BuildRequest) -> ModelSource | None:
    """What an index that is whole can be opened with; a shard leaves that to `merge`."""
    if request.shard.of > 1:
        return None
    source = request.source
    return replace(source, model=source.model if source.is_object else None, max_memory=None)


@contextlib.contextmanager
def _writing(request: BuildRequest) -> Iterator[BuildState]:
    """Be the one process that writes to the index, or one of those that do so together."""
    index, progress, shard = request.index, request.progress, request.shard
    together = shard.of > 1 or request.ray is not None
    if shard.first:
        with disk_errors(index):
            make_folders(index)
            if together:
                _begin_anew_alone(request)
    else:
        shard.wait(Stage("reading the data"), lambda: [] if manifest.exists(index) or
                   BuildState.joined(index, request.plan) else [0])
    group = f"one of {shard.of} shards" if shard.of > 1 else OVER_RAY
    writing = one_of_writers(index, shard.number, group) if together else \
        only_writer(index, "gradindex build")
    with writing, disk_errors(index):
        refuse_links(index)
        yield BuildState.open(index, request.plan, progress, anew=not together)


@contextlib.contextmanager
def _shared_out(request: BuildRequest) -> Iterator[Share]:
    """Who does what: this shard its share, or workers of a Ray cluster everything."""
    if request.ray is None:
        yield request.shard
        return
    from indexer.ray_build import Crew, Job

    with Crew(request.ray, request.ray_workers, Job.of(request), request.progress) as crew:
        yield crew


def _begin_anew_alone(request: BuildRequest) -> None:
    """Begin a build anew where it has another plan, if no other process writes to it.

    A shard of the old plan that is still at work would add its sums to the new one's. Where the
    plan is the same, the others may begin at this moment, and must not find the folder locked.
    """
    stored = BuildState.resumed(request.index)
    if stored is None or stored.plan == request.plan:
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_writer(request.index, "gradindex build"))
        except GradindexError:
            return
        refuse_links(request.index)
        BuildState.open(request.index, request.plan, request.progress)


def merge(
    index: str | Path, model: Any = None, tokenizer: Any = None, device: str = "auto",
    trust_remote_code: bool = False, allow_pickle: bool = False,
    max_memory: str | int | None = None, progress: Progress | None = None,
) -> ModelSource:
    """Make an index of what the shards of a build did, once all are done. Returns it, open.

    `model` (a folder, hub id or loaded model) is where the weights are now, if not where they were.
    Raises InputError where there is nothing to merge or something is missing, IndexMismatchError
    for another model, GradindexError while another process writes to the index; ResourceError.
    """
    folder, progress = Path(index), progress or Progress()
    given = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle,
                        parse_bound(max_memory))
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one that gradindex build --shard wrote.")
    with only_writer(folder, "gradindex merge"), disk_errors(folder):
        refuse_links(folder)
        state = BuildState.resumed(folder)
        if state is None and not manifest.exists(folder):
            raise InputError(f"{folder} holds no unfinished build. Run gradindex build … --shard "
                             "i/n first, once for each i.")
        if state is None or manifest.exists(folder):
            progress.say(f"{folder} is complete; nothing to do.")
        else:
            _refuse_unfinished(folder, state)
            plan = state.plan
            source = given.at_build(plan.model, plan.revision, None)
            about = prepare(folder, source, plan.dtype, state, progress)
            _complete(folder, _fit(folder, about, Shard(), progress), state, progress)
    return replace(given, max_memory=None)


def _refuse_unfinished(index: Path, state: BuildState) -> None:
    """Raise InputError for shards that are not done."""
    run = Run(index, 0, 0, state.corpus.sequences if state.corpus else 0, state.plan.segment_size)
    missing = "the data are not read" if state.corpus is None else \
        "the curvature is not fitted" if not (index / "curvature").is_dir() else None
    left = [run.segments[number].name for number in ingest.unsealed(run)]
    if missing is None and left:
        shown = ", ".join(left[:5]) + ", …" * (len(left) > 5)
        missing = f"{len(left)} of {len(run.segments)} segments are not encoded ({shown}; shard " \
                  "i of n does those whose number leaves i when divided by n)"
    if missing:
        raise InputError(
            f"{index} can't be merged yet: {missing}. Wait for the shards that run, and start "
            "those that were stopped again, or finish all with gradindex build … without --shard."
        )


@dataclass
class _Fitted:
    """A build whose curvature is there, of those modules that have one."""

    about: Prepared
    modules: list[Module]
    ekfac: Ekfac
    notes: FitNotes


def _fit(index: Path, about: Prepared, share: Share, progress: Progress) -> _Fitted:
    ekfac, notes = fit(about.model, about.tracked, about.run.records, about.settings, index,
                       progress, about.run.count, share, about.allowance)
    return _Fitted(about, [one for one in about.tracked if one.name in ekfac], ekfac, notes)


def _codes(fitted: _Fitted, state: BuildState) -> Codes:
    return make_codes(fitted.modules, fitted.ekfac, state.plan)


def _complete(index: Path, fitted: _Fitted, state: BuildState, progress: Progress) -> None:
    """Steps 6 and 7, once every segment is encoded."""
    plan, run, model, ekfac = state.plan, fitted.about.run, fitted.about.model, fitted.ekfac
    assert state.request is not None
    codes, length = _codes(fitted, state), plan.bits
    quarantined = ingest.quarantined(run, state.request.max_bad, progress)

    # 6) how far a code's score is from the exact one, and what comes up whatever is asked
    coded = [one for one in range(run.count) if one not in quarantined]
    calibration = calibrate(
        model, codes, ekfac, run.records, lambda ids: run.codes(ids, length), coded,
        plan.batch_tokens, progress, fitted.about.allowance,
    )
    queries, sample = make_background(
        model, codes, ekfac, run.records, lambda ids: run.coded(ids, length), coded, progress)
    background_file.save(index / layout.BACKGROUND, queries)

    # 7) the commit
    made = _manifest(state, fitted, codes, calibration,
                     BackgroundFacts(queries=len(queries), sample=sample), len(quarantined))
    if made.duplicates:
        progress.say(f"duplicates: {made.duplicates:,} sequences equal an earlier one; they are "
                     "shown as one hit with a count")
    manifest.commit(index, made)
    (index / BUILD).unlink()
    for path in filter(is_lock, index.iterdir()):  # of shards that were killed
        path.unlink()
    total = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
    progress.say(f"index: {index}, {made.sequences:,} sequences, {size(total)} (it holds the "
                 "training text)")


def _manifest(
    state: BuildState, fitted: _Fitted, codes: Codes, calibration: Calibration,
    queries: BackgroundFacts, quarantined: int,
) -> Manifest:
    """What the build made."""
    run, model = fitted.about.run, fitted.about.model
    tracked, notes = fitted.modules, fitted.notes
    plan, facts, request, identity = state.plan, state.corpus, state.request, state.model
    assert facts is not None and request is not None and identity is not None
    files = {f"curvature/{name}": one for name, one in notes.files.items()}
    for name in (layout.FIT, layout.BACKGROUND):
        files[name] = facts_of(run.index / name)
    rows = np.concatenate([run.rows(one) for one in run.segments])
    return Manifest(
        format=manifest.FORMAT, generation=1, versions=_versions(),
        model=ModelFacts(
            name=anywhere(plan.model), revision=plan.revision,
            files=identity.files, tensors=identity.tensors, config=identity.config,
            tokenizer=plan.tokenizer, tokenizer_name=request.tokenizer_name,
        ),
        dtype=plan.dtype, device=plan.device, threads=state.threads,
        task=request.task, vocabulary=vocabulary_size(model.network.config),
        sequence_length=plan.sequence_length,
        documents=facts.documents, sequences=run.count - quarantined, tokens=facts.tokens,
        scored_tokens=facts.scored_tokens, skipped=facts.skipped,
        duplicates=row_file.count_equal(rows["digest"][~np.isnan(rows["norm"])]),
        train_sequences=request.train_sequences, modules=tracked,
        parameter_share=parameter_share(model.network, tracked),
        effective_dimension={name: round(one.effective_dimension(plan.damping), 1)
                             for name, one in fitted.ekfac.items()},
        fit=FitFacts(sequences=len(fitted.about.settings.ids) - len(notes.quarantined),
                     labels=plan.fit_labels, left_out=notes.left_out),
        damping=plan.damping, code=CodeFacts(
            length=codes.settings.length, width=codes.settings.width, seed=codes.settings.seed,
            damping=codes.settings.damping, digest=codes.digest,
        ),
        calibration=calibration, background=queries,
        batch_tokens=plan.batch_tokens, plan=plan,
        appended=[],
        next_id=run.count, next_segment=len(run.segments), segments=run.segments,
        deleted=0, deleted_file=None, quarantined=quarantined,
        files=files | ingest.file_facts(run),
    )


def _check_finished(index: Path, request: BuildRequest) -> None:
    """Raise IndexMismatchError if the weights changed; take over a new N_train."""
    (index / BUILD).unlink(missing_ok=True)  # killed right after the commit
    built = manifest.load(index)
    digest = files_digest(request.source)
    if digest is None or digest != built.model["files"]:
        check_identity(LanguageModel.load(request.source, request.dtype), dict(built.model))
    train_sequences = request.facts.train_sequences
    if train_sequences not in (None, built.train_sequences):
        built.train_sequences = train_sequences  # it only scales what is shown
        built.generation += 1
        manifest.commit(index, built)


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "lmdb", "numpy")}
    return {"gradindex": VERSION, "python": platform.python_version(),
            "faiss": code_file.library_version(), **libraries}
