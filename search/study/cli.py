"""`gradindex eval`, `report`: flags → functions."""

from pathlib import Path
from typing import Any

import click

from gradindex.flags import options
from gradindex.terminal import json_text
from search.query_flags import (
    INDEX_FLAGS,
    OUTPUT_FILE,
    check_outputs,
    complain,
    control_flags,
    open_searcher,
    sample_size,
    take_controls,
    write_output,
)
from search.study.report_defaults import OWN_QUERIES, SCORED_SEQUENCES


@click.command("eval")
@options(INDEX_FLAGS)
@click.option("--queries", required=True, metavar="FILE", type=OUTPUT_FILE,
              help="JSON lines with prompt and completion.")
@click.option("--sample", metavar="N|all", default="all", show_default=True,
              help="Score so many random sequences exactly.")
@options(control_flags("damping", "modules"))
@click.option("-o", "--output", type=OUTPUT_FILE, help="Write everything as JSON.")
@click.option("--plot", type=OUTPUT_FILE, help="Write a plot (.png, .svg or .pdf).")
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

    check_outputs({"-o": output, "--plot": plot}, [queries])
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot {plot}: expected a name that ends in .png, .svg or .pdf.")
    controls = take_controls(flags)
    count = sample_size(sample)
    query_file = query_files.read_queries(queries)
    searcher, progress = open_searcher(index, flags)
    # everything that can be wrong is told before the model is loaded
    settings = settle(controls, searcher.manifest)
    evaluation.check_sample(count, searcher.manifest)
    ready = query_files.make_queries(searcher.snapshot, query_file, set())
    complain(query_file, progress)
    progress.start("exact", len(ready) * len(searcher), "scores")
    before = 0

    def follow(done: int, total: int) -> None:
        nonlocal before
        progress.update(done - before, total=total)
        before = done
        if progress.measured:
            progress.say_expected(progress.seconds_each() * (total - done))

    evaluated = evaluation.evaluate(searcher, ready, settings, count, follow)
    progress.finish()
    click.echo(evaluation.table(evaluated))
    if output is not None:
        write_output(output, json_text(evaluated.to_dict(), indent=1) + "\n")
    if plot is not None:
        evaluation.plot(evaluated, plot)
    return 2 if query_file.problems else 0


@click.command()
@options(INDEX_FLAGS)
@click.option("--queries", metavar="FILE", type=OUTPUT_FILE,
              help="JSON lines with prompt and completion "
                   f"[{OWN_QUERIES} of the index's own sequences].")
@click.option("--sample", metavar="N|all",
              help=f"Score so many random sequences exactly [{SCORED_SEQUENCES}].")
@click.option("-o", "--output", type=OUTPUT_FILE,
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
    from search.study.report import render_report

    check_outputs({"-o": output}, [queries])
    count = SCORED_SEQUENCES if sample is None else sample_size(sample)
    query_file = None if queries is None else query_files.read_queries(queries)
    controls = take_controls(flags)
    searcher, progress = open_searcher(index, flags)
    settings = settle(controls, searcher.manifest)
    ready = None
    if query_file is not None:
        ready = query_files.make_queries(searcher.snapshot, query_file, set())
        complain(query_file, progress)
    surveyed = survey.survey(searcher, ready, count, settings, progress)
    write_output(output, render_report(surveyed))
    progress.say(f"the report is in {output}")
    return 2 if query_file is not None and query_file.problems else 0
