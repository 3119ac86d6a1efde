"""`gradindex search`, `rescore` and `info`: flags → Searcher → a rendering. Imports only click."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gradindex import Searcher
    from gradindex.progress import Progress
    from search.engine import Stage

_INDEX = [
    click.argument("index", type=click.Path(path_type=Path)),
    click.option("--model", metavar="PATH", help="Where the model is now, if it was moved."),
    click.option("--tokenizer", metavar="PATH", help="Folder or hub id [the model's]."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--batch-tokens", type=int, help="Padded tokens a batch [the build's]."),
    click.option("--train-sequences", type=int, help="N_train [the build's, or the indexed]."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option("--allow-pickle", is_flag=True, help="Load weights that aren't safetensors."),
]
_QUERY = [
    click.option("-p", "--prompt", metavar="TEXT", help="Prompt; @FILE and - read it."),
    click.option("-c", "--completion", metavar="TEXT",
                 help="Completion to explain, with its leading space; @FILE reads it [the model's "
                      "own continuation]."),
    click.option("--messages", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                 help="JSON file of chat messages; the last one is explained."),
]


def _options(options: list[Callable[..., Any]]) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function
    return decorate


@click.command()
@_options(_INDEX)
@_options(_QUERY)
@click.option("-k", type=int, help="Hits [20].")
@click.option("--shortlist", metavar="N|all",
              help="Sequences to rescore exactly [1000, or 10 k if more].")
@click.option("--opponents", is_flag=True, help="The most negative influence instead.")
@click.option("--format", "form", type=click.Choice(["auto", "json", "jsonl", "csv"]),
              default="auto", show_default=True, help="auto is text for people.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the result to a file instead of standard output.")
def search(
    index: Path, prompt: str | None, completion: str | None, messages: Path | None, k: int | None,
    shortlist: str | None, opponents: bool, form: str, output: Path | None,
    train_sequences: int | None, **where: Any,
) -> int:
    """Which training sequences made the model say COMPLETION after PROMPT?

    Shortlists by code, rescores exactly, and says how much of the true top k the answer holds.
    Without -c the model's own greedy continuation is explained.

    \b
    Example:
      gradindex search train.index -p "Water is composed of" -c " hydrogen and oxygen."
    """
    from search.engine import drain

    if output is not None and not output.parent.is_dir():
        raise click.UsageError(f"-o {output}: there is no folder {output.parent}.")
    searcher, progress = _open(index, where)
    question = _question(prompt, completion, messages)
    query = searcher.make_query(**question)
    stages = searcher.stages(query, k=k, shortlist=shortlist, opponents=opponents,
                             train_sequences=train_sequences)
    result = drain(stages, _follower(progress))
    to_terminal = output is None and sys.stdout.isatty()
    content = _render(result, form, color=to_terminal and _color())
    if output is None:
        click.echo(content)
    else:
        _write(output, content + "\n")
    return 130 if result.interrupted else 0


@click.command()
@_options(_INDEX)
@_options(_QUERY)
@click.option("--ids", required=True, metavar="FILE|-",
              help="Ids to score: a line each, as a number or as JSON with an id.")
def rescore(
    index: Path, prompt: str | None, completion: str | None, messages: Path | None, ids: str,
    train_sequences: int | None, **where: Any,
) -> int:
    """Exact influence of the sequences you name, as JSON lines in the same order.

    \b
    Example:
      gradindex search train.index -p "2 +" -c " 2" --format jsonl |
        gradindex rescore train.index -p "2 +" -c " 3" --ids -
    """
    from search.render import json_lines

    wanted = list(_read_ids(ids))
    searcher, progress = _open(index, where)
    query = searcher.make_query(**_question(prompt, completion, messages))
    progress.start("exact", len(wanted), "sequences")
    for hits in searcher.rescore_stream(query, wanted, train_sequences):
        click.echo(json_lines(hits), nl=False)
        progress.update(len(hits))
    progress.finish()
    return 0


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["auto", "json"]), default="auto",
              show_default=True)
def info(index: Path, form: str) -> int:
    """What an index is: its model, data, curvature, codes and size.

    \b
    Example:
      gradindex info train.index
    """
    from search.describe import describe, summary

    facts = describe(index)
    click.echo(json.dumps(facts, indent=1, ensure_ascii=False) if form == "json"
               else summary(facts))
    return 0


def _write(output: Path, content: str) -> None:
    """A file is replaced as a whole; anything else (a device, a pipe) is written to."""
    from gradindex.files import atomic_write

    output = output.resolve()
    if output.exists() and not output.is_file():
        output.write_text(content, encoding="utf-8")
    else:
        atomic_write(output, content.encode())


def _open(index: Path, where: dict[str, Any]) -> tuple["Searcher", "Progress"]:
    from gradindex.model import quiet_transformers
    from gradindex.progress import stderr_progress
    from search.engine import open as open_index

    quiet_transformers()
    return open_index(index, **where), stderr_progress()


def _question(prompt: str | None, completion: str | None, messages: Path | None) -> dict[str, Any]:
    if messages is not None:
        if prompt is not None or completion is not None:
            raise click.UsageError("--messages and -p/-c exclude each other; give one query.")
        try:
            return {"messages": json.loads(_read(messages, f"--messages {messages}"))}
        except ValueError as error:
            raise click.UsageError(f"--messages {messages} is not valid JSON: {error}.") from None
    if prompt is None and completion is None:
        raise click.UsageError('give the query: -p "PROMPT" -c " COMPLETION", or --messages FILE.')
    if prompt == completion == "-":
        raise click.UsageError("-p - and -c - can't both be standard input.")
    return {"prompt": _text(prompt), "completion": _text(completion)}


def _text(value: str | None) -> str | None:
    if value == "-":
        return sys.stdin.read()
    if value is not None and value.startswith("@"):
        return _read(Path(value[1:]), value)
    return value


def _read(path: Path, asked: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{asked}: {error.strerror}. A file is read there.") from None
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{asked}: not UTF-8 (byte {error.start}). Convert it, with iconv say."
        ) from None


def _read_ids(ids: str) -> Iterator[int]:
    lines = sys.stdin.read() if ids == "-" else _read(Path(ids), f"--ids {ids}")
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            found = content["id"] if isinstance(content, dict) else content
            if isinstance(found, bool) or not isinstance(found, int):
                raise ValueError
        except (ValueError, KeyError):
            raise click.UsageError(
                f"--ids {ids}, line {number}: {line[:60]!r} is neither a number nor JSON with an "
                "id."
            ) from None
        yield found


def _follower(progress: "Progress") -> Callable[["Stage"], None]:
    done = 0

    def follow(stage: "Stage") -> None:
        nonlocal done
        if stage.name == "gradient" and stage.query is not None:
            if stage.query.generated:
                progress.say(f"the model continues: {stage.query.completion!r}")
            progress.say(f"gradient of {stage.query.scored} scored tokens, "
                         f"log p = {stage.query.log_p:.2f} nats")
        elif stage.name == "approximate":
            progress.start("exact", stage.total, "sequences")
        elif stage.name == "exact":
            progress.update(stage.done - done)
            done = stage.done
            if progress.measured:
                progress.say_expected(progress.seconds_each() * (stage.total - stage.done))
        else:
            progress.finish()
    return follow


def _render(result: Any, form: str, color: bool) -> str:
    from search import render

    if form == "json":
        return str(result.to_json())
    if form == "jsonl":
        return render.json_lines(result.hits).rstrip("\n")
    if form == "csv":
        return render.csv_table(result).rstrip("\n")
    return render.terminal(result, color=color)


def _color() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
