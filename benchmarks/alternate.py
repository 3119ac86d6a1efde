"""Is another checkout as fast? The functions of `throughput` and a scan, in both, turn by turn.

    git worktree add ../before COMMIT
    python -m benchmarks.alternate ../before
    python -m benchmarks.alternate ../before --rounds 30

A process of each checkout holds the same model, and one of the two works at a time: each function
runs in one, then in the other, who is first changing from round to round. A machine that grows
slower meanwhile slows both sides alike. Printed are the medians, and the median of the ratios of
single rounds with its 95% interval (percentile bootstrap). The training step is PyTorch's alone:
its ratio shows what two processes of equal code differ by.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.throughput import LENGTH, SIZES

FUNCTIONS = {  # shown: what is called in the worker
    "training step (PyTorch's alone)": "bench.training_step()",
    "covariance (fit)": "bench.covariance()",
    "eigenvalues (fit)": "bench.eigenvalues()",
    "encode": "bench.encode()",
    "rescore, 1 query": "bench.rescore(1)",
    "rescore, 32 queries": "bench.rescore(32)",
    "rescore, 32 queries of rank 32": "bench.rescore(32, 32)",
    "scan of 20,000 codes": "scan([stored], question, 2)",
}
WORKER = f"""
import sys, time
import numpy as np, torch
from benchmarks.throughput import Bench, Settings, VOCABULARY
torch.set_num_threads(2)
hidden, layers, batch = map(int, sys.argv[1:])
bench = Bench(Settings(length={LENGTH}, layers=layers, hidden=hidden, vocabulary=VOCABULARY),
              batch, "float32")
scan = sys.modules[type(bench.index).__module__].scan  # wherever this checkout has it
random = np.random.default_rng(0)
stored = type(bench.index)(bench.codes.settings.length)
vectors = random.standard_normal((1000, bench.codes.settings.length)).astype(np.float32)
for _ in range(20):
    stored.add(stored.encode(vectors))
question = vectors[:1]
for line in sys.stdin:
    begun = time.perf_counter()
    eval(line)
    print("took", time.perf_counter() - begun, flush=True)
"""


class Side:
    """A process of one checkout, that does what it is told and says how long it took."""

    def __init__(self, checkout: Path, size: tuple[int, int, int]):
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, size)], cwd=checkout, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, call: str) -> float:
        """How long one call takes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(call, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("took "):
                return float(line.split()[1])
        raise SystemExit(f"the process of {self._process.args} ended")

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """The 95% interval of their median, by drawing the rounds again."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    checkouts = given.before.resolve(), Path(__file__).resolve().parents[1]
    print(f"2 threads, float32, {given.rounds} rounds after a first that doesn't count")
    for size in SIZES:
        sides = [Side(checkout, size) for checkout in checkouts]
        taken = np.zeros((len(FUNCTIONS), given.rounds + 1, 2))
        for number in range(given.rounds + 1):
            for own, call in zip(taken, FUNCTIONS.values(), strict=True):
                for side in (0, 1) if number % 2 else (1, 0):  # neither is always the first
                    own[number, side] = sides[side].seconds(call)
            print(f"round {number} of {given.rounds}", file=sys.stderr, flush=True)
        for one in sides:
            one.close()
        print(f"\n{size[0]} wide, {size[1]} layers, {size[2]} × {LENGTH} tokens, milliseconds:\n\n"
              "| | before | now | speed, now / before | 95% |\n|---|---|---|---|---|")
        for name, own in zip(FUNCTIONS, taken[:, 1:], strict=True):
            before, now = np.median(own, axis=0) * 1e3
            ratios = own[:, 0] / own[:, 1]
            low, high = interval(ratios)
            print(f"| {name} | {before:,.1f} | {now:,.1f} | {np.median(ratios):.3f} | "
                  f"{low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
