"""How does fidelity move with the data and the model? A table and a plot of saved runs.

    python benchmarks/fidelity.py --save base.json
    python benchmarks/fidelity.py --sequences 100000 --text packages --save large.json
    python benchmarks/scaling.py base.json large.json --plot scaling.png
"""

import json
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

MEASURES = (("r10@100", "top 10 in 100"), ("r100@1000", "top 100 in 1,000"))


def name_of(run: dict[str, Any]) -> str:
    """What sets a run apart."""
    size = run["size"]
    return (f"{size['sequences']:,} × {size['length']}, {size['layers']} layers of "
            f"{size['hidden']}, {size['modules']}, {size['dtype']}")


def lengths_of(run: dict[str, Any]) -> list[int]:
    return sorted(int(key.split()[1]) for key in run if key.startswith("recall "))


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path))
def main(files: tuple[Path, ...], plot: Path | None) -> None:
    """Print a row a run and code length; plot recall against bytes a token."""
    runs = [json.loads(file.read_text()) for file in files]
    print("| run | K | bytes a token | r10@100 | r100@1000 | c | c on the queries |\n"
          + "|---" * 7 + "|")
    for run in runs:
        for length in lengths_of(run):
            top10, _, top100 = run[f"recall {length}"]
            statement = run[f"statement {length}"]
            print(f"| {name_of(run)} | {length:,} | {length / 8 / run['size']['length']:.0f} | "
                  f"{top10:.3f} | {top100:.3f} | {statement['c']:.2f} | "
                  f"{statement['c_here']:.2f} |")
    print("\n| run, at the default K | search | shortlist for .95 | claimed − actual | per query | "
          "--recall .95 actual | rescored |\n" + "|---" * 7 + "|")
    for run in runs:
        for search in ("plain", "opponents"):
            found = run["controls"][search]
            print(f"| {name_of(run)} | {search} | {found['needed']:,} | {found['gap']:+.3f} | "
                  f"{found['each']:.3f} | {found['grown_actual']:.3f} | {found['grown']:,.0f} |")
    print("\n" + "\n".join(f"{name_of(run)}: {run['summary']}" for run in runs))
    if plot is not None:
        draw(runs, plot)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A panel for each measure, a line for each run."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    ticks = sorted({
        length / 8 / run["size"]["length"] for run in runs for length in lengths_of(run)})
    for place, (axis, (_, what)) in enumerate(zip(axes, MEASURES, strict=True)):
        for number, run in enumerate(runs):
            lengths = lengths_of(run)
            axis.plot([length / 8 / run["size"]["length"] for length in lengths],
                      [run[f"recall {length}"][2 * place] for length in lengths],
                      "-", marker="osDv^Pp"[number], markersize=5, color=f"C{number}",
                      label=name_of(run))
        axis.set(xscale="log", xlabel="bytes of code a token", ylim=(0.4, 1.02),
                 title=f"share of the true {what}")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
