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
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import gradindex
from gradindex.errors import GradindexError, InputError
from gradindex.influence.codes import Codes, CodeSettings, default_width
from gradindex.influence.curvature import Ekfac
from gradindex.memory import Allowance, parse_bound, return_freed
from gradindex.model.network import (
    SMALL_PARTS,
    TRACKABLE,
    LanguageModel,
    ModelSource,
    check_identity,
    files_digest,
    parameter_share,
    tracked_modules,
    untracked,
)
from gradindex.modules import Module
from gradindex.progress import Progress, shares, size
from gradindex.storage import background_file, code_file, manifest, segments
from gradindex.storage.files import disk_errors, facts_of, make_folder, make_folders
from gradindex.storage.integrity import refuse_links
from gradindex.storage.locks import is_lock, one_of_writers, only_writer
from gradindex.storage.manifest import (
    BackgroundFacts,
    Calibration,
    CodeFacts,
    FitFacts,
    Manifest,
    ModelFacts,
    Plan,
)
from gradindex.storage.records import Record
from indexer.background import make_background
from indexer.build_request import Asked, anywhere, ask, loaded, takes_arguments_of
from indexer.calibrate import calibrate
from indexer.dry_run.measure import batch_bytes
from indexer.fit.budget import disk_bytes, held_bytes, partitions
from indexer.fit.schedule import AHEAD, LARGEST_BLOCK, FitNotes, FitSettings, choose_sequences, fit
from indexer.read import ingest
from indexer.read.ingest import Run
from indexer.shards import OVER_RAY, Shard, Share, Stage
from indexer.state import BUILD, State

if TYPE_CHECKING:
    from gradindex import Searcher

NOTABLE = 0.05  # share of parameters that can't be tracked: said loudly from here on


@takes_arguments_of(ask)
def build(asked: Asked) -> "Searcher | None":
    """Fit curvature, encode every training sequence, write the index folder `out`; resumable.

    `model` is a hub id (`id@revision`), a folder or a loaded model; `data` a path, a list of paths,
    or rows (dictionaries; a `datasets.Dataset`). Lengths are in tokens, `bits` is K, the bits of a
    code; the other arguments are the flags of `gradindex build`. Returns the index, open.
    `max_bad` is the share of sequences that may be quarantined, their gradient not being finite.
    With `shard` ("2/8") this process does one of several shares, waiting at most `wait` seconds for
    the others; it returns None, and `merge` makes the index when all are done. `max_memory` ("8GB")
    bounds the memory beside the libraries', of the GPU where the model is on one; curvature and
    codes come out the same.
    With `ray` the units of work are handed out to a cluster ("auto", "host:port") or to workers on
    this machine ("local"), `ray_workers` of them [one a GPU, or as many as there are cores for].
    Raises InputError for unusable input before anything expensive, ResourceError when disk or
    memory don't suffice, IndexMismatchError when the model changed since the build began,
    GradindexError while another process writes to the index, where too much is not finite, or where
    other shards don't come.
    """
    index, say, shard = asked.index, asked.say, asked.shard
    shared, together = shard.of > 1, shard.of > 1 or asked.ray is not None
    if shard.first:
        with disk_errors(index):
            make_folders(index)
            if together:
                _begin_anew_alone(asked)
    else:
        shard.wait(Stage("reading the data"), lambda: [] if manifest.exists(index) or
                   State.joined(index, asked.plan) else [0])
    group = f"one of {shard.of} shards" if shared else OVER_RAY
    writing = one_of_writers(index, shard.number, group) if together else \
        only_writer(index, "gradindex build")
    with writing, disk_errors(index):
        refuse_links(index)
        state = State.open(index, asked.plan, say, anew=not together)
        if manifest.exists(index):
            if shard.first:
                _check_finished(index, asked)
            say.say(f"{index} is complete; nothing to do.")
        else:
            if shard.first:
                state.asked = asked.facts()
                state.save()
            fitted = _build(index, asked, state, say)
            if shared:
                say.say(f"shard {shard.number}/{shard.of} is done; when all are: gradindex merge "
                        f"{index}")
                return None
            _complete(index, fitted, state, say)
    return None if shared else _opened(index, asked.source, asked.device)


def _begin_anew_alone(asked: Asked) -> None:
    """Begin a build anew where it has another plan, if no other process writes to it.

    A shard of the old plan that is still at work would add its sums to the new one's. Where the
    plan is the same, the others may begin at this moment, and must not find the folder locked.
    """
    stored = State.resumed(asked.index)
    if stored is None or stored.plan == asked.plan:
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_writer(asked.index, "gradindex build"))
        except GradindexError:
            return
        refuse_links(asked.index)
        State.open(asked.index, asked.plan, asked.say)


def merge(
    index: str | Path, model: Any = None, tokenizer: Any = None, device: str = "auto",
    trust_remote_code: bool = False, allow_pickle: bool = False,
    max_memory: str | int | None = None, progress: Progress | None = None,
) -> "Searcher":
    """Make an index of what the shards of a build did, once all are done. Returns it, open.

    `model` (a folder, hub id or loaded model) is where the weights are now, if not where they were.
    Raises InputError where there is nothing to merge or something is missing, IndexMismatchError
    for another model, GradindexError while another process writes to the index; ResourceError.
    """
    folder, say = Path(index), progress or Progress()
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one that gradindex build --shard wrote.")
    with only_writer(folder, "gradindex merge"), disk_errors(folder):
        refuse_links(folder)
        state = State.resumed(folder)
        if state is None and not manifest.exists(folder):
            raise InputError(f"{folder} holds no unfinished build. Run gradindex build … --shard "
                             "i/n first, once for each i.")
        own = manifest.load(folder).plan if state is None else state.plan
        name = own["model"] if own["revision"] is None else f"{own['model']}@{own['revision']}"
        source = ModelSource(name if model is None else model, tokenizer, trust_remote_code,
                             allow_pickle)
        if state is None or manifest.exists(folder):
            say.say(f"{folder} is complete; nothing to do.")
        else:
            _refuse_unfinished(folder, state)
            about = prepare(folder, source, device, own["dtype"], state,
                            parse_bound(max_memory), say)
            _complete(folder, _fit(folder, about, Shard(), say), state, say)
    return _opened(folder, source, device)


def _opened(index: Path, source: ModelSource, device: str) -> "Searcher":
    return gradindex.open(
        index, model=loaded(source.model), tokenizer=source.tokenizer, device=device,
        trust_remote_code=source.trust_remote_code, allow_pickle=source.allow_pickle,
    )


def _refuse_unfinished(index: Path, state: State) -> None:
    """Raise InputError for shards that are not done."""
    run = Run(index, 0, 0, (state.corpus or {"sequences": 0})["sequences"],
              state.plan["segment_size"])
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
class Prepared:
    """What every process of a build has: the sequences, the model, how it is to be fitted."""

    run: Run
    model: LanguageModel
    tracked: list[Module]
    settings: FitSettings
    allowance: Allowance


@dataclass
class _Fitted:
    """A build whose curvature is there, of those modules that have one."""

    about: Prepared
    modules: list[Module]
    ekfac: Ekfac
    notes: FitNotes


def _build(index: Path, asked: Asked, state: State, say: Progress) -> _Fitted:
    """Steps 2 to 5: this process's share of them."""
    # 2) text → sequences, on disk as records
    if state.corpus is None:
        assert asked.shard.first  # the others began when this was done
        if not (index / "segments").is_dir():
            make_folder(index / "segments")
        empty = Run(index, 0, 0, 0, asked.plan["segment_size"])
        state.corpus = ingest.write_records(asked.corpus, empty, say)
        state.save()
    ingest.report(state.corpus, state.plan["sequence_length"], say)

    # 3) the model and its tracked modules
    about = prepare(index, asked.source, asked.device, asked.dtype, state, asked.max_memory, say,
                    asked.shard.of)
    with contextlib.ExitStack() as until_here:
        share: Share = asked.shard
        if asked.ray is not None:
            from indexer.ray_build import Crew, Job

            share = until_here.enter_context(Crew(asked.ray, asked.ray_workers, Job.of(asked), say))

        # 4) EK-FAC curvature
        fitted = _fit(index, about, share, say)

        # 5) every sequence → a code
        if asked.ray is None:
            ingest.encode_run(about.model, _codes(fitted, state), about.run,
                              state.plan["batch_tokens"], asked.max_bad, say, share)
        else:
            share.wait(Stage("encode"), lambda: ingest.unsealed(about.run))
    return_freed()
    return fitted


def prepare(
    index: Path, source: ModelSource, device: str, dtype: str, state: State,
    max_memory: int | None, say: Progress, shards: int = 1,
) -> Prepared:
    """Load and check the model. Raises ResourceError where disk or memory don't suffice."""
    plan, facts = state.plan, state.corpus
    assert facts is not None and state.asked is not None
    torch.set_num_threads(state.threads)
    run = Run(index, 0, 0, facts["sequences"], plan["segment_size"])
    say.say(f"model: loading {source.name} as {plan['dtype']} on {plan['device']}")
    model = source.load(device, dtype)
    state.check_model(model)
    tracked = tracked_modules(model.network, plan["modules"])
    say.say(f"modules: {describe(model, tracked)}")
    odd = {what: share for what, share in untracked(model.network, tracked).items()
           if what not in (*TRACKABLE, *SMALL_PARTS)}
    if (total := sum(odd.values())) > NOTABLE:
        say.say(f"warning: {total:.0%} of the model's parameters can't be tracked, so their "
                f"influence is in no score: {shares(odd)}")
    settings = FitSettings(
        choose_sequences(run.count, plan["fit_sequences"], plan["seed"]), plan["fit_labels"],
        min(plan["segment_size"], LARGEST_BLOCK), plan["batch_tokens"], plan["seed"],
        state.asked["max_bad"], plan["covariance_blocks"],
    )
    allowance = allow(model, tracked, settings, max_memory,
                      lambda: run.records(settings.ids[: settings.block]))
    blocks, width = settings.covariance_blocks, model.accumulate.itemsize
    every = partitions(tracked, blocks, width, allowance.planned)
    ingest.check_disk(run, plan["bits"], _still_needed(index, disk_bytes(
        every, blocks, width, AHEAD * shards if shards > 1 else 0)))
    return Prepared(run, model, tracked, settings, allowance)


def _still_needed(index: Path, fit: int) -> int:
    """What a fit of so many bytes still needs on the disk."""
    if (index / "curvature").is_dir():
        return 0
    there = sum(one.stat().st_size for one in (index / "curvature.partial").glob("*"))
    return max(0, fit - there)


def allow(
    model: LanguageModel, tracked: list[Module], settings: FitSettings, max_memory: int | None,
    sample: Callable[[], list[Record]],
) -> Allowance:
    """What a build may use beside the model; some sequences tell what a batch takes.

    Raises ResourceError where that is too little.
    """
    if max_memory is None:
        return Allowance()
    held, largest = max((held_bytes([module], settings.covariance_blocks,
                                    model.accumulate.itemsize), module.name) for module in tracked)
    batch = batch_bytes(model, tracked, sample(), settings)
    return Allowance.beside(model.bytes, max_memory, held, f"fitting {largest}", batch)


def _fit(index: Path, about: Prepared, share: Share, say: Progress) -> _Fitted:
    ekfac, notes = fit(about.model, about.tracked, about.run.records, about.settings, index, say,
                       about.run.count, share, about.allowance)
    return _Fitted(about, [one for one in about.tracked if one.name in ekfac], ekfac, notes)


def _codes(fitted: _Fitted, state: State) -> Codes:
    return make_codes(fitted.modules, fitted.ekfac, state.plan)


def make_codes(modules: list[Module], ekfac: Ekfac, plan: Mapping[str, Any]) -> Codes:
    """The codes that a plan asks for, of modules that have curvature."""
    return Codes(modules, ekfac, CodeSettings(
        plan["bits"], default_width(plan["bits"], len(modules)), plan["seed"], plan["damping"]))


def _complete(index: Path, fitted: _Fitted, state: State, say: Progress) -> None:
    """Steps 6 and 7, once every segment is encoded."""
    plan, run, model, ekfac = state.plan, fitted.about.run, fitted.about.model, fitted.ekfac
    assert state.asked is not None
    codes, length = _codes(fitted, state), plan["bits"]
    quarantined = ingest.quarantined(run, state.asked["max_bad"], say)

    # 6) how far a code's score is from the exact one, and what comes up whatever is asked
    coded = [one for one in range(run.count) if one not in quarantined]
    calibration = calibrate(
        model, codes, ekfac, run.records, lambda ids: run.codes(ids, length), coded,
        plan["batch_tokens"], say, fitted.about.allowance,
    )
    queries, sample = make_background(
        model, codes, ekfac, run.records, lambda ids: run.coded(ids, length), coded, say)
    background_file.save(index / manifest.BACKGROUND, queries)

    # 7) the commit
    made = _manifest(state, fitted, codes, calibration,
                     BackgroundFacts(queries=len(queries), sample=sample), len(quarantined))
    if made.duplicates:
        say.say(f"duplicates: {made.duplicates:,} sequences equal an earlier one; they are shown "
                "as one hit with a count")
    manifest.commit(index, made)
    (index / BUILD).unlink()
    for path in filter(is_lock, index.iterdir()):  # of shards that were killed
        path.unlink()
    total = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
    say.say(f"index: {index}, {made.sequences:,} sequences, {size(total)} (it holds the training "
            "text)")


def _manifest(
    state: State, fitted: _Fitted, codes: Codes, calibration: Calibration,
    queries: BackgroundFacts, quarantined: int,
) -> Manifest:
    """What the build made."""
    run, model = fitted.about.run, fitted.about.model
    tracked, notes = fitted.modules, fitted.notes
    plan, facts, asked = state.plan, state.corpus, state.asked
    assert facts is not None and asked is not None and state.model is not None
    files = {f"curvature/{name}": one for name, one in notes.files.items()}
    for name in (manifest.FIT, manifest.BACKGROUND):
        files[name] = facts_of(run.index / name)
    rows = np.concatenate([run.rows(one) for one in run.segments])
    return Manifest(
        format=manifest.FORMAT, generation=1, versions=_versions(),
        model=ModelFacts(
            name=anywhere(plan["model"]), revision=plan["revision"],
            files=state.model["files"], tensors=state.model["tensors"],
            config=state.model["config"], tokenizer=plan["tokenizer"],
            tokenizer_name=asked["tokenizer_name"],
        ),
        dtype=plan["dtype"], device=plan["device"], threads=state.threads,
        task=asked["task"], vocabulary=model.network.config.get_text_config().vocab_size,
        sequence_length=plan["sequence_length"],
        documents=facts["documents"], sequences=run.count - quarantined, tokens=facts["tokens"],
        scored_tokens=facts["scored_tokens"], skipped=facts["skipped"],
        duplicates=segments.count_equal(rows["digest"][~np.isnan(rows["norm"])]),
        train_sequences=asked["train_sequences"], modules=tracked,
        parameter_share=parameter_share(model.network, tracked),
        effective_dimension={name: round(one.effective_dimension(plan["damping"]), 1)
                             for name, one in fitted.ekfac.items()},
        fit=FitFacts(sequences=len(fitted.about.settings.ids) - len(notes.quarantined),
                     labels=plan["fit_labels"], left_out=notes.left_out),
        damping=plan["damping"], code=CodeFacts(
            length=codes.settings.length, width=codes.settings.width, seed=codes.settings.seed,
            damping=codes.settings.damping, digest=codes.digest,
        ),
        calibration=calibration, background=queries,
        batch_tokens=plan["batch_tokens"], plan=Plan(**plan),  # type: ignore[typeddict-item]
        appended=[],
        next_id=run.count, next_segment=len(run.segments), segments=run.segments,
        deleted=0, deleted_file=None, quarantined=quarantined,
        files=files | ingest.file_facts(run),
    )


def _check_finished(index: Path, asked: Asked) -> None:
    """Raise IndexMismatchError if the weights changed; take over a new N_train."""
    (index / BUILD).unlink(missing_ok=True)  # killed right after the commit
    built = manifest.load(index)
    digest = files_digest(asked.source)
    if digest is None or digest != built.model["files"]:
        check_identity(asked.source.load(asked.device, asked.dtype), dict(built.model))
    if asked.train_sequences not in (None, built.train_sequences):
        built.train_sequences = asked.train_sequences  # it only scales what is shown
        built.generation += 1
        manifest.commit(index, built)


def describe(model: LanguageModel, tracked: list[Module]) -> str:
    """Which modules are tracked, their share of the model, and what isn't tracked."""
    kinds: dict[str, int] = {}
    for module in tracked:
        kind = re.sub(r"_\d+$", "_*", module.name.split(f".{module.layer}.", 1)[1])
        kinds[kind] = kinds.get(kind, 0) + 1
    rest = shares({f"{what} (not chosen)" if what in TRACKABLE else what: share for what, share
                   in untracked(model.network, tracked).items()})
    return (f"{len(tracked):,} linear maps tracked, {', '.join(kinds)}: "
            f"{parameter_share(model.network, tracked):.1%} of the model's parameters"
            + (f"; not tracked: {rest}" if rest else ""))


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "lmdb", "numpy")}
    return {"gradindex": gradindex.__version__, "python": platform.python_version(),
            "faiss": code_file.library_version(), **libraries}
