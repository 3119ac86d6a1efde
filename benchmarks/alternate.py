"""Is another checkout as fast? One of the scripts here, in both, turn by turn.

    git worktree add ../before COMMIT
    python -m benchmarks.alternate ../before throughput --rounds 5 -- --repeats 5

The first number of every row of the tables that the script prints is compared: the median of the
rounds on both sides, their ratio, and the ratios of single rounds. A machine that grows slower
meanwhile slows both sides alike.
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path


def rows(checkout: Path, script: str, arguments: list[str]) -> dict[str, float]:
    """The first number of each row that a script prints, by table and name."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *arguments], cwd=checkout,
                          env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = {}
    table = 0
    for line in done.stdout.splitlines():
        table += line.startswith("|---")
        cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        if table and len(cells) > 1 and re.fullmatch(r"\d+(\.\d+)?", cells[1]):
            found[f"{table}. {cells[0]}"] = float(cells[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     epilog="What follows -- are the script's own arguments.")
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("script", help="a script of benchmarks/ that prints tables")
    parser.add_argument("--rounds", type=int, default=5)
    own = list(itertools.takewhile(lambda word: word != "--", sys.argv[1:]))
    of_the_script = sys.argv[2 + len(own):]
    given = parser.parse_args(own)
    sides = given.before.resolve(), Path(__file__).resolve().parents[1]
    measured: list[list[dict[str, float]]] = [[], []]
    for number in range(given.rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)  # neither is always the first
        for side in order:
            measured[side].append(rows(sides[side], given.script, of_the_script))
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr, flush=True)
    print("| | before | now | now / before | of single rounds |")
    print("|---|---|---|---|---|")
    for name in measured[0][0]:
        before, now = ([one[name] for one in side] for side in measured)
        ratios = sorted(b / a for a, b in zip(before, now, strict=True))
        first, second = statistics.median(before), statistics.median(now)
        print(f"| {name} | {first:,.1f} | {second:,.1f} | {second / first:.3f} | "
              f"{ratios[0]:.2f} to {ratios[-1]:.2f} |")


if __name__ == "__main__":
    main()
