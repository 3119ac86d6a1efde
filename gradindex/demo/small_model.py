"""The demo's small language model: its tokenizer, its training, and what it has learned.

The model sees each document as `gradindex build` will: alone, tokenised as it is, in consecutive
windows of `length` tokens. The same settings, Python and number of threads give the same weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from gradindex import draws
from gradindex.demo.library_documents import Document
from gradindex.errors import InputError
from gradindex.model.tokenise import encode_pair
from gradindex.progress import Progress
from gradindex.results import UNSCORED

END = "<|endoftext|>"
CPU = torch.device("cpu")


class Training(Protocol):
    """What a training is told."""

    @property
    def steps(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True)
class DemoSettings:
    """What is trained; lengths in tokens. About a minute of training on two cores."""

    sequences: int = 4096
    length: int = 128
    longest: int = 96  # of the documents taken, which here makes each a sequence
    vocabulary: int = 4096
    layers: int = 2
    hidden: int = 192
    heads: int = 4
    steps: int = 600
    batch: int = 16
    learning_rate: float = 4e-3
    seed: int = 0


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no special tokens by itself."""
    return PreTrainedTokenizerFast(tokenizer_object=trained_bytes(texts, vocabulary, [END]),
                                   bos_token=END, eos_token=END)


def trained_bytes(texts: list[str], vocabulary: int, special: list[str]) -> Tokenizer:
    """A byte-level BPE, whose first tokens are the special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return tokenizer


def windows(documents: list[Document], tokenizer: Any, length: int) -> list[list[int]]:
    """The training sequences; a window of one token predicts nothing and is left out."""
    sequences = []
    for document in documents:
        ids = tokenizer(document["text"], verbose=False).input_ids
        sequences += [ids[start:start + length] for start in range(0, len(ids), length)]
    return [ids for ids in sequences if len(ids) > 1]


def new_model(settings: DemoSettings) -> GPTNeoXForCausalLM:
    """An untrained model. Its context is a sequence, so that `gradindex build` cuts the same."""
    with draws.always_alike(CPU, settings.seed):
        return GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.hidden,
            intermediate_size=4 * settings.hidden, num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads, max_position_embeddings=settings.length,
            initializer_range=0.1,  # 0.02 learns far more slowly at this size
            bos_token_id=0, eos_token_id=0,
        ))


def train(
    model: GPTNeoXForCausalLM, sequences: list[list[int]], settings: DemoSettings,
    progress: Progress,
) -> float:
    """Train in place for a fixed number of steps; the mean loss of the last pass, in nats."""
    batches = ({"input_ids": padded(group, 0), "labels": padded(group, UNSCORED)}
               for group in batches_of(sequences, settings.batch, settings.seed, len))
    return run_training(model, batches, len(sequences), settings, progress, "nats a token")


def run_training(
    model: Any, batches: Iterator[dict[str, torch.Tensor]], rows: int, settings: Training,
    progress: Progress, unit: str,
) -> float:
    """Train in place on what a model is called with; the mean loss of the last pass of `rows`.

    Raises InputError where there are none.
    """
    if not rows:  # of what there is nothing, batches would be looked for without end
        raise InputError("Python's standard library has no text here to train the demo's model on; "
                         "expected its sources. Run gradindex with a Python that has them.")
    optimizer = new_optimizer(model, settings.learning_rate)
    # up over a twentieth of the steps, then down along a cosine
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1, 20 * (step + 1) / settings.steps) * (1 + math.cos(math.pi * step / settings.steps)) / 2)
    losses: list[float] = []
    progress.start("training", settings.steps, "steps")
    model.train()
    for _ in range(settings.steps):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        progress.update(1)
    model.eval()
    last = losses[-math.ceil(rows / settings.batch):]
    final: float = sum(last) / len(last)
    progress.finish(f"{settings.steps:,} steps, {settings.steps * settings.batch / rows:.1f} "
                    f"passes, final loss {final:.3f} {unit}")
    return final


def new_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """What a model is trained with."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95),
                             weight_decay=0.01)


Item = TypeVar("Item")


def batches_of(
    items: Sequence[Item], size: int, seed: int, length: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Batches of similar lengths without end, every item once a pass."""
    shuffle = draws.generator(draws.Stream.DEMO_BATCHES, seed).shuffle
    order = list(items)
    while True:
        shuffle(order)
        groups = [sorted(order[start:start + 16 * size], key=length)
                  for start in range(0, len(order), 16 * size)]
        batches = [group[start:start + size] for group in groups
                   for start in range(0, len(group), size)]
        shuffle(batches)
        yield from batches


def padded(rows: list[list[int]], padding: int) -> torch.Tensor:
    """Rows as long as the longest of them, padded on the right: int64 [b, m]."""
    width = max(map(len, rows))
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows])


@torch.no_grad()
def log_probability(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """Mean log p (nats) of the completion's tokens after the prompt."""
    tokenised = encode_pair(tokenizer, prompt, completion)
    ids = torch.from_numpy(tokenised.tokens).long()
    log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    each = log_p.gather(1, ids[1:, None])[:, 0]
    return float(each[torch.from_numpy(tokenised.scored[1:])].mean())
