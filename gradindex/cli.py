"""The command line: a group whose commands are imported when they are used.

The one place where errors become exit codes: 0 done, 1 failure, 2 usage or input, 3 index and
model don't match or the index is damaged, 4 the machine refuses (memory, disk, a right, a limit),
130 interrupted.
"""

import importlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from gradindex.errors import GradindexError, ResourceError
from gradindex.memory import gpu_failed, ran_out
from gradindex.storage.os_errors import OF_DISKS, is_known, memory_limit, refusal
from gradindex.terminal import visible_lines

COMMANDS = {
    "demo": "gradindex.demo.cli:demo",
    "build": "indexer.cli:build",
    "search": "search.cli:search",
    "rescore": "search.cli:rescore",
    "eval": "search.study.cli:evaluate",
    "info": "search.cli:info",
    "view": "search.serve.cli:view",
    "export": "search.show.cli:export",
    "report": "search.study.cli:report",
    "audit": "search.study.cli:audit",
    "merge": "indexer.cli:merge",
    "verify": "indexer.cli:verify",
    "append": "indexer.cli:append",
    "delete": "indexer.cli:delete",
    "compact": "indexer.cli:compact",
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is looked up (click's own recipe)."""

    # What a command needs takes seconds to import (torch, FAISS), and `gradindex --help` looks up
    # every command: so the modules themselves import only click at the top.
    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        _check_siblings()
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gradindex")
def main_group() -> None:
    """Which training sequences made this model say that?

    Of language models, classifiers of texts, reward models and policies that learned preferences.

    \b
    gradindex build  MODEL DATA... -o INDEX         once
    gradindex search INDEX -p PROMPT -c COMPLETION  as often as you like
    gradindex search INDEX --text TEXT              of a classifier
    gradindex audit  INDEX                          which of its data are wrong?
    """


def main() -> None:
    """Run the command line and exit with its code."""
    if not (sys.platform.startswith("linux") or sys.platform == "darwin"):
        click.echo(f"gradindex runs on Linux and macOS (on Windows through WSL); this is "
                   f"{sys.platform}.", err=True)
        sys.exit(1)
    # A job scheduler ends a job by SIGTERM: like Ctrl-C, it leaves what was committed, and says so.
    signal.signal(signal.SIGTERM, _interrupt)
    sys.excepthook = _unexpected
    try:
        Path.cwd()
    except FileNotFoundError:  # some library below would end the process over it
        click.echo("gradindex: the folder that this command was started in was removed; change to "
                   "another one (`cd`).", err=True)
        sys.exit(2)
    sys.exit(_run())


def _run() -> int:
    """Run the command and return its exit code; every error that is ours ends in one line."""
    try:
        return int(main_group(standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        # click quotes arguments in its messages as they are, terminal escapes among them.
        message = _Message()
        error.show(message)
        click.echo(visible_lines(message.getvalue()), nl=False, err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; a build, an append, the demo, or a search with --queries -o, "
                   "goes on when the same command runs again.", err=True)
        return 130
    except GradindexError as error:
        _say(error)
        return error.exit_code
    except ImportError as error:
        # FAISS is left to the user to install; our own message that says how has no name. Any other
        # module that can't be imported is a fault, and wants its traceback.
        if error.name is not None and error.name != "faiss":
            raise
        _say(error)
        return 1
    except (MemoryError, RuntimeError) as error:
        if ran_out(error):
            bound = _first_sentence(error)[:200] if "CUDA" in str(error) else memory_limit()
            click.echo(f"gradindex: out of memory; {bound}. Use --max-memory SIZE, which keeps "
                       "less at once and takes longer, smaller --batch-tokens, fewer --modules, "
                       "or a machine with more.", err=True)
            return 4
        if not gpu_failed(error):
            raise
        click.echo(f"gradindex: the GPU failed ({_first_sentence(error)}). What was committed is "
                   "there, and the same command goes on from it; if it fails again, see "
                   "`nvidia-smi` and the system's log, or use --device cpu.", err=True)
        return 1
    except BrokenPipeError:
        # The reader of a pipe (head, say) has left: nothing more to say, and no traceback at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _say_refused(error)


def _first_sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].strip().rstrip(".")


def _say_refused(error: OSError) -> int:
    """Say what the system refused, and return the exit code."""
    if error.filename is not None and is_known(error):
        told = refusal(error, Path(os.fsdecode(error.filename)), "used")
    elif error.errno in OF_DISKS:  # all files of ours are named: what is left is what we print to
        told = ResourceError(f"standard output could not be written ({error.strerror}). Free some "
                             "space, or send it elsewhere, and run the same command again.")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again
    else:
        told = None
    _say(told or error)
    return 1 if told is None else told.exit_code


class _Message(io.StringIO):
    """Receives what click says, and is no terminal, but says that it is one."""

    # click would take escapes out of a message for anything else, and what the user typed with
    # them: they are to be shown.
    def isatty(self) -> bool:
        return True


def _say(error: Exception) -> None:
    click.echo(visible_lines(f"gradindex: {error}"), err=True)


def _unexpected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback as Python does, with hidden characters shown: it may quote data."""
    lines = traceback.format_exception(kind, error, trace)
    click.echo(visible_lines("".join(lines)), nl=False, err=True)


def _check_siblings() -> None:
    import gradindex

    gradindex._check_siblings()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
