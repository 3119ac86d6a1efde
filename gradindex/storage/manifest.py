"""What an index is: `manifest.json`, the commit point.

An index folder without a manifest is a build that hasn't ended; what the manifest doesn't list
does not exist. It is written last and replaced atomically, and every commit counts `generation` up
by one. It ends with its own digest, holds every other file's size and SHA-256, no wall-clock time
and no absolute path of the index, so equal builds give equal bytes and the folder moves freely.

A manifest may come from a stranger: nothing in it is believed before types, bounds and names were
checked.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any

import pydantic
from typing_extensions import TypedDict

from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError
from gradindex.modules import Module
from gradindex.storage import layout, sealed_json
from gradindex.storage.files import FileFacts, atomic_write
from gradindex.storage.integrity import CheckedFiles, damaged, open_inside
from gradindex.storage.plan import Count, DataFacts, Plan, Positive
from gradindex.storage.upgrades import FORMAT, OLDEST, downgrade, upgrade
from gradindex.version import VERSION

LARGEST = 1 << 28  # bytes of a manifest: a million segments
LARGEST_SIDE = 1 << 20  # of a module
LARGEST_LENGTH = 1 << 24  # bits of a code

_MODULE_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")


class ModelFacts(TypedDict):
    """Where the model was at the build, and what it is: digests, and its configuration."""

    name: str
    revision: str | None
    files: str | None
    tensors: str
    config: dict[str, Any]
    tokenizer: str | None
    tokenizer_name: str | None


class FitFacts(TypedDict):
    """How the curvature was fitted; `left_out` are modules without a gradient, and why."""

    sequences: Count
    labels: str
    left_out: dict[str, str]


class CodeFacts(TypedDict):
    """CodeSettings, and the digest of the random numbers drawn for them."""

    length: Annotated[int, pydantic.Field(gt=0, le=LARGEST_LENGTH, multiple_of=64)]
    width: Annotated[int, pydantic.Field(gt=0, le=4096)]
    seed: Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]
    damping: Positive
    digest: str


class Calibration(TypedDict):
    """How far a code's score is from the exact one, see `indexer/calibrate.py`.

    `anchors` are exact scores measured then: ids of a sequence that was the query and of another,
    and the influence of the second on the first.
    """

    c: Positive
    slope: float
    pairs: Count
    anchors: list[tuple[Count, Count, float]]


class BackgroundFacts(TypedDict):
    """How many background queries there are, and of how many sequences their thresholds are."""

    queries: Annotated[int, pydantic.Field(ge=0, le=4096)]
    sample: Count


class Appended(TypedDict):
    """Documents that came after the build: their data, and how their Λ compares (`append.py`)."""

    data: list[DataFacts]
    first: Count
    sequences: Count
    drift: float
    drift_error: float


@dataclass
class Segment:
    """A sealed run of sequences, in order of their ids."""

    name: Annotated[str, pydantic.Field(pattern=r"^\d{6,12}$")]
    rows: Annotated[int, pydantic.Field(gt=0, le=1 << 24)]


@dataclass
class Manifest:
    """Everything a reader needs to know; sizes in bytes, damping in units of mean(Λ).

    `sequences` are those that can be found: the rows of all segments less the `deleted` and the
    `quarantined`. `documents` and tokens are of everything that was ever read. Ids below `next_id`
    and segment numbers below `next_segment` were given once and are never given again.
    `deleted_file` lists the deleted that are still in a segment.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: int
    generation: Count
    versions: dict[str, str]
    model: ModelFacts
    dtype: str
    device: str
    threads: Annotated[int, pydantic.Field(gt=0, le=1 << 16)]
    task: str  # text, completion, messages or tokens
    vocabulary: Annotated[int, pydantic.Field(gt=0, le=1 << 24)]  # token ids are below it
    sequence_length: Annotated[int, pydantic.Field(gt=0, le=1 << 24)]
    documents: Count
    sequences: Count
    tokens: Count
    scored_tokens: Count
    skipped: dict[str, Count]
    duplicates: Count  # sequences equal to an earlier one
    train_sequences: Annotated[int, pydantic.Field(gt=0)] | None  # None: taken as `next_id`
    modules: Annotated[list[Module], pydantic.Field(min_length=1, max_length=1 << 17)]
    parameter_share: float
    effective_dimension: dict[str, float]
    fit: FitFacts
    damping: Positive
    code: CodeFacts
    calibration: Calibration
    background: BackgroundFacts | None  # None: built in format 1
    batch_tokens: Annotated[int, pydantic.Field(gt=0, le=1 << 40)]
    plan: Plan
    appended: list[Appended]
    next_id: Count
    next_segment: Count
    segments: Annotated[list[Segment], pydantic.Field(max_length=1 << 20)]
    deleted: Count
    deleted_file: Annotated[str, pydantic.Field(pattern=r"^deleted/\d{6,12}\.npy$")] | None
    quarantined: Count
    files: dict[str, FileFacts]  # by relative name

    @property
    def layers(self) -> list[int]:
        """The block numbers that have tracked modules, ascending."""
        return sorted({module.layer for module in self.modules})

    @property
    def rows(self) -> int:
        """Rows of all segments, the deleted and the quarantined among them."""
        return sum(segment.rows for segment in self.segments)


_ADAPTER: pydantic.TypeAdapter[Manifest] = pydantic.TypeAdapter(Manifest)


def model_name(manifest: Manifest) -> str:
    """The hub's name and revision, or a folder's own name without where it was."""
    name, revision = str(manifest.model["name"]), manifest.model["revision"]
    short = PurePath(name).name if name.startswith(("/", ".", "~")) else name
    return short if revision is None else f"{short} @ {revision[:12]}"


def _wrong(index: Path, what: str) -> DamagedIndexError:
    return damaged(index, layout.MANIFEST, what)


def exists(index: Path) -> bool:
    return (index / layout.MANIFEST).is_file()


def digest_of(manifest: Manifest) -> str:
    """The hex SHA-256 that a manifest ends with, which names a state of an index."""
    return sealed_json.digest_of(_content(manifest))


def _content(manifest: Manifest) -> dict[str, Any]:
    """What the manifest's file says, in its own format."""
    content = asdict(manifest)
    downgrade(content)
    return content


def commit(index: Path, manifest: Manifest) -> None:
    """Write the manifest: from this moment on the index is what it says, in the newest format.

    Raises ResourceError.
    """
    newest = _content(replace(manifest, format=FORMAT))
    atomic_write(index / layout.MANIFEST, sealed_json.sign(newest))


def load(index: Path) -> Manifest:
    """Read the manifest, and nothing else.

    Raises InputError where there is no index, DamagedIndexError for a manifest that was changed or
    can't be, IndexMismatchError for another format version.
    """
    if not (index / layout.MANIFEST).is_symlink() and not exists(index):
        if (index / layout.BUILD).is_file():
            raise InputError(f"{index} is an unfinished build; run the same build command again to "
                             "finish it (or gradindex merge, where shards built it).")
        if any((index / part).is_dir() for part in (layout.SEGMENTS, layout.CURVATURE)):
            raise _wrong(index, "is missing: the index was not copied whole, or lost it")
        raise InputError(f"{index} is no index (there is no manifest.json in it); give the folder "
                         "that `gradindex build -o` wrote.")
    content = _parse(index)
    if sealed_json.KEY not in content:
        raise IndexMismatchError(
            f"{index} was written before format {OLDEST} was settled (its manifest has no digest). "
            "Build the index again: `gradindex build MODEL DATA... -o NEW_INDEX`."
        )
    try:
        manifest = _ADAPTER.validate_json(_checked(content))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise _wrong(index, f"is not what an index has: {where}: {first['msg']}") from None
    except ValueError as error:
        raise _wrong(index, f"can't be believed: {error}") from None
    _check(index, manifest)
    return manifest


def _checked(content: dict[str, Any]) -> bytes:
    """The JSON of a manifest in the newest format. Raises ValueError if it was changed."""
    checked = sealed_json.check(content)
    if content["format"] == FORMAT:
        return checked
    own = sealed_json.parse(checked)
    upgrade(own)
    return sealed_json.canonical(own)


def _parse(index: Path) -> dict[str, Any]:
    descriptor = open_inside(index, layout.MANIFEST)
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise _wrong(index, f"is larger than {LARGEST:,} bytes")
    try:
        content = sealed_json.parse(raw)
        version = content["format"]
    except (ValueError, KeyError) as error:
        raise _wrong(index, f"can't be read ({str(error)[:200]})") from None
    if not isinstance(version, int) or not OLDEST <= version <= FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise IndexMismatchError(
            f"{index} has format {str(version)[:20]}; this gradindex ({VERSION}) "
            f"reads formats {OLDEST} to {FORMAT}. " + (
                "Run `pip install --upgrade gradindex`." if newer else
                "Build the index again: `gradindex build MODEL DATA... -o NEW_INDEX`.")
        )
    return content


def _check(index: Path, manifest: Manifest) -> None:
    """Raise DamagedIndexError where the parts of a manifest don't fit each other."""
    for module in manifest.modules:
        if not _MODULE_NAME.fullmatch(module.name) or not all(
                0 < side <= LARGEST_SIDE for side in (module.d_out, module.d_in)):
            raise _wrong(index, f"names a module that can't be: {module.name[:80]!r}")
    names = [segment.name for segment in manifest.segments]
    numbers = [int(name) for name in names]
    if len(set(names)) < len(names) or any(one >= manifest.next_segment for one in numbers):
        raise _wrong(index, "lists a segment twice, or one that was never made")
    live = manifest.rows - manifest.deleted - manifest.quarantined
    if manifest.sequences != live or manifest.rows > manifest.next_id:
        raise _wrong(index,
                      f"counts {manifest.sequences:,} sequences, its segments {live:,}")
    expected = {layout.curvature_file(module) for module in manifest.modules} | {layout.FIT}
    expected |= {file for name in names for file in layout.segment_files(name)}
    expected |= {layout.BACKGROUND} if manifest.background is not None else set()
    expected |= {manifest.deleted_file} - {None}  # type: ignore[arg-type]
    if odd := expected ^ set(manifest.files):
        raise _wrong(index, f"lists files that don't fit its contents: {min(odd)[:80]!r}")
    deleted = None if manifest.deleted_file is None else (manifest.deleted_file, manifest.deleted)
    bounds = layout.most_bytes(
        manifest.modules, {segment.name: segment.rows for segment in manifest.segments},
        manifest.code["length"], manifest.sequence_length, manifest.next_id,
        None if manifest.background is None else manifest.background["queries"], deleted)
    for name, most in bounds.items():
        if manifest.files[name].size > most:
            raise _wrong(index, f"gives {name} {manifest.files[name].size:,} bytes, more "
                          f"than the {most:,} that it can have")


@dataclass
class Problem:
    """A damaged file, the segment it belongs to (None: the whole index needs it), and the error."""

    file: str
    segment: str | None
    error: DamagedIndexError


def problems(files: CheckedFiles, manifest: Manifest, digest: bool = False) -> Iterator[Problem]:
    """Files that are missing or changed: by presence, size and small content, or all content."""
    for name in sorted(manifest.files):
        try:
            files.check(name, digest)
        except DamagedIndexError as error:
            yield Problem(name, layout.segment_of(name), error)
