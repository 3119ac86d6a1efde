"""Speed of the encode pass, of a scan and of exact rescoring; both sides of each ratio in one run.

    python benchmarks/throughput.py

A training step is forward and backward with weight gradients, no optimiser. Each pair alternates,
and the median of the repetitions counts.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.prepare import Settings, new_model
from gradindex.codes import Codes, CodeSettings, default_width
from gradindex.curvature import Curvature
from gradindex.gradients import make_batch
from gradindex.influence import score
from gradindex.model import ModelSource, tracked_modules
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
    preconditioned = {m.name: torch.randn(m.shape) for m in modules}

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


def scan(rows: int, repeats: int) -> None:
    """Nanoseconds a code, one query on one core, at both settings of the query's quantisation."""
    random = np.random.default_rng(1)
    index = CodeIndex(CODE)
    for _ in range(rows // 1000):
        index.add(index.encode(random.standard_normal((1000, CODE), dtype=np.float32)))
    query = random.standard_normal(CODE).astype(np.float32)
    for bits in (4, 8):
        index._index.qb = bits
        [seconds] = alternate(repeats, lambda: index.scores(query))
        each = seconds / len(index)
        print(f"scan, qb = {bits}: {each * 1e9:.0f} ns a code, "
              f"{code_bytes(CODE) / each / 1e9:.1f} GB/s a core")


if __name__ == "__main__":
    main()
