"""What Ray costs and brings a search: one process beside workers of one thread, on this machine.

    python -m benchmarks.ray_search [--sequences 2048]

Builds an index of random sequences with a random model (which ones doesn't change how long a search
takes), then asks the same query of one process with one thread and of one or two workers with one
thread each, in turn, and prints medians of each step and their ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gradindex
from gradindex.model.load_errors import quiet_transformers
from search.engine import Searcher

LENGTH, VOCABULARY = 128, 4096
REPEATS = 7
SEARCHES = {"--no-rescore": {"rescore": False}, "--shortlist 100": {"shortlist": 100}}
STEPS = ("gradient", "scan", "rescore", "conclude")


def main() -> None:
    """Build, then measure."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--sequences", type=int, default=2048)
    asked = flags.parse_args()
    quiet_transformers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        index = build(Path(folder), asked.sequences)
        alone = gradindex.open(index)
        facts = alone.manifest
        print(f"{len(alone):,} sequences of {LENGTH} tokens in {len(facts.segments)} segments, "
              f"{len(facts.modules)} modules, K = {facts.code['length']:,}")
        for workers in (1, 2):
            compare(index, alone, workers)


def build(folder: Path, count: int) -> Path:
    """An index of so many random sequences."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gpt_neox", hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
    )).save_pretrained(folder / "model")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, LENGTH))
    np.save(folder / "tokens.npy", tokens)
    gradindex.build(str(folder / "model"), folder / "tokens.npy", folder / "index",
                    fit_sequences=512, segment_size=count // 8)
    return folder / "index"


def compare(index: Path, alone: Searcher, workers: int) -> None:
    """Ask one process and so many workers in turn, and print the medians."""
    import ray

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False,
             logging_level="error")
    begun = time.perf_counter()
    shared = gradindex.open(index, ray=True, ray_workers=workers)
    shared.snapshot.load()
    print(f"\n{workers} worker{'s' * (workers > 1)}, there after {time.perf_counter() - begun:.1f}"
          f" s; load average {os.getloadavg()[0]:.1f}; milliseconds: one process / Ray")
    print("| search | " + " | ".join((*STEPS, "all", "ratio")) + " |")
    for name, controls in SEARCHES.items():
        ask(alone, controls)
        ask(shared, controls)
        pairs = [(ask(alone, controls), ask(shared, controls)) for _ in range(REPEATS)]
        assert all(mine["ids"] == theirs["ids"] for mine, theirs in pairs)
        cells, both = [], []
        for step in (*STEPS, "all"):
            both = [statistics.median(pair[side][step] for pair in pairs) for side in (0, 1)]
            cells.append(f"{1000 * both[0]:.0f} / {1000 * both[1]:.0f}")
        print(f"| `{name}` | " + " | ".join(cells) + f" | {both[1] / both[0]:.2f} |", flush=True)
    del shared
    ray.shutdown()


def ask(searcher: Searcher, controls: dict[str, object]) -> dict[str, object]:
    """Seconds of each step and of all, and the hits found."""
    tokens = [*range(5, 37)]
    begun = time.perf_counter()
    result = searcher.search(token_ids=tokens, labels=[-100] * 16 + tokens[16:], **controls)
    seconds = {step: result.seconds.get(step, 0.0) for step in STEPS}
    return {**seconds, "all": time.perf_counter() - begun, "ids": [hit.id for hit in result]}


if __name__ == "__main__":
    main()
