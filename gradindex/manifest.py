"""What an index is: `manifest.json`, the commit point.

An index folder without a manifest is a build that hasn't ended; what the manifest doesn't list
does not exist. It is written last and replaced atomically. It holds no wall-clock time and no
absolute path of the index, so equal builds give equal bytes and the folder moves freely.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError
from gradindex.files import atomic_write, sha256
from gradindex.modules import Module

FORMAT = 1
NAME = "manifest.json"
SMALL = 1 << 20  # files up to this size are digested on every opening, others by size alone


@dataclass
class Segment:
    """A sealed run of sequences: ids first … first + rows − 1."""

    name: str
    first: int
    rows: int


@dataclass
class Manifest:
    """Everything a reader needs to know; sizes in bytes, damping in units of mean(Λ)."""

    format: int
    versions: dict[str, str]
    model: dict[str, Any]  # name, revision, files, tensors, tokenizer, tokenizer_name
    dtype: str
    device: str
    threads: int
    task: str  # text, completion, messages or tokens
    sequence_length: int
    documents: int
    sequences: int
    tokens: int
    scored_tokens: int
    skipped: dict[str, int]
    train_sequences: int | None  # None: taken as `sequences`
    modules: list[dict[str, Any]]
    parameter_share: float
    effective_dimension: dict[str, float]
    fit: dict[str, Any]  # sequences, labels
    damping: float
    code: dict[str, Any]  # length, width, seed, digest
    calibration: dict[str, float]  # c, slope, pairs
    batch_tokens: int
    plan: dict[str, Any]  # the build command, resolved
    segments: list[Segment]
    files: dict[str, dict[str, Any]]  # relative name → size, sha256

    @property
    def tracked(self) -> list[Module]:
        return [Module(**module) for module in self.modules]

    @property
    def layers(self) -> list[int]:
        """The block numbers that have tracked modules, ascending."""
        return sorted({module["layer"] for module in self.modules})


def segment_folder(index: Path, name: str) -> Path:
    return index / "segments" / name


def exists(index: Path) -> bool:
    return (index / NAME).is_file()


def commit(index: Path, manifest: Manifest) -> None:
    """Write the manifest: from this moment on the index is what it says."""
    content = json.dumps(asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False,
                         allow_nan=False)
    atomic_write(index / NAME, content.encode() + b"\n")


def load(index: Path) -> Manifest:
    """Read the manifest and check every file's presence and size, and small files' content.

    Raises InputError where there is no index, DamagedIndexError for a missing or changed file,
    IndexMismatchError for another format version.
    """
    if not exists(index):
        unfinished = (index / "build.json").is_file()
        what = "an unfinished build; run the same build command again to finish it" if unfinished \
            else "no index (there is no manifest.json in it); give the folder that " \
                 "`gradindex build -o` wrote"
        raise InputError(f"{index} is {what}.")
    manifest = _parse(index)
    for name, facts in manifest.files.items():
        _check_file(index, name, facts)
    return manifest


def _parse(index: Path) -> Manifest:
    try:
        content = json.loads((index / NAME).read_text(encoding="utf-8"))
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedIndexError(
            f"{index / NAME} can't be read ({error}). Copy the index again or build it again."
        ) from error
    if version != FORMAT:
        raise IndexMismatchError(
            f"{index} has format {version}; this gradindex reads format {FORMAT}. Use a gradindex "
            "that writes that format, or build the index again."
        )
    names = {field.name for field in fields(Manifest)}
    if set(content) != names:
        odd = ", ".join(sorted(set(content) ^ names))
        raise DamagedIndexError(
            f"{index / NAME} lacks or adds entries: {odd}. Copy the index again."
        )
    try:
        content["segments"] = [Segment(**segment) for segment in content["segments"]]
    except TypeError as error:
        raise DamagedIndexError(f"{index / NAME}: {error}. Copy the index again.") from error
    return Manifest(**content)


def _check_file(index: Path, name: str, facts: dict[str, Any]) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DamagedIndexError(f"{index / NAME} names {name!r}, which lies outside the index.")
    path = index / name
    found = path.stat().st_size if path.is_file() else None
    if found is None or found != facts["size"]:
        state = "is missing" if found is None else f"has {found} bytes"
        raise DamagedIndexError(
            f"{path} {state}, expected {facts['size']} bytes. Copy the index again (the copy may "
            "have been cut short), or build it again."
        )
    if found <= SMALL and sha256(path) != facts["sha256"]:
        raise DamagedIndexError(
            f"{path} was changed after it was built (its SHA-256 differs). Copy the index again."
        )


def file_facts(index: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, by relative name."""
    return {
        name: {"size": (index / name).stat().st_size, "sha256": sha256(index / name)}
        for name in names
    }
