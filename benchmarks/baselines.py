"""How much of the true top do other methods find?

    python benchmarks/baselines.py --plot baselines.png

The truth is the exact EK-FAC influence (damping 0.1 of mean Λ a module) of every training sequence
on held-out queries; model and queries are those of `fidelity.py`. Compared by how much of the true
top each finds: the code; scores without a store (gradient dot product, K-FAC, TF-IDF, hidden
states); and stores (two-sided random projections as in LoGra, Choe et al. 2024, plain and with
their own Fisher inverse; one-bit PCA; the eigen-coordinates of largest Λ).
Whether EK-FAC is a truth worth finding is asked by `inverse.py` and `lds.py`.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fidelity import tfidf_scores
from benchmarks.workload import Size, Workload, make_workload
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.gradients import apply_inputs, backward
from gradindex.influence.split_batches import plan_batches
from gradindex.modules import Module
from gradindex.progress import duration, stderr_progress
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.layout import code_bytes
from gradindex.storage.records import Record
from indexer.defaults import DAMPING

BATCH_TOKENS = 2048
LENGTHS = (4096, 8192, 16384, 32768, 65536)  # K, bits
COORDINATES = (4096, 65536)
SKETCHES = (16, 32)  # projected inputs and outputs a module
COMPONENTS = 1024  # of PCA, a module
PCA_SAMPLE = 2048  # training sequences
KFAC_SAMPLE = 2048  # training sequences
CUTS = ((10, 100), (100, 1000))  # k of the true top, length of the shortlist

ByModule = dict[str, Tensor]


@dataclass
class Seen:
    """One module of one batch: its inputs and output gradients, and the gradient in the eigenbasis.

    a [b, t, i], d [b, t, o]; rotated Q_Sᵀ G Q_A, and whitened, divided by (Λ+λ)^½, both [b, o·i].
    """

    module: Module
    a: Tensor
    d: Tensor
    rotated: Tensor
    whitened: Tensor


Features = Callable[[Seen], Tensor]  # [b, p] of one module; both sides of a score use the same


def look(
    work: Workload, records: list[Record], each: Callable[[list[int], Seen], None],
    hidden: Tensor | None = None,
) -> None:
    """One forward and backward pass over `records`: `each(rows, seen)` for every batch and module.

    Fills `hidden` [n, h] with the mean over tokens of what the LM head reads.
    """
    progress = stderr_progress()
    progress.start("gradients", len(records), "sequences")
    for rows in plan_batches([len(record.tokens) for record in records], BATCH_TOKENS):
        batch = work.model.batch([records[r] for r in rows])

        def keep(_: object, inputs: tuple[Tensor, ...]) -> None:
            if hidden is not None:
                real = batch.real.unsqueeze(-1)  # noqa: B023
                hidden[rows] = (inputs[0].detach() * real).sum(1) / real.sum(1)  # noqa: B023

        def one(module: Module, a: Tensor, d: Tensor) -> None:
            c = work.ekfac[module.name]
            rotated = torch.bmm((d @ c.eigenvectors_s).transpose(1, 2),
                                apply_inputs(a, c.eigenvectors_a.T, module.bias)).flatten(1)
            whitened = rotated / c.damped(DAMPING).sqrt().flatten()
            each(rows, Seen(module, a, d, rotated, whitened))  # noqa: B023

        handle = work.model.network.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            with torch.no_grad():
                backward(work.model, work.modules, batch, one)
        finally:
            handle.remove()
        progress.update(len(rows))
    progress.finish()


# ---- what each method keeps of a gradient -------------------------------------------------------


def two_sided(modules: list[Module], size: int) -> Features:
    """P_S G P_Aᵀ [size, size], P Gaussian with variance 1/size, drawn for each module and side."""
    generator = torch.Generator().manual_seed(size)
    sides = {m.name: [torch.randn(size, n, generator=generator) / size**0.5 for n in m.shape]
             for m in modules}

    def features(seen: Seen) -> Tensor:
        p_s, p_a = sides[seen.module.name]
        projected = apply_inputs(seen.a, p_a, seen.module.bias)
        return torch.bmm((seen.d @ p_s.T).transpose(1, 2), projected).flatten(1)

    return features


def top_coordinates(work: Workload, count: int) -> Features:
    """The `count` whitened eigen-coordinates of largest Λ/(Λ+λ) of all modules together."""
    weights = [(c.eigenvalues / c.damped(DAMPING)).flatten()
               for c in (work.ekfac[m.name] for m in work.modules)]
    chosen = torch.topk(torch.cat(weights), count).indices.sort().values
    places, start = {}, 0
    for module, weight in zip(work.modules, weights, strict=True):
        places[module.name] = chosen[(chosen >= start) & (chosen < start + len(weight))] - start
        start += len(weight)
    return lambda seen: seen.whitened[:, places[seen.module.name]]


def principal_components(work: Workload, sample: list[Record]) -> Features:
    """The whitened gradient on its first COMPONENTS principal directions, module by module.

    Directions are X ᵀU/σ from the sample's Gram matrix X Xᵀ = U σ² Uᵀ, uncentred because scores are
    inner products. Holds the sample in float16: 2 bytes · sample · tracked weights.
    """
    gathered = {m.name: torch.zeros(len(sample), m.size, dtype=torch.float16)
                for m in work.modules}

    def gather(rows: list[int], seen: Seen) -> None:
        gathered[seen.module.name][rows] = seen.whitened.half()

    look(work, sample, gather)
    directions: ByModule = {}
    progress = stderr_progress()
    progress.start("principal components", len(work.modules), "modules")
    for module in work.modules:
        x = gathered.pop(module.name).float()
        values, vectors = torch.linalg.eigh((x @ x.T).double())
        kept = min(COMPONENTS, len(sample))
        u = vectors[:, -kept:] / values[-kept:].clamp(min=1e-9 * float(values[-1])).sqrt()
        directions[module.name] = x.T @ u.float()
        progress.update(1)
    progress.finish()
    return lambda seen: seen.whitened @ directions[seen.module.name]


# ---- scores from what was kept ------------------------------------------------------------------


def dot(query: ByModule, kept: ByModule) -> np.ndarray:
    """Σ over modules of q · x: [q, n] from [q, p] and [n, p] by module."""
    return sum((query[name] @ x.float().T).double().numpy() for name, x in kept.items())


def fisher(query: ByModule, kept: ByModule) -> np.ndarray:
    """Σ over modules of q (F+λI)⁻¹ x, F the mean of x xᵀ over all sequences, λ as for EK-FAC."""
    solved = {}
    for name, x in kept.items():
        f = (x.float().T @ x.float()).double() / len(x)
        damped = f + DAMPING * f.diagonal().mean() * torch.eye(len(f), dtype=f.dtype)
        solved[name] = torch.linalg.solve(damped, query[name].double().T).T.float()
    return dot(solved, kept)


def one_bit(query: ByModule, kept: ByModule) -> np.ndarray:
    """Dot product with each x replaced by c σ ∘ sign(x): σ [p] the rms of each coordinate over all
    sequences, kept once; c the best scale (least squares) of a sequence's module, kept in 2 bytes.
    """
    rounded = {}
    for name, x in kept.items():
        wide = x.float()
        rms = (wide**2).mean(0).sqrt()
        scale = (wide.abs() @ rms / (rms @ rms)).half().float()
        rounded[name] = torch.where(wide >= 0, 1.0, -1.0) * rms * scale[:, None]
    return dot(query, rounded)


def kfac_damped(work: Workload) -> ByModule:
    """λ_S λ_Aᵀ + λ [o·i] by module: the eigenvalues K-FAC has where EK-FAC has Λ.

    λ_S = E[(Q_Sᵀ d)²] and λ_A = E[(Q_Aᵀ a)²] over tokens, labels drawn from the model. The number
    of tokens a sequence, a factor of all modules alike, is left out: it doesn't change the order.
    """
    sample = work.train[:KFAC_SAMPLE]
    sums = {m.name: (torch.zeros(m.shape[0]), torch.zeros(m.shape[1])) for m in work.modules}
    generator = torch.Generator().manual_seed(0)
    progress = stderr_progress()
    progress.start("K-FAC eigenvalues", len(sample), "sequences")
    for rows in plan_batches([len(record.tokens) for record in sample], BATCH_TOKENS):
        batch = work.model.batch([sample[r] for r in rows])

        def each(module: Module, a: Tensor, d: Tensor) -> None:
            c = work.ekfac[module.name]
            rotated = apply_inputs(a, c.eigenvectors_a.T, module.bias)[batch.real]  # noqa: B023
            sums[module.name][0].add_(((d @ c.eigenvectors_s) ** 2).sum((0, 1)))
            sums[module.name][1].add_((rotated**2).sum(0))

        drawn = torch.rand(batch.tokens.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            backward(work.model, work.modules, batch, each, drawn)
        progress.update(len(rows))
    progress.finish()
    tokens = sum(len(record.tokens) for record in sample)
    products = {name: torch.outer(s / tokens, a / tokens) for name, (s, a) in sums.items()}
    return {name: (x + DAMPING * x.mean()).flatten() for name, x in products.items()}


# ---- everything in one pass ---------------------------------------------------------------------


class CodeStore:
    """The code at one length K, encoded batch by batch."""

    def __init__(self, work: Workload, length: int):
        self.modules, self.length = work.modules, length
        self.codes = Codes(work.modules, work.ekfac,
                           CodeSettings.of(length, work.modules, 0, DAMPING))
        self.index = CodeIndex(length)
        self.stored = np.zeros((len(work.train), code_bytes(length)), np.uint8)
        self.vectors = self.codes.empty(0)

    def add(self, rows: list[int], seen: Seen) -> None:
        if seen.module.name == self.modules[-1].name:  # modules arrive from the last to the first
            self.vectors = self.codes.empty(len(rows))
        self.codes.add(self.vectors, seen.module, seen.a, seen.d)
        if seen.module.name == self.modules[0].name:
            self.stored[rows] = self.index.encode(self.vectors.numpy())

    def scores(self, coordinates: ByModule) -> np.ndarray:
        """[q, n] from C [q, o, i] by module."""
        self.index.add(self.stored)
        vectors = self.codes.query_vectors(coordinates).numpy()
        return self.index.many_scores(vectors).astype(np.float64)


def sides_of(work: Workload, rotated: ByModule) -> dict[str, ByModule]:
    """By method, what the rotated gradient of a sequence is multiplied with, [q, o·i] a module."""
    kfac = kfac_damped(work)
    return {
        "gradient dot product": rotated,
        "K-FAC": {name: query / kfac[name] for name, query in rotated.items()},
        "EK-FAC": {name: query / work.ekfac[name].damped(DAMPING).flatten()
                   for name, query in rotated.items()},
    }


Row = tuple[str, float, np.ndarray]  # name, bytes a sequence (NaN: nothing kept), scores [q, n]


def collect(work: Workload, stores: dict[str, Features]) -> tuple[np.ndarray, list[Row]]:
    """Two passes: over the queries, then over the training sequences, all methods at once.

    Returns EK-FAC's scores [q, n] and the table's rows.
    """
    names, n = [m.name for m in work.modules], len(work.train)
    width = work.model.network.config.hidden_size
    query: dict[str, ByModule] = {store: {} for store in stores}
    kept: dict[str, ByModule] = {store: {} for store in stores}
    rotated = {m.name: torch.zeros(len(work.queries), m.size) for m in work.modules}
    hidden = torch.zeros(len(work.queries), width), torch.zeros(n, width)

    def put(place: dict[str, ByModule], count: int, rows: list[int], seen: Seen) -> None:
        for store, features in stores.items():
            x, name = features(seen), seen.module.name
            if name not in place[store]:
                place[store][name] = torch.zeros(count, x.shape[1], dtype=torch.float16)
            place[store][name][rows] = x.half()

    def of_query(rows: list[int], seen: Seen) -> None:
        put(query, len(work.queries), rows, seen)
        rotated[seen.module.name][rows] = seen.rotated

    look(work, work.queries, of_query, hidden[0])
    query = {store: {name: x.float() for name, x in parts.items()}
             for store, parts in query.items()}
    sides = sides_of(work, rotated)
    stacked = {name: torch.cat([side[name] for side in sides.values()]) for name in names}
    totals = torch.zeros(len(stacked[names[0]]), n, dtype=torch.float64)
    coders = {length: CodeStore(work, length) for length in LENGTHS}

    def of_sequence(rows: list[int], seen: Seen) -> None:
        put(kept, n, rows, seen)
        totals[:, rows] += (stacked[seen.module.name] @ seen.rotated.T).double()
        for coder in coders.values():
            coder.add(rows, seen)

    look(work, work.train, of_sequence, hidden[1])
    parts = totals.split([len(side[names[0]]) for side in sides.values()])
    exact = {name: part.numpy() for name, part in zip(sides, parts, strict=True)}
    coordinates = {m.name: sides["EK-FAC"][m.name].unflatten(1, m.shape) for m in work.modules}
    rows: list[Row] = [
        (f"code, 1 bit, K = {length:,}", code_bytes(length), coder.scores(coordinates))
        for length, coder in coders.items()
    ]
    rows += [(name, math.nan, exact[name]) for name in ("gradient dot product", "K-FAC")]
    for store in stores:
        count = sum(x.shape[1] for x in kept[store].values())
        scored = [("fp16", 2.0 * count, dot)]
        if store.startswith("PCA"):
            scored.append(("1 bit", count / 8 + 2 * len(names), one_bit))
        if store.startswith("two-sided"):
            scored.append(("fp16, own Fisher inverse", 2.0 * count, fisher))
        rows += [(f"{store}, {how}", room, score(query[store], kept[store]))
                 for how, room, score in scored]
    own, states = (torch.nn.functional.normalize(part) for part in hidden)
    rows += [("mean last hidden states, fp16, cosine", 2.0 * width, (own @ states.T).numpy()),
             ("TF-IDF (completion tokens)", math.nan, tfidf_scores(work))]
    return exact["EK-FAC"], rows


# ---- measures and tables ------------------------------------------------------------------------


def recall(truth: np.ndarray, scores: np.ndarray, k: int, length: int) -> float:
    """Share of each query's true top k among its `length` best by score, the mean over queries."""
    best = np.argsort(-truth, axis=1, kind="stable")[:, :k]
    found = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    return float(np.mean([len(set(b) & set(f)) / k for b, f in zip(best, found, strict=True)]))


Measured = tuple[str, float, list[float]]  # name, bytes a token (NaN: nothing kept), shares by CUTS


def measured(work: Workload, truth: np.ndarray, rows: list[Row]) -> list[Measured]:
    tokens = float(np.mean([len(record.tokens) for record in work.train]))
    return [(name, room / tokens, [recall(truth, scores, k, length) for k, length in CUTS])
            for name, room, scores in rows]


def print_methods(rows: list[Measured]) -> None:
    heads = [f"r{k}@{length}" for k, length in CUTS]
    print(f"| method | bytes a token | {' | '.join(heads)} |\n|---|---|---|---|")
    for name, room, shares in rows:
        size = "–" if math.isnan(room) else f"{room:,.1f}"
        print(f"| {name} | {size} | {' | '.join(f'{share:.3f}' for share in shares)} |")


FAMILIES = {"code": "black", "gradient": "#888888", "K-FAC": "#d62728", "PCA": "#ff7f0e",
            "two-sided": "#2ca02c", "top-Λ": "#9467bd", "mean": "#8c564b", "TF-IDF": "#1f77b4"}


def plot(path: Path, rows: list[Measured]) -> None:
    """Recall against bytes a token; methods that keep nothing are horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, len(CUTS), sharey=True)
    codes = [row for row in rows if row[0].startswith("code")]
    others = [row for row in rows if row not in codes]
    for axis, (k, length), place in zip(axes, CUTS, range(len(CUTS)), strict=True):
        axis.plot([room for _, room, _ in codes], [shares[place] for _, _, shares in codes], "o-",
                  color="black", label="code, 1 bit", zorder=3)
        drawn: dict[str, int] = {}
        for name, room, shares in others:
            family = next(one for one in FAMILIES if name.startswith(one))
            mark = "sDv^"[drawn.get(family, 0)]
            drawn[family] = drawn.get(family, 0) + 1
            if math.isnan(room):
                axis.axhline(shares[place], color=FAMILIES[family], linestyle=":",
                             label=f"{name} (nothing kept)")
            else:
                axis.plot(room, shares[place], mark, color=FAMILIES[family], label=name)
        axis.set(xscale="log", xlabel="bytes a token", ylim=(0, 1.03),
                 title=f"share of the true top {k} in the best {length:,}")
        ticks = [4, 8, 16, 32, 64, 128, 1024]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=130)


@click.command()
@click.option("--sequences", type=int, default=8192, show_default=True)
@click.option("--queries", type=int, default=64, show_default=True)
@click.option("--steps", type=int, default=1000, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Write a picture here.")
def main(sequences: int, queries: int, steps: int, cache: Path, picture: Path | None) -> None:
    """Score with every method, print a table."""
    begun = time.monotonic()
    size = Size(sequences=sequences, steps=steps)
    work = make_workload(cache, size, queries, stderr_progress())
    stores = {f"PCA, {COMPONENTS:,} a module": principal_components(work, work.train[:PCA_SAMPLE])}
    for size in SKETCHES:
        name = f"two-sided projection {size} × {size} a module"
        stores[name] = two_sided(work.modules, size)
    for count in COORDINATES:
        stores[f"top-Λ eigen-coordinates, {count:,}"] = top_coordinates(work, count)
    truth, rows = collect(work, stores)
    print(f"{work.summary()}\n")
    table = measured(work, truth, rows)
    print_methods(table)
    if picture:
        plot(picture, table)
    print(f"\ntotal {duration(time.monotonic() - begun)}")


if __name__ == "__main__":
    main()
