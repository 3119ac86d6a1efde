"""Do the scores say what retraining without some of the data would do?

    python benchmarks/lds.py --threads 2

Trains a small GPT-NeoX on standard-library text, then trains it again on random halves of the
data. The linear datamodeling score (LDS; Park et al. 2023, arXiv 2303.14186) of a query is the
Spearman correlation, over the halves S, of its f = Σ log p(completion | prompt) after training on S
with Σ of its scores over the sequences of S. Then: what the log p of single queries loses when
their highest-scored sequences are taken out.

Every retraining runs on one thread and is kept in the cache as it ends, so a killed run goes on
where it was, with the same numbers whatever `--threads` is.
"""

import hashlib
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fidelity import tfidf_scores
from benchmarks.workload import Size, Workload, fit_on, library, query_gradients, record
from gradindex import draws
from gradindex.demo.small_model import DemoSettings, new_model, train, train_tokenizer
from gradindex.influence.codes import Codes, CodeSettings, default_length
from gradindex.influence.curvature import Ekfac
from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Gradients, Preconditioned, precondition
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module, choose_modules
from gradindex.progress import Progress, duration, stderr_progress
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.files import atomic_write
from gradindex.storage.records import Record
from indexer.defaults import DAMPING
from indexer.encode import encode_batch

LENGTH, PROMPT = 64, 32  # tokens of a sequence and of a query; of a query, those not scored
BATCH = 32  # sequences scored at once
CODES = (default_length(LENGTH), 2 * default_length(LENGTH))
FACTORS = (1.0, 0.1, 0.01, 0.001, 0.0001)  # damping, of mean(Λ)
DRAWS = 1000
EXACT, DOT, TFIDF, HIDDEN = ("EK-FAC, exact", "gradient dot product", "TF-IDF of the completion",
                             "cosine of mean last hidden states")


# a batch of 16 costs as much a pass and ends .16 nats a token higher
LARGER = DemoSettings(length=LENGTH, vocabulary=2048, layers=2, hidden=128, batch=8)
SMALLER = replace(LARGER, vocabulary=1024, hidden=96)


def untrained(family: str, settings: DemoSettings) -> Any:
    """A network of a family: GPT-NeoX with a head of its own, or Llama whose head is tied."""
    if family == "neox":
        return new_model(settings)
    with draws.always_alike(torch.device("cpu"), settings.seed):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.hidden,
            intermediate_size=8 * settings.hidden // 3, num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads, max_position_embeddings=settings.length,
            tie_word_embeddings=True, initializer_range=0.1, bos_token_id=0, eos_token_id=0))


@dataclass
class Study(Workload):
    """The scored model with its data; modules and curvature are of all kinds, embeddings too."""

    settings: DemoSettings
    family: str


def make_study(
    cache: Path, sequences: int, queries: int, passes: int, progress: Progress,
    family: str = "neox", size: DemoSettings = LARGER,
) -> Study:
    """Cut the text, train on all of it and fit, or reuse what `cache` holds for the numbers."""
    settings = replace(size, sequences=sequences, steps=passes * sequences // size.batch)
    folder = cache / f"lds-{family}-{settings.hidden}-{sequences}-{queries}-{passes}"
    if not (folder / "model").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "retrained").mkdir(parents=True)
        texts = list(library())
        tokenizer = train_tokenizer(texts, settings.vocabulary)
        ids = np.concatenate([tokenizer(text, verbose=False).input_ids for text in texts])
        windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int32)
        order = np.random.default_rng(0).permutation(len(windows))[: sequences + queries]
        np.save(folder / "windows.npy", windows[order])
        network = untrained(family, settings)
        loss = train(network, windows[order[:sequences]].tolist(), settings, progress)
        (folder / "loss.txt").write_text(f"{loss:.2f}")
        network.save_pretrained(folder / "model")
    windows = np.load(folder / "windows.npy")
    network = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = LanguageModel.load(ModelSource(network))
    modules = tracked_modules(model.network, "everything")
    training = [record(n, row, 0) for n, row in enumerate(windows[:sequences])]
    # Each module is fitted by itself, so that a choice of modules is a subset.
    ekfac = fit_on(folder, model, modules, training, sequences, progress)
    return Study(
        Size(sequences=sequences, length=LENGTH, layers=2, hidden=settings.hidden,
             modules="everything"),
        model,
        modules, ekfac, training,
        [record(n, row, PROMPT) for n, row in enumerate(windows[sequences:])],
        (folder / "loss.txt").read_text(), folder, settings, family,
    )


def completion_log_p(model: LanguageModel, queries: list[Record]) -> np.ndarray:
    """f: Σ log p of each query's completion, in nats: float64 [q]."""
    batch = model.batch(queries)
    with torch.no_grad():
        log_p, _ = model.objective.log_p(model.objective.outputs(model.network, batch), batch)
    return log_p.double().sum(1).numpy()


def retrain(
    path: Path, ids: list[list[int]], family: str, settings: DemoSettings, queries: list[Record]
) -> None:
    """Train on the sequences `ids` alone, in a process of its own, and write f [q]."""
    torch.set_num_threads(1)
    network = untrained(family, settings)
    train(network, ids, settings, Progress(None))
    f = completion_log_p(LanguageModel.load(ModelSource(network)), queries)
    atomic_write(path, lambda file: np.save(file, f))


def retrain_all(
    study: Study, what: str, kept: np.ndarray, seed: int, threads: int, progress: Progress
) -> np.ndarray:
    """f [r, q] after training on each row of `kept` (bool [r, n]), where the cache lacks it.

    Each makes as many passes over what it keeps as the scored model made over everything.
    """
    digests = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in kept]
    paths = [study.folder / "retrained" / f"{seed}-{digest}.npy" for digest in digests]
    missing = {path: row for path, row in zip(paths, kept, strict=True) if not path.exists()}
    progress.start(what, len(paths), "retrainings", done=len(paths) - len(missing))
    with ProcessPoolExecutor(threads, multiprocessing.get_context("spawn")) as pool:
        running = []
        for path, row in missing.items():
            ids = [study.train[n].tokens.tolist() for n in np.flatnonzero(row)]
            steps = round(study.settings.steps * row.mean())
            settings = replace(study.settings, seed=seed, steps=steps)
            running.append(pool.submit(retrain, path, ids, study.family, settings, study.queries))
        for future in as_completed(running):
            future.result()
            progress.update(1)
    progress.finish()
    return np.stack([np.load(path) for path in paths])


def random_choice(draws: int, sequences: int, count: int) -> np.ndarray:
    """`count` of n sequences a row, bool [draws, n]; more draws leave the first as they were."""
    ranks = [np.random.default_rng([1, n]).permutation(sequences) for n in range(draws)]
    return np.stack(ranks) < count


# Scores are one number per query and sequence, [q, n]; positive: the sequence makes f larger.


def coordinates(
    gradients: Gradients, ekfac: Ekfac, modules: list[Module], damping: float
) -> Gradients:
    """C_u [q, o, i] of each query from its ∇ f, for `modules` only."""
    return {m.name: ekfac[m.name].coordinates(gradients[m.name], damping) for m in modules}


def ekfac_scores(
    study: Study, gradients: Gradients, ekfac: Ekfac, modules: list[Module], damping: float
) -> np.ndarray:
    """Exact EK-FAC influence."""
    asked = coordinates(gradients, ekfac, modules, damping)
    preconditioned = Preconditioned(precondition(ekfac, asked))
    return exact_scores(study.model, modules, preconditioned, study.train, BATCH * LENGTH)


def encode(study: Study, modules: list[Module], length: int) -> tuple[Codes, CodeIndex]:
    """The codes of all training sequences at the default damping."""
    settings = CodeSettings.of(length, modules, 0, DAMPING)
    codes, index = Codes(modules, study.ekfac, settings), CodeIndex(length)
    for start in range(0, len(study.train), BATCH):
        vectors = encode_batch(study.model, codes, study.train[start : start + BATCH])
        index.add(index.encode(vectors.numpy()))
    return codes, index


def code_scores(codes: Codes, index: CodeIndex, queries: Gradients) -> np.ndarray:
    """Of the codes alone, for queries given as coordinates."""
    return index.many_scores(codes.query_vectors(queries).numpy()).astype(np.float64)


def hidden_scores(study: Study) -> np.ndarray:
    """Cosine of the hidden states after the last layer, averaged over tokens."""
    ids = torch.from_numpy(np.stack([one.tokens for one in study.queries + study.train])).long()
    with torch.no_grad():
        states = study.model.network.base_model(ids).last_hidden_state
    unit = torch.nn.functional.normalize(states.double().mean(1), dim=-1).numpy()
    return unit[: len(study.queries)] @ unit[len(study.queries) :].T


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman correlation of x [q, s] with y [q, s] along s: [q, draws].

    `counts` [s, draws] says how often each draw holds each of the s; ties share their mean rank.
    """
    def centred_ranks(values: np.ndarray) -> np.ndarray:  # [q, s, draws]
        own, other = values[:, :, None], values[:, None, :]
        ranks = ((other < own) + 0.5 * (other == own)) @ counts
        return ranks - (ranks * share).sum(1, keepdims=True)

    share = counts / counts.sum(0)
    a, b = centred_ranks(x), centred_ranks(y)
    return (a * b * share).sum(1) / np.sqrt((a * a * share).sum(1) * (b * b * share).sum(1))


def rank_agreement(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman correlation of x and y [q, s] along s, where no two are equal: mean over q."""
    ranks = (values.argsort(1).argsort(1) for values in (x, y))
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]))


def mean_lds(kept: np.ndarray, f: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mean LDS over queries, of the data and then of DRAWS bootstrap draws: [1 + DRAWS].

    `kept` bool [s, n]; f [s, q], the mean over seeds; scores [q, n]. A draw takes subsets and
    queries with replacement, the same for all scores: differences and ratios of two are paired.
    """
    random = np.random.default_rng(2)
    drawn = [random.multinomial(n, np.full(n, 1 / n), DRAWS).T for n in f.shape]
    subsets, queries = (np.hstack([np.ones((len(counts), 1)), counts]) for counts in drawn)
    each = spearman(scores @ kept.T, f.T, subsets)
    return (each * queries).sum(0) / queries.sum(0)


def interval(draws: np.ndarray, sign: str = "") -> str:
    """`value | low to high`: the first draw and the 95 % percentile interval of the others."""
    low, high = np.nanquantile(draws[1:], [0.025, 0.975])  # nan: a draw of one subset alone
    return f"{draws[0]:{sign}.3f} | {low:{sign}.3f} to {high:{sign}.3f}"


def reliability(f: np.ndarray) -> str:
    """How alike seeds rank the subsets, f [seeds, s, q], and the LDS that this noise allows."""
    seeds = len(f)
    if seeds == 1:
        return "with one seed, the noise of retraining is not measured"
    r = np.mean([rank_agreement(f[i].T, f[j].T) for i in range(seeds) for j in range(i)])
    of_mean = max(0.0, float(seeds * r / (1 + (seeds - 1) * r)))  # Spearman-Brown
    return (f"two seeds rank the subsets with a Spearman correlation of {r:.3f} (mean over "
            f"queries), so that noise alone limits the LDS to about {of_mean**0.5:.3f}")


def lds_on(part: slice, kept: np.ndarray, f: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`mean_lds` of scores on some of the subsets and queries; f [seeds, s, q]."""
    return lambda scores: mean_lds(kept[part], f.mean(0)[part][:, part], scores[part])


def recall_of_codes(exact: np.ndarray, found: np.ndarray) -> tuple[list[float], float]:
    """Shares of the exact top 10 among the first 10, 50 and 100 by code; their correlation.

    Both are [q, n].
    """
    top, order = np.argsort(-exact, axis=1)[:, :10], np.argsort(-found, axis=1)
    shares = [float(np.mean([len({*a} & {*b[:most]}) / 10
                             for a, b in zip(top.tolist(), order.tolist(), strict=True)]))
              for most in (10, 50, 100)]
    return shares, float(np.mean([np.corrcoef(a, b)[0, 1]
                                  for a, b in zip(exact, found, strict=True)]))


def mean_and_error(values: np.ndarray) -> str:
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


@click.command()
@click.option("--sequences", default=2048, show_default=True)
@click.option("--queries", default=64, show_default=True)
@click.option("--passes", default=3, show_default=True, help="Over the data, in each training.")
@click.option("--subsets", default=40, show_default=True)
@click.option("--seeds", default=2, show_default=True, help="Retrainings of each subset.")
@click.option("--removals", default=16, show_default=True, help="Queries to remove the top of.")
@click.option("--random-removals", default=8, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Retrainings at once, one on each.")
@click.option("--retrain-only", is_flag=True, help="End after the retrainings.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
def main(
    sequences: int, queries: int, passes: int, subsets: int, seeds: int, removals: int,
    random_removals: int, threads: int, retrain_only: bool, cache: Path,
) -> None:
    """Train, retrain on halves and without the top of the scores; print four tables."""
    begun = time.monotonic()
    quiet_transformers()
    torch.set_num_threads(1)  # the scored model, too, is the same whatever --threads is
    progress = stderr_progress()
    study = make_study(cache, sequences, queries, passes, progress)
    model, ekfac = study.model, study.ekfac
    kept = random_choice(subsets, sequences, sequences // 2)
    # Seed 0 is the scored model's own: no half shares its first weights.
    f = np.stack([retrain_all(study, f"halves, seed {seed}", kept, seed, threads, progress)
                  for seed in range(1, seeds + 1)])

    mlp = [module for module in study.modules if module.kind == "mlp"]
    gradients = query_gradients(study, study.queries)
    methods = {
        EXACT: ekfac_scores(study, gradients, ekfac, mlp, DAMPING),
        DOT: exact_scores(model, mlp, Preconditioned(gradients), study.train, BATCH * LENGTH),
        TFIDF: tfidf_scores(study),
        HIDDEN: hidden_scores(study),
    }
    taken, asked = max(1, sequences // 100), np.arange(min(removals, queries))
    removed = {}
    for name in (EXACT, TFIDF, DOT):
        left = np.ones((len(asked), sequences), dtype=bool)
        top = np.argsort(-methods[name][asked], axis=1, kind="stable")[:, :taken]
        np.put_along_axis(left, top, False, axis=1)
        after = retrain_all(study, f"without the top by {name}", left, 0, threads, progress)
        removed[name] = after[asked, asked]  # of each retraining, the query it was made for
    left = ~random_choice(random_removals, sequences, taken)
    random = retrain_all(study, "without random ones", left, 0, threads, progress)[:, asked]
    if retrain_only:
        return

    codes = {f"code alone, K = {length:,}": encode(study, mlp, length) for length in CODES}
    for name, encoded in codes.items():
        methods[name] = code_scores(*encoded, coordinates(gradients, ekfac, mlp, DAMPING))
    full, completion = completion_log_p(model, study.queries), LENGTH - PROMPT
    print(f"GPT-NeoX of {model.network.num_parameters() / 1e6:.2f} M parameters "
          f"({sum(m.d_out * m.shape[1] for m in mlp) / 1e6:.2f} M in the MLPs' modules); "
          f"{sequences:,} sequences of {LENGTH} tokens, {passes} passes in batches of "
          f"{study.settings.batch}, loss {study.loss} nats a token in the last; {queries} held-out "
          f"queries of {PROMPT} + {completion} tokens, {-full.mean() / completion:.2f} nats a "
          f"token. {subsets} random halves × {seeds} seeds: {reliability(f)}. 95 %: bootstrap over "
          f"subsets and queries, {DRAWS:,} draws\n\n| score | LDS | 95 % |\n|---|---|---|")
    lds = partial(mean_lds, kept, f.mean(0))
    measured = {name: lds(scores) for name, scores in methods.items()}
    for name, values in measured.items():
        print(f"| {name} | {interval(values)} |")
    print("\n| ratio of LDS | | 95 % |\n|---|---|---|")
    for over, under in ((EXACT, DOT), *((name, EXACT) for name in codes)):
        print(f"| {over} / {under} | {interval(measured[over] / measured[under])} |")

    print(f"\nEK-FAC with one choice changed; default: damping {DAMPING} of mean(Λ), MLP modules, "
          f"fitted on {sequences:,} sequences\n\n| choice | LDS | 95 % | less the default's | 95 % "
          "| rank agreement with the default |\n|---|---|---|---|---|---|")

    def row(name: str, scores: np.ndarray) -> None:
        draws = lds(scores)
        print(f"| {name} | {interval(draws)} | {interval(draws - measured[EXACT], '+')} | "
              f"{rank_agreement(scores, methods[EXACT]):.3f} |", flush=True)

    for factor in FACTORS:
        row(f"damping {factor:g}", ekfac_scores(study, gradients, ekfac, mlp, factor))
    for name, encoded in codes.items():
        for factor in FACTORS[1:4]:
            row(f"{name}, built at damping {DAMPING}, queried at {factor:g}",
                code_scores(*encoded, coordinates(gradients, ekfac, mlp, factor)))
    for choice in ("mlp", "attention", "head", "mlp,head", "all", "everything"):
        chosen = choose_modules(study.modules, choice, "the model's modules")
        row(f"modules: {choice}", ekfac_scores(study, gradients, ekfac, chosen, DAMPING))
    for count in (sequences // 4, sequences // 2, sequences):
        fitted = fit_on(study.folder, model, study.modules, study.train, count, progress)
        row(f"fitted on {count:,}", ekfac_scores(study, gradients, fitted, mlp, DAMPING))

    full, by_chance = full[asked], random.mean(0)
    print(f"\nWhat the completion's log p loses by retraining without {taken} sequences, in nats: "
          f"mean ± standard error over {len(full)} queries of {-full.mean():.1f} nats. Of one "
          f"query, retrainings without random sequences differ by {random.std(0).mean():.2f} (sd)"
          "\n\n| removed | against the full model | against random removal |\n|---|---|---|")
    for name, values in removed.items():
        print(f"| top {taken} by {name} | {mean_and_error(full - values)} | "
              f"{mean_and_error(by_chance - values)} |")
    print(f"| {taken} at random, {random_removals} times | {mean_and_error(full - by_chance)} | |")
    print(f"\ntotal {duration(time.monotonic() - begun)}")


if __name__ == "__main__":
    main()
