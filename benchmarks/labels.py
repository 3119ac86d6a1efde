"""Are corrupted labels found, and is a classifier better without them?

    python -m benchmarks.labels MODEL TRAIN.tsv TEST.tsv --work .demo/labels --threads 2

MODEL is a pretrained encoder (a folder or a hub id; the sentence encoder all-MiniLM-L6-v2 was
used), the files have a sentence, a tab and 0 or 1 a line (SST-2). Of TRAIN every tenth label is
flipped, a classifier is trained on the result, indexed and audited, once with few passes over the
data and once with many, which learn the wrong labels by heart. Every signal of the audit, harm to
50 trusted sentences of TEST among them, stands beside those that need no curvature: how well it
ranks the flipped first (AUROC), and the share found when a tenth and a fifth are inspected.

Then it is trained again without the tenth that is most suspect, by influence and by loss, and
without a random tenth: accuracy on the rest of TEST. `--small` runs all of it in minutes.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from benchmarks.detection import DRAWS, RIVALS, Found, paired, print_tables
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
from gradindex.progress import Progress, duration, stderr_progress

TRUSTED, FITTED = 50, 2048
FLIPPED = 0.1
REMOVED = ("all others, cosine", "loss", "random")  # which tenth is taken out


@dataclass
class Data:
    """Sentences by number: those trained on, those trusted, those tested on; labels of all."""

    texts: list[str]
    labels: np.ndarray
    training: np.ndarray
    trusted: np.ndarray
    test: np.ndarray


def read_data(training: Path, test: Path, rows: int, tested: int) -> Data:
    """`rows` random sentences to train on, TRUSTED and at most `tested` others of the test file."""
    texts, labels = read_sentences(training)
    chosen = np.random.default_rng(0).permutation(len(texts))[:rows]
    others, truth = read_sentences(test)
    order = np.random.default_rng(0).permutation(len(others))[: TRUSTED + tested]
    places = len(chosen) + np.arange(len(order))
    return Data([texts[n] for n in chosen] + [others[n] for n in order],
                np.concatenate([labels[chosen], truth[order]]),
                np.arange(len(chosen)), places[:TRUSTED], places[TRUSTED:])


def flip(data: Data, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the training sentences with a tenth flipped, and which: [n], bool [n]."""
    n = len(data.training)
    flipped = np.zeros(n, dtype=bool)
    flipped[np.random.default_rng([3, seed]).permutation(n)[: round(FLIPPED * n)]] = True
    return np.where(flipped, 1 - data.labels[:n], data.labels[:n]), flipped


# ---- signals


@dataclass
class Audited(Found):
    """A classifier's signals, and its accuracy on held-out sentences."""

    accuracy: float


def train_on_flipped(
    data: Data, folder: Path, recipe: Recipe, seeds: int, threads: int, progress: Progress
) -> np.ndarray:
    """A classifier for each seed, saved in `home`; its accuracy on the sentences to test: [seeds].
    """
    wanted = [Retraining(data.training[:, None], flip(data, seed)[0], seed, data.test,
                         home(folder, recipe, seed) / "model", CLASSES) for seed in range(seeds)]
    logits = retrain_all(folder, recipe, wanted, f"{recipe.epochs} passes", threads, progress)
    found: np.ndarray = (logits.argmax(2) == data.labels[data.test]).mean(1)
    return found


def home(folder: Path, recipe: Recipe, seed: int) -> Path:
    """Where the classifier of a seed is, with its index."""
    return folder / f"{recipe.epochs}-{seed}"


def audit(
    data: Data, folder: Path, seed: int, accuracy: float, settings: dict[str, Any],
    progress: Progress,
) -> Audited:
    """Index and audit the classifier in a folder; the signals are kept there."""
    labels, flipped = flip(data, seed)
    kept = folder / f"signals-{settings['modules']}-{settings['damping']:g}.npz"
    if not kept.is_file():
        rows = [{"sentence": data.texts[n], "label": CLASSES[label], "flipped": bool(one)}
                for n, label, one in zip(data.training, labels, flipped, strict=True)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        index = gradindex.build(
            folder / "model", folder / "train.jsonl", folder / kept.stem, seq_len=LENGTH,
            keep_fields=["flipped"], train_sequences=len(rows), progress=progress, **settings)
        assert index is not None
        trusted = [index.make_query(text=data.texts[n], label=CLASSES[data.labels[n]])
                   for n in data.trusted]
        found = index.audit(against=trusted)
        assert found.places.tolist() == list(range(len(rows)))
        np.savez(kept, **found.signals())
    signals = dict(np.load(kept))
    signals["random"] = np.random.default_rng([4, seed]).random(len(labels))
    return Audited(signals, flipped, accuracy)


def print_signals(audits: list[Audited], recipe: Recipe) -> None:
    """The tables of one regime."""
    clean = np.mean([one.signals["loss"][~one.truth].mean() for one in audits])
    wrong = np.mean([one.signals["loss"][one.truth].mean() for one in audits])
    accuracy = ", ".join(f"{one.accuracy:.3f}" for one in audits)
    print(f"\n**{recipe.epochs} passes**: loss {clean:.3f} nats of right labels, {wrong:.3f} of "
          f"flipped ones; accuracy on held-out sentences {accuracy}\n")
    print_tables(audits, RIVALS)


# ---- retraining


def print_retraining(
    data: Data, folder: Path, recipe: Recipe, one: Audited, count: int, threads: int,
    progress: Progress,
) -> None:
    """Accuracy after training without the most suspect tenth, of `count` seeds, paired."""
    labels, _ = flip(data, 0)
    n, taken = len(labels), round(FLIPPED * len(labels))

    def without(removed: np.ndarray, seed: int) -> Retraining:
        left = np.setdiff1d(np.arange(n), removed)
        return Retraining(data.training[left][:, None], labels[left], 100 + seed, data.test)

    print(f"\nTrained again without a tenth, {recipe.epochs} passes, the labels of seed 0; mean "
          f"accuracy on {len(data.test)} held-out sentences over {count} seeds, paired differences "
          "with 95 % bootstrap intervals over seeds\n\n| without | flipped among them | accuracy "
          "| less that without a random tenth | less that without the tenth of largest loss |\n"
          "|---|---|---|---|---|")
    accuracy, shares = {}, {}
    for name in REMOVED:
        removed = [np.random.default_rng([6, seed]).permutation(n)[:taken] if name == "random"
                   else np.argsort(-one.signals[name], kind="stable")[:taken]
                   for seed in range(count)]
        logits = retrain_all(folder, recipe, [without(*both) for both in zip(
            removed, range(count), strict=True)], f"without a tenth: {name}", threads, progress)
        accuracy[name] = (logits.argmax(2) == data.labels[data.test]).mean(1)
        shares[name] = np.mean([one.truth[some].mean() for some in removed])
    for name, values in accuracy.items():
        cells = " | ".join(paired(values - accuracy[other]) for other in ("random", "loss"))
        print(f"| {name} | {shares[name]:.3f} | {values.mean():.3f} | {cells} |")


@click.command()
@click.argument("model")
@click.argument("training", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), default=Path(".demo/labels"),
              show_default=True, help="Where everything is kept.")
@click.option("--rows", default=6920, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Of flips and of training.")
@click.option("--epochs", default=(1, 6), show_default=True, multiple=True, type=int,
              help="Passes over the data; retrained is with the first.")
@click.option("--retrainings", default=10, show_default=True)
@click.option("--modules", default="head", show_default=True, help="That are indexed.")
@click.option("--damping", default=0.1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Retrainings at once.")
@click.option("--small", is_flag=True, help="A minute or two, to see that it runs.")
def main(
    model: str, training: Path, test: Path, work: Path, rows: int, seeds: int,
    epochs: tuple[int, ...], retrainings: int, modules: str, damping: float, threads: int,
    small: bool,
) -> None:
    """Flip, train, audit; retrain without the suspects; print tables."""
    begun = time.monotonic()
    if small:
        rows, seeds, retrainings, epochs = 200, 1, 2, (2,)
    progress = stderr_progress()
    recipe = Recipe(model, len(CLASSES), epochs[0])
    data = read_data(training, test, rows, 100 if small else 1000)
    folder = work / f"{len(data.training)}-{len(data.test)}"
    Hidden.of(folder, recipe, read_tokens(model, data.texts, LENGTH), progress)
    settings = {"modules": modules, "damping": damping, "bits": 1024,
                "fit_sequences": FITTED}
    print(f"{model}, its last {recipe.blocks} blocks and the head trained, modules {modules}, "
          f"damping {damping:g}; {len(data.training):,} sentences of at most {LENGTH} tokens, "
          f"{FLIPPED:.0%} of the labels flipped; {len(data.trusted)} trusted sentences, "
          f"{len(data.test)} to test on; {seeds} seeds; 95 %: bootstrap over sentences, {DRAWS:,} "
          "draws. Of two classes self-confidence ranks as the loss does")
    first = None
    for count in epochs:
        one = replace(recipe, epochs=count)
        accuracy = train_on_flipped(data, folder, one, seeds, threads, progress)
        audits = [audit(data, home(folder, one, seed), seed, accuracy[seed], settings, progress)
                  for seed in range(seeds)]
        print_signals(audits, one)
        first = first or audits[0]
    assert first is not None
    if retrainings:
        print_retraining(data, folder, recipe, first, retrainings, threads, progress)
    print(f"\ntotal {duration(time.monotonic() - begun)}")


if __name__ == "__main__":
    main()
