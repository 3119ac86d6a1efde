"""How time and memory grow with the model's width, the length of sequences and their number.

    python -m benchmarks.scale

Each curve comes with its exponent: the slope of its logarithm against that of what grows. Memory is
what a batch takes in a stage beyond what is held before it, at its peak (known on Linux alone).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable

import click
import numpy as np
import torch

from benchmarks.throughput import VOCABULARY, Bench, alternate
from gradindex.demo.small_model import DemoSettings
from gradindex.memory import forget_most, most, resident, return_freed
from gradindex.storage.code_index import CodeIndex, scan
from gradindex.storage.layout import code_bytes
from indexer.fit.eigen import eigenvectors

WIDTHS = (96, 192, 384, 768)
LENGTHS = (64, 128, 256, 512)
COUNTS = (10_000, 100_000, 1_000_000)
TOKENS = 2048  # a batch


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """The slope of log value against log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def of_model(hidden: int, length: int, repeats: int) -> dict[str, float]:
    """Milliseconds a sequence of each stage, and the MB that a batch takes."""
    bench = Bench(DemoSettings(length=length, layers=4, hidden=hidden, vocabulary=VOCABULARY),
                  TOKENS // length, "float32")
    functions: dict[str, Callable[[], object]] = {
        "training step": bench.training_step, "covariance": bench.covariance,
        "eigenvalues": bench.eigenvalues, "encode": bench.encode,
        "rescore": lambda: bench.rescore(1), "query's gradient": bench.query,
    }
    if length <= 64:  # the query scores the tokens from 64 on
        del functions["query's gradient"]
    seconds = alternate(repeats, *functions.values())
    found = {name: 1000 * taken / (1 if name.startswith("query") else len(bench.records))
             for name, taken in zip(functions, seconds, strict=True)}
    matrix = torch.randn(4 * hidden, 4 * hidden, dtype=torch.float64)
    begun = time.perf_counter()
    eigenvectors(matrix @ matrix.T, "a benchmark")
    found["eigenvectors of the largest matrix"] = 1000 * (time.perf_counter() - begun)
    for name, function in functions.items():
        return_freed()
        forget_most()
        before = resident()
        function()
        found[f"{name}, MB a batch"] = (most() - before) / 1e6
    return found


def curve(what: str, sizes: tuple[int, ...], rows: list[dict[str, float]]) -> None:
    print(f"\n| {what} | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |")
    print("|---" * (len(sizes) + 2) + "|")
    for name in rows[-1]:
        values = [row[name] for row in rows if name in row]
        shown = ["–"] * (len(sizes) - len(values)) + [f"{value:,.3g}" for value in values]
        print(f"| {name} | " + " | ".join(shown) +
              f" | {exponent(sizes[-len(values):], values):.2f} |", flush=True)


def of_codes(count: int, threads: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a scan of so many codes of 4 KiB, and their MB."""
    length = 32768
    codes = np.random.default_rng(0).integers(0, 256, (4096, code_bytes(length)), dtype=np.uint8)
    codes[:, -8:].view(np.float32)[:] = 1
    segments = []
    for first in range(0, count, 4096):
        segments.append(CodeIndex(length))
        segments[-1].add(codes[: min(4096, count - first)])
    query = np.random.default_rng(1).standard_normal((1, length)).astype(np.float32)
    [seconds] = alternate(repeats, lambda: scan(segments, query, threads))
    return {"scan of one query": 1000 * seconds, "codes, MB": count * code_bytes(length) / 1e6}


@click.command()
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--one", hidden=True, help="hidden,length: measure this alone.")
def main(threads: int, repeats: int, one: str | None) -> None:
    """Print the three curves, milliseconds."""
    torch.set_num_threads(threads)
    if one is not None:
        hidden, length = map(int, one.split(","))
        print(json.dumps(of_model(hidden, length, repeats)))
        return

    def apart(hidden: int, length: int) -> dict[str, float]:
        shown = subprocess.run(
            [sys.executable, "-m", "benchmarks.scale", "--one", f"{hidden},{length}", "--threads",
             str(threads), "--repeats", str(repeats)], capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(shown.stdout.splitlines()[-1])
        return found

    print(f"GPT-NeoX of 4 layers, MLPs tracked, batches of {TOKENS:,} tokens, K = 256 a token (at "
          f"least 16,384); milliseconds a sequence; {threads} threads, median of {repeats}")
    curve("width, 128 tokens", WIDTHS, [apart(width, 128) for width in WIDTHS])
    curve("tokens, width 192", LENGTHS, [apart(192, length) for length in LENGTHS])
    curve("sequences, codes of 4 KiB", COUNTS,
          [of_codes(count, threads, repeats) for count in COUNTS])


if __name__ == "__main__":
    main()
