"""The settings of small indexes, and what is seen of an index from outside."""

from pathlib import Path
from typing import Any

import numpy as np

import gradindex
from gradindex.storage import layout, manifest
from gradindex.storage.records import Record
from support.models import tiny_network

# of small_documents
SMALL: dict[str, Any] = {"seq_len": 24, "bits": 512, "segment_size": 16, "batch_tokens": 96,
                         "id_field": "url", "keep_fields": ["place"]}
SMALL_FLAGS = [part for name, value in SMALL.items()
               for part in (f"--{name.replace('_', '-')}",
                            ",".join(value) if isinstance(value, list) else str(value))]
QUESTION = {"prompt": "The plum number 26 grows", "completion": " by the river."}
APPLES = {"prompt": "The apple number", "completion": " 3 grows by the river."}
OTHER = {"prompt": "The fig number 3 grows", "completion": " by the market."}
# of tiny_tokens, for what is repeated often
TINY: dict[str, Any] = {"bits": 512, "segment_size": 4, "batch_tokens": 12}
TINY_QUESTION = {"token_ids": [3, 1, 4, 1, 5]}


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file, by its name in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def unlisted(index: Path) -> set[str]:
    """Files and folders that the manifest doesn't account for."""
    listed = {layout.MANIFEST, *manifest.load(index).files}
    folders = {parent for name in listed for parent in map(str, list((index / name).parents))}
    return {str(path.relative_to(index)) for path in index.rglob("*")
            if str(path.relative_to(index)) not in listed and str(path) not in folders
            } - {"deleted"}


def build_tiny(data: Any, out: Path, **options: Any) -> Any:
    """Build an index of `tiny_network` in batches of four."""
    larger = {**TINY, "batch_tokens": 24, "segment_size": 8}
    return gradindex.build(tiny_network(), data, out, **{**larger, **options})


def add(index: Path, data: Any = None, **options: Any) -> Any:
    """Append to an index of `tiny_network`."""
    return gradindex.append(index, data, model=tiny_network(), **options)


def answer(searcher: Any, question: dict[str, Any] = QUESTION, **controls: Any) -> dict[str, Any]:
    """All that a search says, but for seconds and what names the state of the index."""
    content = searcher.search(**question, **controls).to_dict()
    return {name: value for name, value in content.items() if name not in ("seconds", "index")}


def influences(searcher: Any, question: dict[str, Any] = QUESTION) -> dict[int, float]:
    """Exact influence of every sequence by id, without folding equal ones."""
    ids = searcher.snapshot.contents.ids.tolist()
    return {hit.id: hit.influence for hit in searcher.rescore(**question, ids=ids)}


def records_in(searcher: Any) -> list[Record]:
    """The records of a searcher's live sequences, in order."""
    contents = searcher.snapshot.contents
    return contents.records(contents.places)


def scores(searcher: Any) -> np.ndarray:
    """Exact influence of every sequence on TINY_QUESTION, by id."""
    ids = searcher.snapshot.contents.ids.tolist()
    return np.array([hit.influence for hit in searcher.rescore(**TINY_QUESTION, ids=ids)])
