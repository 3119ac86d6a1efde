"""A small policy that learned preferences, with its pairs: a model for `fidelity.py --model`.

    python -m benchmarks.policy PAIRS.jsonl.gz -o .demo/policy
    python benchmarks/fidelity.py --model .demo/policy/model --data .demo/policy/pairs.jsonl \\
        --task preference

PAIRS has `prompt`, `chosen` and `rejected` a line (right and wrong solutions of GSM8K's questions
were used). A GPT-NeoX learns prompts with both answers as texts, and then the pairs by DPO. What it
said of the answers before is kept in the pairs' `ref_chosen_logps` and `ref_rejected_logps`.
"""

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.feedback import read_rows
from gradindex.demo.small_model import (
    DemoSettings,
    batches_of,
    new_model,
    new_optimizer,
    padded,
    train,
    train_tokenizer,
)
from gradindex.model.tokenise import encode_pair
from gradindex.progress import Progress, stderr_progress
from gradindex.task import BETA

SIDES = ("chosen", "rejected")
BATCH, LEARNING_RATE = 8, 3e-5  # of pairs


@dataclass
class Pair:
    """Both answers behind their prompt: token ids and whether each is the answer's; and the row."""

    row: dict[str, Any]
    tokens: list[list[int]]
    scored: list[list[bool]]


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows, an answer being begun by a new line."""
    return [{"prompt": row["prompt"], **{side: "\n" + row[side] for side in SIDES}}
            for row in read_rows(path)]


def tokenise(tokenizer: Any, rows: list[dict[str, Any]], length: int) -> list[Pair]:
    """Rows as TRL tokenises them, each answer ended; those with a longer text are left out."""
    found = []
    for row in rows:
        both = [encode_pair(tokenizer, row["prompt"], row[side] + tokenizer.eos_token)
                for side in SIDES]
        if max(len(one.tokens) for one in both) <= length:
            found.append(Pair(row, [one.tokens.tolist() for one in both],
                              [one.scored.tolist() for one in both]))
    return found


def answers_log_p(network: Any, pairs: list[Pair]) -> Tensor:
    """Sums of log p (nats) of each pair's answers: [2, b]."""
    ids, scored = ([one for side in range(2) for one in (getattr(pair, of)[side] for pair in pairs)]
                   for of in ("tokens", "scored"))
    tokens, counted = padded(ids, 0), padded(scored, 0)
    log_p = network(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    each = log_p.gather(-1, tokens[:, 1:, None])[..., 0] * counted[:, 1:]
    return each.sum(1).view(2, -1)


def train_on_pairs(
    network: Any, pairs: list[Pair], reference: np.ndarray, steps: int, progress: Progress
) -> None:
    """DPO, in place; `reference` [n, 2] is what the network says of each pair before."""
    optimizer = new_optimizer(network, LEARNING_RATE)
    batches = batches_of(range(len(pairs)), BATCH, 0, lambda n: max(map(len, pairs[n].tokens)))
    progress.start("preferences", steps, "steps")
    for numbers in islice(batches, steps):
        log_p = answers_log_p(network, [pairs[n] for n in numbers])
        gained = log_p - torch.from_numpy(reference[numbers].T).to(log_p)
        loss = -logsigmoid(BETA * (gained[0] - gained[1])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        progress.update(1)
    progress.finish()


@torch.no_grad()
def all_log_p(network: Any, pairs: list[Pair]) -> np.ndarray:
    """Sums of log p of every pair's answers: float64 [n, 2]."""
    parts = [answers_log_p(network, pairs[first:first + BATCH])
             for first in range(0, len(pairs), BATCH)]
    return torch.cat(parts, 1).T.double().numpy()


@click.command()
@click.argument("source", metavar="PAIRS", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(".demo/policy"),
              show_default=True)
@click.option("--length", default=256, show_default=True, help="Tokens of a text at most.")
@click.option("--steps", default=400, show_default=True, help="On the texts.")
@click.option("--passes", default=1, show_default=True, help="On the pairs.")
def main(source: Path, output: Path, length: int, steps: int, passes: int) -> None:
    """Train on the texts, then on the pairs; save the policy and its pairs."""
    progress = stderr_progress()
    rows = read_pairs(source)
    texts = [row["prompt"] + row[side] for row in rows for side in SIDES]
    settings = DemoSettings(length=length, steps=steps)
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    pairs = tokenise(tokenizer, rows, length)
    network = new_model(settings)
    loss = train(network, [ids for pair in pairs for ids in pair.tokens], settings, progress)
    reference = all_log_p(network, pairs)
    train_on_pairs(network, pairs, reference, passes * -(-len(pairs) // BATCH), progress)
    z = BETA * (all_log_p(network, pairs) - reference) @ [1, -1]
    network.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    (output / "pairs.jsonl").write_text("".join(
        json.dumps({**pair.row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}) + "\n"
        for pair, (chosen, rejected) in zip(pairs, reference.tolist(), strict=True)))
    print(f"{len(pairs):,} of {len(rows):,} pairs, of at most {length} tokens; "
          f"{network.num_parameters() / 1e6:.1f} M parameters, loss {loss:.2f} nats a token; "
          f"passes of DPO: {passes}, after which z is {z.mean():.2f} in the mean, above 0 for "
          f"{(z > 0).mean():.3f} of the pairs")


if __name__ == "__main__":
    main()
