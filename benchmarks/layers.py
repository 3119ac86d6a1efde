"""What layers besides plain linear maps cost, and how near fused experts come to transformers' own.

    python -m benchmarks.layers

1. Every class of fused experts in transformers, alone, on random weights: our forward pass beside
   the class's own loop, in float64.
2. A mixture of experts: a forward and a backward pass that hands over every expert's inputs and
   gradients, beside the same passes of transformers alone, in two of its ways; and covariances
   from packed tokens beside the same from all tokens, zeros where none was routed.
3. A quantised base: the same passes with 8 and 4 bits beside float32.

Passes compute no weight gradients. All run in turn, and the median counts.
"""

import importlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gradindex.influence.blockwise import covariance_shapes
from gradindex.influence.gradients import backward
from gradindex.model import fused_experts
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.model.network import EXPERTS, LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.objective.batch import Batch, Text
from gradindex.objective.next_token import NextToken
from indexer.fit.batch_sums import add_covariances

MIXTURE = dict(vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
               num_attention_heads=4, num_key_value_heads=4, num_experts=16, num_experts_per_tok=2)
DENSE = dict(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
             num_attention_heads=8, num_key_value_heads=8)
ROWS, LENGTH = 8, 128
SMALL = dict(hidden_size=8, intermediate_size=6, moe_intermediate_size=6, expert_ffn_hidden_size=6,
             num_local_experts=4, num_experts=4, n_routed_experts=4, moe_num_experts=4,
             num_moe_experts=4)


def alternate(repeats: int, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each function, run in turn after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(own) for name, own in times.items()}


def show(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(f"\n{title}\n\n| what | ms | ratio |\n|---|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {1000 * own:.0f} | {own / first:.2f} |")


def compare_classes() -> None:
    """1: the largest difference of outputs, class by class."""
    equal, others = [], []
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        names = re.findall(r"@use_experts_implementation.*\n(?:@.*\n)*class (\w+)",
                           file.read_text())
        for name in names:
            try:
                error = _difference(file, name)
            except Exception as wrong:  # a class that can't be made from a small configuration
                others.append(f"{name}: can't be made alone ({type(wrong).__name__})")
                continue
            (equal if error < 1e-12 else others).append(
                name if error < 1e-12 else f"{name}: {error:.1e}")
    print(f"{len(equal)} of {len(equal) + len(others)} classes of fused experts in transformers "
          f"{transformers.__version__} give the same as their own loop, within 1e-12.")
    print("Others: " + "; ".join(others))


def _difference(file: Path, name: str) -> float:
    module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    made = re.search(rf"class {name}\b.*?def __init__\(self, config: \"?(\w+)", file.read_text(),
                     re.DOTALL)
    configs = [one for one in dir(module) if one.endswith("Config") and "PreTrained" not in one]
    config = getattr(module, made.group(1) if made else configs[0])().get_text_config()
    for key, value in SMALL.items():
        if hasattr(config, key):
            setattr(config, key, value)
    torch.manual_seed(0)
    kind = getattr(module, name)
    fused = kind(config).double()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    first = fused.gate_up_proj if fused.has_gate else fused.up_proj
    x = torch.randn(9, first.shape[1 if fused.is_transposed else 2], dtype=torch.float64)
    chosen = torch.stack([torch.randperm(fused.num_experts)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, dtype=torch.float64)
    expected = kind.forward.__wrapped__(fused, x, chosen, weights)
    fused_experts.open_experts(nn.ModuleList([fused]))
    with torch.no_grad():
        return float((fused_experts.forward(fused, x, chosen, weights) - expected).abs().max())


def plain(model: LanguageModel, batch: Batch, way: str | None = None) -> None:
    """A forward and a backward pass of transformers alone, to the first block's inputs."""
    own = model.network.config._experts_implementation
    if way:
        model.network.config._experts_implementation = way
    inputs = model.network.get_input_embeddings()(batch.tokens).requires_grad_()
    logits = model.network(inputs_embeds=inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten()).backward()
    model.network.config._experts_implementation = own


def nothing(_: Module, a: torch.Tensor, d: torch.Tensor) -> None:
    pass


def small_model(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def make_data() -> Batch:
    random = np.random.default_rng(0)
    return NextToken().batch([
        Text(random.integers(0, 4096, LENGTH).astype(np.int32), np.ones(LENGTH, bool))
        for _ in range(ROWS)], torch.device("cpu"))


def compare_passes(repeats: int) -> None:
    """2: the price of seeing into the experts."""
    network = small_model("olmoe", **MIXTURE).requires_grad_(False)
    model, batch = LanguageModel(network, None, ModelSource(network)), make_data()
    modules = tracked_modules(network)
    ways = {f"transformers, {way}": (lambda way=way: plain(model, batch, way))
            for way in ("eager", "grouped_mm")}
    show(f"A mixture of {MIXTURE['num_experts']} experts, {MIXTURE['num_experts_per_tok']} a "
         f"token, {ROWS} × {LENGTH} tokens, {len(modules)} maps", alternate(repeats, {
             **ways, "transformers, our way of running experts": lambda: plain(
                 model, batch, EXPERTS),
             "gradindex, inputs and gradients of every map": lambda: backward(
                 model, modules, batch, nothing)}))

    sums = {name: torch.zeros(shape) for name, shape in covariance_shapes(modules, 1).items()}

    def spread(module: Module, a: torch.Tensor, d: torch.Tensor) -> None:
        places = batch.positions[module.name].clamp(min=0).unsqueeze(-1)
        for side, x in (("A", a), ("S", d)):
            rows = x.new_zeros(*batch.tokens.shape, x.shape[-1]).scatter_add_(
                1, places.expand(x.shape), x).flatten(0, 1)
            sums[f"{module.name}/{side}"].addmm_(rows.T, rows)

    with torch.no_grad():
        show("Covariances of the mixture", alternate(repeats, {
            "packed tokens": lambda: add_covariances(model, modules, sums, batch, None),
            "all tokens, zeros where none was routed": lambda: backward(
                model, modules, batch, spread)}))


def compare_bits(repeats: int) -> None:
    """3: the price of dequantising in every pass."""
    batch, folder = make_data(), Path(tempfile.mkdtemp())
    small_model("llama", **DENSE).save_pretrained(folder / "whole")
    models = {"float32": LanguageModel.load(ModelSource(str(folder / "whole"), device="cpu"))}
    for bits in (8, 4):
        settings = transformers.BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(
            folder / "whole", quantization_config=settings).save_pretrained(folder / str(bits))
        models[f"{bits} bits"] = ModelSource(str(folder / str(bits))).load("cpu")
    modules = tracked_modules(models["float32"].network)
    for name, model in models.items():
        print(f"{name}: {model.bytes / 1e6:.1f} MB of weights and buffers")
    show(f"A base of {models['float32'].network.num_parameters() / 1e6:.1f} M parameters, {ROWS} × "
         f"{LENGTH} tokens", alternate(repeats, {
             name: (lambda model=model: backward(model, modules, batch, nothing))
             for name, model in models.items()}))


@click.command(help=__doc__, context_settings={"max_content_width": 100})
@click.option("--repeats", default=7)
def main(repeats: int) -> None:
    """Print the tables of results/layers.md."""
    quiet_transformers()
    torch.set_num_threads(1)
    compare_classes()
    compare_passes(repeats)
    compare_bits(repeats)


if __name__ == "__main__":
    main()
