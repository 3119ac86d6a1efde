"""`gradindex demo`: flags → functions."""

from pathlib import Path

import click


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path(".demo"),
              show_default=True, metavar="FOLDER",
              help="Folder for the model, its text and the index.")
def demo(out: Path) -> int:
    """Train a small model on Python's standard library, index its text, ask it three questions.

    Nothing is downloaded. It says first how long it will take here. The same command run again goes
    on where the last one stopped, and a finished demo is asked again.

    \b
    Example:
      gradindex demo -o .demo
    """
    from gradindex.demo.journey import run_demo
    from gradindex.demo.small_model import DemoSettings
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress

    quiet_transformers()
    return run_demo(out, DemoSettings(), stderr_progress())
