"""A pretrained encoder whose last blocks and new head are trained on texts or pairs of texts.

What stands below the trained blocks is run once for each text and kept in a file, which makes a
training about three times as cheap. Trainings by the dozen run side by side, one thread each; every
result is kept in a file, so that a killed run goes on where it was.
"""

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gradindex.model.load_errors import quiet_transformers
from gradindex.progress import Progress
from gradindex.storage.files import atomic_write

CLASSES = ("negative", "positive")  # of a sentence
LENGTH = 64  # tokens of a sentence at most
CHUNK = 64  # texts of like lengths that are run at once where nothing is trained
WARM_UP, CLIP = 0.1, 1.0


@dataclass(frozen=True)
class Recipe:
    """How an encoder is trained: its last `blocks`, `outputs` numbers a text, by AdamW.

    The learning rate rises over the first tenth of the steps and falls to 0 with the last.
    """

    model: str
    outputs: int
    epochs: int
    blocks: int = 2
    learning_rate: float = 2e-4
    batch: int = 16
    weight_decay: float = 0.01
    dropout: float = 0.1

    def said(self) -> str:
        """In words, for a table's heading."""
        return (f"the last {self.blocks} blocks and the head trained, {self.epochs} passes in "
                f"batches of {self.batch}, learning rate {self.learning_rate:g}")


def new_network(recipe: Recipe, seed: int) -> Any:
    """The pretrained encoder with a head whose weights `seed` draws, in float32."""
    quiet_transformers()
    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        recipe.model, num_labels=recipe.outputs, dtype=torch.float32)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = recipe.dropout
    return network.eval()


def read_sentences(path: Path) -> tuple[list[str], np.ndarray]:
    """The sentences of a file and their labels, 0 or 1."""
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").split("\n"))
    texts, labels = zip(*(cells[:2] for cells in lines if cells[-1] in ("0", "1")), strict=True)
    return list(texts), np.array(labels, dtype=np.int64)


def read_tokens(model: str, texts: Sequence[str], length: int) -> list[list[int]]:
    """Token ids of each text, at most `length`, with the tokenizer's special ones."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=length).input_ids
    return ids


# ---- what stands below the trained blocks


class Given(nn.Module):
    """In place of embeddings and lower blocks: hands on what these made of the texts."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """The hidden states [b, t, h] as they come."""
        return inputs_embeds


@contextmanager
def begun_above(network: Any, blocks: int) -> Iterator[Any]:
    """The network without what is below its last blocks: it takes hidden states in its place."""
    base = network.base_model
    embeddings, layers = base.embeddings, base.encoder.layer
    base.embeddings, base.encoder.layer = Given(), layers[len(layers) - blocks:]
    try:
        yield network
    finally:
        base.embeddings, base.encoder.layer = embeddings, layers


class Hidden:
    """Of each text the hidden states [t, h] that the trained blocks read, kept in a file."""

    def __init__(self, folder: Path):
        self._states = np.load(folder / "hidden.npy", mmap_mode="r")
        self._ends = np.load(folder / "ends.npy")

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text."""
        return np.diff(self._ends)

    def batch(self, texts: Sequence[int]) -> dict[str, Tensor]:
        """Some texts, padded, as the network's arguments."""
        parts = [torch.from_numpy(self._states[self._ends[n] : self._ends[n + 1]].copy())
                 for n in texts]
        mask = [torch.ones(len(part), dtype=torch.long) for part in parts]
        pad = torch.nn.utils.rnn.pad_sequence
        return {"inputs_embeds": pad(parts, batch_first=True),
                "attention_mask": pad(mask, batch_first=True)}

    @classmethod
    def of(
        cls, folder: Path, recipe: Recipe, ids: list[list[int]], progress: Progress
    ) -> "Hidden":
        """Run the lower part on every text, or take what the folder holds."""
        if not (folder / "ends.npy").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            base = new_network(recipe, 0).base_model
            base.encoder.layer = base.encoder.layer[: len(base.encoder.layer) - recipe.blocks]
            ends = np.cumsum([0, *map(len, ids)])
            states = np.zeros((ends[-1], base.config.hidden_size), np.float32)
            progress.start("frozen part", len(ids), "texts")
            for some in chunks([len(one) for one in ids]):
                with torch.no_grad():
                    found = base(**padded([ids[n] for n in some])).last_hidden_state
                for n, row in zip(some, found, strict=True):
                    states[ends[n] : ends[n + 1]] = row[: len(ids[n])].numpy()
                progress.update(len(some))
            progress.finish()
            np.save(folder / "hidden.npy", states)
            np.save(folder / "ends.npy", ends)  # the last: with it, all is there
        return cls(folder)


def padded(ids: list[list[int]]) -> dict[str, Tensor]:
    """Token ids as a network's arguments."""
    rows = [torch.tensor(one) for one in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(rows, batch_first=True),
            "attention_mask": pad([torch.ones_like(one) for one in rows], batch_first=True)}


def chunks(lengths: Sequence[int] | np.ndarray) -> Iterator[list[int]]:
    """The numbers of texts, CHUNK of like lengths at a time."""
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), CHUNK):
        yield order[first : first + CHUNK].tolist()


# ---- training


def train(
    hidden: Hidden, recipe: Recipe, texts: np.ndarray, labels: np.ndarray, seed: int
) -> Any:
    """A network trained on rows of one text or two, `texts` [n, 1 or 2] by their numbers.

    Rows of one text have `labels` [n]; of two the first is preferred: −log σ of the difference.
    `seed` draws the head's first weights, the order of the rows and the dropout.
    """
    network, random = new_network(recipe, seed), np.random.default_rng(seed)
    steps, done = recipe.epochs * -(-len(texts) // recipe.batch), 0
    with begun_above(network, recipe.blocks) as top:
        weights = [weight for part in (top.base_model.encoder.layer, *_head(top))
                   for weight in part.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=recipe.weight_decay)
        top.train()
        for _ in range(recipe.epochs):
            for rows in batches(hidden.lengths[texts].max(1), recipe.batch, random):
                done += 1
                rate = min(done / (WARM_UP * steps), (steps - done) / ((1 - WARM_UP) * steps))
                optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate
                logits = top(**hidden.batch(texts[rows].T.flatten().tolist())).logits
                loss = cross_entropy(logits, torch.from_numpy(labels[rows])) \
                    if texts.shape[1] == 1 else \
                    -logsigmoid(torch.sub(*logits[:, 0].view(2, -1))).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(weights, CLIP)
                optimizer.step()
        top.eval()
    return network


def _head(network: Any) -> list[nn.Module]:
    """What stands behind the blocks."""
    pooler = getattr(network.base_model, "pooler", None)
    return [part for part in (pooler, network.classifier) if part is not None]


def batches(
    lengths: np.ndarray, size: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """One pass over the rows in random batches, like lengths together to save padding."""
    order = random.permutation(len(lengths))
    found = []
    for first in range(0, len(order), 16 * size):
        part = order[first : first + 16 * size]
        part = part[np.argsort(lengths[part], kind="stable")]
        found += [part[start : start + size] for start in range(0, len(part), size)]
    for place in random.permutation(len(found)):
        yield found[place]


def outputs(network: Any, hidden: Hidden, texts: np.ndarray, blocks: int) -> np.ndarray:
    """What a network says of texts, by their numbers: float64 [n, outputs]."""
    found = np.zeros((len(texts), network.config.num_labels))
    with begun_above(network, blocks) as top, torch.no_grad():
        for some in chunks(hidden.lengths[texts]):
            found[some] = top(**hidden.batch(texts[some].tolist())).logits.double().numpy()
    return found


# ---- many trainings


@dataclass(frozen=True)
class Retraining:
    """One training and what is asked of its network: `outputs` of the texts `asked` [n].

    The network itself is saved in the folder `model`, where there is one, its classes being called
    `names`.
    """

    texts: np.ndarray
    labels: np.ndarray
    seed: int
    asked: np.ndarray
    model: Path | None = None
    names: Sequence[str] = ()

    def name(self, recipe: Recipe) -> str:
        """A name that is its own."""
        digest = hashlib.sha256(repr(recipe).encode())
        for part in (self.texts, self.labels, self.asked):
            digest.update(np.ascontiguousarray(part).tobytes())
        return f"{self.seed}-{digest.hexdigest()[:16]}.npy"


def retrain(folder: Path, recipe: Recipe, one: Retraining, path: Path) -> None:
    """One training, in a process of its own; writes the outputs."""
    torch.set_num_threads(1)
    hidden = Hidden(folder)
    network = train(hidden, recipe, one.texts, one.labels, one.seed)
    if one.model is not None:
        save(network, recipe, one.model, one.names)
    found = outputs(network, hidden, one.asked, recipe.blocks)
    atomic_write(path, lambda file: np.save(file, found))


def retrain_all(
    folder: Path, recipe: Recipe, wanted: Sequence[Retraining], what: str, threads: int,
    progress: Progress,
) -> np.ndarray:
    """The outputs [r, asked, outputs] of each training, where the folder lacks them."""
    kept = folder / "retrained"
    kept.mkdir(exist_ok=True)
    paths = [kept / one.name(recipe) for one in wanted]
    missing = {path: one for path, one in zip(paths, wanted, strict=True) if not path.exists()}
    progress.start(what, len(paths), "trainings", done=len(paths) - len(missing))
    with ProcessPoolExecutor(threads, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(retrain, folder, recipe, one, path)
                   for path, one in missing.items()]
        for future in as_completed(running):
            future.result()
            progress.update(1)
    progress.finish()
    return np.stack([np.load(path) for path in paths])


def save(network: Any, recipe: Recipe, folder: Path, names: Sequence[str]) -> None:
    """Write a network with its tokenizer, as a build takes it; `names` are those of classes."""
    if names:
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {name: number for number, name in enumerate(names)}
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(recipe.model).save_pretrained(folder)
