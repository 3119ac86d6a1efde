"""Does a shortlist by code hold the sequences with the most exact influence?

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py --controls
    python benchmarks/fidelity.py --model MODEL --data DATA --rows 2048 --length 64

Trains a small GPT-NeoX on Python sources, scores held-out queries exactly (EK-FAC) against every
training sequence, and compares shortlists: codes of several lengths K, the eigen-coordinates with
the largest Λ, and the TF-IDF filter of Grosse et al. 2023 (§3.2). r10@100 is the share of the true
top 10 in a shortlist of 100. Then: the recall statement, claimed against actual. With --controls,
the same for every control of a search: damping, layers, normalisation, two completions, opponents,
short completions, at one K. With --model: recall, and claimed against actual, of a model of yours
and rows of its data, whatever its task.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.task_shortlists import print_shortlists
from benchmarks.workload import PROMPT, Size, Workload, fit_on, make_workload
from gradindex.draws import Stream, choose
from gradindex.influence.codes import (
    RECIPES,
    Codes,
    CodeSettings,
    default_length,
    score_error,
)
from gradindex.influence.curvature import Ekfac
from gradindex.influence.exact import Influences, collect, exact_scores
from gradindex.influence.gradients import apply_inputs, backward
from gradindex.influence.preconditioned import (
    Gradients,
    Preconditioned,
    precondition,
    query_coordinates,
)
from gradindex.influence.split_batches import plan_batches
from gradindex.memory import Allowance
from gradindex.modules import Module
from gradindex.progress import Progress, duration, stderr_progress
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.layout import code_bytes
from gradindex.storage.records import Record
from indexer.calibrate import calibrate, score_pairs
from search.ask.settings import SMALLEST_SHORTLIST
from search.rank.ranking import CodeRanking
from search.rank.shortlist import Shortlist, Statement, longer

LENGTHS = (4096, 8192, 16384, 32768, 65536)
COORDINATES = (4096, 16384, 65536)
SHORTLISTS = ((10, 100), (10, 1000), (100, 1000))  # k, shortlist
BINNED = [(k, length) for k in (10, 100) for length in (20, 50, 100, 200, 500, 1000, 2000)
          if length > k]  # whose claims are put in bins
DAMPINGS = (0.001, 0.01, 1.0, 10.0)
GOAL = 0.95
FIT_SAMPLE = 4096  # sequences that curvatures are compared on
PART = 2048  # sequences whose codes and scores are kept together


@dataclass
class Control:
    """One way to search: C of every query, the modules left, the sign, what is ranked by."""

    name: str
    coordinates: Gradients
    layers: set[int] | None = None
    sign: float = 1.0
    normalize: str = "none"
    truth: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # [q, n]

    def part(self, modules: list[Module]) -> Gradients:
        return {m.name: self.coordinates[m.name] for m in modules
                if self.layers is None or m.layer in self.layers}


class Baseline:
    """The coordinates of largest Λ/(Λ+λ) in the eigenbasis, half-whitened, in float16."""

    def __init__(self, modules: list[Module], ekfac: Ekfac, count: int, rows: int):
        weight = torch.cat([
            (ekfac[m.name].eigenvalues / ekfac[m.name].damped(0.1)).flatten() for m in modules
        ])
        chosen = torch.topk(weight, min(count, len(weight))).indices
        self.order = {}  # by module: places in the vector, places in the module
        start = 0
        for m in modules:
            size = ekfac[m.name].eigenvalues.numel()
            here = ((chosen >= start) & (chosen < start + size)).nonzero()[:, 0]
            self.order[m.name] = (here, chosen[here] - start)
            start += size
        self.ekfac = ekfac
        self.stored = torch.zeros(rows, len(chosen), dtype=torch.float16)

    def _root(self, name: str, here: torch.Tensor) -> torch.Tensor:
        return self.ekfac[name].damped(0.1).flatten()[here].sqrt()

    def add(self, rows: list[int], module: Module, rotated: torch.Tensor) -> None:
        there, here = self.order[module.name]
        values = rotated.flatten(1)[:, here] / self._root(module.name, here)
        self.stored[torch.tensor(rows)[:, None], there] = values.half()

    def scores(self, coordinates: Gradients, count: int) -> np.ndarray:
        """[q, n] from the `count` heaviest coordinates."""
        queries = len(next(iter(coordinates.values())))
        vectors = torch.zeros(queries, self.stored.shape[1])
        for name, (there, here) in self.order.items():
            vectors[:, there] = coordinates[name].flatten(1)[:, here] * self._root(name, here)
        parts = [vectors[:, :count] @ part[:, :count].float().T for part in self.stored.split(512)]
        return torch.cat(parts, dim=1).numpy()


def tfidf_scores(work: Workload) -> np.ndarray:
    """Σ of the IDF of the completion's tokens that a sequence holds (§3.2), plainly: [q, n]."""
    vocabulary = work.model.network.config.vocab_size
    holds = np.zeros((len(work.train), vocabulary), dtype=bool)
    for row, record in enumerate(work.train):
        holds[row, record.tokens] = True
    count = holds.sum(0)
    idf = np.log((len(work.train) - count + 0.5) / (count + 0.5) + 1)
    scores = np.zeros((len(work.queries), len(work.train)))
    for row, record in enumerate(work.queries):
        tokens = record.tokens[record.scored]
        scores[row] = holds[:, tokens] @ idf[tokens]
    return scores


# ---- queries


def coordinates_of(work: Workload, records: list[Record], damping: float) -> Gradients:
    """C [q, o, i] of queries."""
    parts = []
    for first in range(0, len(records), 8):
        some = records[first : first + 8]
        with torch.no_grad():
            c, _ = query_coordinates(work.model, work.modules, work.ekfac,
                                     work.model.batch(some), damping)
        parts.append(c)
    return {m.name: torch.cat([part[m.name] for part in parts]) for m in work.modules}


def controls_of(work: Workload, every: bool) -> list[Control]:
    """The plain search and its opponents, and with `every` all other ways to ask."""
    plain = coordinates_of(work, work.queries, 0.1)
    top = max(m.layer for m in work.modules) + 1
    found = [Control("plain", plain), Control("opponents", plain, sign=-1.0)]
    if not every:
        return found
    found += [Control("cosine", plain, normalize="cosine"),
              Control("relatif", plain, normalize="relatif")]
    found += [Control(f"damping {damping:g}", coordinates_of(work, work.queries, damping))
              for damping in DAMPINGS]
    third = [set(range(round(n * top / 3), round((n + 1) * top / 3))) for n in range(3)]
    for name, layers in (("lower third", third[0]), ("middle third", third[1]),
                         ("upper third", third[2]), ("one layer", {top // 2})):
        shown = ",".join(map(str, sorted(layers)))
        found.append(Control(f"{name} (layer {shown} of {top})", plain, layers))
    others = [replace(one, tokens=np.concatenate([one.tokens[:PROMPT], other.tokens[PROMPT:]]))
              for one, other in zip(work.queries, work.queries[1:] + work.queries[:1], strict=True)]
    against = coordinates_of(work, others, 0.1)
    found.append(Control("versus", {name: plain[name] - c for name, c in against.items()}))
    for count in (1, 5):
        end = PROMPT + count
        short = [replace(one, tokens=one.tokens[:end], scored=one.scored[:end])
                 for one in work.queries]
        found.append(Control(f"completion of {count}", coordinates_of(work, short, 0.1)))
    return found


# ---- one pass


@dataclass
class Pass:
    """What one forward and backward pass of every sequence gave."""

    indexes: dict[int, CodeIndex]
    norms: dict[int, np.ndarray]
    self_influence: np.ndarray
    squared_step: np.ndarray
    baseline: Baseline | None


def one_pass(
    work: Workload, codes: dict[int, Codes], controls: list[Control], baseline: Baseline | None,
    progress: Progress,
) -> Pass:
    """Codes, norms, sizes, and exact scores for every control (into its `truth`).

    Gradients are rotated into the eigenbasis, which serves everything at once; where only the plain
    search is asked for, the cheaper product with P_u does.
    """
    if baseline is None and len(controls) == 2:
        return _plain_pass(work, codes, controls, progress)
    n = len(work.train)
    stored = {k: np.zeros((n, code_bytes(k)), np.uint8) for k in codes}
    result = Pass({k: CodeIndex(k) for k in codes}, {k: np.zeros(n) for k in codes}, np.zeros(n),
                  np.zeros(n), baseline)
    distinct = {id(one.coordinates): one.coordinates for one in controls}
    flat = {key: {name: c.flatten(1) for name, c in own.items()} for key, own in distinct.items()}
    layers = sorted({m.layer for m in work.modules})
    queries = len(work.queries)
    truth = {key: np.zeros((len(layers), queries, n), np.float32) for key in distinct}
    progress.start("encode and score", n, "sequences")
    for rows in plan_batches([len(record.tokens) for record in work.train],
                             2048 if work.size.length <= 128 else 4096):
        vectors = {k: one.empty(len(rows)) for k, one in codes.items()}

        def each(module: Module, a: torch.Tensor, d: torch.Tensor) -> None:
            for k, one in codes.items():
                one.add(vectors[k], module, a, d)  # noqa: B023
            c = work.ekfac[module.name]
            wide = c.eigenvalues.dtype
            rotated_a = apply_inputs(a.to(wide), c.eigenvectors_a.T, module.bias)
            rotated = (d.to(wide) @ c.eigenvectors_s).transpose(1, 2) @ rotated_a
            if baseline is not None:
                baseline.add(rows, module, rotated)  # noqa: B023
            place = layers.index(module.layer)
            for key, own in flat.items():
                truth[key][place][:, rows] += (own[module.name] @ rotated.flatten(1).T).numpy()  # noqa: B023
            part = rotated.square().div_(c.damped(0.1))
            result.self_influence[rows] += part.sum((1, 2)).double().numpy()  # noqa: B023
            part.div_(c.damped(0.1))
            result.squared_step[rows] += part.sum((1, 2)).double().numpy()  # noqa: B023

        members = [work.train[row] for row in rows]
        with torch.no_grad():
            backward(work.model, work.modules, work.model.batch(members), each)
        for k in codes:
            array = vectors[k].float().numpy()
            stored[k][rows] = result.indexes[k].encode(array)
            result.norms[k][rows] = np.linalg.norm(array.astype(np.float64), axis=1)
        progress.update(len(rows))
    progress.finish()
    for k, index in result.indexes.items():
        index.add(stored[k])
    for one in controls:
        kept = [place for place, layer in enumerate(layers)
                if one.layers is None or layer in one.layers]
        one.truth = truth[id(one.coordinates)][kept].sum(0, dtype=np.float64)
    return result


def _plain_pass(
    work: Workload, codes: dict[int, Codes], controls: list[Control], progress: Progress
) -> Pass:
    """Part after part, each kept in the cache, so that a killed run goes on."""
    n = len(work.train)
    p = Preconditioned(precondition(work.ekfac, controls[0].coordinates))
    result = Pass({k: CodeIndex(k) for k in codes}, {k: np.zeros(n) for k in codes}, np.ones(n),
                  np.ones(n), None)
    truth = np.zeros((len(work.queries), n))
    asked = "-".join(map(str, [work.size.modules, work.size.dtype, len(work.queries), *codes]))
    progress.start("encode and score", n, "sequences")
    for first in range(0, n, PART):
        rows = range(first, min(first + PART, n))
        path = work.folder / f"pass-{asked}-{first}.npz"
        if not path.exists():
            np.savez(path.with_suffix(".tmp.npz"), **_part(work, codes, p, rows))
            path.with_suffix(".tmp.npz").rename(path)
        with np.load(path, allow_pickle=False) as part:
            for k in codes:
                result.indexes[k].add(part[f"codes {k}"])
                result.norms[k][rows] = part[f"norms {k}"]
            truth[:, rows] = part["truth"]
        progress.update(len(rows))
    progress.finish()
    for one in controls:
        one.truth = truth
    return result


def _part(
    work: Workload, codes: dict[int, Codes], p: Preconditioned, rows: range
) -> dict[str, np.ndarray]:
    """Codes, norms and exact scores of some sequences."""
    some = [work.train[row] for row in rows]
    truth = np.zeros((len(p), len(rows)))
    stored = {k: np.zeros((len(rows), code_bytes(k)), np.uint8) for k in codes}
    norms = {k: np.zeros(len(rows)) for k in codes}
    for here in plan_batches([len(record.tokens) for record in some], 4096):
        vectors = {k: one.empty(len(here)) for k, one in codes.items()}
        influences = Influences(p)
        batch = work.model.batch([some[row] for row in here])
        collect(work.model, work.modules, batch, influences,
                *(partial(one.add, vectors[k]) for k, one in codes.items()))
        for k in codes:
            array = vectors[k].float().numpy()
            stored[k][here] = CodeIndex(k).encode(array)
            norms[k][here] = np.linalg.norm(array.astype(np.float64), axis=1)
        truth[:, here] = influences.total
    return {"truth": truth, **{f"codes {k}": stored[k] for k in codes},
            **{f"norms {k}": norms[k] for k in codes}}


# ---- what a shortlist holds, and what is claimed of it


def shortlist_recall(truth: np.ndarray, scores: np.ndarray, k: int, length: int) -> np.ndarray:
    """Share of each query's true top k among its `length` best by score: [q]."""
    best = np.argsort(-truth, axis=1, kind="stable")[:, :k]
    found = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    return np.array([len(set(b) & set(f)) / k for b, f in zip(best, found, strict=True)])


class Asked:
    """One query under one control: the truth, and the shortlist as a search would make it."""

    def __init__(
        self, control: Control, query: int, scores: np.ndarray, noise: float, norms: np.ndarray,
        sizes: Pass,
    ):
        n = len(scores)
        self.error = noise * norms
        self.influence = control.sign * control.truth[query]
        squared = {"none": np.ones(n), "cosine": sizes.self_influence,
                   "relatif": sizes.squared_step}[control.normalize]
        self.value = self.influence / np.sqrt(squared)
        self.order = np.argsort(-self.value, kind="stable")
        self.shortlist = Shortlist(
            CodeRanking(scores, norms, control.sign, control.normalize != "none"), noise, n)
        places = np.empty(n, dtype=np.int64)
        places[self.shortlist.places(n)] = np.arange(n)
        self.code_place = places  # of every sequence in the order by code

    def actual(self, k: int, length: int) -> float:
        return float((self.code_place[self.order[:k]] < length).mean())

    def claimed(self, k: int, length: int) -> tuple[float, list[int], Statement | None]:
        """The statement, the rescored, best first, and all of the statement (None: complete)."""
        found = self.shortlist.advance(range(len(self.value)), min(length, len(self.value)))
        ranked = sorted(found, key=lambda one: (-self.value[one], one))
        if self.shortlist.cutoff is None:
            return 1.0, ranked, None
        made = self.shortlist.statement(ranked, self.influence[ranked], k, [], np.zeros(0))
        return made.estimate, ranked, made

    def until(self, goal: float, k: int, most: int) -> tuple[float, float, int]:
        """`--recall goal`: claimed, actual and the length it ended with."""
        length = min(most, max(SMALLEST_SHORTLIST, 2 * k))
        while True:
            claim, ranked, made = self.claimed(k, length)
            if made is None or made.lower >= goal or length >= most:
                return claim, self.actual(k, length), length
            expected = self.shortlist.length_for(goal, ranked, self.influence[ranked], k, made)
            length = min(most, longer(length, expected))


def asked_of(
    control: Control, work: Workload, codes: Codes, found: Pass, c: float
) -> list[Asked]:
    """Every query under one control, from the stored codes."""
    length = codes.settings.length
    vectors = codes.query_vectors(control.part(work.modules)).numpy()
    scores = found.indexes[length].many_scores(vectors).astype(np.float64)
    norms = found.norms[length]
    noise = [float(score_error(c, float(np.linalg.norm(vector)), np.ones(1), length)[0])
             for vector in vectors]
    return [Asked(control, query, scores[query], noise[query], norms, found)
            for query in range(len(vectors))]


def needed_shortlist(asked: list[Asked], k: int = 10) -> int:
    """The shortest length whose mean recall of the top k reaches the goal."""
    places = np.sort(np.concatenate([one.code_place[one.order[:k]] for one in asked]))
    return int(places[int(np.ceil(GOAL * len(places))) - 1]) + 1


def control_row(name: str, asked: list[Asked], most: int) -> tuple[str, str, dict[str, float]]:
    """A row of the first table and of the table of bins, and the numbers."""
    recalls = {f"r{k}@{length}": float(np.mean([one.actual(k, length) for one in asked]))
               for k, length in ((10, 100), (100, 1000))}
    needed = needed_shortlist(asked)
    pairs = np.array([(one.claimed(k, length)[0], one.actual(k, length))
                      for one in asked for k, length in BINNED])
    gap = float(np.mean(pairs[:, 0] - pairs[:, 1]))
    each = float(np.mean(np.abs(pairs[:, 0] - pairs[:, 1])))
    grown = np.array([one.until(GOAL, 10, most) for one in asked])
    row = (f"| {name} | {recalls['r10@100']:.3f} | {recalls['r100@1000']:.3f} | {needed:,} | "
           f"{gap:+.3f} | {each:.3f} | {grown[:, 0].mean():.3f} | {grown[:, 1].mean():.3f} | "
           f"{int(np.median(grown[:, 2])):,} |")
    bins = []
    for low in np.arange(10) / 10:
        here = pairs[(pairs[:, 0] >= low) & (pairs[:, 0] < low + 0.1 + (low > 0.85))]
        bins.append(f"{here[:, 0].mean():.2f}→{here[:, 1].mean():.2f} ({len(here)})"
                    if len(here) else "–")
    numbers = {**recalls, "needed": needed, "gap": gap, "each": each,
               "grown_claimed": float(grown[:, 0].mean()),
               "grown_actual": float(grown[:, 1].mean()), "grown": float(np.median(grown[:, 2]))}
    return row, f"| {name} | " + " | ".join(bins) + " |", numbers


def print_controls(
    work: Workload, controls: list[Control], codes: Codes, found: Pass, c: float
) -> dict[str, dict[str, float]]:
    length = codes.settings.length
    print(f"\nK = {length:,}, c = {c}. Shortlist for .95: that mean r10 needs. Claimed − actual "
          "and its size per query: over k = 10, 100 and shortlists of 20 to 2,000. Then --recall "
          f"{GOAL} -k 10: claimed, actual, median length.\n")
    print("| search | r10@100 | r100@1000 | shortlist for .95 | claimed − actual | per query | "
          "--recall claimed | actual | rescored |\n" + "|---" * 9 + "|")
    most = min(len(work.train), 10_000)
    numbers, lines = {}, []
    for control in controls:
        row, bins, numbers[control.name] = control_row(
            control.name, asked_of(control, work, codes, found, c), most)
        print(row, flush=True)
        lines.append(bins)
    print("\nMean claim → mean truth (how many) by the claim:\n\n| search | "
          + " | ".join(f".{n}" for n in range(10)) + " |\n" + "|---" * 11 + "|")
    print("\n".join(lines))
    return numbers


# ---- how many sequences the curvature needs


def print_fits(work: Workload, counts: tuple[int, ...], progress: Progress) -> None:
    """Agreement of exact scores under curvatures fitted on more or fewer sequences."""
    sample = [work.train[n] for n in choose(Stream.FIT_SEQUENCES, 5, len(work.train), FIT_SAMPLE)]
    scores = {}
    for count in sorted({*counts, work.size.fit_sequences}):
        ekfac = fit_on(work.folder, work.model, work.modules, work.train, count, progress)
        c = coordinates_of(replace(work, ekfac=ekfac), work.queries, 0.1)
        scores[count] = exact_scores(work.model, work.modules,
                                     Preconditioned(precondition(ekfac, c)), sample, 4096)
    most = max(scores)
    print(f"\nCurvature fitted on fewer sequences, against {most:,}: scores of {len(sample):,} "
          "random sequences, means over queries\n\n| fitted on | Spearman | top 10 shared | "
          "top 100 shared |\n|---|---|---|---|")
    for count, found in scores.items():
        ranks = [np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]
                 for a, b in zip(found, scores[most], strict=True)]
        shared = [shortlist_recall(scores[most], found, k, k).mean() for k in (10, 100)]
        print(f"| {count:,} | {np.mean(ranks):.3f} | {shared[0]:.2f} | {shared[1]:.2f} |")


# ---- the whole


def print_statement(
    work: Workload, plain: Control, codes: Codes, found: Pass, c: float
) -> dict[str, float]:
    """The code's error on these queries, and claims against truth."""
    asked = asked_of(plain, work, codes, found, c)
    error = np.stack([one.error for one in asked]) / c
    scores = np.stack([one.shortlist.ranking.scores() for one in asked])
    z, unit = (scores - plain.truth) / error, plain.truth / error
    slope = 1 + float((z * unit).sum() / (unit**2).sum())
    print(f"\nK = {codes.settings.length:,}: c = {c} calibrated, {z.std():.3f} on these queries; "
          f"slope {slope:.3f}; kurtosis of the error "
          f"{float((z**4).mean() / (z**2).mean() ** 2):.2f}")
    for k, length in SHORTLISTS:
        claim = np.array([one.claimed(k, length)[0] for one in asked])
        actual = np.array([one.actual(k, length) for one in asked])
        print(f"  r{k}@{length}: claimed {claim.mean():.3f}, actual {actual.mean():.3f}, "
              f"difference {claim.mean() - actual.mean():+.3f}, per query "
              f"{np.abs(claim - actual).mean():.3f}")
    return {"c": c, "c_here": float(z.std()), "slope": slope}


def options(function: Callable[..., None]) -> Callable[..., None]:
    """The flags of Size."""
    for name, value in reversed(asdict(Size()).items()):
        function = click.option("--" + name.replace("_", "-"), default=value,
                                show_default=True)(function)
    return function


@click.command()
@options
@click.option("--queries", type=int, default=64, show_default=True)
@click.option("--bits", multiple=True, type=int, default=LENGTHS, show_default=True)
@click.option("--controls/--no-controls", default=False,
              help="Every control, at the default K if it is among bits.")
@click.option("--fits", multiple=True, type=int, help="Also compare curvatures fitted on so many.")
@click.option("--baselines/--no-baselines", default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Numbers as JSON.")
@click.option("--model", help="A trained model in place of one that is trained here.")
@click.option("--data", help="Its data, of which rows are drawn.")
@click.option("--task", help="What it was trained for [as its class tells].")
@click.option("--modules", help="Which of its maps [as a build chooses].")
@click.option("--recipe", "recipes", multiple=True, type=int, default=RECIPES[-1:],
              show_default=True, help="How its codes are made; 2 is as before.")
@click.option("--rows", type=int, default=2048, show_default=True, help="So many are indexed.")
def main(queries: int, bits: tuple[int, ...], controls: bool, fits: tuple[int, ...],
         baselines: bool, cache: Path, save: Path | None, model: str | None, data: str | None,
         task: str | None, modules: str | None, recipes: tuple[int, ...], rows: int,
         **size: object) -> None:
    """Train, score exactly, compare shortlists, print tables."""
    begun = time.monotonic()
    progress = stderr_progress()
    if model is not None and data is not None:
        length = Size(**size).length  # type: ignore[arg-type]
        for k, recipe in product(bits, recipes):
            print_shortlists(
                model, data, task, modules, rows, queries, length, k, recipe, progress)
        return
    work = make_workload(cache, Size(**size), queries, progress)  # type: ignore[arg-type]
    codes = {k: Codes(work.modules, work.ekfac,
                      CodeSettings.of(k, work.modules, 0, 0.1)) for k in bits}
    asked = controls_of(work, controls)
    baseline = Baseline(work.modules, work.ekfac, max(COORDINATES), len(work.train)) \
        if baselines else None
    found = one_pass(work, codes, asked, baseline, progress)
    plain = asked[0]

    print(f"{work.summary()}\n")
    print("| stored per sequence | bytes | r10@100 | r10@1000 | r100@1000 |\n|---|---|---|---|---|")

    def row(name: str, size: str, scores: np.ndarray) -> list[float]:
        shares = [float(shortlist_recall(plain.truth, scores, k, n).mean()) for k, n in SHORTLISTS]
        print(f"| {name} | {size} | " + " | ".join(f"{share:.3f}" for share in shares) + " |",
              flush=True)
        return shares

    row("TF-IDF filter (completion tokens)", "–", tfidf_scores(work))
    for count in COORDINATES if found.baseline else ():
        assert found.baseline is not None
        row(f"top-Λ eigen-coordinates, fp16, {count:,}", f"{2 * count:,}",
            found.baseline.scores(plain.coordinates, count))
    numbers: dict[str, object] = {"size": asdict(work.size), "summary": work.summary()}
    for k, one in codes.items():
        scores = found.indexes[k].many_scores(one.query_vectors(plain.coordinates).numpy())
        numbers[f"recall {k}"] = row(f"code, 1 bit, K = {k:,}", f"{code_bytes(k):,}", scores)
    print("\nRecall statement, claimed against actual (mean over queries; mean absolute per query)")
    calibrated = {}
    damping = codes[bits[-1]].settings.damping
    pairs, _ = score_pairs(
        work.model, work.modules, work.ekfac, lambda ids: [work.train[n] for n in ids],
        list(range(len(work.train))), 0, damping, 2048, progress, Allowance())
    for k, one in codes.items():
        calibrated[k] = c = calibrate(
            work.model, one, work.ekfac, pairs,
            lambda ids, k=k: (_subset(found.indexes[k], k, ids), found.norms[k][ids]),  # type: ignore[misc]
            2048, progress,
        )["c"]
        numbers[f"statement {k}"] = print_statement(work, plain, one, found, c)
    usual = default_length(work.size.length)
    chosen = usual if usual in codes else bits[-1]
    numbers["controls"] = print_controls(work, asked, codes[chosen], found, calibrated[chosen])
    if fits:
        print_fits(work, fits, progress)
    if save is not None:
        save.write_text(json.dumps(numbers, indent=1))
    print(f"\ntotal {duration(time.monotonic() - begun)}")


def _subset(index: CodeIndex, length: int, ids: list[int]) -> CodeIndex:
    part = CodeIndex(length)
    part.add(index.codes(ids))
    return part


if __name__ == "__main__":
    main()
