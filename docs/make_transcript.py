"""The transcript in the README: the demo's first question, and what `gradindex search` answers.

    make transcript    # writes it into README.md, and docs/transcript.json
    python docs/make_transcript.py .demo --check    # exit code 1 where the answer is another

docs/transcript.json is the saved result. From it the transcript is rendered again wherever it is
compared (`tests/test_docs.py`), without the minutes of the demo; its seconds are taken out, which
no other run has. Another version of Python has another standard library, so other answers.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

from docs.make_tree import ROOT, with_block
from gradindex.demo.questions import QUERIES, as_typed, search_arguments
from gradindex.results import Result
from search.show.output_forms import render_form
from search.show.terminal_text import render_terminal

README, SAVED = ROOT / "README.md", ROOT / "docs" / "transcript.json"
OPENING = "<!-- transcript: written by docs/make_transcript.py -->"
CLOSING = "<!-- end of transcript -->"
INDEX = Path(".demo/index")  # of `gradindex demo`
COLUMNS = 100  # of what is no terminal


def answer(folder: Path) -> Result:
    """What the index in `folder` answers now, run as a user runs it."""
    arguments = [*search_arguments(folder / "index", *QUERIES[0]), "--format", "json"]
    shown = subprocess.run([sys.executable, "-m", "gradindex", *arguments], check=True,
                           stdout=subprocess.PIPE)
    return replace(Result.from_json(shown.stdout.decode()), seconds={})


def transcript(result: Result) -> str:
    """The command and its answer, as the README shows them."""
    typed = as_typed(search_arguments(INDEX, *QUERIES[0]))
    shown = render_terminal(result, width=COLUMNS)
    return f"{OPENING}\n```text\n$ {typed}\n\n{shown}\n```\n{CLOSING}"


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 for another transcript.")
def main(folder: Path, check: bool) -> None:
    """Ask the demo's index in FOLDER its first question, and show it in the README."""
    result = answer(folder)
    page = README.read_text(encoding="utf-8")
    written = with_block(page, transcript(result))
    if check:
        same = written == page
        click.echo(f"the demo answers {'as' if same else 'otherwise than'} the README shows")
        sys.exit(not same)
    README.write_text(written, encoding="utf-8")
    SAVED.write_bytes(render_form(result, "json"))


if __name__ == "__main__":
    main()
