"""The demo's small language model: its tokenizer, its training, and what it has learned.

The model sees each document as `gradindex build` will: alone, tokenised as it is, in consecutive
windows of `length` tokens. The same settings, Python and number of threads give the same weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from gradindex import draws
from gradindex.demo.library_documents import Document
from gradindex.model.tokenise import encode_pair
from gradindex.progress import Progress
from gradindex.results import UNSCORED

END = "<|endoftext|>"
CPU = torch.device("cpu")


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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


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
    optimizer = new_optimizer(model, settings)
    # up over a twentieth of the steps, then down along a cosine
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1, 20 * (step + 1) / settings.steps) * (1 + math.cos(math.pi * step / settings.steps)) / 2)
    batches = _batches(sequences, settings)
    losses: list[float] = []
    progress.start("training", settings.steps, "steps")
    model.train()
    for _ in range(settings.steps):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        progress.update(1)
    model.eval()
    last = losses[-math.ceil(len(sequences) / settings.batch):]
    final: float = sum(last) / len(last)
    passes = settings.steps * settings.batch / len(sequences)
    progress.finish(f"{settings.steps:,} steps, {passes:.1f} passes, "
                    f"final loss {final:.3f} nats a token")
    return final


def new_optimizer(model: GPTNeoXForCausalLM, settings: DemoSettings) -> torch.optim.AdamW:
    """What a model is trained with."""
    return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95),
                             weight_decay=0.01)


def _batches(
    sequences: list[list[int]], settings: DemoSettings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels without end, every sequence once a pass, in batches of similar lengths."""
    shuffle = draws.generator(draws.Stream.DEMO_BATCHES, settings.seed).shuffle
    order = list(sequences)
    size = settings.batch
    while True:
        shuffle(order)
        groups = [sorted(order[start:start + 16 * size], key=len)
                  for start in range(0, len(order), 16 * size)]
        batches = [group[start:start + size] for group in groups
                   for start in range(0, len(group), size)]
        shuffle(batches)
        for batch in batches:
            width = max(map(len, batch))
            yield (torch.tensor([ids + [0] * (width - len(ids)) for ids in batch]),
                   torch.tensor([ids + [UNSCORED] * (width - len(ids)) for ids in batch]))


@torch.no_grad()
def log_probability(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """Mean log p (nats) of the completion's tokens after the prompt."""
    tokenised = encode_pair(tokenizer, prompt, completion)
    ids = torch.from_numpy(tokenised.tokens).long()
    log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    each = log_p.gather(1, ids[1:, None])[:, 0]
    return float(each[torch.from_numpy(tokenised.scored[1:])].mean())
