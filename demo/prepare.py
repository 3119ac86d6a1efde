"""Make what the demo indexes: a small language model and the documents it was trained on.

    python demo/prepare.py .demo

writes

    .demo/model/            an ordinary transformers folder: GPT-NeoX, a byte-level BPE tokenizer
    .demo/documents.jsonl   id, text, module and kind of every training document
    .demo/demo.json         the settings, sizes, final loss and what was learned of QUERIES

in about two minutes on two cores. The text is the running Python's standard library (see
documents.py), so nothing is downloaded. The model sees each document as `gradindex build` will:
alone, tokenised as it is, in consecutive windows of `length` tokens. The same settings, Python
and number of threads give the same weights. Run again, it reuses what is complete.
"""

import hashlib
import json
import math
import platform
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

if not __package__:  # run as a script, from anywhere
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.documents import Document, standard_library_documents
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.tokenise import encode_pair
from gradindex.progress import Progress, stderr_progress

END = "<|endoftext|>"
UNSCORED = -100

# (prompt, completion): what the demo asks about. Each was told by several documents: a sentence in
# other words than theirs, a fact that is only code, and an idiom.
QUERIES = (
    ("Write a message with severity", " 'ERROR' on the root logger"),
    ("weekdays = ['Mon', 'Tue',", " 'Wed', 'Thu', 'Fri'"),
    ("if self.closed:\n    raise", ' ValueError("I/O operation on closed file'),
)

# Documents of these modules come first: much used, and told in many places.
MODULES = """
    pydoc_data _collections_abc _compression _pydatetime _pyio argparse base64 bisect calendar cmd
    collections configparser contextlib copy csv dataclasses datetime difflib enum fileinput fnmatch
    fractions ftplib functools getpass glob gzip hashlib heapq hmac html http imaplib ipaddress json
    logging numbers os pathlib poplib posixpath queue random sched secrets shelve
    shutil smtplib socket socketserver ssl statistics string subprocess tempfile textwrap threading
    timeit urllib wave weakref wsgiref zipfile
"""


@dataclass(frozen=True)
class Settings:
    """What is trained; lengths in tokens. About two minutes of training on two cores."""

    sequences: int = 4096
    length: int = 128
    longest: int = 96  # of the documents taken, which here makes each a sequence
    vocabulary: int = 4096
    layers: int = 2
    hidden: int = 192
    heads: int = 4
    steps: int = 1000
    batch: int = 16
    learning_rate: float = 4e-3
    seed: int = 0


def prepare(out: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Write the demo into `out`, unless it is there, and return the facts in demo.json."""
    asked = {"settings": asdict(settings), "python": platform.python_version()}
    done = out / "demo.json"
    if done.exists():
        facts: dict[str, Any] = json.loads(done.read_text())
        if asked.items() <= facts.items():
            progress.say(f"{out} is complete; reusing it")
            return facts
        done.unlink()
    out.mkdir(parents=True, exist_ok=True)

    progress.start("documents", 0, "")
    documents, tokenizer = choose_documents(settings)
    sequences = windows(documents, tokenizer, settings.length)
    tokens = sum(map(len, sequences))
    progress.finish(f"{len(documents):,} of the standard library, {len(sequences):,} sequences, "
                    f"{tokens:,} tokens")

    model = new_model(settings)
    before = [log_probability(model, tokenizer, *query) for query in QUERIES]
    loss = train(model, sequences, settings, progress)
    learned = [
        {"prompt": prompt, "completion": completion, "before": untrained,
         "after": log_probability(model, tokenizer, prompt, completion)}
        for (prompt, completion), untrained in zip(QUERIES, before, strict=True)
    ]
    progress.say("log p a token, before and after training:")
    for line in learned:
        progress.say(f"  {line['before']:6.2f} {line['after']:6.2f}  {line['prompt']!r} → "
                     f"{line['completion']!r}")

    save(model, tokenizer, documents, out)
    facts = {**asked, "documents": len(documents), "sequences": len(sequences), "tokens": tokens,
             "parameters": model.num_parameters(), "loss": loss, "learned": learned}
    done.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def choose_documents(settings: Settings) -> tuple[list[Document], PreTrainedTokenizerFast]:
    """Documents that make `settings.sequences` windows, MODULES first, and their tokenizer."""
    def rank(document: Document) -> tuple[bool, bytes]:
        key = f"{settings.seed}:{document['id']}".encode()
        return document["module"].split(".")[0] not in first, hashlib.sha256(key).digest()

    first = set(MODULES.split())
    everything = standard_library_documents()
    ranked = sorted(everything, key=rank)
    tokenizer = train_tokenizer([document["text"] for document in ranked[:2 * settings.sequences]],
                                settings.vocabulary)
    chosen, left = set(), settings.sequences
    for document in ranked:
        tokens = len(tokenizer(document["text"]).input_ids)
        cost = math.ceil(tokens / settings.length)
        if tokens <= settings.longest and cost <= left:
            chosen.add(document["id"])
            left -= cost
        if not left:
            break
    return [document for document in everything if document["id"] in chosen], tokenizer


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


def new_model(settings: Settings) -> GPTNeoXForCausalLM:
    """An untrained model. Its context is a sequence, so that `gradindex build` cuts the same."""
    torch.manual_seed(settings.seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, max_position_embeddings=settings.length,
        initializer_range=0.1,  # 0.02 learns far more slowly at this size
        bos_token_id=0, eos_token_id=0,
    ))


def train(
    model: GPTNeoXForCausalLM, sequences: list[list[int]], settings: Settings, progress: Progress
) -> float:
    """Train in place for a fixed number of steps; the mean loss of the last pass, in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1, 20 * (step + 1) / settings.steps) * (1 + math.cos(math.pi * step / settings.steps)) / 2)
    batches = _batches(sequences, settings)
    losses = []
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
    final = sum(last) / len(last)
    passes = settings.steps * settings.batch / len(sequences)
    progress.finish(f"{settings.steps:,} steps, {passes:.1f} passes, "
                    f"final loss {final:.3f} nats a token")
    return final


def _batches(
    sequences: list[list[int]], settings: Settings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels without end, every sequence once a pass, in batches of similar lengths."""
    shuffle = random.Random(settings.seed).shuffle
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
    return each[torch.from_numpy(tokenised.scored[1:])].mean().item()


def save(
    model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document],
    out: Path,
) -> None:
    """Write documents.jsonl and model/, each complete or not at all."""
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    partial = out / "documents.jsonl.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(out / "documents.jsonl")
    partial = out / "model.partial"
    for folder in (partial, out / "model", out / "index"):  # an index of another model is no use
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out / "model")


@click.command()
@click.argument("out_dir", type=click.Path(path_type=Path, file_okay=False))
@click.option("--sequences", type=int, default=Settings.sequences, show_default=True)
@click.option("--steps", type=int, default=Settings.steps, show_default=True)
@click.option("--seed", type=int, default=Settings.seed, show_default=True)
def main(out_dir: Path, **changes: int) -> None:
    """Train a small language model on Python's standard library; write it and its text."""
    quiet_transformers()
    prepare(out_dir, Settings(**changes), stderr_progress())


if __name__ == "__main__":
    main()
