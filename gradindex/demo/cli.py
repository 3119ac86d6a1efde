"""`gradindex demo`: flags → functions."""

from pathlib import Path

import click


@click.command()
@click.argument("kind", type=click.Choice(["language", "classifier"]), default="language",
                metavar="[classifier]")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Folder for the model, its text and the index [.demo, .demo-classifier].")
def demo(kind: str, out: Path | None) -> int:
    """Train a small model on Python's standard library, index its text, ask it three questions.

    It is a language model, or with `classifier` one that tells what a text is about, of whose
    labels some were made wrong.

    Nothing is downloaded. It says first how long it will take here. The same command run again goes
    on where the last one stopped, and a finished demo is asked again.

    \b
    Example:
      gradindex demo -o .demo
      gradindex demo classifier
    """
    from gradindex.demo.journey import run_demo
    from gradindex.demo.kinds import classifier_demo, language_demo
    from gradindex.demo.small_classifier import ClassifierSettings
    from gradindex.demo.small_model import DemoSettings
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress

    quiet_transformers()
    made = language_demo(DemoSettings()) if kind == "language" else \
        classifier_demo(ClassifierSettings())
    folder = out or Path(".demo" if kind == "language" else ".demo-classifier")
    return run_demo(folder, made, stderr_progress())
