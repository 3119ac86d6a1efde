"""`gradindex eval`, `report`, `audit`: flags → functions."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradindex.flags import options
from gradindex.terminal import json_text, visible_lines
from search.query_flags import (
    INDEX_FLAGS,
    INPUT_FILE,
    OUTPUT_FILE,
    check_outputs,
    complain,
    control_flags,
    open_searcher,
    sample_size,
    take_controls,
    write_output,
)
from search.study.audit_defaults import MOST_EXACT
from search.study.report_defaults import OWN_QUERIES, SCORED_SEQUENCES

if TYPE_CHECKING:
    from search.study.audited import Audit


@click.command("eval")
@options(INDEX_FLAGS)
@click.option("--queries", required=True, metavar="FILE", type=INPUT_FILE,
              help="As for search: JSON lines or a table, of the index's task.")
@click.option("--sample", metavar="N|all", default="all", show_default=True,
              help="Score so many random sequences exactly.")
@options(control_flags("damping", "modules", "members"))
@click.option("-o", "--output", type=OUTPUT_FILE, help="Write everything as JSON.")
@click.option("--plot", type=OUTPUT_FILE, help="Write a plot (.png, .svg or .pdf).")
def evaluate(
    index: Path, queries: Path, sample: str, output: Path | None, plot: Path | None, **flags: Any
) -> int:
    """How good is an index? Shortlists by code and by TF-IDF against exact scores.

    Of a model of any task. Scores every sequence (or a random part) exactly on your queries, and
    shows the share of the true top 10 and top 100 that shortlists hold, and what the recall
    statement claims of them.

    \b
    Example:
      gradindex eval train.index --queries questions.jsonl --sample 10000 --plot eval.png
    """
    from search.ask import query_files
    from search.ask.settings import settle
    from search.study import evaluate as evaluation

    check_outputs({"-o": output, "--plot": plot}, [queries])
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot {plot}: expected a name that ends in .png, .svg or .pdf.")
    controls = take_controls(flags)
    count = sample_size(sample)
    searcher, progress = open_searcher(index, flags)
    query_file = query_files.read_queries(queries, settings=searcher.manifest.plan.corpus)
    # everything that can be wrong is told before the model is loaded
    settings = settle(controls, searcher.manifest)
    evaluation.check_sample(count, searcher.manifest)
    ready = query_files.make_queries(searcher.snapshot, query_file, set())
    complain(query_file, progress, searcher.snapshot, ready)
    progress.start("exact", len(ready) * len(searcher), "scores")
    evaluated = evaluation.evaluate(searcher, ready, settings, count, progress.follow)
    progress.finish()
    click.echo(evaluation.table(evaluated))
    if output is not None:
        write_output(output, json_text(evaluated.to_dict(), indent=1) + "\n")
    if plot is not None:
        evaluation.plot(evaluated, plot)
    return 2 if query_file.problems else 0


@click.command()
@options(INDEX_FLAGS)
@click.option("--queries", metavar="FILE", type=INPUT_FILE,
              help="As for search: JSON lines or a table, of the index's task "
                   f"[{OWN_QUERIES} of the index's own sequences].")
@click.option("--sample", metavar="N|all",
              help=f"Score so many random sequences exactly [{SCORED_SEQUENCES}].")
@click.option("-o", "--output", type=OUTPUT_FILE,
              default=Path("report.html"), show_default=True, help="The page to write.")
def report(
    index: Path, queries: Path | None, sample: str | None, output: Path, **flags: Any
) -> int:
    """What is in an index: one HTML page with plots, which needs nothing else.

    Of a model of any task: texts by source and length, self-influence and its outliers, influence
    by layer, how heavy its upper tail is and how few sequences carry half of it.

    \b
    Example:
      gradindex report train.index -o report.html
      gradindex report train.index --queries questions.jsonl --sample all
    """
    from search.ask import query_files
    from search.ask.settings import settle
    from search.study import survey
    from search.study.report import render_report

    check_outputs({"-o": output}, [queries])
    count = SCORED_SEQUENCES if sample is None else sample_size(sample)
    controls = take_controls(flags)
    searcher, progress = open_searcher(index, flags)
    query_file = None if queries is None else query_files.read_queries(
        queries, settings=searcher.manifest.plan.corpus)
    settings = settle(controls, searcher.manifest)
    ready = None
    if query_file is not None:
        ready = query_files.make_queries(searcher.snapshot, query_file, set())
        complain(query_file, progress, searcher.snapshot, ready)
    surveyed = survey.survey(searcher, ready, count, settings, progress)
    write_output(output, render_report(surveyed))
    progress.say(f"the report is in {output}")
    return 2 if query_file is not None and query_file.problems else 0


@click.command()
@options(INDEX_FLAGS)
@click.option("--against", metavar="FILE", type=INPUT_FILE,
              help="Queries of the index's task that are known to be right, with their answer, as "
                   "for search: rank by harm to them.")
@click.option("--truth", metavar="FIELD",
              help="A kept or derived field that says what is corrupted (true or false, 1 or 0), "
                   "or a classifier's true label: measure how well each signal finds it.")
@click.option("--truth-as", type=click.Choice(["marks", "labels"]),
              help="What --truth holds, where 0 and 1 may be either.")
@click.option("--exact", metavar="N|all", default=str(MOST_EXACT), show_default=True,
              help="Score so many exactly, those that are likeliest to be corrupted by their "
                   "codes; the others come after them.")
@options(control_flags("damping", "modules", "members"))
@click.option("--format", "form", default="auto", show_default=True,
              type=click.Choice(["auto", "json", "jsonl", "csv", "parquet", "html"]),
              help="auto is what -o ends in, else text for people.")
@click.option("-o", "--output", type=OUTPUT_FILE,
              help="Write the whole table, or a page of the first hundred (.html).")
def audit(
    index: Path, against: Path | None, truth: str | None, truth_as: str | None, exact: str,
    form: str, output: Path | None, **flags: Any,
) -> int:
    """Which training sequences are corrupted? Every one with what marks it, most suspect first.

    Self-influence, loss, and of a classifier what the other sequences of each class say of it, of
    pairs what all others do; or the harm to a trusted set. They are ranked by what is found best:
    by what the others say against it, of a language model by self-influence, with --against by
    harm.

    \b
    Example:
      gradindex audit reviews.index -o suspects.csv
      gradindex audit reviews.index --truth flipped -o suspects.html
      gradindex audit pairs.index --against trusted.jsonl --truth swapped -o suspects.html
    """
    from search.ask import query_files
    from search.ask.settings import settle
    from search.study.audit import audit as make_audit
    from search.study.audit_forms import form_of_name
    from search.study.audit_rows import check_kept
    from search.study.trusted import read_trusted

    check_outputs({"-o": output}, [against])
    if output is not None and form == "auto":
        form = form_of_name(output)
    count, controls = sample_size(exact, "--exact"), take_controls(flags)
    searcher, progress = open_searcher(index, flags)
    # everything that can be wrong is told before the model is loaded
    settings = settle(controls, searcher.manifest)
    if truth is not None:
        check_kept(searcher.snapshot, truth)
    query_file = None if against is None else read_trusted(against, searcher.manifest.plan)
    trusted = None
    if query_file is not None:
        trusted = query_files.make_queries(searcher.snapshot, query_file, set())
        complain(query_file, progress, searcher.snapshot, trusted)
    try:
        audited = make_audit(searcher.snapshot, settings, searcher.batch_tokens, trusted, count,
                             progress, truth, truth_as)
    except KeyboardInterrupt:
        progress.say("an audit is not gone on with: nothing was scored in full yet, and nothing is "
                     "written. --exact N scores fewer.")
        raise
    _show_audit(audited, form, output)
    return 130 if audited.interrupted else 2 if query_file is not None and query_file.problems \
        else 0


def _show_audit(audited: "Audit", form: str, output: Path | None) -> None:
    """Write an audit, and print what is found."""
    from search.study.audit_forms import put
    from search.study.audit_text import render
    from search.study.audit_words import detection_lines, sentences

    if output is not None:
        write_output(output, partial(put, audited, form))
    # what isn't a file may be standard output itself, which has the data then
    if form == "auto" or (output is not None and output.is_file()):
        click.echo(render(audited))
        if output is not None:
            what = "a page of them" if form == "html" else "the whole table"
            click.echo(f"{what} is in {visible_lines(str(output))}", err=True)
        return
    for line in (*sentences(audited), *detection_lines(audited.detections)):
        click.echo(visible_lines(line), err=True)
    if output is None:
        put(audited, form, sys.stdout.buffer)
