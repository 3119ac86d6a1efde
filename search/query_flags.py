"""What the commands of this package share: flags, and what becomes of them.

It is read whenever a command's help is, so nothing heavy is imported before it is needed.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from gradindex.flags import MAX_MEMORY, MODEL, read_text
from search.ask.controls import CONTROLS, DEFAULTS, TYPES, Controls, flag_of
from search.ask.question import Question

if TYPE_CHECKING:
    from gradindex.progress import Progress
    from gradindex.results import Query
    from search.ask.query_files import QueryFile
    from search.engine import Searcher
    from search.rank.snapshot import Snapshot
    from search.show.table_files import Sink

Flag = Callable[[Any], Any]  # a decorator of click's


def control_flags(*names: str) -> list[Flag]:
    """The flags of some controls, in that order, as the table of controls has them."""
    return [_control_flag(name) for name in names]


def _control_flag(name: str) -> Flag:
    """One control's flag; one that is on or off has no value."""
    control, flag, default = CONTROLS[name], flag_of(name), getattr(DEFAULTS, name)
    if TYPES[name] is bool:
        return click.option(flag, is_flag=True, help=control.help)
    return click.option(flag, type=_type_of_flag(name), default=default, metavar=control.unit,
                        show_default=default is not None, help=control.help)


def _type_of_flag(name: str) -> type | None:
    """What click makes of a flag's text: a number, or None where it stays text."""
    kinds = get_args(TYPES[name])
    # what may be text as well as a number is told apart by `settle`, which says what it expected
    return None if str in kinds else next((kind for kind in kinds if kind in (int, float)), None)


def _refuse_stray(_: click.Context, __: click.Parameter, words: tuple[str, ...]) -> None:
    """Say what to type for a text that stands where none is expected: prompt and completion differ.
    """
    if words:
        text = shlex.quote(" ".join(words))
        raise click.UsageError(f"{text} stands after the index, and may be the prompt or the "
                               f"completion: say -p {text} to ask why the model goes on as it "
                               f"does, or -p PROMPT -c {text} to ask why it says this.")


# ---- flags that several commands have, in the order in which their help shows them

INPUT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)
INDEX_FLAGS = [
    click.argument("index", type=click.Path(path_type=Path)),
    *MODEL,
    click.option("--batch-tokens", type=int, help="Padded tokens a batch [the build's]."),
    MAX_MEMORY,
    *control_flags("train_sequences"),
    click.option("--allow-damaged", is_flag=True,
                 help="Digest every file and leave damaged segments out; the coverage is said."),
]
RAY_FLAGS = [
    click.option("--ray", is_flag=False, flag_value="local", default=None, metavar="[ADDRESS]",
                 help="Let workers of a Ray cluster score the sequences: the one at ADDRESS (auto, "
                      "host:port), or one that is started here."),
    click.option("--ray-workers", type=click.IntRange(min=1), metavar="N",
                 help="How many [one for each GPU of the cluster, else for each machine]."),
]
QUESTION_FLAGS = [
    # no part of the usage: it is there to be refused
    click.argument("stray", nargs=-1, metavar="", expose_value=False, callback=_refuse_stray),
    click.option("-p", "--prompt", metavar="TEXT",
                 help="Prompt, of all models but classifiers; @FILE and - read it without its last "
                      "newline, @@ stands for @."),
    click.option("-c", "--completion", metavar="TEXT",
                 help="Completion to explain, of a language model, with its leading space; @FILE "
                      "reads it, as for -p [the model's own continuation]."),
    click.option("--messages", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                 help="JSON file of chat messages, or of an object with messages, tools and "
                      "chat_template_kwargs, or of a row of data; the last message is explained."),
    click.option("--versus", metavar="TEXT",
                 help="Another completion: explain log p of -c minus log p of this."),
    click.option("--score-on", metavar="RANGE",
                 help="Score these tokens of the completion only: 0-2, or 5."),
    click.option("--text", metavar="TEXT", help="Text whose label is explained, of a classifier."),
    click.option("--text-b", metavar="TEXT", help="The second text, if the classifier reads two."),
    click.option("--label", metavar="NAME", help="Its label, by name or number [the model's own]."),
    click.option("--versus-label", metavar="NAME",
                 help="Another label: explain log p of --label minus log p of this."),
    click.option("--chosen", metavar="TEXT", help="Preferred answer to -p, with its leading "
                 "space, of a reward model or a policy of preferences."),
    click.option("--rejected", metavar="TEXT", help="The answer that it was preferred to."),
    click.option("--response", metavar="TEXT", help="One answer to -p instead of the two, whose "
                 "reward is explained."),
]
# of a question, which may stand in a file
TEXTS = ("prompt", "completion", "versus", "text", "text_b", "chosen", "rejected", "response")
NAMES = ("label", "versus_label")


# ---- what the flags say


def take_controls(flags: dict[str, Any]) -> Controls:
    """The controls among a command's flags, which are taken out of them."""
    chosen: dict[str, Any] = {}
    for name in CONTROLS:
        given = flag_of(name).removeprefix("--").replace("-", "_")
        if TYPES[name] is bool and getattr(DEFAULTS, name):
            # what is on unless a flag says no
            if given in flags:
                chosen[name] = not flags.pop(given)
        elif name in flags:
            chosen[name] = flags.pop(name)
    return Controls(**chosen)


def take_question(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that say what is asked, by name, which are taken out of a command's flags."""
    return {name: flags.pop(name) for name in (*TEXTS, *NAMES, "messages", "score_on")}


def read_question(flags: dict[str, Any], id_source: str | None = None) -> Question:
    """What the flags of `take_question` ask, files read. Raises UsageError.

    `id_source` is where ids are read, for standard input has one reader.
    """
    texts, messages = {name: flags.get(name) for name in TEXTS}, flags["messages"]
    if messages is not None:
        if any(text is not None for text in texts.values()):
            raise click.UsageError("--messages and what else says a query (-p, -c, --versus, …) "
                                   "exclude each other; give one query.")
        try:
            chat = json.loads(read_text(messages, f"--messages {messages}"))
        except ValueError as error:
            raise click.UsageError(f"--messages {messages} is not valid JSON: {error}.") from None
        return _chat_question(chat, messages, flags["score_on"])
    if not any(text is not None for text in texts.values()):
        for name in NAMES:  # a label alone asks nothing, whatever the task
            if flags.get(name) is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} goes with --text, the text "
                                       "that a label is given to: give both.")
        raise click.UsageError('give the query: -p "PROMPT" -c " COMPLETION", or --messages FILE, '
                               "or --queries FILE; of a classifier --text, of pairs --chosen and "
                               "--rejected.")
    if [*texts.values(), id_source].count("-") > 1:
        raise click.UsageError("only one of a query's texts and --ids can be standard input, -.")
    given: dict[str, Any] = {name: read_argument(text) for name, text in texts.items()}
    return Question(**given, **{name: flags.get(name) for name in (*NAMES, "score_on")})


def _chat_question(content: Any, path: Path, score_on: str | None) -> Question:
    """What a file of messages asks, or of a row of data that holds a chat or a prompt.

    Raises UsageError for an object of something else, or with more than would be read.
    """
    from gradindex.model.messages import (
        CHAT_FIELDS,
        TOLD_BESIDE,
        TOLD_BESIDE_PROMPTS,
        has_value,
        is_messages,
        is_told,
        led_by,
        read_chat,
    )

    if not isinstance(content, dict) or is_messages(content):
        return Question(messages=content, score_on=score_on)
    told: dict[str, Any] = {name: content[name] for name in ("tools", "chat_template_kwargs")
                            if has_value(content.get(name))}
    lost: tuple[str, ...] = TOLD_BESIDE
    field = next((name for name in CHAT_FIELDS if content.get(name) is not None), None)
    if field == "messages":
        told["messages"] = content[field]
    elif field is not None:
        lost = tuple(name for name in lost if name != "system")
        told["messages"] = led_by(read_chat(content[field], name=field).messages,
                                  content.get("system"))
    elif {"prompt", "completion"} <= content.keys():
        lost, texts = TOLD_BESIDE_PROMPTS, {name: content[name] for name in TEXTS[:2]}
        if all(map(is_messages, texts.values())):
            told["messages"] = [message for name, text in texts.items()
                                for message in read_chat(text, name=name).messages]
        elif all(isinstance(text, str) for text in texts.values()):
            told |= texts
        else:
            raise click.UsageError(f"--messages {path}: of prompt and completion one is text and "
                                   "one messages, or neither; expected both of one kind.")
    else:
        raise click.UsageError(
            f"--messages {path} holds an object without messages (its fields are "
            f"{', '.join(content)[:100] or 'none'}); expected a list of messages, or an object "
            "with messages, tools and chat_template_kwargs, or a row of data with conversations, "
            "or with prompt and completion.")
    # what else a row has (an id, a label) is nothing that a template reads
    for name in lost:
        if has_value(content.get(name)) and not (
                field and is_told(read_chat(content[field]).messages, content[name])):
            raise click.UsageError(f"--messages {path}: field {name!r} would not be read. Put it "
                                   "into the messages or the prompt, as training did, or take it "
                                   "out.")
    return Question(**told, score_on=score_on)


def read_argument(value: str | None) -> str | None:
    """The text that an argument stands for: its own, a file's (@FILE) or standard input's (-).

    Of the latter two the last newline is left out: editors and `echo` put one behind every text.
    """
    if value == "-":
        return _without_newline(sys.stdin.read())
    if value is not None and value.startswith("@@"):
        return value[1:]
    if value is not None and value.startswith("@"):
        return _without_newline(read_text(Path(value[1:]), value))
    return value


def _without_newline(text: str) -> str:
    """A text without the newline at its end; of several, without the last."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def sample_size(text: str, flag: str = "--sample") -> int | None:
    """How many sequences a flag asks for, None for all. Raises UsageError."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise click.UsageError(f"{flag} {text}: expected a number above 0, or all.")
    return None if text == "all" else int(text)


def open_searcher(index: Path, flags: dict[str, Any]) -> tuple["Searcher", "Progress"]:
    """An index, opened as the flags that are left say, and what tells of progress."""
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress
    from search.opening import open as open_index

    quiet_transformers()
    # whatever flags are left are those that say where things are: no others may be
    searcher, progress = open_index(index, **flags), stderr_progress()
    if not searcher.snapshot.coverage.whole:
        progress.say(f"warning: {searcher.snapshot.coverage}")
    return searcher, progress


def complain(
    query_file: "QueryFile", progress: "Progress", snapshot: "Snapshot", queries: "list[Query]"
) -> None:
    """Say which lines of a file of queries are left out, and why; and what of them isn't read.

    Of those that are left, the `queries`, which are unlike the index's sequences.
    """
    from search.rank.snapshot import unlike

    texts = [text for query in queries for text in query.texts]
    for told in dict.fromkeys(unlike(snapshot, text) for text in texts):
        if told is not None:
            progress.say(f"warning: {told}")
    if query_file.unread:
        progress.say(f"queries: not read: {', '.join(query_file.unread)}")
    for complaint in query_file.complaints():
        progress.say(f"left out: {complaint}")


# ---- what is written


def check_outputs(outputs: dict[str, Path | None], inputs: list[Path | None]) -> None:
    """Raise UsageError for what can't be written, or would replace what is read."""
    for flag, path in outputs.items():
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{flag} {path}: there is no folder {path.parent}.")
        # now, and not when an answer waits to be written
        if path is not None and not os.access(path.parent, os.W_OK) and not (
                path.exists() and os.access(path, os.W_OK)):
            raise click.UsageError(f"{flag} {path}: nothing can be written to {path.parent} (this "
                                   "user has no right to, or it is mounted read-only).")
        # resolved: a link to an input would be replaced as well
        if path is not None and path.resolve() in [other.resolve() for other in inputs if other]:
            raise click.UsageError(f"{flag} {path}: that file is read here; give another.")


def write_output(output: Path, content: "str | bytes | Callable[[Sink], object]") -> None:
    """A file is replaced as a whole; anything else (a device, a pipe) is written to.

    `content` may be a function that is called with what takes it.
    """
    from gradindex.storage.files import atomic_write
    from gradindex.storage.os_errors import refusals

    raw = content.encode() if isinstance(content, str) else content
    # asked of the name that was given: /dev/stdout leads to a pipe, which has none of its own
    if not output.exists() or output.is_file():
        atomic_write(output.resolve(), raw)  # or a link would be replaced by a file
    else:
        with refusals(output, "written"), output.open("wb") as file:
            if isinstance(raw, bytes):
                file.write(raw)
            else:
                raw(file)


def may_color() -> bool:
    """Whether standard output is a terminal on which the user wants colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and \
        os.environ.get("TERM") != "dumb"
