"""An index folder → a Searcher, in this process alone or shared out to a cluster."""

from pathlib import Path
from typing import Any

from gradindex.errors import InputError
from gradindex.memory import parse_bound
from gradindex.model.model_source import ModelSource
from gradindex.ray_cluster import LOCAL, WITH_RAY, connect
from search.engine import Searcher
from search.rank.ray_search import SharedSnapshot
from search.rank.snapshot import Snapshot


def open(
    index: str | Path, model: Any = None, tokenizer: Any = None, device: str = "auto",
    trust_remote_code: bool = False, allow_pickle: bool = False, batch_tokens: int | None = None,
    allow_damaged: bool = False, max_memory: str | int | None = None, ray: str | bool = False,
    ray_workers: int | None = None, adapter: str | None = None, device_map: str | None = None,
) -> Searcher:
    """Open an index for searching. Nothing heavy is loaded before the first search.

    `model` (a folder, hub id or loaded model) is where the weights are now, if not where they were
    at the build; other weights are refused. `adapter` is which of several adapters is meant, and
    `batch_tokens` bounds the memory of a batch [both the build's], `max_memory` ("8GB") all of it,
    of the GPU where the model is on one. `device_map` "auto" spreads it over all GPUs. With
    `allow_damaged` every file is digested first and segments with a damaged one are left out;
    results say so (`Result.coverage`). With `ray`, workers of a Ray cluster score the sequences:
    "auto" or host:port says where it is, True starts one here; `ray_workers` is how many [one for
    each GPU of the cluster, or for each machine if it has none]. What is appended or deleted later
    is seen by who opens later. Raises InputError where there is no index or no cluster,
    DamagedIndexError for missing or changed files.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"--batch-tokens {batch_tokens}: expected a number above 0.")
    if ray_workers is not None and (ray_workers < 1 or not ray):
        raise InputError(f"--ray-workers {ray_workers}: expected a number above 0, and --ray.")
    source = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle,
                         parse_bound(max_memory), adapter, device_map)
    if ray and device_map is not None:
        raise InputError(WITH_RAY)
    if not ray:
        return open_index(Path(index), source, batch_tokens, allow_damaged)
    # the cluster first: where there is none, nothing of the index need be read
    cluster = connect(LOCAL if ray is True else str(ray))
    shared = SharedSnapshot(cluster, ray_workers, Path(index), source, allow_damaged)
    return Searcher(shared, batch_tokens or shared.manifest.batch_tokens)


def open_index(
    path: Path, source: ModelSource, batch_tokens: int | None = None, allow_damaged: bool = False
) -> Searcher:
    """An index in this process alone, see `open`."""
    # the build's batches are known to fit this machine, or one like it
    snapshot = Snapshot(path, source, allow_damaged)
    return Searcher(snapshot, batch_tokens or snapshot.manifest.batch_tokens)
