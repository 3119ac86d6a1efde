"""Are pairs found whose preference was given for length, and is a reward model better without them?

    python -m benchmarks.feedback MODEL TRAIN.tsv TEST.tsv --pairs PAIRS.jsonl.gz \\
        --work .demo/feedback --threads 2

MODEL is a pretrained encoder (a folder or a hub id; the sentence encoder all-MiniLM-L6-v2 was
used), TRAIN and TEST have a sentence, a tab and 0 or 1 a line (SST-2). A pair is a positive
sentence, chosen, and a negative one. Every tenth is swapped, of those whose longer sentence gains
by it; a reward model is trained on the result, indexed and audited against 50 trusted pairs of TEST
whose chosen sentence is the shorter. How well does harm to them rank the swapped first, beside what
needs no curvature? Which group leads the totals, of pairs whose chosen text is the longer or the
others? And trained again without the most harmful twentieth, or a random one: how much higher are
rewards of the longer of two held-out sentences of one label?

PAIRS (optional) has `prompt`, `chosen` and `rejected` a line; of these a tenth is swapped likewise,
split by prompt. `--small` runs all of it in minutes.
"""

import gzip
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from benchmarks.detection import DRAWS, Found, paired, print_tables
from benchmarks.encoder import (
    LENGTH,
    Hidden,
    Recipe,
    Retraining,
    read_sentences,
    read_tokens,
    retrain_all,
)
from gradindex.progress import Progress, duration, stderr_progress
from search.engine import Searcher

TRUSTED, SWAPPED, REMOVED, FITTED = 50, 0.1, 0.05, 2048
RIVALS = ("loss", "gradient norm", "length", "random")
GROUP = "longer-chosen"


@dataclass
class Pairs:
    """Texts, with the prompt that some begin with, and pairs of them by number.

    `training`, `trusted` and `test` [n, 2] are chosen and rejected, as they should be; `alike`
    [n, 2] are pairs of one label, of which the first is longer. `lengths` are tokens of each text.
    """

    texts: list[str]
    prompts: list[str]
    tokens: list[list[int]]
    training: np.ndarray
    trusted: np.ndarray
    test: np.ndarray
    alike: np.ndarray
    most: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, the prompt's and special ones included."""
        return np.array([len(one) for one in self.tokens])


def sentence_pairs(
    model: str, training: Path, test: Path, rows: int, tested: int, length: int
) -> Pairs:
    """A positive sentence and a negative one a pair, each sentence once."""
    texts: list[str] = []
    tokens: list[list[int]] = []
    parts, alike = [], np.zeros((0, 2), np.int64)
    for number, (path, most) in enumerate(((training, rows), (test, tested))):
        found, labels = read_sentences(path)
        random = np.random.default_rng([0, number])
        # a build leaves out what is longer, as TRL's training does
        own = read_tokens(model, found, 1 << 20)
        fit = np.array([len(one) <= length for one in own])
        sides = [random.permutation(np.flatnonzero(fit & (labels == label))) for label in (1, 0)]
        most = min(most, *map(len, sides))
        parts.append(len(texts) + np.stack([side[:most] for side in sides], 1))
        if number:  # the same sentences, two of one label
            alike = np.concatenate([len(texts) + side[: most // 2 * 2].reshape(-1, 2)
                                    for side in sides])
        texts += found
        tokens += own
    lengths = np.array([len(one) for one in tokens])
    # the trusted: the right answer is the shorter, which is what the bias goes against
    shorter = np.flatnonzero(lengths[parts[1][:, 0]] < lengths[parts[1][:, 1]])[:TRUSTED]
    kept = np.setdiff1d(np.arange(len(parts[1])), shorter)
    trusted, rest = parts[1][shorter], parts[1][kept]
    # no sentence of a trusted pair stands in what is tested
    alike = alike[~np.isin(alike, trusted).any(1)]
    alike = alike[lengths[alike[:, 0]] != lengths[alike[:, 1]]]
    swap = lengths[alike[:, 0]] < lengths[alike[:, 1]]
    alike[swap] = alike[swap, ::-1]
    return Pairs(texts, [""] * len(texts), tokens, parts[0], trusted, rest, alike, length)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, compressed (.gz) or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(
            encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answer_pairs(model: str, path: Path, rows: int, length: int) -> Pairs:
    """Pairs of answers, split by prompt; those with a text that is too long are left out."""
    data = read_rows(path)
    tokens = read_tokens(model, [one["prompt"] + one[side] for one in data
                                 for side in ("chosen", "rejected")], 1 << 20)
    numbers = np.arange(2 * len(data)).reshape(-1, 2)
    lengths = np.array([len(one) for one in tokens])
    fit = lengths[numbers].max(1) <= length
    prompts = sorted({one["prompt"] for one in data})
    order = np.random.default_rng(0).permutation(len(prompts))
    # by prompt: a tenth may be trusted, a tenth is tested, the rest trained on
    part = dict(zip(prompts, np.argsort(order) * 10 // len(prompts), strict=True))
    of = np.array([part[one["prompt"]] for one in data])
    training = np.random.default_rng(1).permutation(numbers[fit & (of > 1)])[:rows]
    others, test = numbers[fit & (of == 0)], numbers[fit & (of == 1)]
    trusted = others[lengths[others[:, 0]] < lengths[others[:, 1]]][:TRUSTED]
    return Pairs([one[side] for one in data for side in ("chosen", "rejected")],
                 [one["prompt"] for one in data for _ in range(2)], tokens, training, trusted,
                 test, np.zeros((0, 2), np.int64), length)


def swap(pairs: Pairs, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training pairs with a tenth swapped, whose longer text gains by it; and which."""
    lengths, found = pairs.lengths[pairs.training], pairs.training.copy()
    can = np.flatnonzero(lengths[:, 0] < lengths[:, 1])
    chosen = np.random.default_rng([3, seed]).permutation(can)[: round(SWAPPED * len(found))]
    found[chosen] = found[chosen, ::-1]
    return found, np.isin(np.arange(len(found)), chosen)


# ---- one reward model


@dataclass
class Judged(Found):
    """A reward model's signals, its accuracy on held-out pairs, and lines of a table of groups."""

    accuracy: float
    groups: list[str]


def train_on_swapped(
    pairs: Pairs, folder: Path, recipe: Recipe, seeds: int, threads: int, progress: Progress
) -> np.ndarray:
    """A reward model for each seed, saved; its accuracy on the pairs to test: [seeds]."""
    trained = [swap(pairs, seed)[0] for seed in range(seeds)]
    wanted = [Retraining(one, np.zeros(len(one)), seed, pairs.test.flatten(),
                         folder / f"{recipe.epochs}-{seed}" / "model")
              for seed, one in enumerate(trained)]
    rewards = retrain_all(folder, recipe, wanted, "reward models", threads, progress)
    found: np.ndarray = (-np.diff(rewards.reshape(seeds, -1, 2))[..., 0] > 0).mean(1)
    return found


def judge(
    pairs: Pairs, folder: Path, recipe: Recipe, seed: int, accuracy: float,
    settings: dict[str, Any], progress: Progress,
) -> Judged:
    """Index and audit the reward model of a seed; the signals are kept beside it."""
    home = folder / f"{recipe.epochs}-{seed}"
    training, swapped = swap(pairs, seed)
    kept = home / f"signals-{settings['modules']}-{settings['damping']:g}.npz"
    if not kept.is_file():
        (home / "train.jsonl").write_text("".join(
            json.dumps({**row(pairs, one), "swapped": bool(wrong)}) + "\n"
            for one, wrong in zip(training, swapped, strict=True)))
        index = gradindex.build(
            home / "model", home / "train.jsonl", home / kept.stem, seq_len=pairs.most,
            keep_fields=["swapped"], derive=[GROUP], train_sequences=len(training),
            progress=progress, **settings)
        assert index is not None
        trusted = [index.make_query(**row(pairs, one)) for one in pairs.trusted]
        audit = index.audit(against=trusted)
        assert len(audit.places) == len(training)
        np.savez(kept, groups=groups(index, trusted), **audit.signals())
    signals = dict(np.load(kept))
    told = signals.pop("groups").tolist()
    signals["length"] = np.subtract(*pairs.lengths[training].T).astype(float)
    signals["random"] = np.random.default_rng([4, seed]).random(len(training))
    del signals["self-confidence"]  # of pairs it ranks as the loss and the margin do
    return Judged(signals, swapped, accuracy, told)


def row(pairs: Pairs, one: Sequence[int]) -> dict[str, Any]:
    """A pair as a row of data, or as a query."""
    chosen, rejected = one
    prompt = {"prompt": pairs.prompts[chosen]} if pairs.prompts[chosen] else {}
    return prompt | {"chosen": pairs.texts[chosen], "rejected": pairs.texts[rejected]}


def groups(index: Searcher, trusted: list[gradindex.Query]) -> list[str]:
    """The groups as a search against the trusted orders them, most opposed first."""
    [result] = index.search_many(trusted, aggregated=True, opponents=True, shortlist="all",
                                 group_by=GROUP)
    return [f"| {GROUP} {str(one.value).lower()} | {one.sequences:,.0f} | {one.influence:+.1f} | "
            f"{one.excess:+.1f} | {one.z:+.1f} |" for one in result.groups or []]


# ---- tables


def print_found(name: str, pairs: Pairs, judged: list[Judged], recipe: Recipe) -> None:
    """What was found, of one kind of pairs."""
    accuracy = ", ".join(f"{one.accuracy:.3f}" for one in judged)
    clean, wrong = (np.mean([one.signals["loss"][one.truth == swapped].mean() for one in judged])
                    for swapped in (False, True))
    print(f"\n**{name}**: {len(pairs.training):,} pairs of texts of at most {pairs.most} tokens, "
          f"{SWAPPED:.0%} swapped; {recipe.said()}; {len(pairs.trusted)} trusted pairs; loss "
          f"{clean:.3f} nats, {wrong:.3f} of swapped pairs; accuracy on {len(pairs.test)} held-out "
          f"pairs {accuracy}. The reward margin ranks as the loss does\n")
    print_tables(judged, RIVALS)
    print("\n| group, most harmful first (seed 0) | pairs | influence on the trusted | beyond the "
          "mean | standard errors |\n|---|---|---|---|---|")
    print("\n".join(judged[0].groups))


def print_retraining(
    pairs: Pairs, folder: Path, recipe: Recipe, one: Judged, count: int, threads: int,
    progress: Progress,
) -> None:
    """Length bias after training without the most harmful twentieth, of `count` seeds, paired."""
    training, swapped = swap(pairs, 0)
    n, taken = len(training), round(REMOVED * len(training))
    asked = np.concatenate([pairs.test, pairs.alike])

    def without(removed: np.ndarray, seed: int) -> Retraining:
        left = training[np.setdiff1d(np.arange(n), removed)]
        return Retraining(left, np.zeros(len(left)), 100 + seed, asked.flatten())

    print(f"\nTrained again without {REMOVED:.0%}, the swaps of seed 0; means over {count} seeds, "
          "paired differences with 95 % bootstrap intervals over seeds. r(longer) − r(shorter), "
          "the same over the standard deviation of all rewards asked for, and how often it is "
          f"above 0, on {len(pairs.alike)} held-out pairs of one label\n\n"
          "| without | swapped among them | r(longer) − r(shorter) | less random's | over σ | less "
          "random's | above 0 | less random's | accuracy | less random's |\n"
          "|---|---|---|---|---|---|---|---|---|---|")
    # some of the swapped themselves: what finding them could do at best
    some = {"random": np.arange(n), "swapped": np.flatnonzero(swapped)}
    found = {}
    for name in ("random", "harm, cosine", "loss", "swapped"):
        removed = [np.random.default_rng([6, seed]).permutation(some[name])[:taken]
                   if name in some else np.argsort(-one.signals[name], kind="stable")[:taken]
                   for seed in range(count)]
        rewards = retrain_all(folder, recipe, [without(*both) for both in zip(
            removed, range(count), strict=True)], f"without {name}", threads, progress)
        # a model that is surer has rewards further apart, whatever it goes by
        better, spread = -np.diff(rewards.reshape(count, -1, 2))[..., 0], rewards.std((1, 2))
        known, alike = np.split(better, [len(pairs.test)], axis=1)
        found[name] = (np.mean([swapped[rows].mean() for rows in removed]), alike.mean(1),
                       alike.mean(1) / spread, (alike > 0).mean(1), (known > 0).mean(1))
    for name, (share, *measures) in found.items():
        cells = " | ".join(f"{values.mean():.3f} | {paired(values - other)}" for values, other
                           in zip(measures, found["random"][1:], strict=True))
        print(f"| {name} | {share:.3f} | {cells} |")


@click.command()
@click.argument("model")
@click.argument("training", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Path(exists=True, path_type=Path))
@click.option("--pairs", "answers", type=click.Path(exists=True, path_type=Path),
              help="Pairs with prompts (JSON lines, .gz), beside those of sentences.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(".demo/feedback"),
              show_default=True, help="Where everything is kept.")
@click.option("--rows", default=2000, show_default=True, help="Pairs of sentences.")
@click.option("--answer-rows", default=300, show_default=True, help="Of --pairs.")
@click.option("--seeds", default=3, show_default=True,
              help="Of swaps and of training; of --pairs one.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--retrainings", default=6, show_default=True)
@click.option("--modules", default="head", show_default=True, help="That are indexed.")
@click.option("--damping", default=0.1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Retrainings at once.")
@click.option("--small", is_flag=True, help="A minute or two, to see that it runs.")
def main(
    model: str, training: Path, test: Path, answers: Path | None, work: Path, rows: int,
    answer_rows: int, seeds: int, epochs: int, retrainings: int, modules: str, damping: float,
    threads: int, small: bool,
) -> None:
    """Swap, train, audit; retrain without the suspects; print tables."""
    begun = time.monotonic()
    if small:
        rows, answer_rows, seeds, epochs, retrainings = 150, 100, 1, 2, 2
    progress, recipe = stderr_progress(), Recipe(model, 1, epochs)
    print(f"{model}; modules {modules}, damping {damping:g}; {seeds} seeds; 95 %: bootstrap over "
          f"pairs, {DRAWS:,} draws")
    kinds = {"Sentences": sentence_pairs(model, training, test, rows, 200 if small else 1000,
                                         LENGTH)}
    if answers is not None:
        kinds["Answers"] = answer_pairs(model, answers, answer_rows, 256)
    for name, pairs in kinds.items():
        count = 1 if name == "Answers" else seeds  # which are long
        folder = work / f"{name.lower()}-{len(pairs.training)}-{len(pairs.test)}"
        pairs = used(pairs)
        Hidden.of(folder, recipe, pairs.tokens, progress)
        settings: dict[str, Any] = {"modules": modules, "damping": damping, "bits": 1024,
                                    "task": "reward", "fit_sequences": FITTED}
        accuracy = train_on_swapped(pairs, folder, recipe, count, threads, progress)
        judged = [judge(pairs, folder, recipe, seed, accuracy[seed], settings, progress)
                  for seed in range(count)]
        print_found(name, pairs, judged, recipe)
        if len(pairs.alike) and retrainings:
            print_retraining(pairs, folder, recipe, judged[0], retrainings, threads, progress)
    print(f"\ntotal {duration(time.monotonic() - begun)}")


def used(pairs: Pairs) -> Pairs:
    """The same without the texts that are in no pair."""
    parts = ("training", "trusted", "test", "alike")
    kept, places = np.unique(np.concatenate([getattr(pairs, part).flatten() for part in parts]),
                             return_inverse=True)
    ends = np.cumsum([getattr(pairs, part).size for part in parts])[:-1]
    numbers: dict[str, Any] = {part: found.reshape(-1, 2) for part, found
                               in zip(parts, np.split(places, ends), strict=True)}
    return replace(pairs, texts=[pairs.texts[n] for n in kept],
                   prompts=[pairs.prompts[n] for n in kept],
                   tokens=[pairs.tokens[n] for n in kept], **numbers)


if __name__ == "__main__":
    main()
