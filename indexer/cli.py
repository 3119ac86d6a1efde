"""`gradindex build`, `verify`, `append`, `delete`, `compact`: flags → functions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gradindex.errors import DamagedIndexError, ResourceError
from gradindex.flags import (
    ADAPTER,
    DEVICE,
    DEVICE_MAP,
    MAX_MEMORY,
    MODEL,
    TOKENIZER,
    TRUST,
    options,
    read_ids,
    read_lines,
)
from gradindex.task import BETA, TASKS, Task
from gradindex.terminal import json_text, shell_word, visible_lines
from indexer import defaults

# by task, what may be asked first
FIRST_QUERY = {
    "causal": '-p "PROMPT" -c " COMPLETION"', "classification": '--text "TEXT"',
    "reward": '-p "PROMPT" --response " ANSWER"',
    "preference": '-p "PROMPT" --response " ANSWER"',
}
_MAX_BAD = click.option(
    "--max-bad", type=float, default=defaults.MAX_BAD, show_default=True, metavar="SHARE",
    help="Sequences that may be left out since their gradient is not finite (ten may, unless they "
         "are half of all).")


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("-o", "--out", required=True, metavar="INDEX", help="Folder to write the index to.")
@click.option("--text-field", metavar="NAME", help="Field of plain text [text].")
@click.option("--prompt-field", metavar="NAME", help="Field of the prompt [prompt].")
@click.option("--completion-field", metavar="NAME", help="Field of the completion [completion].")
@click.option("--messages-field", metavar="NAME", help="Field of chat messages, or of turns (from, "
              "value) [messages].")
@click.option("--task", type=click.Choice(list(TASKS)), help="What the model was trained for "
              "[as its class and the data tell].")
@click.option("--text-b-field", metavar="NAME", help="Field of the second of two texts.")
@click.option("--label-field", metavar="NAME", help="Field of a text's class [label].")
@click.option("--labels", metavar="A,B", help="Names of the classes, in the model's order [its "
              "config.json's].")
@click.option("--chosen-field", metavar="NAME", help="Field of the preferred answer [chosen].")
@click.option("--rejected-field", metavar="NAME", help="Field of the other answer [rejected].")
@click.option("--margin-field", metavar="NAME", help="Field of a pair's margin [margin].")
@click.option("--beta", type=float, default=BETA, show_default=True,
              help="β of preference pairs.")
@click.option("--reference", metavar="MODEL", help="Model that preference pairs were compared with "
              "in training, or its adapter: asked what it gives each answer [the data say; else an "
              "adapter's own base].")
@click.option("--chat-template", type=click.Path(path_type=Path), metavar="FILE",
              help="Jinja template that training rendered chats by [the tokenizer's own].")
@click.option("--rows", metavar="FORM", help="Form of the records, where their fields don't tell: "
              "sharegpt, alpaca, question-answer, … (a wrong one shows the list).")
@click.option("--columns", metavar="A,B", help="Names of the columns of a CSV or TSV without a "
              "header.")
@click.option("--id-field", metavar="NAME", help="Field with your own id, shown in results.")
@click.option("--keep-fields", metavar="A,B", help="Fields to carry into results.")
@click.option("--derive", multiple=True, metavar="A,B",
              help="Fields to make of each pair and carry into results: length-difference (tokens "
                   "of the chosen answer less the rejected), longer-chosen (true or false; of "
                   "equal lengths false).")
@click.option("--seq-len", type=int,
              help=f"Tokens a sequence [the model's context, at most {defaults.LONGEST}].")
@click.option("--pack/--no-pack", default=False, help="Join documents with the end token, "
              "for a language model [no].")
@click.option("--truncate", is_flag=True, help="Cut a document at the sequence length, as trainers "
              "do [a longer one becomes several windows].")
@click.option("--limit", type=int, help="Read only the first documents.")
@click.option("--strict", is_flag=True, help="Stop at the first row that can't be used.")
@click.option("--modules", metavar="RANGE|KINDS|REGEX",
              help="Linear modules to track: layers (8-15), mlp (all of the blocks but attention), "
                   "attention, head (the map to the outputs), all (these), embeddings, everything "
                   "(all and embeddings), adapter (LoRA's own), several with commas; else names "
                   "that match [" + defaults.MODULES + "].")
@click.option("--fit-sequences", type=int, default=defaults.FIT_SEQUENCES, show_default=True,
              help="Sequences to fit the curvature on.")
@click.option("--fit-labels", type=click.Choice(defaults.LABELS), default=defaults.LABELS[0],
              show_default=True, help="Labels sampled from the model, or the data's own.")
@click.option("--covariance-blocks", type=int, default=defaults.COVARIANCE_BLOCKS,
              show_default=True, metavar="O",
              help="Split A and S in O blocks along the diagonal, for wide layers: 1/O of the "
                   "memory, less time for eigendecompositions; scores differ somewhat.")
@click.option("--eigen-dtype", type=click.Choice(defaults.EIGEN_DTYPES), default=defaults.AUTO,
              show_default=True,
              help="What a GPU decomposes A and S in: float64, or float32 where float64 is slow "
                   "(auto). On a CPU always float64.")
@click.option("--damping", type=float, default=defaults.DAMPING, show_default=True,
              help="λ as a factor of each module's mean eigenvalue.")
@click.option("--also", multiple=True, metavar="[NAME=]MODEL",
              help="Another checkpoint of the model, or one trained like it (a folder, hub id or "
                   "id@revision): the score is the mean over all of them. Repeat for more.")
@click.option("--bits", type=int,
              help="Bits a code, K [by the spread of exact scores, once the curvature is fitted].")
@click.option("--dtype", default=defaults.AUTO, show_default=True,
              help="auto (float32 on a CPU, the checkpoint's own on a GPU), float32, bfloat16, …")
@DEVICE
@DEVICE_MAP
@click.option("--batch-tokens", type=int,
              help="Padded tokens a batch [4096, or fewer or more as measured on a larger model].")
@MAX_MEMORY
@click.option("--segment-size", type=int, default=defaults.SEGMENT_SIZE, show_default=True,
              help="Sequences a segment, the unit of work and of resuming.")
@click.option("--train-sequences", type=int,
              help="Sequences the model was trained on, N_train, for influence in nats.")
@_MAX_BAD
@click.option("--seed", type=int, default=defaults.SEED, show_default=True)
@ADAPTER
@TOKENIZER
@options(TRUST)
@click.option("--shard", metavar="I/N",
              help="Do share I (from 0) of N, beside others that run the same command with their "
                   "own I on the same folder; then: gradindex merge. auto: as torchrun or SLURM "
                   "number them.")
@click.option("--wait", type=float, metavar="SECONDS",
              help="How long a shard waits for others that do nothing [for ever].")
@click.option("--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]",
              help="Hand the work to a Ray cluster (auto, host:port); without ADDRESS, to workers "
                   "on this machine.")
@click.option("--ray-workers", type=int, metavar="N",
              help="Workers, each with the model [one a GPU, or what the cores suffice for].")
@click.option("--dry-run", is_flag=True,
              help="Say what time, disk and memory the build will take, measured on two batches "
                   "of the model; write nothing. Exit code 4 where disk or memory won't suffice.")
def build(
    model: str, data: tuple[str, ...], keep_fields: str | None, columns: str | None,
    dry_run: bool, **others: Any
) -> int:
    """Fit curvature and encode every training sequence.

    MODEL is a hub id, id@revision or a folder. DATA are files of records (JSON lines, JSON, CSV,
    TSV, Parquet, Arrow; also .gz, .zst, .bz2, .xz), .npy or text files, folders of them, or folders
    written by datasets' save_to_disk. The same command run again goes on where the last one
    stopped.

    \b
    Example:
      gradindex build ./my-model train.jsonl -o train.index --id-field url
    """
    # here and in each command: torch takes seconds to import, and help should take none
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress
    from indexer.build import build as run
    from indexer.build_request import make_request
    from indexer.dry_run.estimate import estimate

    quiet_transformers()
    labels = others["labels"]
    others["labels"] = () if labels is None else tuple(map(str.strip, labels.split(",")))
    others["keep_fields"], others["derive"] = (
        tuple(name.strip() for name in given.split(",") if name.strip())
        for given in (keep_fields or "", ",".join(others["derive"])))
    others["columns"] = tuple(name.strip() for name in columns.split(",")) if columns else ()
    if dry_run:
        needs = estimate(model, list(data), progress=stderr_progress(), **others)
        click.echo(visible_lines("\n".join(needs.lines())))
        return ResourceError.exit_code if needs.lacking else 0
    request = make_request(model, list(data), progress=stderr_progress(), **others)
    built = run(request)
    if built is None:  # a shard has no index to search yet
        return 0
    second = ' --text-b "TEXT"' * _has_two_texts(Path(others["out"]), built.task)
    click.echo(visible_lines(f'next: gradindex search {shell_word(others["out"])} '
                             f'{FIRST_QUERY[built.task.name]}{second}'), err=True)
    return 0


def _has_two_texts(index: Path, task: Task) -> bool:
    """Whether the first sequence of an index has two texts, of which a classifier is asked both."""
    from gradindex.storage.contents import Contents
    from gradindex.storage.manifest import load

    manifest = load(index)
    return task.name == "classification" and manifest.rows > 0 and \
        Contents(index, manifest).records([0])[0].border is not None


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@options([*MODEL, MAX_MEMORY])
def merge(index: Path, **others: Any) -> None:
    """Make an index of what the shards of a build did.

    Run it once all of them are done; it says what is missing.

    \b
    Example:
      gradindex build ./my-model train.jsonl -o train.index --shard 0/2 &
      gradindex build ./my-model train.jsonl -o train.index --shard 1/2
      wait; gradindex merge train.index
    """
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress
    from indexer.parallel.merge import merge as run

    quiet_transformers()
    run(index, progress=stderr_progress(), **others)


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1)
@options([*MODEL, MAX_MEMORY])
@click.option("--reference", metavar="MODEL", help="Where the reference of preference pairs is "
              "now, if it was moved.")
@click.option("--limit", type=int, help="Read only the first documents.")
@click.option("--strict", is_flag=True, help="Stop at the first row that can't be used.")
@_MAX_BAD
@click.option("--discard", is_flag=True, help="Drop what an unfinished append did, first.")
def append(index: Path, data: tuple[str, ...], **others: Any) -> None:
    """Add documents to an index, under its curvature.

    DATA as for build, whose fields and settings apply. The same command run again goes on where the
    last one stopped. How far the new data's Λ differs from the old's is measured and said.

    \b
    Example:
      gradindex append train.index more.jsonl
    """
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress
    from indexer.upkeep.append import append as run

    quiet_transformers()
    run(index, list(data) or None, progress=stderr_progress(), **others)


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--ids", "ids_file", metavar="FILE|-",
              help="Ids to delete: a line each, as a number or as JSON with an id.")
@click.option("--user-ids", "user_ids_file", metavar="FILE|-",
              help="Your own ids of documents, a line each; the sequences that hold them go.")
@click.option("--segment", "names", multiple=True, metavar="NAME",
              help="Give up a damaged segment, as verify names it.")
def delete(
    index: Path, ids_file: str | None, user_ids_file: str | None, names: tuple[str, ...]
) -> None:
    """Take sequences out of every answer, at once.

    Their text stays on the disk until compact. Searches that run already go on with what they had.

    \b
    Example:
      echo 4711 | gradindex delete train.index --ids -
    """
    from gradindex.progress import stderr_progress
    from indexer.upkeep.delete import delete as run
    from indexer.upkeep.delete import give_up

    progress = stderr_progress()
    # a damaged segment can't tell which ids it holds, so giving one up is a deed of its own
    if bool(names) + (ids_file is not None or user_ids_file is not None) != 1:
        raise click.UsageError("say what to delete: --ids FILE or --user-ids FILE, or --segment "
                               "NAME.")
    if ids_file == user_ids_file == "-":
        raise click.UsageError("only one of --ids and --user-ids can be standard input, -.")
    if names:
        rows = give_up(index, names, progress)
        progress.say(f"{rows:,} sequences given up with their segments")
        return
    ids = list(read_ids(ids_file)) if ids_file else []
    user_ids = set(_user_ids(user_ids_file)) if user_ids_file else set()
    for line in run(index, ids, user_ids, progress).lines(index):
        progress.say(line)


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
def compact(index: Path) -> None:
    """Rewrite segments that hold deleted sequences or are not full.

    Ids and answers stay the same; the text of deleted sequences leaves the disk as soon as no
    search has the old files open.

    \b
    Example:
      gradindex compact train.index
    """
    from gradindex.progress import stderr_progress
    from indexer.upkeep.compact import compact as run

    run(index, stderr_progress())


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@options(MODEL)
@click.option("--no-model", is_flag=True, help="Check files, records and codes alone.")
@click.option("--rebuild", is_flag=True,
              help="Encode damaged segments again from their records, where those are sound.")
@click.option("--format", "form", type=click.Choice(["auto", "json"]), default="auto",
              show_default=True)
def verify(index: Path, form: str, **others: Any) -> int:
    """Is an index what it was, and does it still give the right answers?

    Digests every file, checks every record and code, encodes a sample again and measures scores of
    the build again. Says what is damaged and what to do; exit code 3 then.

    \b
    Example:
      gradindex verify train.index
    """
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress
    from indexer.upkeep.verify import verify as run

    quiet_transformers()
    verified = run(index, progress=stderr_progress(), **others)
    if form == "json":
        click.echo(json_text(verified.to_dict(), indent=1))
    else:
        click.echo(visible_lines("\n".join(verified.lines())))
    return 0 if verified.sound else DamagedIndexError.exit_code


def _user_ids(file: str) -> Iterator[str]:
    """The user's own ids of a file: a line each, as text or JSON with a user_id."""
    for _, line in read_lines(file, "--user-ids"):
        content: Any = line.strip()
        if content.startswith("{"):
            try:
                content = json.loads(content)["user_id"]
            except (ValueError, KeyError):
                raise click.UsageError(f"--user-ids {file}: {line[:60]!r} is not JSON with a "
                                       "user_id.") from None
        yield str(content)
