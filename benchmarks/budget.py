"""The memory and disk that models of many sizes take, and how right such a budget is.

    python -m benchmarks.budget

First the budget of four models, from the shapes of their MLPs alone: nothing of them is loaded.
Then builds and searches of a random model that fits here, at several --max-memory, each in a
process of its own: the budget of its parts, with a batch of the fit as measured, beside the peak.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from gradindex.influence.codes import default_length, default_width
from gradindex.memory import PLANNED, Allowance
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.storage.records import Part, Record
from indexer.fit.batch_memory import batch_bytes
from indexer.fit.budget import Budget, budget, held_bytes
from indexer.fit.notes import FitSettings

LENGTH = 512  # tokens a sequence
ROOMS = (24, 80, 141)  # GB


@dataclass(frozen=True)
class Shape:
    """A model: all its parameters, and the MLPs' maps [o, i] of one of its layers."""

    name: str
    parameters: float
    layers: int
    maps: tuple[tuple[int, int], ...]
    bias: bool = False

    def modules(self) -> list[Module]:
        return [Module(f"layers.{layer}.{number}", layer, "mlp", o, i, self.bias)
                for layer in range(self.layers) for number, (o, i) in enumerate(self.maps)]


SHAPES = (
    Shape("1.4 B (Pythia: 24 × 2,048, MLP 8,192)", 1.41e9, 24,
          ((8192, 2048), (2048, 8192)), bias=True),
    Shape("7 B (Llama 2: 32 × 4,096, gated MLP 11,008)", 6.74e9, 32,
          ((11008, 4096), (11008, 4096), (4096, 11008))),
    Shape("52 B (our guess at the paper's: 64 × 8,192, MLP 32,768)", 52e9, 64,
          ((32768, 8192), (8192, 32768)), bias=True),
    Shape("70 B (Llama 2: 80 × 8,192, gated MLP 28,672)", 69e9, 80,
          ((28672, 8192), (28672, 8192), (8192, 28672))),
)


def gb(count: float) -> str:
    return f"{count / 1e9:,.2f}" if count < 1e10 else f"{count / 1e9:,.0f}"


def on_paper() -> None:
    """A row a model, bfloat16 weights, and the partitions that several rooms ask for."""
    length = default_length(LENGTH)
    print(f"sequences of {LENGTH} tokens, K = {length:,}; GB; weights in bfloat16, curvature in "
          "float32")
    print("| model | weights | curvature (disk) | largest module's | projections | a query in full "
          "| at rank 32 | fit, all at once | fit on disk |\n|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        modules = shape.modules()
        found = _budget(shape, modules, None, length)
        print(f"| {shape.name} | " + " | ".join(map(gb, (
            found.model, found.curvature, found.module, found.projections, found.query,
            found.query_low_rank, found.sums + found.host_sums, found.fit_disk))) + " |")
    print("\npartitions of the fit (passes over its sequences: twice as many), where half of what "
          "the weights leave is for sums; – where the weights or one module don't fit")
    print("| model | " + " | ".join(f"{room} GB" for room in ROOMS) + " | host with 512 GB |")
    print("|---|" + "---|" * (len(ROOMS) + 1))
    for shape in SHAPES:
        modules, shown = shape.modules(), []
        for room in (*ROOMS, 512):
            left = room * 1e9 - 2 * shape.parameters
            fits = left >= 2 * max(held_bytes([one], 1, 4) for one in modules)
            shown.append(str(_budget(shape, modules, int(PLANNED * left / 2), length).partitions)
                         if fits else "–")
        print(f"| {shape.name} | " + " | ".join(shown) + " |")


def _budget(shape: Shape, modules: list[Module], held: int | None, length: int) -> Budget:
    return budget(int(2 * shape.parameters), modules, 1, 4, held,
                  default_width(length, len(modules)))


MEASURED = """
import json, sys
import gradindex
from gradindex.memory import most, resident
stage, model, data, out, memory = sys.argv[1:]
import indexer.build, search.engine
from transformers import GPTNeoXForCausalLM  # the model's code is the libraries' too
import torch
torch.set_num_threads(2)
from gradindex.model import ModelSource, tracked_modules
before = resident()
options = {"max_memory": None if memory == "None" else memory}
if stage == "build":
    gradindex.build(model, data, out, seq_len=64, fit_sequences=16, segment_size=64,
                    batch_tokens=512, bits=16384, **options)
else:
    gradindex.open(out, **options).search(token_ids=list(range(5, 69)), k=3, shortlist=16,
                                          labels=[-100] * 32 + list(range(37, 69)))
print(json.dumps([before, most()]))
"""


def measured(hidden: int, layers: int) -> None:
    """Builds and searches at several allowances, budget and peak side by side."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        config = GPTNeoXConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
            intermediate_size=4 * hidden, vocab_size=2048, max_position_embeddings=128)
        torch.manual_seed(0)
        network = GPTNeoXForCausalLM(config)
        network.save_pretrained(folder / "model")
        import numpy as np

        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(
            0, 2048, (64, 64)).astype(np.int32), allow_pickle=False)
        model = LanguageModel.load(ModelSource(network))
        modules = tracked_modules(network)
        sample = [Record(n, row, np.ones(64, bool), [Part(n, "", n, -1, -1, 0)])
                  for n, row in enumerate(np.load(folder / "tokens.npy", allow_pickle=False))]
        batch = batch_bytes(model, modules, sample[:16], FitSettings([], "model", 64, 512, 0))
        width = default_width(16384, len(modules))
        largest = max(held_bytes([one], 1, 4) for one in modules)
        print(f"\n{network.num_parameters() / 1e6:.0f} M random parameters, {layers} layers of "
              f"{hidden}, {len(modules)} maps tracked, float32; weights {gb(model.bytes)} GB, "
              f"the largest module's fit {gb(largest)} GB, a batch {gb(batch)} GB; GB beyond the "
              "libraries")
        print("| stage | --max-memory | partitions | budget | peak | peak / budget | "
              "peak / --max-memory |\n|---|---|---|---|---|---|---|")
        least, libraries = model.bytes + largest + batch, list[int]()
        for most in (None, int(least * 2), int(least * 1.4), int(least * 1.15)):
            allowed = Allowance.beside(model.bytes, most, 0, "nothing", batch)
            found = budget(model.bytes, modules, 1, 4, allowed.planned, width)
            kept = min(found.curvature, allowed.curvature or found.curvature)
            full = allowed.bytes is None or found.query <= allowed.bytes / 4
            for stage in ("build", "search"):
                out = subprocess.run(
                    [sys.executable, "-c", MEASURED, stage, str(folder / "model"),
                     str(folder / "tokens.npy"), str(folder / f"index-{most}"), str(most)],
                    capture_output=True, text=True)
                if out.returncode and "does not suffice" not in out.stderr:
                    raise RuntimeError(out.stderr or f"killed ({out.returncode})")
                if out.returncode:
                    print(f"| {stage} | {gb(most or 0)} GB | refused: "
                          f"{out.stderr.splitlines()[-1]} |", flush=True)
                    break
                before, peak = json.loads(out.stdout.splitlines()[-1])
                libraries.append(before)
                expected = model.bytes + batch + (
                    found.sums + found.host_sums if stage == "build" else
                    kept + found.projections + found.module + (
                        2 * found.query if full else found.query_low_rank))
                own = peak - before
                print(f"| {stage} | {'–' if most is None else gb(most) + ' GB'} | "
                      f"{found.partitions if stage == 'build' else '–'} | {gb(expected)} | "
                      f"{gb(own)} | {own / expected:.2f} | "
                      f"{'–' if most is None else f'{own / most:.2f}'} |", flush=True)
        print(f"the libraries take {gb(max(libraries))} GB")


@click.command()
@click.option("--hidden", type=int, default=768, show_default=True)
@click.option("--layers", type=int, default=10, show_default=True)
def main(hidden: int, layers: int) -> None:
    """Print the budgets on paper, then the ones that were measured."""
    on_paper()
    measured(hidden, layers)


if __name__ == "__main__":
    main()
