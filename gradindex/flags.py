"""What the commands of both sides share: flags that say where the model is, and lists of ids."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from gradindex.modules import LAST, split_name

TOKENIZER = click.option("--tokenizer", metavar="PATH", help="Folder or hub id [the model's].")
ADAPTER = click.option("--adapter", metavar="NAME",
                       help="Which adapter, of several that the model's folder holds [its own].")
DEVICE = click.option("--device", default="auto", show_default=True,
                      help="auto, cpu, cuda or cuda:N.")
DEVICE_MAP = click.option("--device-map", metavar="auto",
                          help="auto: spread a model over all GPUs, for one that none holds alone.")
TRUST = [
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option("--allow-pickle", is_flag=True, help="Load weights that aren't safetensors."),
]


def _models(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> str | dict[str, str] | None:
    """The model, or where there are several a dictionary of them by name; None for none."""
    if not values:
        return None
    named = dict[str, str]()
    for name, model in map(split_name, values):
        if (name or LAST) in named:
            raise click.UsageError(f"--model is given twice for {name or LAST}.")
        named[name or LAST] = model
    return named[LAST] if named.keys() == {LAST} else named


MODEL = [
    click.option("--model", metavar="PATH|NAME=PATH", multiple=True, callback=_models,
                 help="Where the model is now, if it was moved; NAME=PATH of one of several."),
    ADAPTER, TOKENIZER, DEVICE, DEVICE_MAP, *TRUST,
]
MAX_MEMORY = click.option(
    "--max-memory", metavar="SIZE",
    help="Memory to use at most, such as 8GB: the GPU's where the model is on one, else the host's "
         "[what there is].")


def options(flags: list[Callable[..., Any]]) -> Callable[..., Any]:
    """A decorator that adds several flags to a command; its help shows them in this order."""
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):  # the last one that decorates comes first in the help
            function = flag(function)
        return function
    return decorate


def read_text(path: Path, argument: str) -> str:
    """A file's text; `argument` is the part of the command that names it. Raises UsageError."""
    try:
        # bytes: text would lose its \r, and a byte order mark is no part of it
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise click.UsageError(f"{argument}: {error.strerror}. A file is read there.") from None
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{argument}: not UTF-8 (byte {error.start}). Convert it, with iconv say."
        ) from None


def read_ids(source: str) -> Iterator[int]:
    """Sequences' ids from a file, or from standard input for "-".

    Each line is a number or a JSON object with an "id", as hits are printed. Raises UsageError.
    """
    for number, line in read_lines(source, "--ids"):
        try:
            content = json.loads(line)
            sequence = content["id"] if isinstance(content, dict) else content
            if isinstance(sequence, bool) or not isinstance(sequence, int):  # True is an int
                raise ValueError
        except (ValueError, KeyError):
            raise click.UsageError(
                f"--ids {source}, line {number}: {line[:60]!r} is neither a number nor JSON with "
                "an id."
            ) from None
        yield sequence


def read_lines(source: str, flag: str) -> list[tuple[int, str]]:
    """The lines that aren't blank, with their numbers from 1, of a file or of standard input ("-").

    Raises UsageError, which names the `flag`.
    """
    text = sys.stdin.read() if source == "-" else read_text(Path(source), f"{flag} {source}")
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
