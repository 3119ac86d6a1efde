"""What comes after the shards of a build: `merge` measures their codes and commits the index."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gradindex.errors import InputError
from gradindex.memory import parse_bound
from gradindex.model.model_source import ModelSource
from gradindex.progress import Progress
from gradindex.storage import layout
from gradindex.storage.integrity import refuse_links
from gradindex.storage.locks import only_writer
from gradindex.storage.manifest import exists as index_exists
from gradindex.storage.os_errors import disk_errors
from gradindex.task import Task
from indexer.build import commit_index, fit_curvature, measure_codes, settle_codes
from indexer.prepare import load_model, prepare_build
from indexer.read import ingest
from indexer.read.ingest import Run
from indexer.shards import Shard
from indexer.state import BuildState


def merge(
    index: str | Path, model: Any = None, tokenizer: Any = None, device: str = "auto",
    trust_remote_code: bool = False, allow_pickle: bool = False,
    max_memory: str | int | None = None, adapter: str | None = None,
    device_map: str | None = None, progress: Progress | None = None,
) -> ModelSource:
    """Make an index of what the shards of a build did, once all are done. Returns what opens it.

    `model` (a folder, hub id or loaded model) is where the weights are now, if not where they were.
    Raises InputError where there is nothing to merge or something is missing, IndexMismatchError
    for another model, GradindexError while another process writes to the index; ResourceError.
    """
    folder, progress = Path(index), progress or Progress()
    source = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle,
                         parse_bound(max_memory), adapter, device_map)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one that gradindex build --shard wrote.")
    with only_writer(folder, "gradindex merge"), disk_errors(folder):
        refuse_links(folder)
        state = BuildState.resumed(folder)
        if state is None and not index_exists(folder):
            raise InputError(f"{folder} holds no unfinished build. Run gradindex build … --shard "
                             "i/n first, once for each i.")
        if state is None or index_exists(folder):
            progress.say(f"{folder} is complete; nothing to do.")
        else:
            _refuse_unfinished(folder, state)
            plan = state.plan
            source_now = source.at_build(
                plan.model, plan.revision, None, plan.adapter, Task(plan.task, plan.beta),
                {one["name"]: (one["model"], one["revision"]) for one in plan.also})
            model_now, tracked = load_model(source_now, plan.dtype, state, progress)
            prepared = prepare_build(folder, model_now, tracked, state, progress)
            # steps 4 to 6 are done, so the curvature is only read; 7 and 8 are what is left
            fitted = fit_curvature(folder, prepared, Shard(), progress)
            settle_codes(fitted, state, Shard(), progress)
            measured = measure_codes(folder, fitted, state, progress)
            commit_index(folder, fitted, measured, state, progress)
    return replace(source, max_memory=None)


def _refuse_unfinished(index: Path, state: BuildState) -> None:
    """Raise InputError where shards have not done all of their work."""
    run = Run(index, 0, 0, state.corpus.sequences if state.corpus else 0, state.plan.segment_size)
    # the first thing that is missing: what comes after it isn't there either
    missing = "the data are not read" if state.corpus is None else \
        "the curvature is not fitted" if not (index / layout.CURVATURE).is_dir() else None
    names = [run.segments[number].name for number in ingest.unsealed(run)]
    if missing is None and names:
        shown = ", ".join(names[:5]) + ", …" * (len(names) > 5)
        missing = f"{len(names)} of {len(run.segments)} segments are not encoded ({shown}; shard " \
                  "i of n does those whose number leaves i when divided by n)"
    if missing:
        raise InputError(
            f"{index} can't be merged yet: {missing}. Wait for the shards that run, and start "
            "those that were stopped again, or finish all with gradindex build … without --shard."
        )
