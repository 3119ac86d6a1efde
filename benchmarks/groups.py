"""Is a group's total influence, estimated from codes, as far off as its standard error says?

    python -m benchmarks.groups [--cache .demo/groups]

Trains the demo's model on documents of any length, indexes them, and scores every sequence exactly
on held-out queries. Codes are made from several seeds: only another random projection is another
draw of the error. Estimated totals over documents, modules, kinds, random groups and the whole
index are compared with the exact ones.

First table: the sum of code scores, and two standard errors of it, √Σσ² (as if errors were
independent) and the one in use, which is the code's error for the norm of the summed codes.
Second table: ways to use what was rescored.

    codes        Σ of code scores, nothing else
    exact in     the exact score of what was rescored put in for its code's
    let in       `Shortlist.estimates`, as `gradindex search --group-by` does
    sample       Σ of code scores plus the mean of (exact − code) of the group's random sample
    1/π          Σ of I/π over the shortlist (Horvitz & Thompson 1952)

Last: the same for groups looked at because they came out on top, and for groups of the truly best;
and what reading a grouping costs.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np

import gradindex
from gradindex.demo.library_documents import standard_library_documents
from gradindex.demo.make_demo import prepare
from gradindex.demo.questions import QUERIES
from gradindex.demo.small_model import DemoSettings
from gradindex.influence.codes import Codes, CodeSettings, score_error
from gradindex.influence.exact import Influences, collect
from gradindex.influence.preconditioned import Preconditioned, precondition
from gradindex.influence.split_batches import plan_batches
from gradindex.model.load_errors import quiet_transformers
from gradindex.progress import Progress, stderr_progress
from gradindex.results import Query
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.layout import code_bytes
from gradindex.storage.records import Record
from search.engine import Searcher
from search.rank.grouping import Grouping, chosen_signs, make_grouping, read_grouping
from search.rank.query_gradient import coordinates_of
from search.rank.ranking import CodeRanking
from search.rank.recall import inclusion_probability
from search.rank.shortlist import Shortlist

SEEDS = (0, 1, 2)
COUNT = 32  # queries
BATCH_TOKENS = 2048
SHORTLISTS = (200, 1000)
RANDOM = (10, 100, 1000)  # sizes of random groups
ESTIMATORS = ("codes", "exact in", "let in", "sample", "1/π")
TOP = 10

Pass = dict[str, np.ndarray]


# ---- an index, queries, exact scores and codes


def make_index(cache: Path, progress: Progress) -> Searcher:
    """The demo's model, trained on long documents too, and its index; reused if they are there."""
    prepare(cache, DemoSettings(longest=100_000, steps=1000), progress)
    if not (cache / "index" / "manifest.json").exists():
        gradindex.build(str(cache / "model"), cache / "documents.jsonl", cache / "index",
                        id_field="id", keep_fields=["module", "kind"], fit_sequences=2048,
                        progress=progress)
    return gradindex.open(cache / "index")


def make_queries(searcher: Searcher, cache: Path) -> list[Query]:
    """The demo's, and beginnings of documents that were not trained on, long and short in turn."""
    made = [searcher.make_query(*query) for query in QUERIES]
    with (cache / "documents.jsonl").open() as lines:
        trained = {json.loads(line)["id"] for line in lines}
    texts = [one["text"] for one in standard_library_documents() if one["id"] not in trained]
    np.random.default_rng(0).shuffle(texts)
    for text in texts:
        ids = searcher.snapshot.tokenizer(text).input_ids
        prompt, completion = (64, 32) if len(made) % 2 else (16, 8)
        if len(ids) >= prompt + completion and len(made) < COUNT:
            ids = ids[: prompt + completion]
            made.append(searcher.make_query(token_ids=ids, labels=[-100] * prompt + ids[prompt:]))
    return made


def make_pass(
    searcher: Searcher, queries: list[Query], records: list[Record], path: Path, progress: Progress
) -> Pass:
    """Exact scores [q, n], and of every seed the codes, norms and queries' vectors; kept."""
    if not path.exists():
        np.savez(path.with_suffix(".tmp.npz"), **_pass(searcher, queries, records, progress))
        path.with_suffix(".tmp.npz").rename(path)
    with np.load(path, allow_pickle=False) as kept:
        return dict(kept)


def _pass(
    searcher: Searcher, queries: list[Query], records: list[Record], progress: Progress
) -> Pass:
    facts = searcher.manifest
    made = {seed: Codes(facts.modules, searcher.snapshot.ekfac, CodeSettings(
        facts.code["length"], facts.code["width"], seed, facts.code["damping"]))
        for seed in SEEDS}
    coordinates = coordinates_of(searcher.snapshot, queries, facts.modules, facts.damping,
                                 BATCH_TOKENS)
    p = Preconditioned(precondition(searcher.snapshot.ekfac, coordinates))
    found = {"truth": np.zeros((len(queries), len(records)))}
    for seed, codes in made.items():
        found[f"queries {seed}"] = codes.query_vectors(coordinates).float().numpy()
        found[f"codes {seed}"] = np.zeros((len(records), code_bytes(facts.code["length"])),
                                          np.uint8)
        found[f"norms {seed}"] = np.zeros(len(records))
    progress.start("encode and score", len(records), "sequences")
    for rows in plan_batches([len(record.tokens) for record in records], BATCH_TOKENS):
        vectors = {seed: codes.empty(len(rows)) for seed, codes in made.items()}
        influences = Influences(p)
        batch = searcher.model.batch([records[row] for row in rows])
        collect(searcher.model, facts.modules, batch, influences,
                *(partial(codes.add, vectors[seed]) for seed, codes in made.items()))
        found["truth"][:, rows] = influences.total
        for seed in SEEDS:
            array = vectors[seed].float().numpy()
            found[f"codes {seed}"][rows] = CodeIndex(facts.code["length"]).encode(array)
            found[f"norms {seed}"][rows] = np.linalg.norm(array.astype(np.float64), axis=1)
        progress.update(len(rows))
    progress.finish()
    return found


# ---- groups


def labels_of(records: list[Record]) -> dict[str, np.ndarray]:
    """The number of each sequence's group, by the name of the grouping."""
    keys: dict[str, Callable[[Record], object]] = {
        "document": lambda one: one.parts[0].document,
        "module": lambda one: one.parts[0].fields["module"],
        "kind": lambda one: one.parts[0].fields["kind"],
    }
    found = {}
    for name, key in keys.items():
        numbers: dict[object, int] = {}
        found[name] = np.array([numbers.setdefault(key(one), len(numbers)) for one in records])
    shuffled = np.random.default_rng(0).permutation(len(records))
    found |= {f"random {size:,}": shuffled // size for size in RANDOM}
    return {**found, "whole index": np.zeros(len(records), dtype=np.int64)}


def grouping_of(labels: np.ndarray, codes: CodeIndex, length: int) -> Grouping:
    places = np.arange(len(labels))
    entries = np.stack([labels, places, np.ones(len(labels))]).astype(np.float64)
    return make_grouping(list(range(labels.max() + 1)), entries, *chosen_signs([codes], length))


# ---- estimators


class Draw:
    """The code scores of one query under one seed, and the exact ones."""

    def __init__(self, scores: np.ndarray, truth: np.ndarray, norms: np.ndarray, noise: float):
        self.scores, self.truth = scores, truth
        self.norms, self.noise, self.error = norms, noise, noise * norms

    def shortlist(self, length: int) -> tuple[Shortlist, list[int]]:
        made = Shortlist(CodeRanking(self.scores, self.norms), self.noise, length)
        return made, made.advance(range(len(self.scores)), length)

    def totals(
        self, name: str, grouping: Grouping, length: int, sample: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Estimated totals [G] and their standard errors [G]."""
        estimate, variance = self.scores.copy(), self.error**2
        shortlist, counted = self.shortlist(length)
        if name == "exact in":
            estimate[counted], variance[counted] = self.truth[counted], 0.0
        elif name == "let in":
            estimate, variance = shortlist.estimates(
                self.scores, counted, self.truth[counted], sample, self.truth[sample])
        elif name == "1/π":
            pi = inclusion_probability(self.truth[counted], self.error[counted], shortlist.cutoff)
            estimate = np.zeros(len(self.scores))
            estimate[counted] = self.truth[counted] / pi
        elif name == "sample":
            return self._corrected(grouping, sample)
        return (grouping.total(estimate),
                np.sqrt(grouping.spread * grouping.total(variance, power=2)))

    def _corrected(
        self, grouping: Grouping, sample: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of groups with at least two of the sample; NaN for others."""
        inside, away = np.zeros((2, len(self.scores)))
        inside[sample], away[sample] = 1.0, (self.truth - self.scores)[sample]
        drawn, size = grouping.total(inside), grouping.total(np.ones(len(inside)))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(drawn >= 2, grouping.total(away) / drawn, np.nan)
            spread = (grouping.total(away**2) / drawn - mean**2) * drawn / (drawn - 1)
            return (grouping.total(self.scores) + size * mean,
                    size * np.sqrt(np.maximum(spread, 0) / drawn))


def draws_of(found: Pass, c: float) -> dict[int, list[Draw]]:
    """By seed, a draw of every query."""
    made = {}
    for seed in SEEDS:
        vectors, norms = found[f"queries {seed}"], found[f"norms {seed}"]
        scores = code_index(found, seed).many_scores(vectors).astype(np.float64)
        made[seed] = [
            Draw(own, truth, norms, float(score_error(
                c, float(np.linalg.norm(vector)), np.ones(1), len(vector))[0]))
            for own, truth, vector in zip(scores, found["truth"], vectors, strict=True)]
    return made


def code_index(found: Pass, seed: int) -> CodeIndex:
    made = CodeIndex(found[f"queries {seed}"].shape[1])
    made.add(found[f"codes {seed}"])
    return made


# ---- tables


def within(z: np.ndarray) -> str:
    return f"{np.mean(np.abs(z) < 1):.3f}, {np.mean(np.abs(z) < 2):.3f}"


def print_errors(groupings: dict[tuple[str, int], Grouping], draws: dict[int, list[Draw]]) -> None:
    print("\n| groups of two or more | how many | sequences | spread | √Σσ²: within 1, 2 "
          "| sd of z | norm of the sum: within 1, 2 | sd of z |\n" + "|---" * 8 + "|")
    for name in dict.fromkeys(name for name, _ in groupings):
        apart, together = [], []
        for seed, own in draws.items():
            grouping = groupings[name, seed]
            size = grouping.total(np.ones(len(own[0].scores)))
            large = size > 1
            for draw in own:
                error = grouping.total(draw.scores - draw.truth)[large]
                z = error / np.sqrt(grouping.total(draw.error**2, power=2))[large]
                apart.append(z)
                together.append(z / np.sqrt(grouping.spread[large]))
        one, other = np.concatenate(apart), np.concatenate(together)
        spread = grouping.spread[large]
        print(f"| {name} | {large.sum():,} | {size[large].min():,.0f} to {size.max():,.0f} | "
              f"{spread.min():.2f} to {spread.max():.2f} | {within(one)} | {one.std():.2f} | "
              f"{within(other)} | {other.std():.2f} |", flush=True)


def print_estimators(
    groupings: dict[tuple[str, int], Grouping], draws: dict[int, list[Draw]], sample: list[int],
    length: int, chosen: Callable[[Grouping, Draw, np.ndarray], np.ndarray], names: list[str],
    estimators: tuple[str, ...],
) -> None:
    """Mean error / root mean square error, in √Σσ² of the codes; then within 1 and 2."""
    print("\n| groups | " + " | ".join(estimators) + " |\n|---" + "|---" * len(estimators) + "|")
    for name in names:
        cells = []
        for estimator in estimators:
            errors, zs = [], []
            for seed, own in draws.items():
                grouping = groupings[name, seed]
                for draw in own:
                    totals, error = draw.totals(estimator, grouping, length, sample)
                    here = chosen(grouping, draw, totals)
                    here = here[np.isfinite(totals[here]) & (error[here] > 0)]
                    away = (totals - grouping.total(draw.truth))[here]
                    zs.append(away / error[here])
                    errors.append(away / np.sqrt(grouping.total(draw.error**2, power=2))[here])
            away = np.concatenate(errors)
            cells.append("–" if not len(away) else
                         f"{away.mean():+.2f} / {np.sqrt(np.mean(away**2)):.2f}; "
                         f"{within(np.concatenate(zs))}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def all_large(grouping: Grouping, draw: Draw, totals: np.ndarray) -> np.ndarray:
    return np.flatnonzero(grouping.total(np.ones(len(draw.scores))) > 1)


def on_top(grouping: Grouping, draw: Draw, totals: np.ndarray) -> np.ndarray:
    """The groups of largest positive total: those of large errors are likelier to be among them."""
    return np.argsort(-totals)[:TOP]


def of_hits(grouping: Grouping, draw: Draw, totals: np.ndarray) -> np.ndarray:
    """The groups of the TOP sequences with most influence."""
    return np.unique(grouping.group[np.isin(grouping.place, np.argsort(-draw.truth)[:TOP])])


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/groups"),
              show_default=True)
def main(cache: Path) -> None:
    """Train, index, score exactly, print tables."""
    quiet_transformers()
    progress = stderr_progress()
    searcher = make_index(cache, progress)
    queries = make_queries(searcher, cache)
    records = searcher.snapshot.records(range(len(searcher)))
    found = make_pass(searcher, queries, records, cache / "groups.npz", progress)
    c, length = searcher.manifest.calibration["c"], searcher.manifest.code["length"]
    draws = draws_of(found, c)
    sample = searcher.snapshot.random_sample()
    groupings = {(name, seed): grouping_of(labels, code_index(found, seed), length)
                 for name, labels in labels_of(records).items() for seed in SEEDS}
    print(f"{len(searcher):,} sequences, K = {length:,}, c = {c}, {len(queries)} queries, "
          f"{len(SEEDS)} seeds")
    print_errors(groupings, draws)
    names = list(dict.fromkeys(name for name, _ in groupings))
    for most in SHORTLISTS:
        print(f"\nShortlist of {most:,}. Mean error / root mean square error, in √Σσ²; share "
              "within 1 and 2 standard errors")
        print_estimators(groupings, draws, sample, most, all_large, names, ESTIMATORS)
    for what, chosen in ((f"The {TOP} groups of most positive estimated total", on_top),
                         (f"The groups of the {TOP} most influential sequences", of_hits)):
        print(f"\n{what}, shortlist of {SHORTLISTS[-1]:,}")
        print_estimators(groupings, draws, sample, SHORTLISTS[-1], chosen,
                         ["document", "module"], ("codes", "let in"))
    print()
    for by in ("module", "document"):
        begun = time.process_time()
        read_grouping(searcher.snapshot.contents, searcher.snapshot.segments(), by)
        each = (time.process_time() - begun) / len(searcher)
        print(f"reading a grouping by {by}: {1e5 * each:.1f} CPU seconds per 100,000 sequences")


if __name__ == "__main__":
    main()
