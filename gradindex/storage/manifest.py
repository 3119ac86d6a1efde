"""What an index is: `manifest.json`, the commit point.

An index folder without a manifest is a build that hasn't ended, and what the manifest doesn't list
does not exist. It is written last and replaced atomically; every commit counts `generation` up by
one. It holds the size and the SHA-256 of every other file and ends with its own digest. It holds no
wall-clock time and no absolute path of the index, so equal builds give equal bytes and the folder
moves freely.

A manifest may come from a stranger: nothing in it is believed before types, bounds and names were
checked.
"""

import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any

import pydantic
from typing_extensions import TypedDict

from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError
from gradindex.modules import AT, LAST, MEMBER_FORM, Module
from gradindex.storage import layout, sealed_json
from gradindex.storage.build_plan import Count, DataFacts, Plan, Positive
from gradindex.storage.files import FileFacts, atomic_write
from gradindex.storage.integrity import CheckedFiles, damaged, read_inside
from gradindex.storage.os_errors import OF_THE_PATH, refusals
from gradindex.storage.upgrades import FORMAT, OLDEST, downgrade, upgrade
from gradindex.task import DERIVED, TASKS, Task
from gradindex.version import VERSION

# Bounds of what a stranger's manifest may claim: memory is taken by these numbers.
LARGEST = 1 << 28  # bytes of a manifest: a million segments
LARGEST_SIDE = 1 << 20  # of a module
LARGEST_LENGTH = 1 << 24  # bits of a code

MOST_MEMBERS = 63  # besides the model itself
# It becomes the name of a file, so it may lead out of no folder.
_MODULE_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")


class ModelFacts(TypedDict):
    """Where the model was at the build (`name`, `revision`), and what it is (`model/identity.py`).

    `files` is None where the model was given as an object.
    """

    name: str
    revision: str | None
    files: str | None
    tensors: str
    config: dict[str, Any]
    tokenizer: str | None
    tokenizer_name: str | None


class MemberFacts(TypedDict):
    """As `ModelFacts` of another model that shares the score; it has the first one's tokenizer."""

    name: str
    revision: str | None
    files: str | None
    tensors: str
    config: dict[str, Any]


class FitFacts(TypedDict):
    """How the curvature was fitted; `left_out` says of modules without a gradient why."""

    sequences: Count
    labels: str
    left_out: dict[str, str]


class CodeFacts(TypedDict):
    """The settings of the codes (`CodeSettings`), and the digest of the random numbers drawn."""

    length: Annotated[int, pydantic.Field(gt=0, le=LARGEST_LENGTH, multiple_of=64)]
    width: Annotated[int, pydantic.Field(gt=0, le=4096)]
    seed: Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]
    damping: Positive
    recipe: Annotated[int, pydantic.Field(ge=1, le=3)]
    digest: str


class Calibration(TypedDict):
    """How far code scores are from exact ones, see `indexer/calibrate.py`.

    `c` is the error in units of ‖v_q‖ ‖v_m‖ / √K, and `slope` that of code scores over exact ones,
    from so many `pairs` of sequences. `anchors` are some of the exact scores: the id of the
    sequence that was the query, the id of another, and the influence of the second on the first.
    """

    c: Positive
    slope: float
    pairs: Count
    anchors: list[tuple[Count, Count, float]]


class BackgroundFacts(TypedDict):
    """How many background queries there are, and from how many sequences their thresholds are."""

    queries: Annotated[int, pydantic.Field(ge=0, le=4096)]
    sample: Count


class Appended(TypedDict):
    """Documents that were appended: their data, ids from `first` on, and how far their Λ drifted.

    See `indexer/upkeep/append.py`.
    """

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
    """Everything that a reader needs to know; sizes in bytes, damping in units of mean(Λ).

    `sequences` counts those that can be found: the rows of all segments less the `deleted` and the
    `quarantined`. `documents`, `tokens` and `scored_tokens` count everything that was ever read.
    Ids below `next_id` and numbers of segments below `next_segment` were given once and are never
    given again. `deleted_file` lists the deleted that are still in a segment.
    """

    # Unknown entries are refused: whoever wrote them meant something by them.

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    format: int
    generation: Count
    versions: dict[str, str]
    model: ModelFacts
    also: Annotated[dict[Annotated[str, pydantic.Field(pattern=MEMBER_FORM)], MemberFacts],
                    pydantic.Field(max_length=MOST_MEMBERS)]
    dtype: str
    device: str
    threads: Annotated[int, pydantic.Field(gt=0, le=1 << 16)]
    kind: str  # of records: text, completion, messages, tokens, labelled or pairs
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
    deleted_file: Annotated[str, pydantic.Field(pattern=layout.DELETED_FORM)] | None
    quarantined: Count
    files: dict[str, FileFacts]  # by relative name

    @property
    def task(self) -> Task:
        """What the model was trained for."""
        return Task(self.plan.task, self.plan.beta)

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
    """What the model is called, in words: its hub id and revision, or its folder's own name."""
    # An index is passed on, and where a folder lay on another machine is nobody's business.
    name, revision = str(manifest.model["name"]), manifest.model["revision"]
    short = PurePath(name).name if name.startswith(("/", ".", "~")) else name
    return short if revision is None else f"{short} @ {revision[:12]}"


def _wrong(index: Path, what: str) -> DamagedIndexError:
    """The error for a manifest: "manifest.json `what`"."""
    return damaged(index, layout.MANIFEST, what)


def expected_identity(manifest: Manifest) -> dict[str, Any]:
    """What the index knows its model by, and the other members (`model/identity.py`)."""
    return {**manifest.model, "also": dict(manifest.also)}


def exists(index: Path) -> bool:
    """Whether a folder holds an index that was committed. Raises ResourceError."""
    path = index / layout.MANIFEST
    with refusals(path):  # pathlib would say of a folder that may not be entered: nothing there
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            if error.errno in OF_THE_PATH:
                return False
            raise


def digest_of(manifest: Manifest) -> str:
    """The SHA-256, in hex, that a manifest ends with: it names a state of an index."""
    return sealed_json.digest_of(_content(manifest))


def _content(manifest: Manifest) -> dict[str, Any]:
    """What the manifest's file says, in its own format."""
    # An index keeps its format until something is committed to it, and its digest with that.
    content = asdict(manifest)
    downgrade(content)
    return content


def commit(index: Path, manifest: Manifest) -> None:
    """Write the manifest, in the newest format. From this moment on the index is what it says.

    Raises ResourceError.
    """
    newest = _content(replace(manifest, format=FORMAT))
    atomic_write(index / layout.MANIFEST, sealed_json.with_digest(newest))


def load(index: Path) -> Manifest:
    """Read the manifest and check all that it says of itself. No other file is read.

    Raises InputError where there is no index, DamagedIndexError for a manifest that was changed or
    contradicts itself, IndexMismatchError for a format that this version doesn't read,
    ResourceError where the system refuses to read it.
    """
    # Absence first, as it is no damage: most likely the user named another folder, or a build that
    # was killed. A link is left to `_parse`, which refuses it.
    if not (index / layout.MANIFEST).is_symlink() and not exists(index):
        if (index / layout.BUILD).is_file():
            raise InputError(f"{index} is an unfinished build; run the same build command again to "
                             "finish it (or gradindex merge, where shards built it).")
        if any((index / part).is_dir() for part in (layout.SEGMENTS, layout.CURVATURE)):
            raise _wrong(index, "is missing: the index was not copied whole, or lost it")
        raise InputError(f"{index} is no index (there is no {layout.MANIFEST} in it); give the "
                         "folder that `gradindex build -o` wrote.")
    content = _parse(index)
    if sealed_json.KEY not in content:
        raise IndexMismatchError(
            f"{index} was written before format {OLDEST} was settled (its manifest has no digest). "
            "Build the index again: `gradindex build MODEL DATA... -o NEW_INDEX`."
        )
    try:
        manifest = _ADAPTER.validate_json(_checked(content))
    except pydantic.ValidationError as error:
        # Of perhaps thousands of errors the first, and without the input, which may be anything.
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise _wrong(index, f"is not what an index has: {where}: {first['msg']}") from None
    except ValueError as error:
        raise _wrong(index, f"can't be believed: {error}") from None
    _check(index, manifest)
    return manifest


def _checked(content: dict[str, Any]) -> bytes:
    """The JSON of a manifest in the newest format. Raises ValueError if it was changed."""
    # The digest is that of its own format's content, so it is checked before the upgrade.
    checked = sealed_json.check(content)
    if content["format"] == FORMAT:
        return checked
    upgraded = sealed_json.parse(checked)
    upgrade(upgraded)
    return sealed_json.canonical(upgraded)


def _parse(index: Path) -> dict[str, Any]:
    """What the manifest's file holds, of a format that can be read. Nothing else is checked."""
    raw = read_inside(index, layout.MANIFEST, LARGEST)
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
    """Raise DamagedIndexError where the parts of a manifest contradict each other."""
    for module in manifest.modules:
        if not _MODULE_NAME.fullmatch(module.name) or not all(
                0 < side <= LARGEST_SIDE for side in (module.d_out, module.d_in)):
            raise _wrong(index, f"names a module that can't be: {module.name[:80]!r}")
        if module.member != LAST and (module.member not in manifest.also or
                                      not module.name.startswith(module.member + AT)):
            raise _wrong(index, f"has a module of no model that it names: {module.name[:80]!r}")
    plan = manifest.plan
    if plan.task not in TASKS or not set(plan.derive) <= set(DERIVED) or \
            (plan.task == "classification") != bool(plan.labels):
        raise _wrong(index, f"is of a task that can't be: {plan.task[:80]!r}, with the classes "
                     f"{', '.join(plan.labels)[:80]!r}")
    names = [segment.name for segment in manifest.segments]
    numbers = [int(name) for name in names]
    if len(set(names)) < len(names) or any(
            number >= manifest.next_segment for number in numbers):
        raise _wrong(index, "lists a segment twice, or one that was never made")
    live = manifest.rows - manifest.deleted - manifest.quarantined
    if manifest.sequences != live or manifest.rows > manifest.next_id:
        raise _wrong(index, f"counts {manifest.sequences:,} sequences, its segments {live:,}")
    expected = {layout.curvature_file(module) for module in manifest.modules} | {layout.FIT}
    expected |= {file for name in names for file in layout.segment_files(name)}
    expected |= {layout.BACKGROUND} if manifest.background is not None else set()
    expected |= {manifest.deleted_file} - {None}  # type: ignore[arg-type]
    # No more and no fewer: every other reader takes what it needs from `files` without asking.
    if strange := expected ^ set(manifest.files):
        raise _wrong(index, f"lists files that don't fit its contents: {min(strange)[:80]!r}")
    deleted = None if manifest.deleted_file is None else (manifest.deleted_file, manifest.deleted)
    bounds = layout.most_bytes(
        manifest.modules, {segment.name: segment.rows for segment in manifest.segments},
        manifest.code["length"], manifest.sequence_length * (1 + manifest.task.of_pairs),
        manifest.next_id,
        None if manifest.background is None else manifest.background["queries"], deleted)
    for name, most in bounds.items():
        if manifest.files[name].size > most:
            raise _wrong(index, f"gives {name} {manifest.files[name].size:,} bytes, more "
                         f"than the {most:,} that it can have")


@dataclass
class Problem:
    """A damaged file of an index, and the error that reading it would raise.

    `segment` is the one that it belongs to; None where the whole index needs it.
    """

    file: str
    segment: str | None
    error: DamagedIndexError


def problems(files: CheckedFiles, manifest: Manifest, digest: bool = False) -> Iterator[Problem]:
    """The files that are missing or changed, in order of their names.

    Small files are read and compared; of others the size is, or with `digest` all content too.
    """
    for name in sorted(manifest.files):
        try:
            files.check(name, digest)
        except DamagedIndexError as error:
            yield Problem(name, layout.segment_of(name), error)
