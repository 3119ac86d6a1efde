"""What several models in one index add to the scores, and what they cost.

    python benchmarks/members.py --threads 2

*Retraining*: the two small models of head.py, trained again on random halves of the data (by the
functions of lds.py, in its cache). Beside the last checkpoint: one after a sixth of the training,
and models from other seeds than any that is retrained. LDS of the mean over some of them, and its
ratio to the MLPs of the last checkpoint, paired; then on every other half and query. `shared` is
with the last checkpoint's curvature for all.
*Codes*: the share of the true top 10 among the code's first, at equal bits, each set by its own
exact scores; and what `gradindex eval` finds of indexes built with them: recall and claims.
*Costs*: seconds to encode the same sequences with one model and with two, by turns.
"""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradindex
from benchmarks.lds import (
    BATCH,
    LENGTH,
    PROMPT,
    SMALLER,
    Study,
    code_scores,
    coordinates,
    encode,
    interval,
    lds_on,
    make_study,
    random_choice,
    recall_of_codes,
    reliability,
    retrain_all,
    untrained,
)
from benchmarks.workload import fit_on, query_gradients
from gradindex.demo.small_model import train
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Ekfac
from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Gradients, Preconditioned, precondition
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.members import tracked_of_all
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.modules import LAST, choose_modules
from gradindex.progress import Progress, duration, stderr_progress
from indexer.defaults import DAMPING
from indexer.encode import encode_batch
from search.ask.controls import Controls
from search.ask.settings import settle
from search.study import evaluate as evaluation

SEEDS = (10, 11, 12)  # none of which a half is retrained from
EARLY = 6  # of so many parts of the training the first
LENGTHS = (4096, 16384, 32768)  # K
REPEATS = 5  # turns of each side
SETS = {
    "last": [LAST],
    "early alone": ["early"],
    "early, last": ["early", LAST],
    "last, 1 seed": [LAST, "seed-10"],
    "last, 3 seeds": [LAST, "seed-10", "seed-11", "seed-12"],
    "early, last, 3 seeds": ["early", LAST, "seed-10", "seed-11", "seed-12"],
}


class Watch(Progress):
    """Keeps a network as it is after so many steps of its training."""

    def __init__(self, network: torch.nn.Module, step: int):
        super().__init__(None)
        self.kept: dict[str, torch.Tensor] = {}
        self._network, self._step = network, step

    def update(self, n: int, total: int | None = None) -> None:
        self._done += n
        if self._done == self._step:
            self.kept = {name: tensor.clone()
                         for name, tensor in self._network.state_dict().items()}


def train_members(study: Study, progress: Progress) -> dict[str, Path]:
    """The folders of an early checkpoint of the scored model and of models from other seeds."""
    home = study.folder / "members"
    ids = [one.tokens.tolist() for one in study.train]
    folders = {name: home / name for name in ("early", *(f"seed-{seed}" for seed in SEEDS))}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    progress.start("members", len(missing), "trainings")
    for name in missing:
        seed = 0 if name == "early" else int(name.removeprefix("seed-"))
        settings = replace(study.settings, seed=seed)
        network = untrained(study.family, settings)
        watch = Watch(network, settings.steps // EARLY)
        train(network, ids, settings, watch)
        if name == "early":
            # the same training as the scored model's, or it would be no checkpoint of it
            for ours, theirs in zip(network.parameters(), study.model.network.parameters(),
                                    strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
            network.load_state_dict(watch.kept)
        network.save_pretrained(folders[name])
        progress.update(1)
    progress.finish()
    return folders


def with_members(study: Study, folders: dict[str, Path], progress: Progress) -> Study:
    """The study with all members, and the curvature of each."""
    model = study.model
    for name, folder in folders.items():
        model.others[name] = LanguageModel.load(
            ModelSource(AutoModelForCausalLM.from_pretrained(folder)))
    modules = [replace(module, weight=1.0) for module in tracked_of_all(model, "mlp,head")]
    home = study.folder / "members-fit"
    home.mkdir(exist_ok=True)
    ekfac = fit_on(home, model, modules, study.train, len(study.train), progress)
    return replace(study, modules=modules, ekfac=ekfac)


def scores_of_each(
    study: Study, gradients: Gradients, ekfac: Ekfac, choice: str, damping: float
) -> dict[str, np.ndarray]:
    """Exact influence [q, n] by each member alone."""
    modules = choose_modules(study.modules, choice, "the model's modules")
    found = {}
    for name in [LAST, *study.model.others]:
        own = [module for module in modules if module.member == name]
        asked = coordinates(gradients, ekfac, own, damping)
        found[name] = exact_scores(study.model, own, Preconditioned(precondition(ekfac, asked)),
                                   study.train, BATCH * LENGTH)
    return found


def shared_curvature(study: Study) -> Ekfac:
    """The last checkpoint's curvature under the name of every member's modules."""
    return {module.name: study.ekfac[module.path] for module in study.modules}


def retraining(
    study: Study, gradients: Gradients, subsets: int, seeds: int, threads: int, progress: Progress,
) -> None:
    """LDS of each set of models."""
    count = len(study.train)
    kept = random_choice(subsets, count, count // 2)
    f = np.stack([retrain_all(study, f"{study.family}, halves, seed {seed}", kept, seed, threads,
                              progress) for seed in range(1, seeds + 1)])
    rows: dict[str, np.ndarray] = {}
    for choice in ("mlp", "mlp,head"):
        for damping in (DAMPING, DAMPING / 10):
            each = scores_of_each(study, gradients, study.ekfac, choice, damping)
            for name, members in SETS.items():
                rows[f"{choice}, damping {damping:g}: {name}"] = np.mean(
                    [each[member] for member in members], axis=0)
    each = scores_of_each(study, gradients, shared_curvature(study), "mlp,head", DAMPING)
    for name in ("early, last", "last, 3 seeds"):
        rows[f"mlp,head, damping {DAMPING:g}, shared: {name}"] = np.mean(
            [each[member] for member in SETS[name]], axis=0)

    whole, rest = (lds_on(part, kept, f) for part in (slice(None), slice(1, None, 2)))
    today, head = (rows[f"{choice}, damping {DAMPING:g}: last"] for choice in ("mlp", "mlp,head"))
    plain, plain_rest, with_head = whole(today), rest(today), whole(head)
    print(f"\n{type(study.model.network).__name__} of "
          f"{study.model.network.num_parameters() / 1e6:.2f} M parameters, {count:,} × {LENGTH} "
          f"tokens; early: after {study.settings.steps // EARLY} of {study.settings.steps} steps; "
          f"{len(study.queries)} queries, {subsets} halves × {seeds} seeds: {reliability(f)}\n\n"
          "| score | LDS | 95 % | ratio to the MLPs of last | 95 % | on the rest | 95 % | ratio to "
          "MLPs and head of last | 95 % |\n|---|---|---|---|---|---|---|---|---|")
    for name, values in rows.items():
        found, found_rest = whole(values), rest(values)
        print(f"| {name} | {interval(found)} | {interval(found / plain)} | "
              f"{interval(found_rest / plain_rest)} | {interval(found / with_head)} |", flush=True)


def recall(study: Study, gradients: Gradients) -> None:
    """Recall of the codes of each set, by its own exact scores."""
    each = scores_of_each(study, gradients, study.ekfac, "mlp,head", DAMPING)
    print("\n| codes of | K | 10 in 10 | 10 in 50 | 10 in 100 | correlation |\n"
          "|---|---|---|---|---|---|")
    for name in ("last", "early, last", "last, 3 seeds"):
        modules = [module for module in study.modules if module.member in SETS[name]]
        exact = np.sum([each[member] for member in SETS[name]], axis=0)
        asked = coordinates(gradients, study.ekfac, modules, DAMPING)
        for length in LENGTHS:
            found = code_scores(*encode(study, modules, length), asked)
            shares, alike = recall_of_codes(exact, found)
            print(f"| {name} | {length:,} | " + " | ".join(f"{one:.3f}" for one in shares) +
                  f" | {alike:.3f} |", flush=True)


def claims(study: Study, folders: dict[str, Path]) -> None:
    """Recall claimed and actual, of indexes that are built with each set."""
    print("\n| index of | K | recall of the top 10 in 100 | claimed | of the top 100 in 500 | "
          "claimed |\n|---|---|---|---|---|---|")
    windows = study.folder / "training.npy"
    np.save(windows, np.stack([one.tokens for one in study.train]))
    for name in ("last", "early, last", "last, 3 seeds"):
        out = study.folder / "claims"
        shutil.rmtree(out, ignore_errors=True)
        also = {member: str(folders[member]) for member in SETS[name] if member != LAST}
        index = gradindex.build(str(study.folder / "model"), windows, out, also=also,
                                progress=Progress(None), bits=16384)
        queries = []
        for one in study.queries:
            labels = [-100] * PROMPT + one.tokens[PROMPT:].tolist()
            queries.append(index.make_query(token_ids=one.tokens.tolist(), labels=labels))
        found = evaluation.evaluate(index, queries, settle(Controls(), index.manifest), None,
                                    lambda done, total: None)
        shown = {(one.k, one.shortlist): one for one in found.measures if one.method == "both"}
        cells = [f"{shown[of].recall:.3f} | {shown[of].claimed:.3f}" for of in ((10, 100),
                                                                               (100, 500))]
        print(f"| {name} | {index.manifest.code['length']:,} | {' | '.join(cells)} |", flush=True)


def costs(study: Study) -> None:
    """Seconds to encode the same sequences with one model and with two, by turns."""
    sides, taken = {}, dict[str, list[float]]()
    for name in ("last", "early, last"):
        modules = [module for module in study.modules if module.member in SETS[name]]
        sides[name] = Codes(modules, study.ekfac, CodeSettings.of(16384, modules, 0, DAMPING))
        taken[name] = []
    for turn in range(REPEATS + 1):
        for name, codes in sides.items():
            begun = time.perf_counter()
            for start in range(0, 512, BATCH):
                encode_batch(study.model, codes, study.train[start : start + BATCH])
            if turn:  # the first warms up
                taken[name].append(time.perf_counter() - begun)
    ratios = np.array(taken["early, last"]) / np.array(taken["last"])
    print("\n| encode 512 sequences | seconds, median of 5 turns |\n|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {np.median(seconds):.2f} |")
    print(f"| ratio, turn by turn | {np.median(ratios):.3f} ({ratios.min():.3f} to "
          f"{ratios.max():.3f}) |")


@click.command()
@click.option("--sequences", default=1024, show_default=True)
@click.option("--queries", default=64, show_default=True)
@click.option("--subsets", default=48, show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Retrainings at once.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"),
              show_default=True)
def main(
    sequences: int, queries: int, subsets: int, seeds: int, threads: int, cache: Path
) -> None:
    """Print the tables of two models."""
    begun = time.monotonic()
    quiet_transformers()
    torch.set_num_threads(1)  # a training is the same whatever --threads is
    progress = stderr_progress()
    for family in ("neox", "llama"):
        study = make_study(cache, sequences, queries, 3, progress, family, SMALLER)
        folders = train_members(study, progress)
        study = with_members(study, folders, progress)
        gradients = query_gradients(study, study.queries)
        retraining(study, gradients, subsets, seeds, threads, progress)
        recall(study, gradients)
        claims(study, folders)
        costs(study)
    print(f"\ntotal {duration(time.monotonic() - begun)}")


if __name__ == "__main__":
    main()
