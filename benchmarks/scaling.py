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

MEASURES = (("r10@100", "top 10 in 100", "o"), ("r100@1000", "top 100 in 1,000", "s"))


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
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axis = figure.subplots()
    for number, run in enumerate(runs):
        lengths = lengths_of(run)
        room = [length / 8 / run["size"]["length"] for length in lengths]
        for place, (_, what, mark) in enumerate(MEASURES):
            recall = [run[f"recall {length}"][2 * place] for length in lengths]
            axis.plot(room, recall, "-" if place == 0 else "--", marker=mark, color=f"C{number}",
                      label=f"{name_of(run)}: {what}")
    axis.set(xscale="log", xlabel="bytes of code a token", ylabel="share of the true top found",
             ylim=(0, 1.02), title="Fidelity of a shortlist by code")
    ticks = sorted({
        length / 8 / run["size"]["length"] for run in runs for length in lengths_of(run)})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
