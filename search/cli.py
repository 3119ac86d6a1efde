"""`gradindex search`, `rescore`, `eval`, `report`, `view`, `export`, `info`: flags → functions."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradindex.flags import MAX_MEMORY, MODEL, options, read_ids, read_text
from gradindex.terminal import json_text, visible_lines
from search.command_line import control_flags, take_controls

if TYPE_CHECKING:
    from gradindex import Searcher
    from gradindex.progress import Progress
    from gradindex.results import Result
    from search.ask.controls import Controls
    from search.ask.query_files import QueryFile
    from search.ask.question import Question
    from search.engine import Stage

_INDEX = [
    click.argument("index", type=click.Path(path_type=Path)),
    *MODEL,
    click.option("--batch-tokens", type=int, help="Padded tokens a batch [the build's]."),
    MAX_MEMORY,
    *control_flags("train_sequences"),
    click.option("--allow-damaged", is_flag=True,
                 help="Digest every file and leave damaged segments out; the coverage is said."),
]
_GRADIENT = control_flags("damping", "modules")
_RAY = [
    click.option("--ray", is_flag=False, flag_value="local", default=None, metavar="[ADDRESS]",
                 help="Let workers of a Ray cluster score the sequences: the one at ADDRESS (auto, "
                      "host:port), or one that is started here."),
    click.option("--ray-workers", type=click.IntRange(min=1), metavar="N",
                 help="How many [one for each GPU of the cluster, else for each machine]."),
]
FORMS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".html": "html"}
_QUERY = [
    click.option("-p", "--prompt", metavar="TEXT",
                 help="Prompt; @FILE and - read it, @@ stands for @."),
    click.option("-c", "--completion", metavar="TEXT",
                 help="Completion to explain, with its leading space; @FILE reads it [the model's "
                      "own continuation]."),
    click.option("--messages", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                 help="JSON file of chat messages; the last one is explained."),
    click.option("--versus", metavar="TEXT",
                 help="Another completion: explain log p of -c minus log p of this."),
    click.option("--score-on", metavar="RANGE",
                 help="Score these tokens of the completion only: 0-2, or 5."),
    *control_flags("normalize"),
]


@click.command()
@options(_INDEX)
@options(_RAY)
@options(_QUERY)
@options(_GRADIENT)
@options(control_flags("k", "shortlist", "recall", "rescore", "opponents", "candidates", "group_by",
                       "time_limit"))
@click.option("--queries", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="JSON lines with prompt, completion, id: search for all of them together.")
@click.option("--aggregate", type=click.Choice(["sum"]),
              help="With --queries: one search, for the sum of their log p.")
@options(control_flags("rank"))
@click.option("--format", "form", default="auto", show_default=True,
              type=click.Choice(["auto", "json", "jsonl", "csv", "parquet", "html"]),
              help="auto is what -o ends in, else text for people; with --queries -o, a JSON "
                   "result a line.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write to a file instead of standard output; with --queries, resumes.")
def search(
    index: Path, prompt: str | None, completion: str | None, messages: Path | None,
    versus: str | None, score_on: str | None, queries: Path | None, aggregate: str | None,
    form: str, output: Path | None, **flags: Any,
) -> int:
    """Which training sequences made the model say COMPLETION after PROMPT?

    Shortlists by code, rescores exactly, and says how much of the true top k the answer holds.
    Without -c the model's own greedy continuation is explained.

    \b
    Example:
      gradindex search train.index -p "Water is composed of" -c " hydrogen and oxygen."
      gradindex search train.index --queries questions.jsonl -o results.jsonl --recall 0.95
    """
    from search.ask.make_query import make_query
    from search.ask.settings import settle
    from search.engine import drain

    _check_outputs({"-o": output}, [queries, messages])
    controls = take_controls(flags)
    if queries is not None:
        if any(given is not None for given in (prompt, completion, messages, versus, score_on)):
            raise click.UsageError("--queries and -p, -c, --messages, --versus, --score-on exclude "
                                   "each other; those are fields of the file's lines.")
        return _search_many(index, flags, queries, aggregate is not None, controls, form, output)
    if aggregate is not None or controls.rank is not None:
        raise click.UsageError("--aggregate and --rank go with --queries FILE.")
    question = _question(prompt, completion, messages, versus, score_on)
    searcher, progress = _open(index, flags)
    settings = settle(controls, searcher.manifest)  # before the model is loaded
    query = make_query(searcher.index, question)
    stages = searcher.stages([query], settings, conclude_early=True)
    return _finish(drain(stages, _Follower(progress).follow), form, output)


def _finish(result: "Result", form: str, output: Path | None) -> int:
    from search.show.wording import meaning, recall_statement

    to_terminal = output is None and sys.stdout.isatty()
    if form == "auto" and output is not None:
        form = FORMS.get(output.suffix.lower(), "auto")
    content = _render(result, form, color=to_terminal and _color())
    if form in ("jsonl", "csv"):  # which hold hits alone
        for line in (recall_statement(result), meaning(result), *result.warnings):
            click.echo(visible_lines(line), err=True)
    if output is None:
        click.echo(content, nl=False)
    else:
        _write(output, content)
    return 130 if result.interrupted else 0


def _search_many(
    index: Path, where: dict[str, Any], path: Path, aggregated: bool, controls: "Controls",
    form: str, output: Path | None,
) -> int:
    """Answer a file of queries; 2 if some could not be."""
    from search.ask import query_files
    from search.ask.make_query import aggregate
    from search.ask.settings import settle
    from search.engine import drain

    if form in ("csv", "parquet", "html") and not aggregated:
        raise click.UsageError(f"--format {form} holds one query's hits; with --queries take json.")
    read = query_files.read_queries(path)
    searcher, progress = _open(index, where)
    settings = settle(controls, searcher.manifest)
    if aggregated:
        made = query_files.make_queries(searcher, read, set())
        _complain(read, progress)
        stages = searcher.stages([aggregate(made)], settings, conclude_early=True)
        return _finish(drain(stages, _Follower(progress).follow), form, output) or \
            2 * bool(read.problems)
    results = None
    if output is not None:
        results = query_files.ResultsFile(output, searcher, settings, read.questions)
        if results.done:
            progress.say(f"{len(results.done)} queries are answered in {output} already")
    made = query_files.make_queries(searcher, read, results.done if results else set())
    _complain(read, progress)
    follower = _Follower(progress, len(made))
    color = sys.stdout.isatty() and _color()
    for stage in searcher.answer(made, settings):
        follower.follow(stage)
        if stage.result is not None and results is not None:
            results.write(stage.result)
        elif stage.result is not None:
            click.echo(_render(stage.result, "json" if form == "jsonl" else form, color), nl=False)
    if results is not None:
        results.close()
    return 2 if read.problems else 0


def _complain(read: "QueryFile", progress: "Progress") -> None:
    for problem in read.problems:
        progress.say(f"left out: {problem}")


@click.command()
@options(_INDEX)
@options(_QUERY)
@options(_GRADIENT)
@click.option("--ids", required=True, metavar="FILE|-",
              help="Ids to score: a line each, as a number or as JSON with an id.")
def rescore(
    index: Path, prompt: str | None, completion: str | None, messages: Path | None,
    versus: str | None, score_on: str | None, ids: str, **flags: Any,
) -> int:
    """Exact influence of the sequences you name, as JSON lines in the same order.

    The sizes of their gradients (cosine, relatif) come with a --normalize other than none.

    \b
    Example:
      gradindex search train.index -p "2 +" -c " 2" --format jsonl |
        gradindex rescore train.index -p "2 +" -c " 3" --ids -
    """
    from gradindex.results import UNITS
    from search.ask.make_query import make_query
    from search.ask.settings import settle
    from search.show.render import json_lines

    question = _question(prompt, completion, messages, versus, score_on, ids)
    controls = take_controls(flags)
    searcher, progress = _open(index, flags)
    settings = settle(controls, searcher.manifest)
    wanted = searcher.known(read_ids(ids))
    query = make_query(searcher.index, question)
    progress.start("exact", len(wanted), "sequences")
    for hits in searcher.rescore_stream(query, wanted, settings):
        click.echo(json_lines(hits, UNITS.format(how="exact")), nl=False)
        progress.update(len(hits))
    progress.finish()
    return 0


@click.command("eval")
@options(_INDEX)
@click.option("--queries", required=True, metavar="FILE",
              type=click.Path(dir_okay=False, path_type=Path),
              help="JSON lines with prompt and completion.")
@click.option("--sample", metavar="N|all", default="all", show_default=True,
              help="Score so many random sequences exactly.")
@options(_GRADIENT)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write everything as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path),
              help="Write a plot (.png, .svg or .pdf).")
def evaluate(
    index: Path, queries: Path, sample: str, output: Path | None, plot: Path | None, **flags: Any
) -> int:
    """How good is an index? Shortlists by code and by TF-IDF against exact scores.

    Scores every sequence (or a random part) exactly on your queries, and shows the share of the
    true top 10 and top 100 that shortlists hold, and what the recall statement claims of them.

    \b
    Example:
      gradindex eval train.index --queries questions.jsonl --sample 10000 --plot eval.png
    """
    from search.ask import query_files
    from search.ask.settings import settle
    from search.study import evaluate as evaluation

    _check_outputs({"-o": output, "--plot": plot}, [queries])
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot {plot}: expected a name that ends in .png, .svg or .pdf.")
    controls = take_controls(flags)
    count = _sample(sample)
    read = query_files.read_queries(queries)
    searcher, progress = _open(index, flags)
    settings = settle(controls, searcher.manifest)
    evaluation.check_sample(count, searcher.manifest)
    made = query_files.make_queries(searcher, read, set())
    _complain(read, progress)
    progress.start("exact", len(made) * len(searcher), "scores")
    before = 0

    def follow(done: int, total: int) -> None:
        nonlocal before
        progress.update(done - before, total=total)
        before = done
        if progress.measured:
            progress.say_expected(progress.seconds_each() * (total - done))

    found = evaluation.evaluate(searcher, made, settings, count, follow)
    progress.finish()
    click.echo(evaluation.table(found))
    if output is not None:
        _write(output, json_text(found.to_dict(), indent=1) + "\n")
    if plot is not None:
        evaluation.plot(found, plot)
    return 2 if read.problems else 0


@click.command()
@options(_INDEX)
@click.option("--queries", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
              help="JSON lines with prompt and completion [16 of the index's own sequences].")
@click.option("--sample", metavar="N|all", help="Score so many random sequences exactly [4096].")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
              default=Path("report.html"), show_default=True, help="The page to write.")
def report(
    index: Path, queries: Path | None, sample: str | None, output: Path, **flags: Any
) -> int:
    """What is in an index: one HTML page with plots, which needs nothing else.

    Texts by source and length, self-influence and its outliers, influence by layer, how heavy its
    upper tail is and how few sequences carry half of it.

    \b
    Example:
      gradindex report train.index -o report.html
      gradindex report train.index --queries questions.jsonl --sample all
    """
    from search.ask import query_files
    from search.ask.settings import settle
    from search.study import survey
    from search.study.report import render

    _check_outputs({"-o": output}, [queries])
    count = survey.SAMPLE if sample is None else _sample(sample)
    read = None if queries is None else query_files.read_queries(queries)
    controls = take_controls(flags)
    searcher, progress = _open(index, flags)
    settings = settle(controls, searcher.manifest)
    made = None
    if read is not None:
        made = query_files.make_queries(searcher, read, set())
        _complain(read, progress)
    _write(output, render(survey.survey(searcher, made, count, settings, progress)))
    progress.say(f"the report is in {output}")
    return 2 if read is not None and read.problems else 0


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["auto", "json"]), default="auto",
              show_default=True)
def info(index: Path, form: str) -> int:
    """What an index is: its model, data, curvature, codes and size.

    \b
    Example:
      gradindex info train.index
    """
    from search.study.describe import describe, summary

    facts = describe(index)
    click.echo(json_text(facts, indent=1) if form == "json" else summary(facts))
    return 0


@click.command()
@options(_INDEX)
@options(_RAY)
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen on; off the loopback a token is asked for.")
@click.option("--name", "others", multiple=True, metavar="NAME[:PORT]",
              help="Another name by which the page is reached, through a proxy say.")
@click.option("--port", type=click.IntRange(1, 65535), help="[the first free one from 8765 on]")
@click.option("--no-open", is_flag=True, help="Don't open a browser.")
def view(
    index: Path, host: str, others: tuple[str, ...], port: int | None, no_open: bool, **where: Any
) -> int:
    """Search in a local web page.

    Off the loopback everybody is asked for a token, as the password of any user: the one in
    GRADINDEX_TOKEN, or a new one that is printed. The page shows training text to who has it.

    \b
    Example:
      gradindex view train.index
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads leave pages their turn
    from search.serve import serving

    train_sequences = where.pop("train_sequences")
    token = serving.token_for(host, os.environ.get("GRADINDEX_TOKEN"))
    searcher, progress = _open(index, where)
    listening = serving.listen(host, port)
    address = f"http://{serving.bracketed(host)}:{listening.getsockname()[1]}/"
    if token is not None:
        if "GRADINDEX_TOKEN" not in os.environ:
            progress.say(f"token, the password of any user: {token}")
        progress.say("warning: whoever reads the network reads the token and the training text; "
                     "put a proxy with TLS in front")
    progress.say(f"the page: {address} (Ctrl-C ends it)")
    if not no_open:
        click.launch(address)
    hosts = serving.names(host, listening.getsockname()[1], others)
    serving.server(searcher, hosts, token, train_sequences).run(sockets=[listening])
    return 0


@click.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="File to write: .html, .json, .jsonl, .csv or .parquet.")
@click.option("--query", type=int, metavar="N", help="Which of several results, from 1 on.")
def export(result: Path, output: Path, query: int | None) -> int:
    """Write a saved result in another form.

    RESULT is what `search --format json -o FILE` wrote, a download of the page, or the file of
    results of `search --queries`. HTML is one file that needs nothing else and shows everything.

    \b
    Example:
      gradindex search train.index -p "2 +" -c " 2" -o result.json
      gradindex export result.json -o result.html
    """
    from search.show import render

    _check_outputs({"-o": output}, [result])
    form = FORMS.get(output.suffix.lower())
    if form is None:
        raise click.UsageError(f"-o {output}: expected a name that ends in {', '.join(FORMS)}.")
    _write(output, render.render(render.read(result, query), form))
    return 0


def _sample(given: str) -> int | None:
    """How many sequences, None for all."""
    if given != "all" and not (given.isdecimal() and int(given)):
        raise click.UsageError(f"--sample {given}: expected a number above 0, or all.")
    return None if given == "all" else int(given)


def _check_outputs(outputs: dict[str, Path | None], inputs: list[Path | None]) -> None:
    """Raise UsageError for what can't be written, or would replace what is read."""
    for name, path in outputs.items():
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{name} {path}: there is no folder {path.parent}.")
        if path is not None and path.resolve() in [one.resolve() for one in inputs if one]:
            raise click.UsageError(f"{name} {path}: that file is read here; give another.")


def _write(output: Path, content: str | bytes) -> None:
    """A file is replaced as a whole; anything else (a device, a pipe) is written to."""
    from gradindex.storage.files import atomic_write

    output = output.resolve()
    raw = content.encode() if isinstance(content, str) else content
    if output.exists() and not output.is_file():
        output.write_bytes(raw)
    else:
        atomic_write(output, raw)


def _open(index: Path, where: dict[str, Any]) -> tuple["Searcher", "Progress"]:
    from gradindex.model.loading import quiet_transformers
    from gradindex.progress import stderr_progress
    from search.engine import open as open_index

    quiet_transformers()
    searcher, progress = open_index(index, **where), stderr_progress()
    if not searcher.index.coverage.whole:
        progress.say(f"warning: {searcher.index.coverage}")
    return searcher, progress


def _question(
    prompt: str | None, completion: str | None, messages: Path | None, versus: str | None,
    score_on: str | None, ids: str | None = None,
) -> "Question":
    """What the flags ask. Raises UsageError for what can't stand together."""
    from search.ask.question import Question

    if messages is not None:
        if prompt is not None or completion is not None or versus is not None:
            raise click.UsageError("--messages and -p, -c, --versus exclude each other; give one "
                                   "query.")
        try:
            chat = json.loads(read_text(messages, f"--messages {messages}"))
            return Question(messages=chat, score_on=score_on)
        except ValueError as error:
            raise click.UsageError(f"--messages {messages} is not valid JSON: {error}.") from None
    if prompt is None and completion is None:
        raise click.UsageError('give the query: -p "PROMPT" -c " COMPLETION", or --messages FILE, '
                               "or --queries FILE.")
    if [prompt, completion, versus, ids].count("-") > 1:
        raise click.UsageError("only one of -p, -c, --versus and --ids can be standard input, -.")
    return Question(_text(prompt), _text(completion), versus=_text(versus), score_on=score_on)


def _text(value: str | None) -> str | None:
    if value == "-":
        return sys.stdin.read()
    if value is not None and value.startswith("@@"):
        return value[1:]
    if value is not None and value.startswith("@"):
        return read_text(Path(value[1:]), value)
    return value


class _Follower:
    """Shows where a search stands; with `queries`, of how many."""

    def __init__(self, progress: "Progress", queries: int = 0):
        self._progress, self._queries = progress, queries
        self._answered = self._done = 0
        self._running = False

    def follow(self, stage: "Stage") -> None:
        progress = self._progress
        if stage.name == "gradient" and stage.query is not None and not self._queries:
            query = stage.query
            if query.generated:
                progress.say(f"the model continues: {query.completion!r}")
            difference = ", a difference" if any(text.weight < 0 for text in query.others) else ""
            progress.say(f"gradient of {sum(text.scored for text in query.texts)} scored tokens, "
                         f"log p = {query.log_p:.2f} nats{difference}")
        elif stage.name == "approximate" and stage.total:
            if self._running:
                progress.finish()
            progress.start("exact", stage.total, "sequences")
            self._done, self._running = 0, True
        elif stage.name == "exact":
            progress.update(stage.done - self._done, total=stage.total)
            self._done = stage.done
            if progress.measured:
                progress.say_expected(progress.seconds_each() * (stage.total - stage.done))
        elif stage.name == "result":
            self._answered += 1
            last = self._answered == max(1, self._queries)
            if self._running and (last or stage.done == stage.total):
                progress.finish()
                self._running = False
            if last and self._queries:
                progress.say(f"{self._answered} queries answered")


def _render(result: Any, form: str, color: bool) -> bytes:
    from search.show import render

    if form == "auto":
        return (render.terminal(result, color=color) + "\n").encode()
    return render.render(result, form)


def _color() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
