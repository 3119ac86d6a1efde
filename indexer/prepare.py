"""What every process of a build makes ready: the model, its modules, how it is to be fitted."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradindex.draws import Stream, choose
from gradindex.errors import ResourceError
from gradindex.influence.codes import RECIPES, Codes, CodeSettings
from gradindex.influence.curvature import Ekfac
from gradindex.influence.gradients import backward
from gradindex.memory import Allowance
from gradindex.model.adapters import IDLE, OWN, untrained
from gradindex.model.devices import free_on
from gradindex.model.members import load_members, tracked_of_all
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import (
    SMALL_PARTS,
    TRACKABLE,
    examine,
    parameter_share,
    untracked,
)
from gradindex.modules import LAST, Module
from gradindex.objective.batch import Text
from gradindex.progress import Progress, shares, size
from gradindex.storage import layout
from gradindex.storage.build_plan import Plan
from gradindex.storage.files import bytes_in
from gradindex.storage.records import Record
from gradindex.task import Task
from indexer.code_length import FEWEST, check_bits
from indexer.fit.batch_memory import batch_bytes
from indexer.fit.budget import disk_bytes, gpu_width, held_bytes, partitions
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import AHEAD, BLOCK_SEQUENCES
from indexer.pace.batch_size import choose_batch_tokens
from indexer.read import ingest
from indexer.read.ingest import Run
from indexer.state import BuildState, Settled

NOTABLE = 0.05  # share of parameters that can't be tracked: said loudly from here on


@dataclass
class Prepared:
    """What every process of a build has: the model, the sequences, how it is to be fitted."""

    model: LanguageModel
    tracked: list[Module]
    run: Run
    settings: FitSettings
    allowance: Allowance


def load_model(
    source: ModelSource, dtype: str, state: BuildState, progress: Progress
) -> tuple[LanguageModel, list[Module]]:
    """Load and check the model, and find what of it is tracked.

    Raises InputError for one that can't be used, IndexMismatchError for another than the build
    began with.
    """
    plan = state.plan
    # those of the build's beginning, also where it goes on elsewhere: others sum in another order
    torch.set_num_threads(state.threads)
    progress.say(f"model: loading {source.name} as {plan.dtype} on {plan.device}")
    model = load_members(source, dtype)
    anatomy = examine(model.network, model.source.task)
    tracked = tracked_of_all(model, plan.modules, anatomy)
    check_bits(plan.bits, tracked)
    if model.device.type == "cuda":
        _check_gpu(model, tracked, plan)
    state.check_model(model)  # weights that changed since the data were read end it here
    layout.refuse_equal_files(state.path.parent, tracked)
    rest = untracked(model.network, tracked, anatomy)
    progress.say(f"modules: {describe_modules(model, tracked, rest)}")
    for name, count in untrained(model.network).items():
        progress.say(f"warning: the adapter {name} was never trained: B of its LoRA is 0 in all of "
                     f"{count} layers, so it adds nothing to its base, and its A has no gradient. "
                     "Give the adapter as training saved it")
    # what nobody chose to leave out, and is more than norms and the like
    lost = {what: share for what, share in rest.items()
            if what not in (*TRACKABLE, *SMALL_PARTS, IDLE)}
    own = {what: share for what, share in lost.items() if what.startswith(OWN)}
    followed = parameter_share(
        model.network, [module for module in tracked if module.kind == "adapter"])
    if own and followed:  # little of the model, but what the user asked about
        progress.say(f"warning: {sum(own.values()) / (sum(own.values()) + followed):.1%} of the "
                     "adapter's parameters can't be tracked, so their influence is in no score: "
                     f"{', '.join(what.removeprefix(OWN).strip() for what in own)}")
    if (total := sum(lost.values())) > NOTABLE:
        progress.say(f"warning: {total:.0%} of the model's parameters can't be tracked, so their "
                     f"influence is in no score: {shares(lost)}")
    return model, tracked


def _check_gpu(model: LanguageModel, tracked: list[Module], plan: Plan) -> None:
    """Raise ResourceError where GPUs don't hold the pass of one sequence, or what is fitted.

    On a host one can't tell: memory that is short there is found elsewhere, slowly.
    """
    with torch.no_grad():
        backward(model, tracked, model.batch([_longest_row(model.source.task, plan)]),
                 lambda *_: None)
    needed = held_bytes(tracked, plan.covariance_blocks, model.accumulate.itemsize,
                        gpu_width(model.device, plan.eigen_dtype))
    free = sum(map(free_on, model.devices))
    if model.source.max_memory is None and needed > free:
        raise ResourceError(
            f"fitting {len(tracked)} modules together takes {size(needed)} of the GPU's memory, "
            f"{size(free)} are free beside the model. Fit them in parts (--max-memory "
            f"{max(1, (model.bytes + free) // 10**9)}GB), or use fewer --modules, or "
            f"--covariance-blocks {2 * plan.covariance_blocks}.")


def _longest_row(task: Task, plan: Plan) -> Text:
    """A row as long as any: of pairs, both texts are as long."""
    tokens = np.zeros(plan.sequence_length * (1 + task.of_pairs), dtype=np.int32)
    return Text(tokens, np.ones(len(tokens), dtype=bool),
                border=plan.sequence_length if task.of_pairs else None, label=0)


def prepare_build(
    index: Path, model: LanguageModel, tracked: list[Module], state: BuildState,
    progress: Progress, shards: int = 1,
) -> Prepared:
    """Settle how the model is fitted, the same way in every process, now that the data are read.

    `shards` are how many processes share the fit. Raises ResourceError where disk or memory don't
    suffice.
    """
    plan, request = state.plan, state.request
    assert state.corpus is not None and request is not None
    run = Run(index, 0, 0, state.corpus.sequences, plan.segment_size)
    ids = choose(Stream.FIT_SEQUENCES, plan.seed, run.count, plan.fit_sequences)
    block = min(plan.segment_size, BLOCK_SEQUENCES)

    def sample() -> list[Record]:
        return run.records(ids[:block])

    if state.settled is None:  # the first process alone gets here: the others wait for it
        state.settled = Settled(plan.batch_tokens or choose_batch_tokens(
            model, tracked, sample(), model.source.max_memory, progress), plan.bits,
            recipe=RECIPES[-1])
        state.save()
    settings = FitSettings(ids, plan.fit_labels, block, state.batch_tokens, plan.seed,
                           request.max_bad, plan.covariance_blocks, plan.eigen_dtype)
    allowance = allow(model, tracked, settings, sample)
    blocks, width = settings.covariance_blocks, model.accumulate.itemsize
    groups = partitions(tracked, blocks, width, allowance.planned,
                        gpu_width(model.device, plan.eigen_dtype))
    # blocks that wait for the first shard lie on the disk too, some of each of the others
    ingest.check_disk(run, state.settled.bits or FEWEST, _still_needed(index, disk_bytes(
        groups, blocks, width, AHEAD * shards if shards > 1 else 0)))
    return Prepared(model, tracked, run, settings, allowance)


def _still_needed(index: Path, fit: int) -> int:
    """What a fit of so many bytes still needs on the disk."""
    if (index / layout.CURVATURE).is_dir():
        return 0
    # what an unfinished fit has written is a part of what it needs
    return max(0, fit - bytes_in(index / layout.CURVATURE_PARTIAL))


def allow(
    model: LanguageModel, tracked: list[Module], settings: FitSettings,
    sample: Callable[[], list[Record]],
) -> Allowance:
    """What a build may use beside the model; some sequences tell what a batch takes.

    Raises ResourceError where that is too little.
    """
    if model.source.max_memory is None:  # what a batch takes is measured only where it matters
        return Allowance()
    # modules can be fitted one after the other, so the largest alone has to fit
    gpu = gpu_width(model.device, settings.eigen_dtype)
    held, largest = max((held_bytes([module], settings.covariance_blocks,
                                    model.accumulate.itemsize, gpu), module.name)
                        for module in tracked)
    batch = batch_bytes(model, tracked, sample(), settings)
    return Allowance.beside(
        model.bytes, model.source.max_memory, held, f"fitting {largest}", batch)


def make_codes(
    modules: list[Module], ekfac: Ekfac, plan: Plan, bits: int, recipe: int
) -> Codes:
    """The codes of K = `bits` that a plan asks for, of modules that have curvature."""
    # k follows from how many modules share the K buckets, so it is chosen after the fit
    return Codes(modules, ekfac, CodeSettings.of(
        bits, modules, plan.seed, plan.damping, recipe))


def describe_modules(
    model: LanguageModel, tracked: list[Module], untracked_shares: dict[str, float]
) -> str:
    """Which modules are tracked, their share of the model, and what isn't tracked."""
    kinds: dict[str, int] = {}
    own = [module for module in tracked if module.member == LAST]
    for module in own:
        # the module's own name without its layer; experts count as one kind
        kind = re.sub(r"_\d+$", "_*", module.name.split(f".{module.layer}.", 1)[-1])
        kinds[kind] = kinds.get(kind, 0) + 1
    rest = shares({f"{what} (not chosen)" if what in TRACKABLE else what: share
                   for what, share in untracked_shares.items()})
    members = f", in each of {1 + len(model.others)} models ({', '.join([LAST, *model.others])})"
    return (f"{len(own):,} linear maps tracked{members if model.others else ''}, "
            f"{', '.join(kinds)}: "
            f"{parameter_share(model.network, own):.1%} of the model's parameters"
            + (f"; not tracked: {rest}" if rest else ""))
