"""Do a classifier's scores say what retraining without some of the data would do?

    python -m benchmarks.lds_classifier MODEL TRAIN.tsv TEST.tsv --work .demo/lds --threads 2

The linear datamodeling score of `lds.py` for a classifier of sentences: MODEL is a pretrained
encoder (a folder or a hub id; the sentence encoder all-MiniLM-L6-v2 was used), the files have a
sentence, a tab and 0 or 1 a line (SST-2). It is trained on all of the data and again on random
halves; f of a held-out sentence is log p of its label. `--small` runs all of it in minutes.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from benchmarks.encoder import (
    CLASSES,
    LENGTH,
    Hidden,
    Recipe,
    Retraining,
    read_sentences,
    read_tokens,
    retrain_all,
)
from benchmarks.lds import DRAWS, interval, mean_lds, random_choice, reliability
from gradindex.influence.exact import exact_scores
from gradindex.influence.gradients import backward, gradient
from gradindex.influence.preconditioned import Gradients, Preconditioned, precondition
from gradindex.modules import Module
from gradindex.progress import duration, stderr_progress
from gradindex.storage.records import Record
from search.engine import Searcher

EXACT, DOT = "EK-FAC, exact", "gradient dot product"
SIGNED, HIDDEN = "cosine of hidden states, − where labels differ", "cosine of hidden states"
BATCH_TOKENS = 2048
DAMPINGS = (1.0, 0.01, 0.001)


def log_p(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log p of each text's label, from logits [..., q, classes]: [..., q]."""
    whole = torch.from_numpy(logits).log_softmax(-1).numpy()
    found: np.ndarray = whole[..., np.arange(len(labels)), labels]
    return found


def query_gradients(index: Searcher, queries: list[Record]) -> Gradients:
    """∇ log p(label | text) of every query: [q, o, i] by module."""
    model, modules = index.model, index.manifest.modules
    found: dict[str, list[torch.Tensor]] = {module.name: [] for module in modules}

    def each(module: Module, a: torch.Tensor, d: torch.Tensor) -> None:
        found[module.name].append(gradient(module, a, d))

    for query in queries:
        with torch.no_grad():
            backward(model, modules, model.batch([query]), each)
    return {name: torch.cat(parts) for name, parts in found.items()}


def gradient_scores(index: Searcher, queries: list[Record]) -> dict[str, np.ndarray]:
    """Exact influence [q, n] at the index's damping and at others, and the dot product."""
    gradients, ekfac = query_gradients(index, queries), index.snapshot.ekfac
    sequences = index.snapshot.records(range(len(index)))

    def score(asked: Gradients) -> np.ndarray:
        return exact_scores(index.model, index.manifest.modules, Preconditioned(asked), sequences,
                            BATCH_TOKENS)

    def damped(factor: float) -> np.ndarray:
        return score(precondition(ekfac, {
            name: ekfac[name].coordinates(g, factor) for name, g in gradients.items()}))

    first = index.manifest.damping
    return {EXACT: damped(first), DOT: score(gradients)} | {
        f"EK-FAC, damping {factor:g}": damped(factor) for factor in DAMPINGS}


def hidden_scores(index: Searcher, queries: list[Record]) -> np.ndarray:
    """Cosine [q, n] of the last hidden states, averaged over tokens."""
    states = []
    for record in [*queries, *index.snapshot.records(range(len(index)))]:
        with torch.no_grad():
            ids = torch.from_numpy(record.tokens).long()[None]
            states.append(index.model.network.base_model(ids).last_hidden_state[0].double().mean(0))
    unit = torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()
    return np.asarray(unit[: len(queries)] @ unit[len(queries):].T)


@click.command()
@click.argument("model")
@click.argument("training", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), default=Path(".demo/lds-classifier"),
              show_default=True, help="Where everything is kept.")
@click.option("--rows", default=1024, show_default=True)
@click.option("--queries", default=64, show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--subsets", default=40, show_default=True)
@click.option("--seeds", default=2, show_default=True, help="Retrainings of each subset.")
@click.option("--modules", default="4-6", show_default=True, help="That are indexed.")
@click.option("--threads", default=1, show_default=True, help="Retrainings at once.")
@click.option("--small", is_flag=True, help="A minute or two, to see that it runs.")
def main(
    model: str, training: Path, test: Path, work: Path, rows: int, queries: int, epochs: int,
    subsets: int, seeds: int, modules: str, threads: int, small: bool,
) -> None:
    """Train, retrain on halves, score; print tables."""
    begun = time.monotonic()
    if small:
        rows, queries, epochs, subsets = 128, 8, 2, 10  # of fewer, a draw may be one alone
    progress, recipe = stderr_progress(), Recipe(model, len(CLASSES), epochs)
    # 1) the data, and what the frozen part makes of it
    parts = []
    for path, most in ((training, rows), (test, queries)):
        texts, labels = read_sentences(path)
        chosen = np.random.default_rng(0).permutation(len(texts))[:most]
        parts.append(([texts[n] for n in chosen], labels[chosen]))
    (texts, labels), (asked, wanted) = parts
    n, numbers = len(texts), np.arange(len(texts) + len(asked))
    folder = work / f"{n}-{len(asked)}-{epochs}"
    Hidden.of(folder, recipe, read_tokens(model, texts + asked, LENGTH), progress)

    # 2) what retraining says: seed 0 is the scored model's own
    kept = random_choice(subsets, n, n // 2)
    f = np.stack([log_p(retrain_all(
        folder, recipe, [Retraining(numbers[:n][half][:, None], labels[half], seed, numbers[n:])
                         for half in kept],
        f"halves, seed {seed}", threads, progress), wanted) for seed in range(1, seeds + 1)])

    # 3) the scored model, its index, and the scores
    scored = Retraining(numbers[:n, None], labels, 0, numbers[n:], folder / "model", CLASSES)
    [full] = retrain_all(folder, recipe, [scored], "scored model", 1, progress)
    index = _index(folder, texts, labels, modules)
    records = [_record(index, *one) for one in zip(asked, wanted, strict=True)]
    cosines = hidden_scores(index, records)
    alike = np.where(wanted[:, None] == labels, 1.0, -1.0)
    methods = gradient_scores(index, records) | {SIGNED: cosines * alike, HIDDEN: cosines}

    # 4) how well they agree
    accuracy = np.mean(full.argmax(1) == wanted)
    print(f"{model}; {recipe.said()}; modules {modules}; {n:,} sentences of at most {LENGTH} "
          f"tokens, {len(asked)} held-out ones, {-log_p(full, wanted).mean():.2f} nats, accuracy "
          f"{accuracy:.3f}. {subsets} random halves × {seeds} seeds: {reliability(f)}. 95 %: "
          f"bootstrap over subsets and queries, {DRAWS:,} draws\n\n| score | LDS | 95 % |\n"
          "|---|---|---|")
    lds = partial(mean_lds, kept, f.mean(0))
    measured = {name: lds(scores) for name, scores in methods.items()}
    for name, values in measured.items():
        print(f"| {name} | {interval(values)} |")
    print("\n| LDS of the exact score less that of | | 95 % |\n|---|---|---|")
    for name in list(measured)[1:]:
        print(f"| {name} | {interval(measured[EXACT] - measured[name], '+')} |")
    print(f"\ntotal {duration(time.monotonic() - begun)}")


def _index(folder: Path, texts: list[str], labels: np.ndarray, modules: str) -> Searcher:
    """The index of the sentences, in their order."""
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"sentence": text, "label": CLASSES[label]}) + "\n"
                            for text, label in zip(texts, labels, strict=True)))
    if (folder / f"index-{modules}").is_dir():
        return gradindex.open(folder / f"index-{modules}")
    index = gradindex.build(folder / "model", data, folder / f"index-{modules}", seq_len=LENGTH,
                            modules=modules, bits=1024, fit_sequences=len(texts))
    assert index is not None and len(index) == len(texts)
    return index


def _record(index: Searcher, text: str, label: int) -> Record:
    """A sentence with its label as an index keeps one."""
    query = index.make_query(text=text, label=CLASSES[label])
    tokens = np.array(query.tokens, np.int32)
    return Record(0, tokens, np.ones(len(tokens), bool), [], label=label)


if __name__ == "__main__":
    main()
