"""Speed of fitting, encoding and rescoring beside a training step and the machine's limit.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --peer     # also kronfluence's fit of the same factors

A training step is forward and backward with weight gradients, no optimiser. All functions run in
turn on the same batch, and the median of the repetitions counts. A function's limit is the
arithmetic of its matrix products (counted while it runs) at the speed that the machine multiplies
large square matrices with. `benchmarks/scan.py` has the speed of scans.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from gradindex.demo.small_model import DemoSettings, new_model
from gradindex.draws import Stream
from gradindex.influence.blockwise import covariance_shapes
from gradindex.influence.codes import Codes, CodeSettings, default_length
from gradindex.influence.curvature import Curvature, Ekfac
from gradindex.influence.exact import Influences, collect
from gradindex.influence.gradients import backward
from gradindex.influence.preconditioned import Preconditioned, query_coordinates
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.objective.batch import Batch, Text
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.records import Part, Record
from indexer.encode import encode_batch
from indexer.fit.batch_sums import add_covariances, add_eigenvalues, fit_batch
from indexer.fit.eigen import eigenvectors

VOCABULARY = 4096
LENGTH = 128  # tokens a sequence
SIZES = ((192, 4, 32), (512, 6, 8))  # hidden, layers, sequences of a batch


def alternate(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, run in turn after one warm-up round."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for own, function in zip(times, functions, strict=True):
            begun = time.perf_counter()
            function()
            if repeat:
                own.append(time.perf_counter() - begun)
    return [statistics.median(own) for own in times]


def flops(function: Callable[[], object]) -> int:
    """Arithmetic of the matrix products in a call."""
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        function()
    return int(counter.get_total_flops())


class Bench:
    """A random model, a batch of random sequences, random curvature, and what runs on them."""

    def __init__(self, settings: DemoSettings, batch: int, dtype: str):
        self.trained = new_model(settings).train().to(getattr(torch, dtype))
        self.model: LanguageModel = LanguageModel.load(ModelSource(new_model(settings)), dtype)
        self.modules: list[Module] = tracked_modules(self.model.network)
        random = np.random.default_rng(0)
        self.records = [
            Record(n, random.integers(0, VOCABULARY, settings.length).astype(np.int32),
                   np.ones(settings.length, bool), [Part(n, "", n, -1, -1, 0)])
            for n in range(batch)
        ]
        self.data: Batch = self.model.batch(self.records)
        torch.manual_seed(0)
        self.ekfac: Ekfac = {
            m.name: Curvature(torch.linalg.qr(torch.randn(m.shape[1], m.shape[1]))[0],
                              torch.linalg.qr(torch.randn(m.shape[0], m.shape[0]))[0],
                              torch.rand(m.shape)) for m in self.modules
        }
        length = default_length(settings.length)
        self.codes = Codes(self.modules, self.ekfac, CodeSettings.of(length, self.modules, 0, 0.1))
        self.index = CodeIndex(length)
        shapes = covariance_shapes(self.modules, 1)
        self._sums = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._tables = {m.name: torch.zeros(m.shape) for m in self.modules}
        self._vectors = {f"{m.name}/{side}": getattr(self.ekfac[m.name], f"eigenvectors_{side}"
                                                     .lower())
                         for m in self.modules for side in ("A", "S")}
        self._stacks: dict[tuple[int, int | None], Preconditioned] = {}

    def training_step(self) -> None:
        self.trained.zero_grad()
        self.trained(input_ids=self.data.tokens, labels=self.data.tokens,
                     use_cache=False).loss.backward()

    @torch.no_grad()
    def activations(self) -> None:
        """Forward, and backward to activations alone."""
        backward(self.model, self.modules, self.data, lambda module, a, d: None)

    def encode(self) -> None:
        self.index.encode(encode_batch(self.model, self.codes, self.records).float().numpy())

    @torch.no_grad()
    def covariance(self) -> None:
        batch, numbers = fit_batch(self.model, self.records, "model", 0, Stream.COVARIANCE_LABELS)
        add_covariances(self.model, self.modules, self._sums, batch, numbers)

    @torch.no_grad()
    def eigenvalues(self) -> None:
        batch, numbers = fit_batch(self.model, self.records, "model", 0, Stream.EIGENVALUE_LABELS)
        add_eigenvalues(self.model, self.modules, self._vectors, self._tables, batch, numbers)

    def rescore(self, queries: int, rank: int | None = None) -> None:
        if (queries, rank) not in self._stacks:
            self._stacks[queries, rank] = Preconditioned(
                {m.name: torch.randn(queries, *m.shape) for m in self.modules}, rank)
        collect(self.model, self.modules, self.data,
                Influences(self._stacks[queries, rank]))

    @torch.no_grad()
    def query(self) -> None:
        tokens = self.records[0].tokens
        one = self.model.batch([Text(tokens, np.arange(len(tokens)) >= 64)])
        coordinates, _ = query_coordinates(self.model, self.modules, self.ekfac, one, 0.1)
        self.codes.query_vectors(coordinates)


def table(bench: Bench, repeats: int, dtype: str) -> None:
    """Every function beside a training step and its own limit."""
    functions: dict[str, Callable[[], object]] = {
        "training step": bench.training_step, "forward and activation-backward": bench.activations,
        "covariance (fit)": bench.covariance, "eigenvalues (fit)": bench.eigenvalues,
        "encode": bench.encode, "rescore, 1 query": lambda: bench.rescore(1),
        "rescore, 32 queries": lambda: bench.rescore(32),
        "rescore, 1 query of rank 32": lambda: bench.rescore(1, 32),
        "rescore, 32 queries of rank 32": lambda: bench.rescore(32, 32),
    }
    a, b = torch.randn(2, 2048, 2048).to(getattr(torch, dtype))
    *taken, product = alternate(repeats, *functions.values(), lambda: a @ b)
    seconds, speed = dict(zip(functions, taken, strict=True)), 2 * 2048**3 / product
    print(f"matrix products of 2,048: {speed / 1e9:.0f} GFLOP/s")
    count = len(bench.records)
    step, limit = seconds["training step"], seconds["forward and activation-backward"]
    print("| | sequences/s | × training step | × forward and activation-backward | GFLOP a "
          "sequence | share of its limit |\n|---|---|---|---|---|---|")
    for name, own in seconds.items():
        work = flops(functions[name])
        print(f"| {name} | {count / own:.1f} | {step / own:.2f} | {limit / own:.2f} | "
              f"{work / count / 1e9:.2f} | {work / own / speed:.2f} |", flush=True)
    for kind in ("", " of rank 32"):
        ratio = seconds[f"rescore, 32 queries{kind}"] / seconds[f"rescore, 1 query{kind}"]
        print(f"rescoring for 32 queries{kind} takes {ratio:.2f} times that for one")


@click.command()
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--repeats", type=int, default=9, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--peer", is_flag=True, help="Also time kronfluence's fit; installs it.")
def main(threads: int, repeats: int, dtype: str, peer: bool) -> None:
    """Print a table for each of two sizes, and the fit beside kronfluence's."""
    torch.set_num_threads(threads)
    print(f"{threads} threads, {dtype}, median of {repeats}")
    for hidden, layers, batch in SIZES:
        settings = DemoSettings(length=LENGTH, layers=layers, hidden=hidden, vocabulary=VOCABULARY)
        bench = Bench(settings, batch, dtype)
        print(f"\nGPT-NeoX of {bench.model.network.num_parameters() / 1e6:.1f} M parameters "
              f"({hidden} wide, {layers} layers, MLPs tracked), {batch} × {LENGTH} tokens, K = "
              f"{bench.codes.settings.length:,}, k = {bench.codes.settings.width}")
        table(bench, repeats, dtype)
    if peer:
        folder = Path(".demo/kronfluence")
        if not folder.is_dir():
            for names in (["kronfluence==1.0.1"], ["accelerate", "einops", "einconv",
                                                   "opt_einsum"]):
                subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps",
                                "--target", str(folder), *names], check=True)
        sys.path.append(str(folder))
        against_kronfluence()


def against_kronfluence() -> None:
    """The same factors, of the same model and sequences, by both."""
    from benchmarks.peer import fit_by_kronfluence

    settings = DemoSettings(length=128, layers=4, hidden=192, vocabulary=VOCABULARY)
    bench = Bench(settings, 512, "float32")
    theirs = fit_by_kronfluence(new_model(settings), bench.modules, bench.data.tokens)
    sums = {name: torch.zeros(shape) for name, shape in covariance_shapes(bench.modules, 1).items()}
    begun = time.perf_counter()
    groups = [bench.records[first : first + 32] for first in range(0, 512, 32)]
    with torch.no_grad():
        for some in groups:
            batch, numbers = fit_batch(bench.model, some, "model", 0, Stream.COVARIANCE_LABELS)
            add_covariances(bench.model, bench.modules, sums, batch, numbers)
        covariance = time.perf_counter()
        vectors = {name: eigenvectors(total.double() / (512 * 128), name).float()
                   for name, total in sums.items()}
        decomposed = time.perf_counter()
        tables = {m.name: torch.zeros(m.shape) for m in bench.modules}
        for some in groups:
            batch, numbers = fit_batch(bench.model, some, "model", 0, Stream.EIGENVALUE_LABELS)
            add_eigenvalues(bench.model, bench.modules, vectors, tables, batch, numbers)
    ours = (covariance - begun, decomposed - covariance, time.perf_counter() - decomposed)
    print("\nthe fit of 512 × 128 tokens, labels sampled from the model, batches of 32, seconds:")
    print("| | covariance | eigenvectors | eigenvalues | all |\n|---|---|---|---|---|")
    for name, parts in (("gradindex", ours), ("kronfluence 1.0.1", theirs)):
        print(f"| {name} | " + " | ".join(f"{part:.1f}" for part in (*parts, sum(parts))) + " |")
    print(f"gradindex takes {sum(ours) / sum(theirs):.2f} of kronfluence's time")


if __name__ == "__main__":
    main()
