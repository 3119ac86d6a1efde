"""`gradindex search`, `rescore`, `info`: flags → functions."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradindex.flags import options, read_ids
from gradindex.terminal import json_text, visible_lines
from search.query_flags import (
    INDEX_FLAGS,
    INPUT_FILE,
    OUTPUT_FILE,
    QUESTION_FLAGS,
    RAY_FLAGS,
    check_outputs,
    complain,
    control_flags,
    may_color,
    open_searcher,
    read_question,
    take_controls,
    take_question,
    write_output,
)

if TYPE_CHECKING:
    from gradindex.progress import Progress
    from gradindex.results import Hit, Result
    from search.ask.controls import Controls
    from search.ask.settings import Settings
    from search.engine import Searcher, SearchStage

LOADING = "loading the model and the index, then the query's gradient"


@click.command()
@options(INDEX_FLAGS)
@options(RAY_FLAGS)
@options(QUESTION_FLAGS)
@options(control_flags("normalize", "damping", "modules", "members", "k", "shortlist", "recall",
                       "rescore", "opponents", "candidates", "group_by", "time_limit"))
@click.option("--queries", type=INPUT_FILE, metavar="FILE",
              help="JSON lines or a table (.csv, .tsv, .parquet) with prompt, completion, id; of "
                   "another task rows of its data (text, label; prompt, chosen, rejected, or "
                   "response): search for all of them together.")
@click.option("--aggregate", type=click.Choice(["sum"]),
              help="With --queries: one search, for the sum of their log p. It sums first: "
                   "--normalize goes by the sum's own gradient.")
@options(control_flags("rank"))
@click.option("--check", type=int, metavar="N", help="Measure what the first N hits change: move "
              "the weights by each one's own step, and ask for log p again (needs N_train).")
@click.option("--format", "form", default="auto", show_default=True,
              type=click.Choice(["auto", "json", "jsonl", "csv", "parquet", "html"]),
              help="auto is what -o ends in, else text for people; with --queries -o, a JSON "
                   "result a line.")
@click.option("-o", "--output", type=OUTPUT_FILE,
              help="Write to a file instead of standard output; with --queries, resumes.")
def search(
    index: Path, queries: Path | None, aggregate: str | None, check: int | None, form: str,
    output: Path | None, **flags: Any,
) -> int:
    """Which training sequences made the model say COMPLETION after PROMPT?

    Of a classifier: made it give a text its label; of a reward model or a policy of preferences:
    prefer one answer to another, or give one its reward.

    Shortlists by code, rescores exactly, and says how much of the true top k the answer holds.
    Without -c the model's own greedy continuation is explained, without --label its own label.

    \b
    Example:
      gradindex search train.index -p "Water is composed of" -c " hydrogen and oxygen."
      gradindex search train.index -p "What is" -c " it?" --train-sequences 5000 --check 2
      gradindex search train.index --queries questions.jsonl -o results.jsonl --recall 0.95
      gradindex search reviews.index --text "a dull film" --label negative
      gradindex search pairs.index -p "Is it?" --chosen " It is." --rejected " Who knows."
    """
    from search.ask.make_query import make_query
    from search.ask.settings import settle
    from search.engine import drain

    controls, question_flags = take_controls(flags), take_question(flags)
    check_outputs({"-o": output}, [queries, question_flags["messages"]])
    if queries is not None:
        if check is not None:
            raise click.UsageError("--check is of one query's hits: it can't go with --queries.")
        if any(value is not None for value in question_flags.values()):
            given = next(name for name, value in question_flags.items() if value is not None)
            raise click.UsageError(
                f"--queries and --{given.replace('_', '-')} exclude each other; what is asked is a "
                "field of the file's lines.")
        return _search_many(index, flags, queries, aggregate is not None, controls, form, output)
    if aggregate is not None or controls.rank is not None:
        raise click.UsageError("--aggregate and --rank go with --queries FILE.")
    # read before the index is opened: it may wait for standard input
    question = read_question(question_flags)
    searcher, progress = open_searcher(index, flags)
    settings = settle(controls, searcher.manifest)  # before the model is loaded
    progress.say(LOADING)  # which takes seconds, before anything is scored
    query = make_query(searcher.snapshot, question)
    if check is not None:
        _refuse_check(searcher, settings, check)  # before anything is scored
    stages = searcher.stages([query], settings, conclude_early=True)
    follower = _Follower(progress, searcher.manifest.task.name)
    result = drain(stages, follower.follow)
    if check is not None and not result.interrupted:
        _check(searcher, result, check, progress)
    return _finish(result, form, output)


def _refuse_check(searcher: "Searcher", settings: "Settings", count: int) -> None:
    from search.study.check import refuse

    refuse(searcher.snapshot, settings, count)


def _check(searcher: "Searcher", result: "Result", count: int, progress: "Progress") -> None:
    """Check the first hits, and say how far that is."""
    progress.start("check", 0, "passes")
    searcher.check(result, count, progress.follow)
    progress.finish()


def _finish(result: "Result", form: str, output: Path | None) -> int:
    """Print a result, or write it, in the form asked for."""
    from search.show.output_forms import form_of, render_form
    from search.show.wording import meaning, recall_statement

    # what -o ends in is asked for; a name that says nothing is text for people
    if form == "auto" and output is not None:
        form = form_of(output) or form
    content = render_form(result, form, color=output is None and may_color())
    if form in ("jsonl", "csv"):  # which hold hits alone
        for line in (recall_statement(result), meaning(result), *result.warnings):
            click.echo(visible_lines(line), err=True)
    if output is None:
        click.echo(content, nl=False)
    else:
        write_output(output, content)
    # an answer was given, but scripts should know that Ctrl-C ended it
    return 130 if result.interrupted else 0


def _search_many(
    index: Path, flags: dict[str, Any], path: Path, aggregated: bool, controls: "Controls",
    form: str, output: Path | None,
) -> int:
    """Answer a file of queries; 2 if some could not be."""
    from search.ask import query_files
    from search.ask.make_query import aggregate
    from search.ask.settings import settle
    from search.engine import drain
    from search.show.output_forms import render_form

    if form in ("csv", "parquet", "html") and not aggregated:
        raise click.UsageError(f"--format {form} holds one query's hits; with --queries take json.")
    # a line that can't be used is told and left out: the others are worth their time
    searcher, progress = open_searcher(index, flags)
    query_file = query_files.read_queries(path, settings=searcher.manifest.plan.corpus)
    settings = settle(controls, searcher.manifest)
    progress.say(LOADING)
    if aggregated:
        queries = query_files.make_queries(searcher.snapshot, query_file, set())
        complain(query_file, progress, searcher.snapshot, queries)
        stages = searcher.stages([aggregate(queries)], settings, conclude_early=True)
        follower = _Follower(progress, searcher.manifest.task.name)
        return _finish(drain(stages, follower.follow), form, output) or \
            2 * bool(query_file.problems)
    results = None
    if output is not None:
        results = query_files.ResultsFile(output, searcher.snapshot.digest, settings,
                                          query_file.questions)
        if results.done:
            progress.say(f"{len(results.done)} queries are answered in {output} already")
    queries = query_files.make_queries(searcher.snapshot, query_file,
                                       results.done if results else set())
    complain(query_file, progress, searcher.snapshot, queries)
    follower = _Follower(progress, searcher.manifest.task.name, len(queries))
    # a result is shown, or on disk, before the next query's begins: a kill loses one at most
    for stage in searcher.answer(queries, settings):
        follower.follow(stage)
        if stage.result is not None and results is not None:
            results.write(stage.result)
        elif stage.result is not None:
            one_a_line = "json" if form == "jsonl" else form
            click.echo(render_form(stage.result, one_a_line, may_color()), nl=False)
    if results is not None:
        results.close()
    return 2 if query_file.problems else 0


class _Follower:
    """Shows where a search of a task's index stands; with a `count`, of how many queries."""

    def __init__(self, progress: "Progress", task: str, count: int = 0):
        self._progress, self._task, self._count = progress, task, count
        self._answered = self._done = 0
        self._running = False

    def follow(self, stage: "SearchStage") -> None:
        """Show one stage; bars go on from query to query as long as more is to be scored."""
        from search.show.task_words import asked_of

        progress = self._progress
        if stage.name == "gradient" and stage.query is not None and not self._count:
            query = stage.query
            if query.generated:
                progress.say(f"the model continues: {query.completion!r}" if query.label is None
                             else f"the model's own label: {query.label_name}")
            progress.say(f"the query: {asked_of(query, self._task)}")
        elif stage.name == "approximate" and stage.total:
            if self._running:
                progress.finish()
            # the total may grow on the way: every stage tells it anew
            progress.start("exact", stage.total, "sequences")
            self._done, self._running = 0, True
        elif stage.name == "exact":
            progress.update(stage.done - self._done, total=stage.total)
            self._done = stage.done
            if progress.measured:
                progress.say_expected(progress.seconds_each() * (stage.total - stage.done))
        elif stage.name == "result":
            self._answered += 1
            # several queries share one bar: it ends with the last, or before a longer shortlist
            last = self._answered == max(1, self._count)
            if self._running and (last or stage.done == stage.total):
                progress.finish()
                self._running = False
            if last and self._count:
                progress.say(f"{self._answered} queries answered")


@click.command()
@options(INDEX_FLAGS)
@options(QUESTION_FLAGS)
@options(control_flags("normalize", "damping", "modules", "members"))
@click.option("--ids", "id_source", required=True, metavar="FILE|-",
              help="Ids to score: a line each, as a number or as JSON with an id.")
@click.option("--sort", "ranked", is_flag=True,
              help="The highest first, by influence or as --normalize says, once all are scored.")
def rescore(index: Path, id_source: str, ranked: bool, **flags: Any) -> int:
    """Exact influence of the sequences you name, as JSON lines in the same order, or with --sort.

    The query is one of the index's task, as for search. The sizes of their gradients (cosine,
    relatif) come with a --normalize other than none.

    \b
    Example:
      gradindex search train.index -p "2 +" -c " 2" --format jsonl |
        gradindex rescore train.index -p "2 +" -c " 3" --ids -
      gradindex rescore reviews.index --text "a dull film" --label negative --ids ids.txt
    """
    from gradindex.meaning import units_of
    from search.ask.make_query import make_query
    from search.ask.settings import settle
    from search.rank.named import rescore_named
    from search.rank.snapshot import unlike
    from search.show.data_files import json_lines
    from search.show.wording import ranked_by

    controls = take_controls(flags)
    question = read_question(take_question(flags), id_source)
    searcher, progress = open_searcher(index, flags)
    settings = settle(controls, searcher.manifest)
    places = searcher.known(read_ids(id_source))
    progress.say(LOADING)
    query = make_query(searcher.snapshot, question)
    if told := unlike(searcher.snapshot, query):
        progress.say(f"warning: {told}")
    units = units_of(searcher.manifest.task.name, exact=True, query=query)
    progress.start("exact", len(places), "sequences")
    scored: list[Hit] = []
    for hits in rescore_named(searcher.snapshot, query, places, settings, searcher.batch_tokens):
        if ranked:
            scored += hits
        else:
            click.echo(json_lines(hits, units), nl=False)
        progress.update(len(hits))
    progress.finish()
    if ranked:
        scored.sort(key=lambda hit: ranked_by(hit, settings.normalize), reverse=True)
        click.echo(json_lines(scored, units), nl=False)
    return 0


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

    description = describe(index)
    # broken for people alone: what reads lines finds each fact on one
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    click.echo(json_text(description, indent=1) if form == "json" else summary(description, width))
    return 0
