"""Shortlists of a model of any task against exact scores: what `fidelity.py --model` prints.

An index is built of some rows of the data, others of them are asked about, as they are labelled or
preferred, every sequence is scored exactly, and shortlists by code, by TF-IDF and by both are
compared with that: the share of the true top k in a shortlist, and what the recall statement claims
of it. The model should have been trained on those rows; it isn't here. Codes can be made by the
recipe of before, too (`influence/codes.py`).
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import gradindex
from gradindex.errors import InputError
from gradindex.progress import Progress
from indexer import prepare
from indexer.read.discover import discover
from indexer.read.sources import read_source
from indexer.state import Settled
from search.ask.controls import Controls
from search.ask.query_files import make_queries, read_queries
from search.ask.settings import settle
from search.study.evaluate import evaluate, table


def drawn_rows(data: str, count: int, seed: int) -> list[dict[str, Any]]:
    """So many rows of files of data, at random."""
    rows = [row for source in discover([data]).sources
            for row in read_source(source, list, (), "text", 0) if isinstance(row, dict)]
    if count > len(rows):
        raise InputError(f"{count} rows are asked for, {data} has {len(rows)}.")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[number] for number in chosen]


@contextmanager
def codes_made_by(recipe: int) -> Iterator[None]:
    """Builds begin with a recipe of codes, as those that an earlier version began."""
    def settled(*chosen: Any, **more: Any) -> Settled:
        return Settled(*chosen, **more | {"recipe": recipe})

    with patch.object(prepare, "Settled", settled):
        yield


def print_shortlists(
    model: str, data: str, task: str | None, modules: str | None, sequences: int, count: int,
    length: int, bits: int, recipe: int, progress: Progress,
) -> None:
    """Build of so many `sequences` with codes of K = `bits`, ask `count` queries, print a table."""
    rows = drawn_rows(data, sequences + count, seed=0)
    with tempfile.TemporaryDirectory() as folder, codes_made_by(recipe):
        index = gradindex.build(
            model, rows[:sequences], Path(folder) / "index", task=task, bits=bits, seq_len=length,
            modules=modules, fit_sequences=min(sequences, 4096), progress=progress)
        asked = Path(folder) / "queries.jsonl"
        # under numbers of their own: a row's id may be anything
        asked.write_text("".join(json.dumps({**row, "id": number}) + "\n"
                                 for number, row in enumerate(rows[sequences:])))
        file = read_queries(asked, settings=index.manifest.plan.corpus)
        queries = make_queries(index.snapshot, file, set())
        for problem in file.problems:
            progress.say(problem)
        found = evaluate(index, queries, settle(Controls(), index.manifest), None,
                         lambda done, total: None)
        print(f"\ntask {index.manifest.task.name}, modules {modules or 'by default'}, "
              f"K = {bits:,}, recipe {recipe}, c = {index.manifest.calibration['c']}, "
              f"{len(index):,} sequences\n"
              f"{table(found)}", flush=True)
