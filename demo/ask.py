"""Ask the demo's index its questions: `python demo/ask.py .demo`.

Runs `gradindex search` for each, as a user would, and says what to try next.
"""

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
    for prompt, completion in QUERIES:
        arguments = ["search", str(folder / "index"), "-p", prompt, "-c", completion, "-k", "3"]
        shown = " ".join(_quoted(argument) for argument in arguments)
        click.echo(f"\n{'─' * 78}\n$ gradindex {shown}\n")
        subprocess.run([str(command), *arguments], check=True)
    click.echo(
        f"\n{'─' * 78}\nTry next:\n"
        f"  gradindex search {folder}/index -p 'def __enter__(self):'      "
        "# what the model goes on to say, and why\n"
        f"  gradindex search {folder}/index -p '…' -c ' …' --opponents      "
        "# what spoke against it\n"
        f"  gradindex info {folder}/index                                   "
        "# what is in the index\n"
        "  gradindex build YOUR_MODEL YOUR.jsonl -o your.index                "
        "# your own\n"
        f"(gradindex is in {command.parent}: activate it, or put it in front)"
    )


def _quoted(argument: str) -> str:
    plain = all(letter.isalnum() or letter in "-_./" for letter in argument)
    return argument if plain else "'" + argument.replace("'", "'\\''") + "'"


if __name__ == "__main__":
    main()
