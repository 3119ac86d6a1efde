"""The public functions that write an index and hand it back open.

Writing belongs to `indexer`, opening to `search`, and neither knows the other: here they meet.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, overload

from gradindex.model.model_source import ModelSource
from indexer.build import build as write_build
from indexer.build_request import BuildRequest, make_request, takes_arguments_of
from indexer.parallel.merge import merge as write_merge
from indexer.upkeep.append import append as write_append
from search.engine import Searcher
from search.opening import open_index

Arguments = ParamSpec("Arguments")


@takes_arguments_of(make_request)
def build(request: BuildRequest) -> Searcher | None:
    """Build an index in the folder `out` and return it open. The same call resumes a killed build.

    `model` is a hub id (`id@revision`), a folder or a loaded model; `data` a path, a list of paths,
    or rows (dictionaries; a `datasets.Dataset`). Lengths are in tokens, `bits` is K, the bits of a
    code; the other arguments are the flags of `gradindex build`. `max_bad` is the share of
    sequences that may be quarantined because their gradient is not finite. `max_memory` ("8GB")
    bounds the memory beside the libraries', the GPU's where the model is on one; curvature and
    codes come out the same. `adapter` is which adapter is meant, of several that the model has.
    With `shard` ("2/8") this process does one of several shares, waits at most `wait` seconds for
    the others and returns None; `merge` makes the index when all are done. With `ray` the units of
    work are handed out to a cluster ("auto", "host:port") or to workers on this machine ("local"),
    `ray_workers` of them [one a GPU, or as many as there are cores for].
    Raises InputError for unusable input before anything expensive, ResourceError when disk or
    memory don't suffice, IndexMismatchError when the model changed since the build began, and
    GradindexError while another process writes to the index, where too many gradients are not
    finite, or where other shards don't come.
    """
    source = write_build(request)
    return None if source is None else open_index(request.index, source)


@overload
def _then_open(
    write: Callable[Arguments, ModelSource], returns: Any
) -> Callable[Arguments, Searcher]: ...
@overload
def _then_open(
    write: Callable[Arguments, ModelSource | None], returns: Any
) -> Callable[Arguments, Searcher | None]: ...
def _then_open(
    write: Callable[Arguments, ModelSource | None], returns: Any
) -> Callable[Arguments, Searcher | None]:
    """A function that writes to an index by `write` and returns it open, `returns` says the type.

    It returns None where `write` does: there is no index to open yet.
    """
    signature = inspect.signature(write)

    @functools.wraps(write)
    def call(*positional: Arguments.args, **named: Arguments.kwargs) -> Searcher | None:
        source = write(*positional, **named)
        if source is None:
            return None
        # `index` may have come by its place or by its name
        bound = signature.bind(*positional, **named)
        return open_index(Path(bound.arguments["index"]), source)

    call.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
    call.__module__ = __name__
    return call


append = _then_open(write_append, Searcher | None)
merge = _then_open(write_merge, Searcher)
