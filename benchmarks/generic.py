r"""Does the generic rate by code flag what the exact influence would, and what does it cost?

    python benchmarks/generic.py --sequences 4096 --layers 2 --hidden 128 --steps 500 \
        --fit-sequences 1024

Builds an index of a small GPT-NeoX's training sequences, scores its background queries exactly
against every sequence, and counts by the same rule: the rate of a sequence is the share of the
background queries for which it is among the highest (lowest) hundredth. Then: how often held-out
queries answer with a flagged sequence; the rates of odd sequences that are appended; and the share
of the build's time and bytes. A finished index in the cache is taken with the seconds noted there.
"""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from benchmarks.fidelity import coordinates_of, options
from benchmarks.workload import Size, Workload, make_workload
from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Preconditioned, precondition
from gradindex.progress import Progress, duration, stderr_progress
from gradindex.results import GENERIC
from gradindex.storage.background_file import BackgroundQueries, thresholds
from indexer.background_queries import make_background_queries
from indexer.read.ingest import Run
from search.engine import Searcher
from search.rank.generic_rate import all_rates
from search.rank.snapshot import Snapshot

TOP = 10  # hits of a held-out query
ODD = 16  # odd sequences of each kind


@click.command()
@options
@click.option("--queries", type=int, default=64, show_default=True, help="Held out.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
def main(queries: int, cache: Path, **size: object) -> None:
    """Build, score exactly, compare rates, print."""
    begun = time.monotonic()
    progress = stderr_progress()
    work = make_workload(cache, Size(**size), queries, progress)  # type: ignore[arg-type]
    searcher, seconds, own = build(work)
    snapshot = searcher.snapshot
    background = snapshot.tables.background_queries
    assert background is not None
    print(f"{work.summary()}\nK = {searcher.manifest.code['length']:,}, {len(background)} "
          f"background queries\n")

    records = snapshot.records(range(len(snapshot)))
    here = replace(work, model=snapshot.model, ekfac=snapshot.ekfac)
    as_query = snapshot.model.objective.as_query
    halves = [as_query(record)
              for record in snapshot.contents.records(background.ids)]
    damping = snapshot.manifest.damping
    asked = [coordinates_of(here, some, damping) for some in (halves, work.queries)]
    together = Preconditioned.join([Preconditioned(precondition(snapshot.ekfac, one))
                                    for one in asked])
    exact = exact_scores(snapshot.model, searcher.manifest.modules, together, records,
                         searcher.manifest.batch_tokens)
    truth = exact_rates(background, exact[: len(background)], snapshot.contents.rows["digest"])
    found = all_rates(snapshot)
    assert found is not None
    for side, name in enumerate(("proponents", "opponents")):
        compare(name, found[side], truth[side])
    answers(exact[len(background):], found, truth)
    planted(work, snapshot, together, exact[: len(background)])
    size_of = (snapshot.path / "background.safetensors").stat().st_size
    total = sum(one.size for one in searcher.manifest.files.values())
    print(f"\nbuild {duration(seconds)} ({seconds:.1f} s), of which background queries {own:.1f} s "
          f"({own / seconds:.1%}); {size_of:,} of {total:,} bytes ({size_of / total:.1%})")
    print(f"total {duration(time.monotonic() - begun)}")


def build(work: Workload) -> tuple[Searcher, float, float]:
    """An index of the training sequences, and seconds of its build and of the background queries.

    The latter are made a second time, which gives the same.
    """
    out, data = work.folder / "generic.index", work.folder / "generic.npy"
    noted = work.folder / "generic.seconds"
    np.save(data, np.stack([one.tokens for one in work.train]), allow_pickle=False)
    begun = time.monotonic()
    searcher = gradindex.build(str(work.folder / "model"), data, out, progress=stderr_progress(),
                               fit_sequences=work.size.fit_sequences)
    if not noted.is_file():
        noted.write_text(str(time.monotonic() - begun))
    seconds = float(noted.read_text())
    snapshot, facts = searcher.snapshot, searcher.manifest
    run = Run(out, 0, 0, len(snapshot), facts.plan.segment_size)
    _ = snapshot.codes, snapshot.tables.background_queries
    begun = time.monotonic()
    again, _ = make_background_queries(
        snapshot.model, snapshot.codes, snapshot.ekfac, run.records,
        lambda ids: run.coded(ids, facts.code["length"]), list(range(len(snapshot))),
        facts.batch_tokens, Progress())
    own = time.monotonic() - begun
    assert snapshot.tables.background_queries is not None
    assert np.array_equal(again.vectors, snapshot.tables.background_queries.vectors)
    return searcher, seconds, own


def planted(
    work: Workload, snapshot: Snapshot, queries: Preconditioned, exact: np.ndarray
) -> None:
    """The rates of odd sequences, appended to a copy of the index: by code, and exactly."""
    background, folder = snapshot.tables.background_queries, work.folder / "planted.index"
    assert background is not None
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(snapshot.path, folder)
    draw, length = np.random.default_rng(2), work.size.length
    vocabulary = snapshot.manifest.vocabulary
    kinds = {
        "random tokens": draw.integers(0, vocabulary, (ODD, length)),
        "one token, again and again": np.repeat(draw.integers(0, vocabulary, (ODD, 1)), length, 1),
        "training sequences, shuffled": np.stack([
            draw.permutation(one.tokens) for one in work.train[:ODD]]),
    }
    data = work.folder / "planted.npy"
    np.save(data, np.concatenate(list(kinds.values())).astype(np.int32), allow_pickle=False)
    grown = gradindex.append(folder, data, model=str(work.folder / "model"))
    assert grown is not None
    found, before = all_rates(grown.snapshot), exact.shape[1]
    assert found is not None
    odd = grown.snapshot.records(range(before, len(grown)))
    scores = exact_scores(snapshot.model, snapshot.manifest.modules, queries, odd, 4096)
    digests = grown.snapshot.contents.rows["digest"]
    truth = exact_rates(background, np.concatenate([exact, scores[: len(exact)]], 1), digests)
    norms = grown.snapshot.norms / np.median(snapshot.norms)
    for number, name in enumerate(kinds):
        here = slice(before + number * ODD, before + (number + 1) * ODD)
        shown = [f"{sides[side, here].mean():.2f} ({(sides[side, here] >= GENERIC).sum()} of {ODD})"
                 for side in (0, 1) for sides in (found, truth)]
        both = ((found >= GENERIC) & (truth >= GENERIC))[:, here].sum(1)
        print(f"appended, {name}: ‖v‖ {norms[here].mean():.1f} times the median; mean rate "
              f"(flagged) as proponents {shown[0]} by code, {shown[1]} exactly, {both[0]} by both; "
              f"as opponents {shown[2]}, {shown[3]}, {both[1]}")


def exact_rates(
    background: BackgroundQueries, scores: np.ndarray, digests: np.ndarray
) -> np.ndarray:
    """The rates that exact scores [q, n] give, by the rule of the code's: [2, n]."""
    counts = (background.digests[:, None] != digests[None]).any(2)
    bounds = [thresholds(row[own]) for row, own in zip(scores, counts, strict=True)]
    upper, lower = np.array(bounds).T[..., None]
    reached = np.stack([(scores >= upper) & counts, (scores <= lower) & counts])
    return reached.sum(1) / counts.sum(0)


def compare(name: str, found: np.ndarray, truth: np.ndarray) -> None:
    """Both rates of every sequence, one line each."""
    print(f"{name}: rate by code / by exact influence, mean {found.mean():.4f} / "
          f"{truth.mean():.4f}, median {np.median(found):.3f} / {np.median(truth):.3f}, largest "
          f"{found.max():.3f} / {truth.max():.3f}; correlation "
          f"{np.corrcoef(found, truth)[0, 1]:.3f}")
    for least in (0.05, 0.1, GENERIC, 0.5):
        one, other = found >= least, truth >= least
        print(f"  rate from {least} on: {one.sum()} by code, {other.sum()} exactly, "
              f"{(one & other).sum()} by both of {len(found):,}")


def answers(scores: np.ndarray, found: np.ndarray, truth: np.ndarray) -> None:
    """How many of the top hits of held-out queries are flagged."""
    for side, sign in enumerate((1, -1)):
        top = np.argsort(-sign * scores, axis=1)[:, :TOP]
        name = ("proponents", "opponents")[side]
        print(f"{name} of {len(scores)} held-out queries, exact top {TOP}: flagged by code "
              f"{(found[side][top] >= GENERIC).mean():.1%}, exactly "
              f"{(truth[side][top] >= GENERIC).mean():.1%}; the most frequent is in "
              f"{np.bincount(top.ravel()).max()} answers, with a rate of "
              f"{found[side][np.bincount(top.ravel()).argmax()]:.3f}")


if __name__ == "__main__":
    main()
