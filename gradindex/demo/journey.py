"""The demo from nothing to answers: train, build, ask. What is done already isn't done again."""

import shutil
import sys
import time
from pathlib import Path

import click

from gradindex.cli import main_group
from gradindex.demo.expected_time import expected, seconds_of_a_step
from gradindex.demo.make_demo import DOCUMENTS, INDEX, MODEL, check_folder, is_made, prepare
from gradindex.demo.questions import QUERIES, as_typed, search_arguments, try_next
from gradindex.demo.small_model import DemoSettings
from gradindex.progress import Progress, duration
from gradindex.storage.files import make_folders
from gradindex.storage.locks import only_writer
from gradindex.storage.manifest import exists as index_exists

FIT_SEQUENCES = 2048
RULE = "─" * 78


def run_demo(
    out: Path, settings: DemoSettings, progress: Progress, library: Path | None = None
) -> int:
    """Make the demo in `out` and ask its questions; the exit code of the last command.

    Raises as `prepare` and the commands do, and GradindexError where another demo is at it.
    """
    began, index = time.monotonic(), out / INDEX
    found = check_folder(out)
    make_folders(out)
    with only_writer(out, "the demo"):

        # 1) how long, before anything that takes long
        made = is_made(found, settings)
        needs = expected(seconds_of_a_step(settings), None if made else settings.steps,
                         not (made and index_exists(index)))
        progress.say(f"expected: about {duration(needs.first)} to the first answer, "
                     f"{duration(needs.whole)} in all (measured on a few training steps)")

        # 2) a model that has learned something, and its text
        facts = prepare(out, settings, progress, library)

        # 3) an index, by the command that anyone would type
        code = _run(["build", str(out / MODEL), str(out / DOCUMENTS), "-o", str(index),
                     "--id-field", "id", "--keep-fields", "module,kind",
                     "--fit-sequences", str(FIT_SEQUENCES),
                     "--train-sequences", str(facts["sequences"])])

    # 4) questions
    for number, query in enumerate(QUERIES):
        if code:
            return code
        arguments = search_arguments(index, *query)
        click.echo(f"\n{RULE}\n$ {as_typed(arguments)}\n")
        code = _run(arguments)
        if number == 0:
            progress.say(f"the first answer came after {duration(time.monotonic() - began)}")
    progress.say(f"the demo took {duration(time.monotonic() - began)}; about "
                 f"{duration(needs.whole)} were expected")
    click.echo("\n".join([RULE, "Try next:", *try_next(index)]))
    if shutil.which("gradindex") is None:
        click.echo(f"(gradindex is in {Path(sys.executable).parent}: activate it, or put it in "
                   "front)")
    return code


def _run(arguments: list[str]) -> int:
    """Run a command of gradindex's, in this process: it has loaded what takes seconds to load."""
    return int(main_group.main(args=arguments, prog_name="gradindex", standalone_mode=False) or 0)
