"""Speed of encoding, scanning and rescoring; both sides of each ratio in one run.

    python benchmarks/throughput.py

A training step is forward and backward with weight gradients, no optimiser. Each pair alternates,
and the median of the repetitions counts.
"""

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.prepare import Settings, new_model
from gradindex.codes import Codes, CodeSettings, default_width
from gradindex.curvature import Curvature, Ekfac
from gradindex.gradients import Batch, make_batch
from gradindex.influence import (
    Influences,
    Preconditioned,
    collect,
    precondition,
    query_coordinates,
    score,
)
from gradindex.model import LanguageModel, ModelSource, tracked_modules
from gradindex.records import Part, Record
from gradindex.vectors import CodeIndex, code_bytes
from indexer.encode import encode_batch

LENGTH = 128
CODE = 32768


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


@click.command()
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--batch", type=int, default=32, show_default=True, help="Sequences of 128 tokens.")
@click.option("--repeats", type=int, default=11, show_default=True)
@click.option("--rows", type=int, default=20000, show_default=True, help="Codes to scan.")
def main(threads: int, batch: int, repeats: int, rows: int) -> None:
    """Print sequences a second and ratios, then nanoseconds a code."""
    torch.set_num_threads(threads)
    network = new_model(Settings(length=LENGTH, layers=4, hidden=192))
    trained = new_model(Settings(length=LENGTH, layers=4, hidden=192)).train()
    model = ModelSource(network).load()
    modules = tracked_modules(model.network)
    random = np.random.default_rng(0)
    records = [
        Record(n, random.integers(0, 4096, LENGTH).astype(np.int32), np.ones(LENGTH, bool),
               [Part(n, "", n, -1, -1, 0)]) for n in range(batch)
    ]
    data = make_batch([(record.ids, record.scored) for record in records], model.device)
    torch.manual_seed(0)
    ekfac = {
        m.name: Curvature(torch.linalg.qr(torch.randn(m.shape[1], m.shape[1]))[0],
                          torch.linalg.qr(torch.randn(m.shape[0], m.shape[0]))[0],
                          torch.rand(m.shape)) for m in modules
    }
    codes = Codes(modules, ekfac, CodeSettings(CODE, default_width(CODE, len(modules)), 0, 0.1))
    index = CodeIndex(CODE)
    preconditioned = Preconditioned({m.name: torch.randn(1, *m.shape) for m in modules})

    def train_step() -> None:
        trained.zero_grad()
        trained(input_ids=data.tokens, labels=data.tokens, use_cache=False).loss.backward()

    def encode() -> None:
        index.encode(encode_batch(model, codes, records).numpy())

    def rescore() -> None:
        score(model, modules, preconditioned, data)

    print(f"GPT-NeoX of {network.num_parameters() / 1e6:.1f} M parameters, {len(modules)} tracked "
          f"modules, K = {CODE}, k = {codes.settings.width}, {batch} × {LENGTH} tokens, "
          f"{threads} threads, median of {repeats}")
    step, coded, scored = alternate(repeats, train_step, encode, rescore)
    for name, seconds in (("training step", step), ("encode", coded), ("rescore", scored)):
        print(f"{name:<14} {batch / seconds:7.1f} sequences/s   {step / seconds:.2f} of a training "
              "step's speed")
    scan(rows, repeats)
    many(model, codes, ekfac, data, rows, repeats)


def many(
    model: LanguageModel, codes: Codes, ekfac: Ekfac, data: Batch, rows: int, repeats: int
) -> None:
    """64 queries together against one alone: gradient, scan; and rescoring for 32 against one."""
    modules, queries = codes.modules, 64
    random = np.random.default_rng(2)
    texts = [(random.integers(0, 4096, 96).astype(np.int32), np.arange(96) >= 64)
             for _ in range(queries)]

    def gradient(count: int) -> np.ndarray:
        with torch.no_grad():
            c, _ = query_coordinates(model, modules, ekfac, make_batch(texts[:count], model.device),
                                     0.1)
            precondition(ekfac, c)
            return codes.query_vectors(c).numpy()

    index = random_codes(rows)
    segments = [CodeIndex(CODE) for _ in range(max(1, rows // 4096))]
    for number, segment in enumerate(segments):
        first = number * 4096
        segment.add(index.codes(list(range(first, min(first + 4096, rows)))))
    vectors = gradient(queries)

    def scan_one() -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda segment: segment.scores(vectors[0]), segments))

    def scan_many() -> None:
        for segment in segments:
            segment.many_scores(vectors)

    one, together, alone, shared = alternate(
        repeats, lambda: gradient(1), lambda: gradient(queries), scan_one, scan_many)
    for name, single, joint in (("gradient", one, together), ("scan", alone, shared),
                                ("both", one + alone, together + shared)):
        print(f"{name} of {queries} queries, N = {rows:,}: {joint / queries * 1000:.1f} ms a query "
              f"together, {single * 1000:.1f} ms alone: {joint / queries / single:.2f}")
    extrapolated = 100_000 / rows
    print(f"both at N = 100,000 (scans scaled by {extrapolated:.0f}): "
          f"{(together + extrapolated * shared) / queries / (one + extrapolated * alone):.2f}")

    def stack(count: int) -> Preconditioned:
        return Preconditioned({m.name: torch.randn(count, *m.shape) for m in modules})

    single, several = stack(1), stack(32)
    for_one, for_32 = alternate(
        repeats, lambda: collect(model, modules, data, Influences(single, len(data.tokens))),
        lambda: collect(model, modules, data, Influences(several, len(data.tokens))))
    print(f"rescoring a sequence: {for_one / len(data.tokens) * 1000:.1f} ms for one query, "
          f"{for_32 / len(data.tokens) * 1000:.1f} ms for 32: {for_32 / for_one:.2f} times")


def random_codes(rows: int) -> CodeIndex:
    random = np.random.default_rng(1)
    index = CodeIndex(CODE)
    for _ in range(rows // 1000):
        index.add(index.encode(random.standard_normal((1000, CODE), dtype=np.float32)))
    return index


def scan(rows: int, repeats: int) -> None:
    """Nanoseconds a code, one query on one core, at both settings of the query's quantisation."""
    index = random_codes(rows)
    query = np.random.default_rng(3).standard_normal(CODE).astype(np.float32)
    for bits in (4, 8):
        index._index.qb = bits
        [seconds] = alternate(repeats, lambda: index.scores(query))
        each = seconds / len(index)
        print(f"scan, qb = {bits}: {each * 1e9:.0f} ns a code, "
              f"{code_bytes(CODE) / each / 1e9:.1f} GB/s a core")


if __name__ == "__main__":
    main()
