"""The journey of a build, in numbered steps; every step resumes.

    build.json                     the plan: what was asked for, resolved
    segments/NNNNNN.partial/       records only: read, not yet encoded
    curvature.partial/             the fit's running sums
    curvature/, segments/NNNNNN/   done
    background.safetensors         done, though a killed build makes it again
    manifest.json                  the index exists; build.json goes

The same command run again goes on where the last one stopped; a different one is refused.
"""

import functools
import inspect
import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch

import gradindex
from gradindex import background, curvature, manifest, segments, vectors
from gradindex.checked import refuse_links
from gradindex.codes import Codes, CodeSettings, default_length, default_width
from gradindex.curvature import Ekfac
from gradindex.errors import InputError
from gradindex.files import disk_errors, facts_of, make_folder, make_folders
from gradindex.locks import only_writer
from gradindex.manifest import (
    BackgroundFacts,
    Calibration,
    CodeFacts,
    FitFacts,
    Manifest,
    ModelFacts,
    Plan,
)
from gradindex.model import (
    LanguageModel,
    ModelSource,
    check_identity,
    context_length,
    files_digest,
    parameter_share,
    tokenizer_digest,
    tracked_modules,
)
from gradindex.modules import Module
from gradindex.progress import Progress, size
from indexer import ingest
from indexer.background import make_background
from indexer.calibrate import calibrate
from indexer.corpus import Corpus, CorpusSettings
from indexer.fit import LARGEST_BLOCK, FitNotes, FitSettings, choose_sequences, fit
from indexer.ingest import Run
from indexer.quarantine import SHARE
from indexer.sources import token_file_width
from indexer.state import BUILD, State

if TYPE_CHECKING:
    from gradindex import Searcher

LONGEST_DEFAULT = 512  # tokens, where the model's context is longer


@dataclass
class Asked:
    """What a build was asked for: the plan, which decides the bytes, and what doesn't."""

    index: Path
    source: ModelSource
    corpus: Corpus
    plan: dict[str, Any]
    device: str
    dtype: str
    train_sequences: int | None
    max_bad: float
    tokenizer_name: str | None
    say: Progress


def ask(
    model: Any,
    data: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    text_field: str | None = None,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    messages_field: str | None = None,
    id_field: str | None = None,
    keep_fields: Iterable[str] = (),
    seq_len: int | None = None,
    pack: bool = False,
    limit: int | None = None,
    strict: bool = False,
    modules: str = "mlp",
    fit_sequences: int = 4096,
    fit_labels: str = "model",
    damping: float = curvature.DAMPING,
    bits: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int = 4096,
    segment_size: int = 4096,
    train_sequences: int | None = None,
    max_bad: float = SHARE,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Asked:
    """1) What is asked for, resolved, before anything expensive. Raises InputError."""
    index = Path(out)
    source = ModelSource(model, tokenizer, trust_remote_code, allow_pickle)
    config = source.load_config()
    settings = CorpusSettings(
        sequence_length=_sequence_length(seq_len, config, as_list(data)), pack=pack,
        text_field=text_field, prompt_field=prompt_field, completion_field=completion_field,
        messages_field=messages_field, id_field=id_field, keep_fields=tuple(keep_fields),
        limit=limit, strict=strict,
    )
    check_numbers(fit_sequences=fit_sequences, batch_tokens=batch_tokens, damping=damping,
                  segment_size=segment_size, limit=limit, train_sequences=train_sequences,
                  max_bad=max_bad)
    if not 0 <= seed < 1 << 63:
        raise InputError(f"--seed {seed}: expected a number from 0 on.")
    if isinstance(keep_fields, str):
        raise InputError(f"keep_fields={keep_fields!r}: expected a list of field names.")
    if fit_labels not in ("model", "data"):
        raise InputError(f"--fit-labels {fit_labels}: expected model or data.")
    corpus = open_corpus(data, source, config, settings)
    place, resolved = source.resolve(device, dtype)
    plan = {
        "model": source.name, "revision": source.revision, "data": corpus.data_facts(),
        **{name: value for name, value in asdict(settings).items() if name != "strict"},
        "keep_fields": list(settings.keep_fields), "modules": modules,
        "fit_sequences": fit_sequences, "fit_labels": fit_labels, "damping": damping,
        "bits": _code_length(bits, settings.sequence_length),
        "dtype": str(resolved).removeprefix("torch."),
        "device": place.type, "batch_tokens": batch_tokens, "segment_size": segment_size,
        "seed": seed, "tokenizer": tokenizer_digest(corpus.tokenizer),
    }
    tokenizer_name = None if tokenizer is None or loaded(tokenizer) else _where(str(tokenizer))
    if index.exists() and not index.is_dir():
        raise InputError(f"-o {index} is a file; expected a folder to make or to go on with.")
    return Asked(index, source, corpus, plan, device, dtype, train_sequences, max_bad,
                 tokenizer_name, progress or Progress())


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def takes_arguments_of(
    asks: Callable[Arguments, Asked]
) -> Callable[[Callable[[Asked], Made]], Callable[Arguments, Made]]:
    """A decorator: a function of what is asked for becomes one of the arguments of `asks`.

    So the long list of a build's arguments and defaults stands once.
    """
    def decorate(function: Callable[[Asked], Made]) -> Callable[Arguments, Made]:
        @functools.wraps(function)
        def call(*positional: Arguments.args, **named: Arguments.kwargs) -> Made:
            return function(asks(*positional, **named))

        returns = inspect.signature(function).return_annotation
        call.__signature__ = inspect.signature(asks).replace(  # type: ignore[attr-defined]
            return_annotation=returns)
        return call

    return decorate


@takes_arguments_of(ask)
def build(asked: Asked) -> "Searcher":
    """Fit curvature, encode every training sequence, write the index folder `out`; resumable.

    `model` is a hub id (`id@revision`), a folder or a loaded model; `data` a path, a list of paths,
    or rows (dictionaries; a `datasets.Dataset`). Lengths are in tokens, `bits` is K, the bits of a
    code; the other arguments are the flags of `gradindex build`. Returns the index, open.
    `max_bad` is the share of sequences that may be quarantined, their gradient not being finite.
    Raises InputError for unusable input before anything expensive, ResourceError when disk or
    memory don't suffice, IndexMismatchError when the model changed since the build began,
    GradindexError while another process writes to the index or where too much is not finite.
    """
    index, say = asked.index, asked.say
    with disk_errors(index):
        make_folders(index)
    with only_writer(index, "gradindex build"), disk_errors(index):
        refuse_links(index)
        state = State.open(index, asked.plan, say)
        if manifest.exists(index):
            _check_finished(index, asked)
            say.say(f"{index} is complete; nothing to do.")
        else:
            _build(index, asked, state, say)
    source = asked.source
    return gradindex.open(
        index, model=loaded(source.model), tokenizer=source.tokenizer, device=asked.device,
        trust_remote_code=source.trust_remote_code, allow_pickle=source.allow_pickle,
    )


def _build(index: Path, asked: Asked, state: State, say: Progress) -> None:
    """Steps 2 to 7."""
    plan = asked.plan
    torch.set_num_threads(state.threads)

    # 2) text → sequences, on disk as records
    if state.corpus is None:
        if not (index / "segments").is_dir():
            make_folder(index / "segments")
        empty = Run(index, 0, 0, 0, plan["segment_size"])
        state.corpus = ingest.write_records(asked.corpus, empty, say)
        state.save()
    run = Run(index, 0, 0, state.corpus["sequences"], plan["segment_size"])
    ingest.report(state.corpus, plan["sequence_length"], say)

    # 3) the model and its tracked modules
    say.say(f"model: loading {asked.source.name} as {plan['dtype']} on {plan['device']}")
    model = asked.source.load(asked.device, asked.dtype)
    state.check_model(model)
    tracked = tracked_modules(model.network, plan["modules"])
    say.say(f"modules: {describe(model, tracked)}")
    ingest.check_disk(index, run.count, plan["bits"], tracked)

    # 4) EK-FAC curvature
    chosen = choose_sequences(run.count, plan["fit_sequences"], plan["seed"])
    ekfac, notes = fit(model, tracked, run.records, FitSettings(
        chosen, plan["fit_labels"], min(plan["segment_size"], LARGEST_BLOCK),
        plan["batch_tokens"], plan["seed"], asked.max_bad,
    ), index, say, run.count)
    tracked = [module for module in tracked if module.name in ekfac]

    # 5) every sequence → a code
    length = plan["bits"]
    codes = Codes(tracked, ekfac, CodeSettings(
        length, default_width(length, len(tracked)), plan["seed"], plan["damping"]))
    quarantined = ingest.encode_run(model, codes, run, plan["batch_tokens"], asked.max_bad, say)

    # 6) how far a code's score is from the exact one, and what comes up whatever is asked
    coded = [one for one in range(run.count) if one not in quarantined]
    calibration = calibrate(
        model, codes, ekfac, run.records, lambda ids: run.codes(ids, length), coded,
        plan["batch_tokens"], say,
    )
    queries, sample = make_background(
        model, codes, ekfac, run.records, lambda ids: run.coded(ids, length), coded, say)
    background.save(index / manifest.BACKGROUND, queries)

    # 7) the commit
    made = _manifest(asked, state, run, model, tracked, ekfac, notes, codes, calibration,
                     BackgroundFacts(queries=len(queries), sample=sample), len(chosen),
                     len(quarantined))
    if made.duplicates:
        say.say(f"duplicates: {made.duplicates:,} sequences equal an earlier one; they are shown "
                "as one hit with a count")
    manifest.commit(index, made)
    (index / BUILD).unlink()
    total = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
    say.say(f"index: {index}, {made.sequences:,} sequences, {size(total)} (it holds the training "
            "text)")


def _manifest(
    asked: Asked, state: State, run: Run, model: LanguageModel, tracked: list[Module],
    ekfac: Ekfac, notes: FitNotes, codes: Codes, calibration: Calibration,
    queries: BackgroundFacts, fitted: int, quarantined: int,
) -> Manifest:
    """What the build made."""
    plan, facts = asked.plan, state.corpus
    assert facts is not None and state.model is not None
    files = {f"curvature/{name}": one for name, one in notes.files.items()}
    for name in (manifest.FIT, manifest.BACKGROUND):
        files[name] = facts_of(run.index / name)
    rows = np.concatenate([run.rows(one) for one in run.segments])
    return Manifest(
        format=manifest.FORMAT, generation=1, versions=_versions(),
        model=ModelFacts(
            name=_where(asked.source.name), revision=asked.source.revision,
            files=state.model["files"], tensors=state.model["tensors"],
            config=state.model["config"], tokenizer=plan["tokenizer"],
            tokenizer_name=asked.tokenizer_name,
        ),
        dtype=plan["dtype"], device=plan["device"], threads=state.threads,
        task=asked.corpus.task, vocabulary=model.network.config.get_text_config().vocab_size,
        sequence_length=plan["sequence_length"],
        documents=facts["documents"], sequences=run.count - quarantined, tokens=facts["tokens"],
        scored_tokens=facts["scored_tokens"], skipped=facts["skipped"],
        duplicates=segments.count_equal(rows["digest"][~np.isnan(rows["norm"])]),
        train_sequences=asked.train_sequences, modules=tracked,
        parameter_share=parameter_share(model.network, tracked),
        effective_dimension={name: round(one.effective_dimension(plan["damping"]), 1)
                             for name, one in ekfac.items()},
        fit=FitFacts(sequences=fitted - len(notes.quarantined), labels=plan["fit_labels"],
                     left_out=notes.left_out),
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


def open_corpus(data: Any, source: ModelSource, config: Any, settings: CorpusSettings) -> Corpus:
    """The sequences of some data, cut as `settings` say. Raises InputError."""
    tokenizer = source.load_tokenizer()
    return Corpus(
        as_list(data), tokenizer, settings, vocabulary=config.get_text_config().vocab_size,
        end_token=getattr(tokenizer, "eos_token_id", None),
    )


def as_list(data: Any) -> list[Any]:
    """Paths, or one set of rows, as a list."""
    if isinstance(data, (str, Path)):
        return [data]
    if isinstance(data, (list, tuple)) and data and all(isinstance(d, (str, Path)) for d in data):
        return list(data)
    return [data]


def _where(name: str) -> str:
    """A folder as a path that is valid from anywhere, a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def loaded(model: Any) -> Any:
    """The model if it was given as an object: the index can't find it again by name."""
    return None if isinstance(model, (str, Path)) else model


def _sequence_length(seq_len: int | None, config: Any, data: list[Any]) -> int:
    context = context_length(config)
    if seq_len is None:
        width = token_file_width(data)
        if width is None:
            return min(context or LONGEST_DEFAULT, LONGEST_DEFAULT)
        seq_len = width
    if seq_len < 2 or (context and seq_len > context):
        raise InputError(
            f"sequences of {seq_len} tokens: expected 2 to {context or 'any number of'} (the "
            "model's context). Set --seq-len."
        )
    return seq_len


def _code_length(bits: int | None, sequence_length: int) -> int:
    if bits is None:
        return default_length(sequence_length)
    if bits < 64 or bits % 64:
        raise InputError(f"--bits {bits}: expected a multiple of 64, such as 16384 or 32768.")
    return bits


def check_numbers(**numbers: float | None) -> None:
    """Raise InputError for a flag that isn't above 0."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")


def describe(model: LanguageModel, tracked: list[Module]) -> str:
    """Which modules are tracked, and their share of the model."""
    kinds = dict.fromkeys(module.name.split(f".{module.layer}.", 1)[1] for module in tracked)
    return (f"{len(tracked)} linear maps tracked, {', '.join(kinds)}: "
            f"{parameter_share(model.network, tracked):.1%} of the model's parameters")


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "lmdb", "numpy")}
    return {"gradindex": gradindex.__version__, "python": platform.python_version(),
            "faiss": vectors.library_version(), **libraries}
