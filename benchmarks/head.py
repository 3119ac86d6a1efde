"""What the map to the vocabulary adds to the scores, and what it costs.

    python benchmarks/head.py --threads 2 --real SMOLLM2 --data GSM8K.jsonl

*Retraining*: two small models, a GPT-NeoX with a head of its own and a Llama whose head is tied to
its embedding, trained again on random halves of the data (by the functions of lds.py, in its
cache). LDS of each choice of modules, and its ratio to the MLPs alone, paired. What the curvature
of the head is to be was chosen by every other half and query; the ratio on the rest stands beside.
*Codes*: the share of the true top 10 among the code's first, at equal bits.
*Costs*: seconds to encode some sequences of a real model, without and with the head by turns.
"""

import json
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lds import (
    BATCH,
    CODES,
    LENGTH,
    SMALLER,
    Study,
    code_scores,
    coordinates,
    ekfac_scores,
    encode,
    interval,
    lds_on,
    make_study,
    random_choice,
    recall_of_codes,
    reliability,
    retrain_all,
)
from benchmarks.workload import query_gradients, record
from gradindex.draws import Stream
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Curvature
from gradindex.influence.exact import Rescorer, self_influence
from gradindex.influence.gradients import backward
from gradindex.influence.preconditioned import Gradients, query_square
from gradindex.influence.vocabulary import OutputGradients, OverVocabulary
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module, choose_modules
from gradindex.progress import Progress, duration, stderr_progress
from gradindex.storage.records import Record
from indexer.code_length import mean_share, spreads
from indexer.defaults import DAMPING
from indexer.encode import encode_batch
from indexer.fit.batch_sums import fit_batch

REPEATS = 5  # turns of each side
SOME = 16, 96  # queries and sequences, as many as a build takes
CHOICES = ("mlp", "head", "mlp,head", "mlp,head,embeddings", "attention", "all", "everything")
Uses = dict[str, Tensor]  # a sequence's gradient of a weight, [n, v, h], by use


def uses(
    study: Study, records: list[Record], stream: Stream | None
) -> tuple[Uses, dict[str, Tensor]]:
    """Per-sequence gradients of the head's weight by use, and the sums Σ a aᵀ of each use's inputs.

    With a stream, of labels drawn from the model.
    """
    modules = [module for module in study.modules if module.diagonal]
    found: dict[str, list[Tensor]] = {"head": [], "embedding": []}
    sums: dict[str, Tensor] = {}

    def keep(use: str, g: Tensor, a: Tensor) -> None:
        found[use].append(g)
        sums[use] = sums.get(use, 0) + (a.flatten(0, 1).T @ a.flatten(0, 1)).double()

    def each(_: Module, a: Tensor, d: OutputGradients) -> None:
        if not isinstance(d, OverVocabulary):
            keep("head", d.mT @ a, a)
            return
        t = d.logits.shape[1]
        whole = d.whole()
        if t:
            keep("head", d.logits.mT @ a[:, :t], a[:, :t])
        keep("embedding", whole[:, t:].mT @ a[:, t:], a[:, t:])

    for start in range(0, len(records), BATCH):
        part = records[start : start + BATCH]
        batch, numbers = (study.model.batch(part), None) if stream is None else \
            fit_batch(study.model, part, "model", 0, stream)
        with torch.no_grad():
            backward(study.model, modules, batch, each, numbers)
    return {use: torch.cat(parts) for use, parts in found.items()}, sums


def rotated_scores(
    q: Tensor, m: Tensor, fitted: Tensor, a: Tensor | None, damping: float
) -> np.ndarray:
    """Scores [q, n] where the input side has the eigenvectors of `a` [h, h], the other none."""
    basis = torch.eye(q.shape[-1]) if a is None else torch.linalg.eigh(a)[1].float()
    table = (fitted @ basis).square().mean(0)
    p = ((q @ basis) / (table + damping * table.mean())) @ basis.T
    return np.asarray((p.flatten(1) @ m.flatten(1).T).double().numpy())


def other_curvatures(study: Study, mlp: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of the MLPs and a head whose curvature, or whose gradient, is another."""
    q, _ = uses(study, study.queries, None)
    m, _ = uses(study, study.train, None)
    fitted, sums = uses(study, study.train, Stream.EIGENVALUE_LABELS)
    made = {"MLP + head, Q_A of E[aaᵀ]": rotated_scores(
        q["head"], m["head"], fitted["head"], sums["head"], DAMPING)}
    if study.family == "llama":
        both, whole, all_fitted = (one["head"] + one["embedding"] for one in (q, m, fitted))
        squares = torch.einsum("nvh,nvk->hk", all_fitted, all_fitted).double()
        made = {
            "MLP + both uses, Q_A of E[GᵀG]":
                rotated_scores(both, whole, all_fitted, squares, DAMPING),
            "MLP + both uses, Q_A of the head's E[aaᵀ]":
                rotated_scores(both, whole, all_fitted, sums["head"], DAMPING),
            "MLP + the head's use alone, diagonal":
                rotated_scores(q["head"], m["head"], fitted["head"], None, DAMPING),
            **{name.replace("head", "head's use alone"): scores for name, scores in made.items()},
        }
    return {name: mlp + scores for name, scores in made.items()}


def retraining(
    cache: Path, family: str, sequences: int, queries: int, subsets: int, seeds: int, threads: int,
    progress: Progress,
) -> None:
    """LDS of each choice, and recall of its codes, of one model."""
    study = make_study(cache, sequences, queries, 3, progress, family, SMALLER)
    kept = random_choice(subsets, sequences, sequences // 2)
    f = np.stack([retrain_all(study, f"{family}, halves, seed {seed}", kept, seed, threads,
                              progress) for seed in range(1, seeds + 1)])
    gradients = query_gradients(study, study.queries)

    def scores_of(choice: str, damping: float = DAMPING) -> np.ndarray:
        modules = choose_modules(study.modules, choice, "the model's modules")
        return ekfac_scores(study, gradients, study.ekfac, modules, damping)

    choices = [choice for choice in CHOICES if family == "neox" or "embeddings" not in choice]
    scores = {choice: scores_of(choice) for choice in choices}
    mlp = scores["mlp"]
    scores |= {f"{choice}, damping 0.01": scores_of(choice, 0.01) for choice in ("mlp", "mlp,head")}
    others = other_curvatures(study, mlp)
    scores |= others

    whole, rest = (lds_on(part, kept, f) for part in (slice(None), slice(1, None, 2)))
    plain, plain_rest = whole(mlp), rest(mlp)
    parameters = study.model.network.num_parameters()
    print(f"\n{type(study.model.network).__name__} of {parameters / 1e6:.2f} M parameters "
          f"({sum(m.size for m in study.modules if m.kind == 'head') / parameters:.0%} in the "
          f"head), vocabulary {study.settings.vocabulary:,}, {sequences:,} × {LENGTH} tokens, loss "
          f"{study.loss} nats a token; {queries} queries, {subsets} halves × {seeds} seeds: "
          f"{reliability(f)}\n\n| score | LDS | 95 % | ratio to mlp | 95 % | ratio on the rest | "
          "95 % |\n|---|---|---|---|---|---|---|")
    for name, values in scores.items():
        found, found_rest = whole(values), rest(values)
        print(f"| {name} | {interval(found)} | {interval(found / plain)} | "
              f"{interval(found_rest / plain_rest)} |", flush=True)

    print("\n| ratio of mlp,head to | | 95 % |\n|---|---|---|")
    for name, values in others.items():
        print(f"| {name} | {interval(whole(scores['mlp,head']) / whole(values))} |", flush=True)

    print("\n| codes of | K | 10 in 10 | 10 in 50 | 10 in 100 | as a build expects it | "
          "correlation |\n|---|---|---|---|---|---|---|")
    for choice in ("mlp", "head", "mlp,head"):
        modules = choose_modules(study.modules, choice, "the model's modules")
        asked = coordinates(gradients, study.ekfac, modules, DAMPING)
        expected = spreads(cosines(study, modules, asked, scores[choice])[:SOME[0], :SOME[1]])
        for length in (CODES[0] // 4, *CODES):
            found = code_scores(*encode(study, modules, length), asked)
            recall, alike = recall_of_codes(scores[choice], found)
            print(f"| {choice} | {length:,} | " + " | ".join(f"{one:.3f}" for one in recall) +
                  f" | {mean_share(expected, sequences, length):.3f} | {alike:.3f} |", flush=True)


def cosines(
    study: Study, modules: list[Module], asked: Gradients, scores: np.ndarray
) -> np.ndarray:
    """Scores [q, n] in units of ‖q̃‖ ‖m̃‖."""
    by = Rescorer(study.model, modules, study.ekfac, DAMPING, BATCH * LENGTH)
    own = self_influence(by, study.train, lambda records: (study.model.batch(records), None))
    theirs = sum(query_square(study.ekfac[name], c, DAMPING, 1.0).numpy()
                 for name, c in asked.items())
    return np.asarray(scores / np.sqrt(np.outer(theirs, own)))


def costs(real: Path, data: Path, length: int, sequences: int) -> None:
    """Seconds to encode the same sequences without and with the head, by turns."""
    model = LanguageModel.load(ModelSource(str(real)))
    every = tracked_modules(model.network, "mlp,head")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    with data.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(sequences), strict=False)]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    records = [record(n, np.array(tokenizer(text).input_ids[:length], np.int32), 0)
               for n, text in enumerate(texts)]
    tokens = sum(len(one.tokens) for one in records)
    wide = model.accumulate
    # what is in it matters for no speed
    ekfac = {module.name: Curvature(*(
        torch.ones(side, 1, dtype=wide) if module.diagonal else torch.eye(side, dtype=wide)
        for side in module.shape[::-1]), torch.ones(*module.shape, dtype=wide))
        for module in every}
    sides = {}
    for choice in ("mlp", "mlp,head"):
        modules = choose_modules(every, choice, "the model's modules")
        sides[choice] = Codes(modules, ekfac, CodeSettings.of(32768, modules, 0, DAMPING))
    taken: dict[str, list[float]] = {choice: [] for choice in sides}
    for turn in range(REPEATS + 1):
        for choice, codes in sides.items():
            begun = time.perf_counter()
            for one in records:
                encode_batch(model, codes, [one])
            if turn:  # the first warms up
                taken[choice].append(time.perf_counter() - begun)
    head = next(module for module in every if module.diagonal)
    print(f"\n{real.name}: {model.network.num_parameters() / 1e6:.0f} M parameters, vocabulary "
          f"{head.d_out:,} ({head.size / model.network.num_parameters():.0%} of them), "
          f"{len(records)} sequences, {tokens:,} tokens, {torch.get_num_threads()} threads\n\n"
          "| encode | seconds, median of 5 turns | tokens a second |\n|---|---|---|")
    for choice, seconds in taken.items():
        middle = float(np.median(seconds))
        print(f"| {choice} | {middle:.2f} | {tokens / middle:.0f} |")
    ratios = np.array(taken["mlp,head"]) / np.array(taken["mlp"])
    print(f"| ratio of times, turn by turn | {np.median(ratios):.3f} "
          f"({ratios.min():.3f} to {ratios.max():.3f}) | |")


@click.command()
@click.option("--sequences", default=1024, show_default=True)
@click.option("--queries", default=64, show_default=True)
@click.option("--subsets", default=48, show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Retrainings at once.")
@click.option("--real", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True))
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
def main(
    sequences: int, queries: int, subsets: int, seeds: int, threads: int, real: Path | None,
    data: Path | None, cache: Path,
) -> None:
    """Print the tables of two models, and what a real one's head costs."""
    begun = time.monotonic()
    quiet_transformers()
    torch.set_num_threads(1)
    progress = stderr_progress()
    for family in ("neox", "llama"):
        retraining(cache, family, sequences, queries, subsets, seeds, threads, progress)
    if real is not None and data is not None:
        torch.set_num_threads(threads)
        costs(real, data, 256, 12)
    print(f"\ntotal {duration(time.monotonic() - begun)}")


if __name__ == "__main__":
    main()
