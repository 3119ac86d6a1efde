"""How long a search takes from nothing, beside loading torch and the model.

    make demo && python -m benchmarks.cold

Each run is a process of its own, both kinds in turn: a search of the demo's index that rescores 16
sequences, and a process that imports torch and transformers and loads the demo's model.
"""

import subprocess
import sys

import click

from benchmarks.throughput import alternate

SEARCH = [sys.executable, "-m", "gradindex", "search", ".demo/index", "-p", "severity", "-c",
          " 'ERROR'", "--shortlist", "16", "-k", "3"]
LOAD = [sys.executable, "-c", """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(".demo/model")
AutoTokenizer.from_pretrained(".demo/model")
"""]


@click.command()
@click.option("--repeats", type=int, default=5, show_default=True)
def main(repeats: int) -> None:
    """Print the medians of both, and their difference."""
    search, load = alternate(repeats, *(
        lambda command=command: subprocess.run(command, capture_output=True, check=True)
        for command in (SEARCH, LOAD)))
    print(f"search {search:.2f} s; torch, transformers and the model alone {load:.2f} s; "
          f"difference {search - load:.2f} s")


if __name__ == "__main__":
    main()
