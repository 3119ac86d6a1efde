"""Does a shortlist by code hold the top of a classifier, a reward model or a policy, and say so?

    python benchmarks/task_fidelity.py MODEL DATA --sequences 2048 --queries 32

What `fidelity.py` asks of language models, of a model of any task: an index is built of some rows
of DATA, others of them are asked about, as they are labelled or preferred, every sequence is scored
exactly, and shortlists by code, by TF-IDF and by both are compared with that: the share of the true
top k in a shortlist, and what the recall statement claims of it. MODEL should have been trained on
those rows; it isn't here.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from gradindex.progress import stderr_progress
from indexer.read.discover import discover
from indexer.read.sources import read_source
from search.ask.controls import Controls
from search.ask.query_files import make_queries, read_queries
from search.ask.settings import settle
from search.study.evaluate import evaluate, table


def drawn_rows(data: str, count: int, seed: int) -> list[dict[str, Any]]:
    """So many rows of files of data, at random."""
    rows = [row for source in discover([data]).sources
            for row in read_source(source, list, (), "text", 0) if isinstance(row, dict)]
    if count > len(rows):
        raise click.UsageError(f"{count} rows are asked for, {data} has {len(rows)}.")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[number] for number in chosen]


@click.command()
@click.argument("model")
@click.argument("data")
@click.option("--task", help="What the model was trained for [as its class tells].")
@click.option("--sequences", type=int, default=2048, show_default=True)
@click.option("--queries", "count", type=int, default=32, show_default=True)
@click.option("--bits", type=int, default=32768, show_default=True)
@click.option("--modules", help="[as a build takes them]")
@click.option("--seq-len", type=int, default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    model: str, data: str, task: str | None, sequences: int, count: int, bits: int,
    modules: str | None, seq_len: int, seed: int,
) -> None:
    """Build, ask, compare; the table goes to standard output."""
    rows, progress = drawn_rows(data, sequences + count, seed), stderr_progress()
    with tempfile.TemporaryDirectory() as folder:
        index = gradindex.build(
            model, rows[:sequences], Path(folder) / "index", task=task, bits=bits, modules=modules,
            seq_len=seq_len, fit_sequences=min(sequences, 4096), seed=seed, progress=progress)
        asked = Path(folder) / "queries.jsonl"
        asked.write_text("".join(
            json.dumps({**row, "id": number}) + "\n"
            for number, row in enumerate(rows[sequences:])))
        file = read_queries(asked, settings=index.manifest.plan.corpus)
        queries = make_queries(index.snapshot, file, set())
        for problem in file.problems:
            progress.say(problem)
        settings = settle(Controls(), index.manifest)
        found = evaluate(index, queries, settings, None, lambda done, total: None)
        print(f"task {index.manifest.task.name}, K = {bits:,}, {len(index):,} sequences")
        print(table(found))


if __name__ == "__main__":
    main()
