"""What a build is asked for, resolved and checked before anything expensive.

`make_request` has every argument of a build with its default; the plan that it makes decides the
bytes of the index, and a resumed build compares it.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from gradindex.errors import InputError
from gradindex.memory import parse_bound
from gradindex.model.chat_template import marks_answers, read_chat_template
from gradindex.model.checkpoint import check_checkpoint
from gradindex.model.class_labels import is_number
from gradindex.model.config import context_length
from gradindex.model.devices import has_fast_float64
from gradindex.model.identity import tokenizer_digest
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.members import check_lengths, check_members, member_source, named_members
from gradindex.model.model_source import ModelSource, anywhere
from gradindex.model.network import padding_token
from gradindex.progress import Progress
from gradindex.ray_cluster import WITH_RAY, check_address, load_ray
from gradindex.storage.build_plan import MOST_BLOCKS, CorpusSettings, MemberSource, Plan
from gradindex.storage.os_errors import refusals
from gradindex.task import BETA, TASKS, Task
from indexer import defaults
from indexer.read.corpus import Corpus
from indexer.read.discover import discover
from indexer.read.sources import token_file_width
from indexer.reference import Reference, choose_reference, identified, vocabulary_of
from indexer.shards import Shard, parse_shard
from indexer.state import RequestFacts
from indexer.tasks import choose_task, class_names, derived_fields, said_of_names


@dataclass
class BuildRequest:
    """What a build was asked for: the plan, which decides the bytes, and what doesn't.

    `dtype` is as it was given, perhaps "auto"; the plan has it resolved.
    """

    index: Path
    source: ModelSource
    corpus: Corpus
    plan: Plan
    dtype: str
    facts: RequestFacts
    progress: Progress
    shard: Shard
    ray: str | None
    ray_workers: int | None
    reference: Reference | None


def make_request(
    model: Any,
    data: Any,
    out: str | Path,
    *,
    also: Mapping[str, Any] | Iterable[Any] = (),
    tokenizer: Any = None,
    chat_template: str | Path | None = None,
    adapter: str | None = None,
    text_field: str | None = None,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    messages_field: str | None = None,
    task: str | None = None,
    text_b_field: str | None = None,
    label_field: str | None = None,
    labels: Iterable[str] = (),
    chosen_field: str | None = None,
    rejected_field: str | None = None,
    margin_field: str | None = None,
    beta: float = BETA,
    reference: Any = None,
    rows: str | None = None,
    columns: Iterable[str] = (),
    id_field: str | None = None,
    keep_fields: Iterable[str] = (),
    derive: Iterable[str] = (),
    seq_len: int | None = None,
    pack: bool = False,
    truncate: bool = False,
    limit: int | None = None,
    strict: bool = False,
    modules: str | None = None,
    fit_sequences: int = defaults.FIT_SEQUENCES,
    fit_labels: str = defaults.LABELS[0],
    covariance_blocks: int = defaults.COVARIANCE_BLOCKS,
    eigen_dtype: str = defaults.AUTO,
    damping: float = defaults.DAMPING,
    bits: int | None = None,
    dtype: str = defaults.AUTO,
    device: str = defaults.AUTO,
    device_map: str | None = None,
    batch_tokens: int | None = None,
    segment_size: int = defaults.SEGMENT_SIZE,
    train_sequences: int | None = None,
    max_bad: float = defaults.MAX_BAD,
    seed: int = defaults.SEED,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    shard: str | None = None,
    wait: float | None = None,
    max_memory: str | int | None = None,
    ray: str | None = None,
    ray_workers: int | None = None,
    progress: Progress | None = None,
) -> BuildRequest:
    """Step 1 of a build: what is asked for, resolved. Raises InputError.

    Everything that can be refused is refused here, before anything expensive.
    """
    # 1) where the model comes from; its configuration and its weights' names are read, no weights
    progress = progress or Progress()
    if isinstance(model, Mapping):
        raise InputError("the model is a mapping; expected the model itself, and the others in "
                         "also=, as in also={\"early\": …}.")
    source = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle,
                         parse_bound(max_memory), adapter, device_map,
                         also=named_members(also))
    chosen_task = Task(choose_task(source, task, as_list(data)), beta)
    source = replace(source, task=chosen_task)
    progress.say(f"task: {chosen_task.name}")
    for line in (*check_checkpoint(source), *check_members(source)):
        progress.say(line)
    config = source.load_config()

    # 2) values that can't be, in the order in which they are cheap to see
    settings = CorpusSettings(
        sequence_length=_sequence_length(seq_len, config, as_list(data)), pack=pack,
        text_field=text_field, prompt_field=prompt_field, completion_field=completion_field,
        messages_field=messages_field, id_field=id_field, keep_fields=tuple(keep_fields),
        limit=limit, truncate=truncate, rows=rows, columns=tuple(columns),
        chat_template=read_chat_template(chat_template),
        task=chosen_task.name, text_b_field=text_b_field, label_field=label_field,
        chosen_field=chosen_field, rejected_field=rejected_field, margin_field=margin_field,
        labels=class_names(config, labels, chosen_task),
        derive=derived_fields(derive, keep_fields, chosen_task),
    )
    check_lengths(source, settings.sequence_length)
    if (said := said_of_names(config, settings.labels)) is not None:
        progress.say(said)
    asked = choose_reference(reference, source, as_list(data), settings, progress)
    settings = replace(settings, reference=asked.facts if asked else None)
    check_numbers(fit_sequences=fit_sequences, covariance_blocks=covariance_blocks,
                  batch_tokens=batch_tokens, damping=damping, segment_size=segment_size,
                  limit=limit, train_sequences=train_sequences, max_bad=max_bad, wait=wait,
                  ray_workers=ray_workers, beta=beta)
    if beta != BETA and chosen_task.name != "preference":
        raise InputError(f"--beta is of --task preference; the task is {chosen_task.name}. Leave "
                         "it out.")
    if chat_template is not None and chosen_task.name == "classification":
        raise InputError("--chat-template is for chats; with --task classification a row is "
                         f"{TASKS['classification']}. Leave it out.")
    if ray is not None:
        _check_ray(ray, [model, *source.also.values()], shard)
        if device_map is not None:
            raise InputError(WITH_RAY)
    index = Path(out)
    share = Shard() if shard is None else parse_shard(shard, wait, progress)
    _check_choices(index, seed, covariance_blocks, keep_fields, fit_labels)
    _check_columns(columns)

    # 3) the data: found, of one kind, and digested, so that other content is another plan
    corpus = open_corpus(data, source, settings, asked, strict,
                         settled=bool(labels) and any(map(is_number, settings.labels)))
    if corpus.kind == "messages" and not marks_answers(corpus.tokenizer):
        progress.say("chats: the chat template has no {% generation %} marks, so the assistant's "
                     "words are found turn by turn; if training used another template, give it "
                     "with --chat-template")
    if chat_template is not None and not corpus.forms.chats and \
            corpus.kind in ("text", "tokens", "pairs"):
        raise InputError("--chat-template is for chats, and the data hold " + (
            "pairs of texts" if corpus.kind == "pairs" else corpus.kind) + ". Leave it out.")
    if settings.columns and not any(one.kind == "csv" for one in corpus.sources):
        raise InputError("--columns names the columns of a table without a header (.csv, .tsv); "
                         "none of the data is called so. Call a table that, or leave it out.")
    for note in corpus.notes:
        progress.say(note)
    if not chosen_task.is_causal:
        padding_token(source, config, corpus.tokenizer)  # here, before the weights are loaded

    # 4) the plan, with nothing left to be chosen; a resumed build compares it with the one it began
    chosen_device, chosen_dtype = source.resolve(dtype)
    dtype_name = str(chosen_dtype).removeprefix("torch.")
    if asked is not None:
        asked = identified(asked, source, dtype_name, progress)
        settings = replace(settings, reference=asked.facts)
    plan = Plan(
        **asdict(settings), model=source.name, revision=source.revision, adapter=adapter,
        data=corpus.data_facts(),
        modules=modules or defaults.MODULES,
        fit_sequences=fit_sequences, fit_labels=fit_labels,
        covariance_blocks=covariance_blocks,
        eigen_dtype=_eigen_dtype(eigen_dtype, chosen_device), damping=damping,
        bits=_code_length(bits),
        dtype=dtype_name, device=chosen_device.type,
        batch_tokens=batch_tokens, segment_size=segment_size, seed=seed,
        tokenizer=tokenizer_digest(corpus.tokenizer), beta=beta,
        also=tuple(MemberSource(name=name, model=one.name, revision=one.revision)
                   for name in source.also for one in [member_source(source, name)]),
    )
    if wrong := plan.out_of_bounds():  # else hours of work would end in front of the manifest
        raise InputError(f"this can't be built: {wrong}.")
    tokenizer_name = anywhere(str(tokenizer)) if isinstance(tokenizer, (str, Path)) else None
    facts = RequestFacts(corpus.kind, train_sequences, max_bad, tokenizer_name)
    return BuildRequest(index, source, corpus, plan, dtype, facts, progress, share, ray,
                        ray_workers, asked)


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def takes_arguments_of(
    resolve: Callable[Arguments, BuildRequest]
) -> Callable[[Callable[[BuildRequest], Made]], Callable[Arguments, Made]]:
    """A decorator: the function of a request takes the arguments that `resolve` makes a request of.

    So the long list of a build's arguments and defaults stands once.
    """
    def decorate(function: Callable[[BuildRequest], Made]) -> Callable[Arguments, Made]:
        @functools.wraps(function)
        def call(*positional: Arguments.args, **named: Arguments.kwargs) -> Made:
            return function(resolve(*positional, **named))

        # wraps() hands on the name and the words; what editors show of arguments stands here
        returns = inspect.signature(function).return_annotation
        call.__signature__ = inspect.signature(resolve).replace(  # type: ignore[attr-defined]
            return_annotation=returns)
        return call

    return decorate


def open_corpus(
    data: Any, source: ModelSource, settings: CorpusSettings, reference: Reference | None,
    strict: bool = False, settled: bool = True,
) -> Corpus:
    """The sequences of some data, cut as `settings` say, that a reference can be asked about.

    `strict` and `settled` are those of Corpus. Raises InputError.
    """
    tokenizer = load_tokenizer(source)
    return Corpus(
        as_list(data), tokenizer, settings,
        vocabulary=vocabulary_of(reference, source, settings.sequence_length),
        end_token=getattr(tokenizer, "eos_token_id", None), strict=strict,
        settled=settled,
    )


def as_list(data: Any) -> list[Any]:
    """Paths, or one set of rows, as a list."""
    if isinstance(data, (str, Path)):
        return [data]
    if isinstance(data, (list, tuple)) and data and all(isinstance(d, (str, Path)) for d in data):
        return list(data)
    return [data]  # a list of dictionaries is one source


def _sequence_length(seq_len: int | None, config: Any, data: list[Any]) -> int:
    """Tokens a sequence: as given, as the rows of token files have, or what the model takes."""
    context = context_length(config)
    if seq_len is None:
        # rows of a file were cut by who made it: a shorter length would cut them again
        width = token_file_width(discover(data).sources)
        if width is None:
            return min(context or defaults.LONGEST, defaults.LONGEST)
        seq_len = width
    if seq_len < 2 or (context and seq_len > context):
        raise InputError(
            f"sequences of {seq_len} tokens: expected 2 to {context or 'any number of'} (the "
            "model's context; with longrope its original one, beyond which a sequence would depend "
            "on its batch). Set --seq-len."
        )
    return seq_len


def _eigen_dtype(asked: str, device: torch.device) -> str:
    """The dtype in which A and S are decomposed on a device. Raises InputError."""
    if asked not in defaults.EIGEN_DTYPES:
        raise InputError(f"--eigen-dtype {asked}: expected {' or '.join(defaults.EIGEN_DTYPES)}.")
    if device.type == "cpu":
        if asked == "float32":
            raise InputError("--eigen-dtype float32 is for a GPU; on a CPU A and S are decomposed "
                             "in float64. Leave it out, or use --device cuda.")
        return "float64"
    if asked == defaults.AUTO:
        return "float64" if has_fast_float64(device) else "float32"
    return asked


def _code_length(bits: int | None) -> int | None:
    """K as given, or None. Raises InputError."""
    if bits is not None and (bits < 64 or bits % 64):
        raise InputError(f"--bits {bits}: expected a multiple of 64, such as 16384 or 32768.")
    return bits


def check_numbers(**numbers: float | None) -> None:
    """Raise InputError for a flag that isn't above 0, or for a share above 1."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")
    if (share := numbers.get("max_bad")) is not None and share > 1:
        raise InputError(f"--max-bad {share}: expected a share of all sequences, such as 0.01.")


def _check_choices(
    index: Path, seed: int, covariance_blocks: int, keep_fields: Iterable[str], fit_labels: str
) -> None:
    """Raise InputError for a value outside its bounds or choices."""
    if not 0 <= seed < 1 << 63:
        raise InputError(f"--seed {seed}: expected a number from 0 on.")
    if covariance_blocks > MOST_BLOCKS:
        raise InputError(f"--covariance-blocks {covariance_blocks}: expected 1 to {MOST_BLOCKS}.")
    if isinstance(keep_fields, str):
        raise InputError(f"keep_fields={keep_fields!r}: expected a list of field names.")
    if fit_labels not in defaults.LABELS:
        raise InputError(f"--fit-labels {fit_labels}: expected {' or '.join(defaults.LABELS)}.")
    with refusals(index, "written"):
        is_file = index.exists() and not index.is_dir()
    if is_file:
        raise InputError(f"-o {index} is a file; expected a folder to make or to go on with.")


def _check_columns(columns: Iterable[str]) -> None:
    """Raise InputError for what are no names of columns."""
    names = columns if isinstance(columns, (list, tuple)) else [columns]
    if not all(isinstance(name, str) and name for name in names) or names is not columns \
            or len(set(names)) < len(names):
        raise InputError(f"columns={columns!r}: expected a list of names, one a column, each once.")


def _check_ray(address: str, models: list[Any], shard: str | None) -> None:
    """Raise InputError for a model that workers can't load, or a cluster that isn't there."""
    if not all(isinstance(model, (str, Path)) for model in models):
        raise InputError("ray= hands the work to other processes, which load the model themselves; "
                         "expected its folder or hub id, got an object. Save it "
                         "(save_pretrained) and give the folder.")
    if shard is not None:
        raise InputError("--ray and --shard exclude each other: give one.")
    load_ray()
    check_address(address)  # Ray itself tries for minutes to reach a cluster that isn't there
