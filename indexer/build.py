"""The journey of a build, in numbered steps; every step resumes.

    build.json                     the plan: what was asked for, resolved
    segments/NNNNNN.partial/       records only: read, not yet encoded
    curvature.partial/             the fit's running sums
    curvature/, segments/NNNNNN/   done
    manifest.json                  the index exists; build.json goes

The same command run again goes on where the last one stopped; a different one is refused.
"""

import math
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import gradindex
from gradindex import curvature, manifest, records, vectors
from gradindex.codes import Codes, CodeSettings, default_length, default_width
from gradindex.errors import InputError, ResourceError
from gradindex.manifest import Manifest, Segment, segment_folder
from gradindex.model import (
    ModelSource,
    check_identity,
    context_length,
    describe_modules,
    files_digest,
    parameter_share,
    tokenizer_digest,
    tracked_modules,
)
from gradindex.modules import Module
from gradindex.progress import Progress, size
from gradindex.records import Record
from indexer.calibrate import calibrate
from indexer.corpus import Corpus, CorpusSettings
from indexer.encode import encode_segment
from indexer.fit import LARGEST_BLOCK, FitSettings, choose_sequences, fit
from indexer.sources import token_file_width
from indexer.state import State, only_writer

if TYPE_CHECKING:
    from gradindex import Searcher

LONGEST_DEFAULT = 512  # tokens, where the model's context is longer


def build(
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
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> "Searcher":
    """Fit curvature, encode every training sequence, write the index folder `out`; resumable.

    `model` is a hub id (`id@revision`), a folder or a loaded model; `data` a path, a list of paths,
    or rows (dictionaries; a `datasets.Dataset`). Lengths are in tokens, `bits` is K, the bits of a
    code; the other arguments are the flags of `gradindex build`. Returns the index, open.
    Raises InputError for unusable input before anything expensive, ResourceError when the disk is
    too small, IndexMismatchError when the model changed since the build began.
    """
    say = progress or Progress()
    index = Path(out)
    source = ModelSource(model, tokenizer, trust_remote_code, allow_pickle)

    def reopen() -> "Searcher":
        return gradindex.open(
            index, model=_loaded(model), tokenizer=tokenizer, device=device,
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
        )

    # 1) what is asked for, resolved, before anything expensive
    sources = _as_list(data)
    config = source.load_config()
    settings = CorpusSettings(
        sequence_length=_sequence_length(seq_len, config, sources), pack=pack,
        text_field=text_field, prompt_field=prompt_field, completion_field=completion_field,
        messages_field=messages_field, id_field=id_field, keep_fields=tuple(keep_fields),
        limit=limit, strict=strict,
    )
    _check_numbers(fit_sequences=fit_sequences, batch_tokens=batch_tokens, damping=damping,
                   segment_size=segment_size, limit=limit, train_sequences=train_sequences)
    if not 0 <= seed < 1 << 63:
        raise InputError(f"--seed {seed}: expected a number from 0 on.")
    if isinstance(keep_fields, str):
        raise InputError(f"keep_fields={keep_fields!r}: expected a list of field names.")
    if fit_labels not in ("model", "data"):
        raise InputError(f"--fit-labels {fit_labels}: expected model or data.")
    own_tokenizer = source.load_tokenizer()
    corpus = Corpus(
        sources, own_tokenizer, settings, vocabulary=config.get_text_config().vocab_size,
        end_token=getattr(own_tokenizer, "eos_token_id", None),
    )
    place, resolved = source.resolve(device, dtype)
    plan = {
        "model": source.name, "revision": source.revision, "data": corpus.data_facts(),
        **{name: value for name, value in asdict(settings).items() if name != "strict"},
        "keep_fields": list(settings.keep_fields), "modules": modules,
        "fit_sequences": fit_sequences, "fit_labels": fit_labels, "damping": damping,
        "bits": _code_length(bits, settings.sequence_length),
        "dtype": str(resolved).removeprefix("torch."),
        "device": place.type, "batch_tokens": batch_tokens, "segment_size": segment_size,
        "seed": seed, "tokenizer": tokenizer_digest(own_tokenizer),
    }
    if index.exists() and not index.is_dir():
        raise InputError(f"-o {index} is a file; expected a folder to make or to go on with.")
    index.mkdir(parents=True, exist_ok=True)
    with only_writer(index):
        state = State.open(index, plan, say)
        if manifest.exists(index):
            (index / "build.json").unlink(missing_ok=True)  # killed right after the commit
            built = manifest.load(index)
            digest = files_digest(source)
            if digest is None or digest != built.model["files"]:
                check_identity(source.load(device, dtype), built.model)
            _adopt_train_sequences(index, built, train_sequences)
            say.say(f"{index} is complete; nothing to do.")
            return reopen()
        torch.set_num_threads(state.threads)

        # 2) text → sequences, on disk as records
        if state.corpus is None:
            state.corpus = _write_records(index, corpus, segment_size, say)
            state.save()
        facts = state.corpus
        _report(facts, settings, say)

        # 3) the model and its tracked modules
        say.say(f"model: loading {source.name} on {place} as {plan['dtype']}")
        language_model = source.load(device, dtype)
        state.check_model(language_model)
        tracked = tracked_modules(language_model.network, modules)
        share = parameter_share(language_model.network, tracked)
        say.say(f"modules: {len(tracked)} linear maps tracked, {_names(tracked)}: {share:.1%} of "
                "the model's parameters")
        _check_disk(index, facts["sequences"], plan["bits"], tracked)

        # 4) EK-FAC curvature
        chosen = choose_sequences(facts["sequences"], fit_sequences, seed)
        read = _reader(index, segment_size)
        fit_settings = FitSettings(chosen, fit_labels, min(segment_size, LARGEST_BLOCK),
                                   batch_tokens, seed)
        ekfac = fit(language_model, tracked, read, fit_settings, index, say, facts["sequences"])

        # 5) every sequence → a code
        length = plan["bits"]
        code_settings = CodeSettings(length, default_width(length, len(tracked)), seed, damping)
        codes = Codes(tracked, ekfac, code_settings)
        segments = _segments(facts, segment_size)
        sealed = [s for s in segments if segment_folder(index, s.name).is_dir()]
        say.start("encode", facts["sequences"], "sequences", done=sum(s.rows for s in sealed))
        for segment in segments[len(sealed):]:
            folder = segment_folder(index, f"{segment.name}.partial")
            batch = records.read(folder / "records.lmdb", range(segment.rows))
            encode_segment(language_model, codes, batch, folder, batch_tokens, say)
        say.finish()

        # 6) how far a code's score is from the exact one
        calibration = calibrate(
            language_model, codes, ekfac, read,
            lambda ids: _stored_codes(index, segments, segment_size, length, ids),
            facts["sequences"], batch_tokens, say,
        )

        # 7) the commit
        names = [curvature.path_of(Path("curvature"), module).as_posix() for module in tracked]
        names += [f"segments/{segment.name}/{file}" for segment in segments
                  for file in ("records.lmdb", "vectors.faiss", "norms.npy", "tokens.npz")]
        assert state.model is not None
        manifest.commit(index, Manifest(
            format=manifest.FORMAT, versions=_versions(),
            model={"name": _where(source.name), "revision": source.revision, **state.model,
                   "tokenizer": plan["tokenizer"],
                   "tokenizer_name": None if tokenizer is None or _loaded(tokenizer) else
                   _where(str(tokenizer))},
            dtype=plan["dtype"], device=place.type, threads=state.threads, task=corpus.task,
            sequence_length=settings.sequence_length, documents=facts["documents"],
            sequences=facts["sequences"], tokens=facts["tokens"],
            scored_tokens=facts["scored_tokens"], skipped=facts["skipped"],
            train_sequences=train_sequences, modules=describe_modules(tracked),
            parameter_share=share,
            effective_dimension={name: round(c.effective_dimension(damping), 1)
                                 for name, c in ekfac.items()},
            fit={"sequences": len(chosen), "labels": fit_labels}, damping=damping,
            code={**asdict(code_settings), "digest": codes.digest},
            calibration=calibration, batch_tokens=batch_tokens, plan=plan, segments=segments,
            files=manifest.file_facts(index, sorted(names)),
        ))
        (index / "build.json").unlink()
        total = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
        say.say(f"index: {index}, {facts['sequences']:,} sequences, {size(total)} (it holds the "
                "training text)")
    return reopen()


def _as_list(data: Any) -> list[Any]:
    if isinstance(data, (str, Path)):
        return [data]
    if isinstance(data, (list, tuple)) and data and all(isinstance(d, (str, Path)) for d in data):
        return list(data)
    return [data]


def _where(name: str) -> str:
    """A folder as a path that is valid from anywhere, a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _loaded(model: Any) -> Any:
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


def _check_numbers(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")


def _adopt_train_sequences(index: Path, facts: Manifest, train_sequences: int | None) -> None:
    """N_train only scales what is shown, so a finished index takes a new one."""
    if train_sequences is not None and facts.train_sequences != train_sequences:
        facts.train_sequences = train_sequences
        manifest.commit(index, facts)


def _write_records(
    index: Path, corpus: Corpus, segment_size: int, say: Progress
) -> dict[str, Any]:
    """Tokenise everything into segments of records; what an earlier attempt left is replaced."""
    shutil.rmtree(index / "segments", ignore_errors=True)
    (index / "segments").mkdir()
    facts: dict[str, Any] = {"sequences": 0, "tokens": 0, "scored_tokens": 0}
    pending: list[Record] = []

    def flush() -> None:
        number = (facts["sequences"] - 1) // segment_size
        folder = segment_folder(index, f"{number:06d}.partial")
        folder.mkdir()
        records.write(folder / "records.lmdb", pending)
        pending.clear()

    say.start("read", 0, "sequences")
    for record in corpus.sequences():
        pending.append(record)
        facts["sequences"] += 1
        facts["tokens"] += len(record.ids)
        facts["scored_tokens"] += int(record.scored[1:].sum())
        say.update(1)
        if len(pending) == segment_size:
            flush()
    if pending:
        flush()
    say.finish()
    if not facts["sequences"]:
        skipped = [f"Skipped: {_counts(corpus.skipped.counts)}."] if corpus.skipped.counts else []
        raise InputError(" ".join([
            "the data holds no sequence with a token to predict; expected at least one text of two "
            "tokens.", *skipped, *corpus.skipped.examples[:3]]))
    absent = set(corpus.settings.keep_fields) - corpus.fields_seen
    if absent and corpus.task != "tokens":
        raise InputError(
            f"--keep-fields: no record has a field {sorted(absent)[0]!r}; found "
            f"{', '.join(sorted(corpus.fields_seen)) or 'none'}."
        )
    return {**facts, "documents": corpus.documents, "skipped": dict(corpus.skipped.counts),
            "examples": corpus.skipped.examples}


def _report(facts: dict[str, Any], settings: CorpusSettings, say: Progress) -> None:
    say.say(
        f"data: {facts['documents']:,} documents → {facts['sequences']:,} sequences of at most "
        f"{settings.sequence_length} tokens, {facts['tokens']:,} tokens, "
        f"{facts['scored_tokens']:,} scored"
    )
    if facts["skipped"]:
        say.say(f"skipped: {_counts(facts['skipped'])}")
        for example in facts["examples"]:
            say.say(f"  {example}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} × {reason}" for reason, count in sorted(counts.items()))


def _check_disk(index: Path, sequences: int, length: int, tracked: list[Module]) -> None:
    codes = sequences * (vectors.code_bytes(length) + 4)
    # The fit's running sums are float64 and replaced as a whole: twice their size for a moment.
    fit_ = sum(16 * (o * o + i * i) for o, i in (module.shape for module in tracked))
    free = shutil.disk_usage(index).free
    if codes + fit_ > free:
        raise ResourceError(
            f"the codes need {size(codes)} and the fit {size(fit_)}; {index} has {size(free)} "
            f"free. Free some space, use fewer --bits (now {length}) or --modules, or another "
            "folder; the same command goes on."
        )


def _segments(facts: dict[str, Any], segment_size: int) -> list[Segment]:
    count = facts["sequences"]
    return [
        Segment(f"{number:06d}", first, min(segment_size, count - first))
        for number, first in enumerate(range(0, count, segment_size))
    ]


def _reader(index: Path, segment_size: int) -> Any:
    """Records by id, from sealed and unsealed segments alike."""
    def read(ids: list[int]) -> list[Record]:
        found: dict[int, Record] = {}
        for number in sorted({one // segment_size for one in ids}):
            folder = segment_folder(index, f"{number:06d}")
            if not folder.is_dir():
                folder = segment_folder(index, f"{number:06d}.partial")
            here = [one for one in ids if one // segment_size == number]
            rows = [one % segment_size for one in here]
            found.update(zip(here, records.read(folder / "records.lmdb", rows), strict=True))
        return [found[one] for one in ids]
    return read


def _stored_codes(
    index: Path, segments: list[Segment], segment_size: int, length: int, ids: list[int]
) -> tuple[vectors.CodeIndex, Any]:
    """The codes and norms of some sequences, joined in the order of `ids`."""
    joined = vectors.CodeIndex(length)
    norms = []
    for segment in segments:
        rows = [one - segment.first for one in ids
                if segment.first <= one < segment.first + segment.rows]
        if rows:
            folder = segment_folder(index, segment.name)
            stored = vectors.CodeIndex.read(folder / "vectors.faiss", length, segment.rows)
            joined.add(stored.codes(rows))
            norms.append(np.load(folder / "norms.npy", allow_pickle=False)[rows])
    return joined, np.concatenate(norms)


def _names(tracked: list[Module]) -> str:
    kinds = dict.fromkeys(module.name.split(f".{module.layer}.", 1)[1] for module in tracked)
    return ", ".join(kinds)


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "lmdb", "numpy")}
    return {"gradindex": gradindex.__version__, "python": platform.python_version(),
            "faiss": vectors.library_version(), **libraries}
