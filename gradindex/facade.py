"""The public functions that write an index and hand it back open.

Writing belongs to `indexer`, opening to `search`, and neither knows the other: here they meet.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from gradindex.model.source import ModelSource
from indexer import build as journey
from indexer.build_request import BuildRequest, make_request, takes_arguments_of
from indexer.upkeep import append as appending
from search.engine import Searcher, open_index

Arguments = ParamSpec("Arguments")


@takes_arguments_of(make_request)
def build(request: BuildRequest) -> Searcher | None:
    """Fit curvature, encode every training sequence, write the index folder `out`; resumable.

    `model` is a hub id (`id@revision`), a folder or a loaded model; `data` a path, a list of paths,
    or rows (dictionaries; a `datasets.Dataset`). Lengths are in tokens, `bits` is K, the bits of a
    code; the other arguments are the flags of `gradindex build`. Returns the index, open.
    `max_bad` is the share of sequences that may be quarantined, their gradient not being finite.
    With `shard` ("2/8") this process does one of several shares, waiting at most `wait` seconds for
    the others; it returns None, and `merge` makes the index when all are done. `max_memory` ("8GB")
    bounds the memory beside the libraries', of the GPU where the model is on one; curvature and
    codes come out the same.
    With `ray` the units of work are handed out to a cluster ("auto", "host:port") or to workers on
    this machine ("local"), `ray_workers` of them [one a GPU, or as many as there are cores for].
    Raises InputError for unusable input before anything expensive, ResourceError when disk or
    memory don't suffice, IndexMismatchError when the model changed since the build began,
    GradindexError while another process writes to the index, where too much is not finite, or where
    other shards don't come.
    """
    source = journey.build(request)
    return None if source is None else open_index(request.index, source)


def _then_open(
    write: Callable[Arguments, ModelSource | None]
) -> Callable[Arguments, Searcher | None]:
    """What writes to an index, followed by opening it; None where there is nothing to open."""
    @functools.wraps(write)
    def call(*positional: Arguments.args, **named: Arguments.kwargs) -> Searcher | None:
        source = write(*positional, **named)
        if source is None:
            return None
        given = inspect.signature(write).bind(*positional, **named)
        return open_index(Path(given.arguments["index"]), source)

    return call


append = _then_open(appending.append)
merge = _then_open(journey.merge)
