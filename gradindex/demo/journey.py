"""The demo from nothing to answers: train, build, ask. What is done already isn't done again."""

import shutil
import sys
import time
from pathlib import Path

import click

from gradindex.cli import main_group
from gradindex.demo.expected_time import expected
from gradindex.demo.kinds import Demo
from gradindex.demo.make_demo import DOCUMENTS, INDEX, MODEL, check_folder, is_made
from gradindex.demo.questions import as_typed
from gradindex.progress import Progress, duration
from gradindex.storage.files import make_folders
from gradindex.storage.locks import only_writer
from gradindex.storage.manifest import exists as index_exists

RULE = "─" * 78


def run_demo(
    out: Path, demo: Demo, progress: Progress, library: Path | None = None
) -> int:
    """Make the demo in `out` and ask its questions; the exit code of the last command.

    Raises as its `prepare` and the commands do, and GradindexError where another demo is at it.
    """
    began, index = time.monotonic(), out / INDEX
    found = check_folder(out, demo.settings)
    make_folders(out)
    with only_writer(out, "the demo"):

        # 1) how long, before anything that takes long
        made = is_made(found, demo.settings)
        needs = expected(demo.seconds_of_a_step(), None if made else demo.settings.steps,
                         not (made and index_exists(index)), demo.parts)
        progress.say(f"expected: about {duration(needs.first)} to the first answer, "
                     f"{duration(needs.whole)} in all (measured on a few training steps)")

        # 2) a model that has learned something, and its text
        facts = demo.prepare(out, progress, library)

        # 3) an index, by the command that anyone would type
        code = _run(["build", str(out / MODEL), str(out / DOCUMENTS), "-o", str(index),
                     "--id-field", "id", *demo.build_flags,
                     "--train-sequences", str(facts["sequences"])])

    # 4) questions
    for number, arguments in enumerate(demo.questions(index)):
        if code:
            return code
        click.echo(f"\n{RULE}\n$ {as_typed(arguments)}\n")
        code = _run(arguments)
        if number == 0:
            progress.say(f"the first answer came after {duration(time.monotonic() - began)}")
    progress.say(f"the demo took {duration(time.monotonic() - began)}; about "
                 f"{duration(needs.whole)} were expected")
    click.echo("\n".join([RULE, "Try next:", *demo.try_next(index)]))
    if shutil.which("gradindex") is None:
        click.echo(f"(gradindex is in {Path(sys.executable).parent}: activate it, or put it in "
                   "front)")
    return code


def _run(arguments: list[str]) -> int:
    """Run a command of gradindex's, in this process: it has loaded what takes seconds to load."""
    return int(main_group.main(args=arguments, prog_name="gradindex", standalone_mode=False) or 0)
