"""Ask the demo's index its questions: `python demo/ask.py .demo`.

Runs `gradindex search` for each, as a user would, and says what to try next.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

from demo.prepare import QUERIES


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Search the index in FOLDER for each of the demo's queries."""
    command = Path(sys.executable).with_name("gradindex")
    for query in QUERIES:
        arguments = search_arguments(folder, *query)
        click.echo(f"\n{'─' * 78}\n$ {as_typed(arguments)}\n")
        subprocess.run([str(command), *arguments], check=True)
    click.echo(f"\n{'─' * 78}\nTry next:")
    index = folder / "index"
    for line, what in (
        (f"search {index} -p 'def __enter__(self):'", "what the model goes on to say, and why"),
        (f"search {index} -p 'weekdays =' -c \" ['Mon'\" --opponents", "what spoke against it"),
        (f"search {index} -p 'severity' -c \" 'ERROR'\" --versus \" 'INFO'\"", "rather than that"),
        (f"view {index}", "all of this in a page"),
        (f"info {index}", "what is in the index"),
        ("build YOUR_MODEL YOUR.jsonl -o your.index", "your own"),
    ):
        click.echo(f"  gradindex {line:<66} # {what}")
    click.echo(f"(gradindex is in {command.parent}: activate it, or put it in front)")


def search_arguments(folder: Path, prompt: str, completion: str) -> list[str]:
    """What `gradindex` is called with to ask the demo's index in `folder`."""
    return ["search", str(folder / "index"), "-p", prompt, "-c", completion, "-k", "3"]


def as_typed(arguments: list[str]) -> str:
    """The command as a user would type it."""
    return " ".join(["gradindex", *map(_quoted, arguments)])


def _quoted(argument: str) -> str:
    """For a shell, in double quotes where that is enough: they read better around 'Mon'."""
    if "'" in argument and not set(argument) & set('"$`\\!'):
        return f'"{argument}"'
    return shlex.quote(argument)


if __name__ == "__main__":
    main()
