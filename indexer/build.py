"""The journey of a build, in numbered steps; every step resumes.

    build.json                     the plan: what was asked for, resolved
    segments/NNNNNN.partial/       records only: read, not yet encoded
    curvature.partial/             the fit's running sums
    curvature/, segments/NNNNNN/   done
    background.safetensors         done, though a killed build makes it again
    manifest.json                  the index exists; build.json goes

The same command run again goes on where the last one stopped; a different one is refused. Several
processes can share the fit and the encoding (`shards.py`, `parallel/`). Step 1, what is asked for,
is in `build_request.py`.
"""

import contextlib
import platform
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from gradindex.errors import GradindexError
from gradindex.influence.codes import Codes
from gradindex.influence.curvature import Ekfac
from gradindex.memory import return_freed
from gradindex.model.config import vocabulary_size
from gradindex.model.identity import check_identity, files_digest
from gradindex.model.members import load_members, member_source
from gradindex.model.model_source import ModelSource, anywhere
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import parameter_share
from gradindex.modules import LAST, Module
from gradindex.progress import Progress, size
from gradindex.storage import background_file, code_index, layout, row_file
from gradindex.storage.files import bytes_in, facts_of, make_folder, make_folders
from gradindex.storage.integrity import refuse_links
from gradindex.storage.layout import BUILD
from gradindex.storage.locks import is_lock, one_of_writers, only_writer
from gradindex.storage.manifest import (
    BackgroundFacts,
    Calibration,
    CodeFacts,
    FitFacts,
    Manifest,
    MemberFacts,
    ModelFacts,
    expected_identity,
)
from gradindex.storage.manifest import commit as commit_manifest
from gradindex.storage.manifest import exists as index_exists
from gradindex.storage.manifest import load as load_manifest
from gradindex.storage.os_errors import disk_errors
from gradindex.storage.upgrades import FORMAT
from gradindex.terminal import shell_word
from gradindex.version import VERSION
from indexer.ask_reference import ask_reference, may_stay, read_records
from indexer.background_queries import make_background_queries
from indexer.build_request import BuildRequest
from indexer.calibrate import ExactPairs, calibrate, draw_pairs, exact_pairs, score_pairs
from indexer.code_length import settle_bits
from indexer.encode import encode_run, quarantined_of
from indexer.fit.budget import curvature_bytes
from indexer.fit.notes import FitNotes
from indexer.fit.schedule import fit
from indexer.pace.expected import say_expected
from indexer.prepare import Prepared, load_model, make_codes, prepare_build
from indexer.read import ingest
from indexer.read.ingest import Run
from indexer.shards import OVER_RAY, BuildStage, Share
from indexer.state import BuildState


def build(request: BuildRequest) -> ModelSource | None:
    """Build an index, or do this process's share of it. What is done already isn't done again.

    Returns what opens the finished index, None where it is yet to be merged. Raises as
    `gradindex.build`.
    """
    # 1) what is asked for was settled when the request was made (`build_request.py`)
    index, progress, shard = request.index, request.progress, request.shard
    with _writing(request) as state:
        if index_exists(index):
            if shard.first:
                _check_finished(index, request)
            progress.say(f"{index} is complete; nothing to do.")
            return _source_to_open(request)
        if shard.first:
            state.request = request.facts  # may differ from run to run, unlike the plan
            state.save()

        # 2) the model and its tracked modules: one that can't be used ends it before data are read
        model, tracked = load_model(request.source, request.dtype, state, progress)

        # 3) text → sequences, on disk as records; the other shards began when this was done
        if state.corpus is None:
            assert shard.first
            if not (index / layout.SEGMENTS).is_dir():
                make_folder(index / layout.SEGMENTS)
            empty = Run(index, 0, 0, 0, request.plan.segment_size)
            state.corpus = read_records(request.corpus, empty, progress)
            state.save()
        ingest.report_read(state.corpus, state.plan, progress)
        ingest.check_classes(state.corpus, state.plan, progress)
        ingest.warn_few(state.corpus.sequences, progress)
        if request.reference is not None and shard.first:
            run = Run(index, 0, 0, state.corpus.sequences, state.plan.segment_size)
            stays = model if may_stay(model, run, request.reference, state.plan) else None
            del model  # which makes way where memory doesn't hold both
            ask_reference(run, request.reference, request.source, stays, state.plan, progress)
            model = stays or _load_again(request, state)
        prepared = prepare_build(index, model, tracked, state, progress, shard.of)
        with _share_of(request) as share:
            if progress.shown and request.ray is None:  # how many workers there will be isn't known
                say_expected(prepared, state, share, progress)

            # 4) EK-FAC curvature
            fitted = fit_curvature(index, prepared, share, progress)

            # 5) how many bits a code gets, by the exact scores of some sequences
            settle_codes(fitted, state, share, progress)

            # 6) every sequence → a code
            if request.ray is None:
                encode_run(prepared.model, _codes(fitted, state), prepared.run,
                           state.batch_tokens, request.facts.max_bad, progress, share)
            else:
                share.complete(BuildStage("encode"), lambda: ingest.unsealed(prepared.run))
        return_freed()  # what batches took, before calibration needs it
        if shard.of > 1:
            progress.say(f"shard {shard.number}/{shard.of} is done; when all are: gradindex merge "
                         f"{shell_word(index)}")
            return None

        # 7) how far a code's score is from the exact one, and what comes up whatever is asked
        measured = measure_codes(index, fitted, state, progress)

        # 8) the commit
        commit_index(index, fitted, measured, state, progress)
    return _source_to_open(request)


def _load_again(request: BuildRequest, state: BuildState) -> LanguageModel:
    """The model, after it made way. Raises IndexMismatchError where it changed meanwhile."""
    request.progress.say(f"model: loading {request.source.name} again")
    model = load_members(request.source, request.dtype)
    state.check_model(model)
    return model


def _source_to_open(request: BuildRequest) -> ModelSource | None:
    """What opens the finished index; None for a shard, whose index `merge` makes."""
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
        # until the first has read the data and knows the model, there is nothing to share
        shard.complete(BuildStage("reading the data"), lambda: [] if index_exists(index) or
                       BuildState.joined(index, request.plan) else [0])
    group = f"one of {shard.of} shards" if shard.of > 1 else OVER_RAY
    writing = one_of_writers(index, shard.number, group) if together else \
        only_writer(index, "gradindex build")
    with writing, disk_errors(index):
        refuse_links(index)
        yield BuildState.open(index, request.plan, progress, anew=not together)


@contextlib.contextmanager
def _share_of(request: BuildRequest) -> Iterator[Share]:
    """This process's share: a shard's own, or all of it, to be handed out to a Ray cluster."""
    if request.ray is None:
        yield request.shard
        return
    from indexer.parallel.ray_build import BuildWorkers, WorkerJob

    job = WorkerJob.of(request)
    with BuildWorkers(request.ray, request.ray_workers, job, request.progress) as pool:
        yield pool


def _begin_anew_alone(request: BuildRequest) -> None:
    """Begin a build anew where it has another plan, if no other process writes to it.

    A shard of the old plan that is still at work would add its sums to the new one's. Where the
    plan is the same, the others may begin at this moment, and must not find the folder locked.
    """
    state = BuildState.resumed(request.index)
    if state is None or state.saved_plan == request.plan.to_dict():
        return
    with contextlib.ExitStack() as stack:  # whose errors are not those of what stands below
        try:
            stack.enter_context(only_writer(request.index, "gradindex build"))
        except GradindexError:
            return
        refuse_links(request.index)
        BuildState.open(request.index, request.plan, request.progress)


@dataclass
class FittedBuild:
    """A build with its curvature; `modules` are those of the tracked that have one."""

    prepared: Prepared
    modules: list[Module]
    ekfac: Ekfac
    notes: FitNotes


def fit_curvature(index: Path, prepared: Prepared, share: Share, progress: Progress) -> FittedBuild:
    """Step 4: the curvature, fitted or read."""
    ekfac, notes = fit(prepared.model, prepared.tracked, prepared.run.records, prepared.settings,
                       index, progress, share, prepared.allowance)
    modules = [module for module in prepared.tracked if module.name in ekfac]
    return FittedBuild(prepared, modules, ekfac, notes)


def settle_codes(
    fitted: FittedBuild, state: BuildState, share: Share, progress: Progress
) -> None:
    """Step 5: K, written down with the exact scores that tell it, by the first process alone."""
    prepared, plan, settled = fitted.prepared, state.plan, state.settled
    assert settled is not None
    if share.first and settled.influence is None:
        pairs, cosines = _score_pairs(fitted, state, list(range(prepared.run.count)), progress)
        squares = curvature_bytes(fitted.modules, plan.covariance_blocks,
                                  prepared.model.accumulate.itemsize)
        settled.bits = settle_bits(
            plan.bits, cosines, prepared.run.count, squares, fitted.modules, plan.task,
            progress.say)
        ingest.check_disk(prepared.run, settled.bits, 0)
        settled.influence = [[score if np.isfinite(score) else None for score in scores]
                             for scores in pairs.influence.tolist()]
        state.save()
        return_freed()  # what batches took, before encoding needs it
    share.complete(BuildStage("bits"), lambda: [] if state.reread_bits() else [0])


def _codes(fitted: FittedBuild, state: BuildState) -> Codes:
    return make_codes(fitted.modules, fitted.ekfac, state.plan, state.bits, state.recipe)


@dataclass
class MeasuredBuild:
    """What is known of a build's codes, once every segment is encoded."""

    codes: Codes
    calibration: Calibration
    background: BackgroundFacts
    quarantined: int


def measure_codes(
    index: Path, fitted: FittedBuild, state: BuildState, progress: Progress
) -> MeasuredBuild:
    """Step 7: calibrate the codes, and write the background queries."""
    prepared, ekfac = fitted.prepared, fitted.ekfac
    run, model = prepared.run, prepared.model
    assert state.request is not None
    codes, length = _codes(fitted, state), state.bits
    quarantined = quarantined_of(run, state.request.max_bad, progress)
    coded = [number for number in range(run.count) if number not in quarantined]
    # both read codes and norms from the disk: what is measured is what a search will see
    calibration = calibrate(
        model, codes, ekfac, _pairs_with_codes(fitted, state, quarantined, progress),
        lambda ids: run.codes(ids, length), state.batch_tokens, progress)
    queries, sample = make_background_queries(
        model, codes, ekfac, run.records, lambda ids: run.coded(ids, length), coded,
        state.batch_tokens, progress)
    background_file.save(index / layout.BACKGROUND, queries)
    return MeasuredBuild(codes, calibration,
                         BackgroundFacts(queries=len(queries), sample=sample), len(quarantined))


def _pairs_with_codes(
    fitted: FittedBuild, state: BuildState, quarantined: Container[int], progress: Progress
) -> ExactPairs:
    """The pairs that were scored for the codes' bits; others where some of them got no code."""
    run, seed = fitted.prepared.run, state.plan.seed
    every = list(range(run.count))
    drawn = draw_pairs(every, seed)
    if not any(sequence in quarantined for part in drawn for sequence in part):
        return exact_pairs(run.records, every, seed, state.influence)
    coded = [sequence for sequence in every if sequence not in quarantined]
    return _score_pairs(fitted, state, coded, progress)[0]


def _score_pairs(
    fitted: FittedBuild, state: BuildState, ids: list[int], progress: Progress
) -> tuple[ExactPairs, np.ndarray]:
    """The exact scores of a sample of some ids, and their cosines."""
    prepared, plan = fitted.prepared, state.plan
    return score_pairs(
        prepared.model, fitted.modules, fitted.ekfac, prepared.run.records, ids, plan.seed,
        plan.damping, state.batch_tokens, progress, prepared.allowance)


def commit_index(
    index: Path, fitted: FittedBuild, measured: MeasuredBuild, state: BuildState,
    progress: Progress,
) -> None:
    """Step 8: the manifest. From then on there is an index, and the rest is tidying up."""
    manifest = _manifest(fitted, measured, state)
    if manifest.duplicates:
        progress.say(f"duplicates: {manifest.duplicates:,} sequences equal an earlier one; they "
                     "are shown as one hit with a count")
    commit_manifest(index, manifest)
    (index / BUILD).unlink()
    for path in filter(is_lock, index.iterdir()):  # of shards that were killed
        path.unlink()
    progress.say(f"index: {index}, {manifest.sequences:,} sequences, {size(bytes_in(index))} (it "
                 "holds the training text)")


def _manifest(fitted: FittedBuild, measured: MeasuredBuild, state: BuildState) -> Manifest:
    """What the build came to."""
    run, model = fitted.prepared.run, fitted.prepared.model
    tracked, notes, settings = fitted.modules, fitted.notes, measured.codes.settings
    plan, corpus, request, identity = state.plan, state.corpus, state.request, state.model
    assert corpus is not None and request is not None and identity is not None
    files = {f"{layout.CURVATURE}/{name}": facts for name, facts in notes.files.items()}
    for name in (layout.FIT, layout.BACKGROUND):
        files[name] = facts_of(run.index / name)
    rows = np.concatenate([run.rows(segment) for segment in run.segments])
    return Manifest(
        format=FORMAT, generation=1, versions=_versions(),
        model=ModelFacts(
            name=anywhere(plan.model), revision=plan.revision,
            files=identity.files, tensors=identity.tensors, config=identity.config,
            tokenizer=plan.tokenizer, tokenizer_name=request.tokenizer_name,
        ),
        also={member["name"]: MemberFacts(
            name=anywhere(member["model"]), revision=member["revision"], files=own.files,
            tensors=own.tensors, config=own.config)
            for member in plan.also for own in [identity.also[member["name"]]]},
        dtype=plan.dtype, device=plan.device, threads=state.threads,
        kind=request.task, vocabulary=vocabulary_size(model.network.config),
        sequence_length=plan.sequence_length,
        documents=corpus.documents, sequences=run.count - measured.quarantined,
        tokens=corpus.tokens, scored_tokens=corpus.scored_tokens, skipped=corpus.skipped,
        # the quarantined have no norm, are in no answer, and so are no one's duplicate
        duplicates=row_file.count_equal(rows["digest"][~np.isnan(rows["norm"])]),
        train_sequences=request.train_sequences, modules=tracked,
        parameter_share=parameter_share(model.network, tracked),
        effective_dimension={name: round(curvature.effective_dimension(plan.damping), 1)
                             for name, curvature in fitted.ekfac.items()},
        fit=FitFacts(
            sequences=len(fitted.prepared.settings.ids) - len(notes.quarantined),
            labels=plan.fit_labels, left_out=notes.left_out),
        damping=plan.damping, code=CodeFacts(
            length=settings.length, width=settings.width, seed=settings.seed,
            damping=settings.damping, recipe=settings.recipe,
            digest=measured.codes.digest,
        ),
        calibration=measured.calibration, background=measured.background,
        batch_tokens=state.batch_tokens, plan=plan,
        appended=[],
        next_id=run.count, next_segment=len(run.segments), segments=run.segments,
        deleted=0, deleted_file=None, quarantined=measured.quarantined,
        files=files | ingest.file_facts(run),
    )


def _check_finished(index: Path, request: BuildRequest) -> None:
    """Raise IndexMismatchError if the weights changed; take over a new N_train."""
    (index / BUILD).unlink(missing_ok=True)  # killed right after the commit
    manifest = load_manifest(index)
    source, expected = request.source, expected_identity(manifest)
    sources = {LAST: source} | {name: member_source(source, name) for name in source.also}
    digests = {LAST: manifest.model["files"]} | {
        name: one["files"] for name, one in manifest.also.items()}
    # equal files are proof enough; only else are the models loaded, and their tensors looked at
    if any(digests[name] is None or files_digest(one) != digests[name]
           for name, one in sources.items()):
        check_identity(load_members(source, request.dtype), expected)
    train_sequences = request.facts.train_sequences
    if train_sequences not in (None, manifest.train_sequences):
        manifest.train_sequences = train_sequences  # it only scales what is shown
        manifest.generation += 1
        commit_manifest(index, manifest)


def _versions() -> dict[str, str]:
    """What the index was built with: another version may draw or compute other numbers."""
    libraries = {name: version(name) for name in ("torch", "transformers", "lmdb", "numpy")}
    return {"gradindex": VERSION, "python": platform.python_version(),
            "faiss": code_index.library_version(), **libraries}
