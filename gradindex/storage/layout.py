"""The files of an index in one table: where each lies, what it holds, how large it may be.

    manifest.json                 the commit point (`manifest.py`)
    curvature/<module>.safetensors, curvature/fit.json
    background.safetensors        queries of the index's own (`background_file.py`)
    deleted/NNNNNN.npy            ids that are in a segment and in no answer
    segments/NNNNNN/              a run of sequences (`segments.py`), see SEGMENT_FILES

While something is being made: build.json or append.json, writer.json, a lock shard.N of each shard,
curvature.partial/, reference.partial/ (sequences that a reference has yet to be asked about),
segments/NNNNNN.partial/ and files that end in .tmp.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gradindex.errors import InputError
from gradindex.modules import Module
from gradindex.storage.row_file import ROW

MANIFEST = "manifest.json"
BUILD, APPEND = "build.json", "append.json"  # how far a build or an append has come
WRITER = "writer.json"  # who is writing: read by others for their message, trusted by nobody
SHARD = "shard."  # begins the name of a shard's lock
BACKGROUND = "background.safetensors"
CURVATURE, SEGMENTS, DELETED = "curvature", "segments", "deleted"  # folders
DELETED_FORM = rf"^{DELETED}/\d{{6,12}}\.npy$"  # what names `deleted_file` gives
FIT = f"{CURVATURE}/fit.json"
PARTIAL = ".partial"  # ends the name of a folder that isn't whole yet
CURVATURE_PARTIAL = f"{CURVATURE}{PARTIAL}"
REFERENCE_PARTIAL = f"reference{PARTIAL}"
MARGIN = 1 << 16  # bytes of a file for what isn't counted


@dataclass(frozen=True)
class SegmentFile:
    """One of a segment's files: its name, and which of PARTS `info` counts it as.

    `most` gives the most bytes that it can have, from its rows, K and the tokens of a sequence;
    None for a file that is mapped and never read whole.
    """

    name: str
    part: str
    most: Callable[[int, int, int], int] | None


# Bounds are generous, and are there for hostile files alone: one that says it is larger than any
# writer of ours makes it isn't read into memory.
RECORDS = SegmentFile("records.lmdb", "text", None)
CODES = SegmentFile("vectors.faiss", "codes",
                    lambda rows, length, tokens: rows * code_bytes(length) + 4 * length)
ROWS = SegmentFile("rows.npy", "codes", lambda rows, length, tokens: ROW.itemsize * rows)
TOKENS = SegmentFile("tokens.npz", "words",
                     lambda rows, length, tokens: token_bytes(rows, tokens))
NOTES = SegmentFile("segment.json", "codes", lambda rows, length, tokens: 1024 * rows)
SEGMENT_FILES = (RECORDS, CODES, ROWS, TOKENS, NOTES)
PARTS = ("text", "codes", "words", "background", "curvature")  # of an index, as `info` counts them


def code_bytes(length: int) -> int:
    """Bytes that a code of K = `length` bits takes: its signs, and two floats.

    >>> code_bytes(32768)
    4104
    """
    return length // 8 + 8


def background_bytes(count: int, length: int) -> int:
    """Bytes of `count` background queries of K = `length`, but for the header of their file.

    >>> background_bytes(64, 16384)
    2099200
    """
    return count * (2 * length + 2 * 4 + 3 * 8)


def token_bytes(rows: int, tokens: int) -> int:
    """The most bytes of a segment's token matrix: an index and a value each, and row starts.

    >>> token_bytes(rows=64, tokens=512)
    525312
    """
    return 16 * rows * (tokens + 1)


def module_file(module: Module) -> str:
    """The name of a module's file of curvature, in the folder of these.

    >>> module_file(Module("layers.0.mlp.up", 0, "mlp", 8, 2, False))
    'layers.0.mlp.up.safetensors'
    """
    return f"{module.name}.safetensors"


def curvature_file(module: Module) -> str:
    """The name of a module's file of curvature, in the index.

    >>> curvature_file(Module("layers.0.mlp.up", 0, "mlp", 8, 2, False))
    'curvature/layers.0.mlp.up.safetensors'
    """
    return f"{CURVATURE}/{module_file(module)}"


def refuse_equal_files(index: Path, modules: list[Module]) -> None:
    """Raise InputError where two modules' files would be one: names that differ by case alone.

    `index` has its folder of segments already.
    """
    by_file: dict[str, str] = {}
    for module in modules:
        # as macOS and FAT see names; whether this disk does is asked where it matters alone
        other = by_file.setdefault(unicodedata.normalize("NFC", module.name).casefold(),
                                   module.name)
        if other != module.name and (index / SEGMENTS.upper()).exists():
            raise InputError(
                f"the modules {other} and {module.name} differ by case alone, and the disk of "
                f"{index} can't tell their files apart. Give a folder on another disk with -o, or "
                "leave one out with --modules.")


def deleted_file(generation: int) -> str:
    """The name of the list of deleted ids that the commit of a generation writes.

    >>> deleted_file(3)
    'deleted/000003.npy'
    """
    # A name of its own each time: a reader of the generation before goes on reading its list.
    return f"{DELETED}/{generation:06d}.npy"


def segment_name(number: int) -> str:
    """The name of the segment of a number.

    >>> segment_name(12)
    '000012'
    """
    return f"{number:06d}"


def segment_file(segment: str, file: SegmentFile) -> str:
    """The name, in the index, of one of the files of a segment.

    >>> segment_file("000012", CODES)
    'segments/000012/vectors.faiss'
    """
    return f"{SEGMENTS}/{segment}/{file.name}"


def segment_files(segment: str) -> list[str]:
    """The names, in the index, of all files of a segment."""
    return [segment_file(segment, file) for file in SEGMENT_FILES]


def segment_folder(index: Path, segment: str) -> Path:
    """The folder of a segment that is whole."""
    return index / SEGMENTS / segment


def partial_folder(index: Path, segment: str) -> Path:
    """The folder of a segment that is being made."""
    return index / SEGMENTS / f"{segment}{PARTIAL}"


def segment_of(file: str) -> str | None:
    """The segment that a file belongs to, by its name in the index; None for other files.

    >>> segment_of("segments/000012/rows.npy"), segment_of("manifest.json")
    ('000012', None)
    """
    parts = PurePosixPath(file).parts
    return parts[1] if parts[0] == SEGMENTS else None


def part_of(file: str) -> str:
    """Which of PARTS a file belongs to, by its name in the index.

    >>> part_of("segments/000012/records.lmdb"), part_of("background.safetensors")
    ('text', 'background')
    """
    name = PurePosixPath(file).name
    by_name = {member.name: member.part for member in SEGMENT_FILES}
    return "background" if name == BACKGROUND else by_name.get(name, "curvature")


def most_bytes(
    modules: list[Module], segments: dict[str, int], length: int, tokens: int, next_id: int,
    background: int | None, deleted: tuple[str, int] | None,
) -> dict[str, int]:
    """The most bytes that each file which is read into memory can have, by its name in the index.

    `segments` are the rows of each segment by its name, `length` is K, `tokens` the most tokens of
    a sequence, and all ids are below `next_id`. `background` is the number of background queries,
    and `deleted` the name and length of the list of deleted ids, or None where there is none.

    >>> most_bytes([], {}, 512, 24, 0, None, ("deleted/000001.npy", 10))["deleted/000001.npy"]
    65616
    """
    most = {FIT: MARGIN + 1024 * next_id}
    if deleted is not None:
        most[deleted[0]] = MARGIN + 8 * deleted[1]
    if background is not None:
        most[BACKGROUND] = MARGIN + background_bytes(background, length)
    for module in modules:
        o, i = module.shape
        # in float64, and with A and S whole: blocks only take less
        squares = i * i + (o if module.diagonal else o * o)
        most[curvature_file(module)] = MARGIN + 8 * (squares + o * i)
    for segment, rows in segments.items():
        for file in SEGMENT_FILES:
            if file.most is not None:
                most[segment_file(segment, file)] = MARGIN + file.most(rows, length, tokens)
    return most
