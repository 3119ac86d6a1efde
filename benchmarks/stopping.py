"""When is a search sure, and is what it claims true? On queries whose whole truth is known.

    python benchmarks/stopping.py .demo/index .demo/model --queries 45 --timed 5
    python benchmarks/stopping.py INDEX MODEL --queries 12 --asked questions.jsonl --together 6

Queries are made of sequences of the index (a completion of 1 to 64 tokens after what stands before
it), and read from a file of JSON lines. Every sequence is scored exactly on each for the truth,
which is kept in FOLDER and found there again; searches look their exact scores up there, but for
the timed ones. Printed: for the defaults and what they replace the number rescored, actual and
claimed recall; how much fixed lengths find, by code and by both; and claims by tenths.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from benchmarks.truth import SHORT, Known, Outcome, asked, find, make_queries, search_known
from gradindex.results import Query
from search.ask.controls import Controls
from search.ask.settings import settle
from search.engine import Searcher

DEFAULTS: dict[str, dict[str, Any]] = {
    "1,000 by code": {"shortlist": 1000, "candidates": "code"},
    "1,000 by both": {"shortlist": 1000, "candidates": "both"},
    "until sure, by code": {"candidates": "code"},
    "until sure, by both (default)": {},
    "opponents until sure, by both": {"opponents": True},
}
FIXED = (20, 50, 100, 200, 500, 1000)
SURE = 0.99


def defaults(index: Searcher, known: list[Known], k: int) -> None:
    """A line for each default."""
    print(f"\n{'':<32}rescored  actual  claimed  sure of {SURE}: share  rescored  actual  fewest")
    for name, controls in DEFAULTS.items():
        rows = [search_known(index, one, {"k": k, **controls}) for one in known]
        sure = [row for row in rows if row.lower >= SURE]
        line = f"{name:<32}{_mean(rows, 'rescored'):>8.0f}  {_mean(rows, 'actual'):>6.3f}  " \
            f"{_mean(rows, 'claimed'):>7.3f}  {len(sure) / len(rows):>18.2f}"
        if sure:
            line += f"  {_mean(sure, 'rescored'):>8.0f}  {_mean(sure, 'actual'):>6.3f}  " \
                f"{min(row.actual for row in sure):>6.2f}"
        print(line, flush=True)


def _mean(rows: list[Outcome], name: str) -> float:
    return float(np.mean([getattr(row, name) for row in rows]))


def fixed(index: Searcher, known: list[Known], k: int) -> None:
    """What fixed lengths find and claim, short completions and longer ones; claims by tenths."""
    lengths = [length for length in FIXED if k <= length < len(index)]
    both: list[Outcome] = []
    for what, chosen in (
            (f"completions of 1 to {SHORT} tokens", [q for q in known if q.query.scored <= SHORT]),
            ("longer ones", [q for q in known if q.query.scored > SHORT])):
        print(f"\n{what} ({len(chosen)}): the top {k}\n"
              "rescored  by code: actual  claimed  by both: actual  claimed")
        for length in lengths if chosen else []:
            by = {name: [search_known(index, one, {"k": k, "shortlist": length, "candidates": name})
                         for one in chosen] for name in ("code", "both")}
            both += by["code"] + by["both"]
            print(f"{length:>8,}" + "".join(
                f"  {_mean(rows, 'actual'):>{wide}.3f}  {_mean(rows, 'claimed'):>7.3f}"
                for wide, rows in zip((15, 15), by.values(), strict=True)), flush=True)
    print(f"\nall of these: claimed {_mean(both, 'claimed'):.3f}, actual "
          f"{_mean(both, 'actual'):.3f}\ntenth of the claim  searches  claimed  actual")
    for tenth in range(10):
        rows = [row for row in both if min(9, int(10 * row.claimed)) == tenth]
        if rows:
            print(f"{tenth / 10:>10.1f} to {tenth / 10 + .1:.1f}  {len(rows):>8}  "
                  f"{_mean(rows, 'claimed'):>7.3f}  {_mean(rows, 'actual'):>6.3f}", flush=True)


def timed(index: Searcher, queries: list[Query], k: int, seconds: float | None) -> None:
    """Seconds of searches as a user makes them, from the query to each stage."""
    print("\ntokens scored  prepared  scanned  first exact  of  each  end  rescored  lower bound")
    settings = settle(Controls(k=k, time_limit=seconds), index.manifest)
    for query in queries:
        begun, at, first = time.monotonic(), {}, 0
        for stage in index.stages([query], settings):
            at.setdefault(stage.name, time.monotonic() - begun)
            if stage.name == "exact" and not first:
                first = stage.done
        assert stage.result is not None
        end, done = time.monotonic() - begun, stage.result.rescored
        print(f"{query.scored:>13}  {at['gradient']:>8.1f}  {at['approximate']:>7.1f}  "
              f"{at.get('exact', end):>11.1f}  {first:>2}  {(end - at['approximate']) / done:>4.2f}"
              f"  {end:>3.0f}  {done:>8}  {stage.result.recall.lower:>11.3f}", flush=True)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("model")
@click.option("--queries", "count", default=45, show_default=True, help="Made of the index.")
@click.option("--asked", "file", type=click.Path(exists=True, path_type=Path),
              help="More queries, a JSON object a line.")
@click.option("-k", default=10, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--together", default=20, show_default=True, help="Queries scored in one pass.")
@click.option("--timed", "some", default=0, show_default=True, help="Searches that are timed.")
@click.option("--time-limit", type=float, help="Of each of these, in seconds.")
@click.option("--kept", type=click.Path(path_type=Path), default=Path("truth.npz"),
              show_default=True, help="Where the truth is kept.")
def main(folder: Path, model: str, count: int, file: Path | None, k: int, seed: int,
         together: int, some: int, time_limit: float | None, kept: Path) -> None:
    """Print a line for each default, what fixed lengths find, and claims by tenths."""
    index = gradindex.open(folder, model=model)
    begun = time.monotonic()
    index.snapshot.load()
    loaded = time.monotonic() - begun
    queries = [*make_queries(index, count, seed), *(asked(index, file) if file else [])]
    print(f"{len(index):,} sequences, {len(queries)} queries, k = {k}, "
          f"K = {index.manifest.code['length']:,}; loaded in {loaded:.1f} s")
    if some:
        timed(index, queries[:: max(1, len(queries) // some)][:some], k, time_limit)
    known = find(index, queries, together, kept)
    defaults(index, known, k)
    fixed(index, known, k)


if __name__ == "__main__":
    main()
