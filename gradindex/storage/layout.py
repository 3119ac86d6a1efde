"""An index's files in one table: where each lies, what it holds, how large it may be.

    manifest.json                 the commit point (`manifest.py`)
    curvature/<module>.safetensors, curvature/fit.json
    background.safetensors        queries of the index's own (`background_file.py`)
    deleted/NNNNNN.npy            ids that are in a segment and in no answer
    segments/NNNNNN/              a run of sequences (`segments.py`), see SEGMENT_FILES

While something is being made: build.json or append.json, curvature.partial/,
segments/NNNNNN.partial/ and files that end in .tmp.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gradindex.modules import Module
from gradindex.storage.row_file import ROW

MANIFEST = "manifest.json"
BUILD, APPEND = "build.json", "append.json"  # how far a build or an append has come
BACKGROUND = "background.safetensors"
CURVATURE, SEGMENTS, DELETED = "curvature", "segments", "deleted"  # folders
FIT = f"{CURVATURE}/fit.json"
PARTIAL = ".partial"  # ends the name of a folder that isn't whole yet
MARGIN = 1 << 16  # bytes of a file for what isn't counted


@dataclass(frozen=True)
class SegmentFile:
    """One file of a segment: its name, what `info` counts it as, and the most bytes it can have.

    `most` is a function of its rows, of K and of the tokens in a sequence; None for what is mapped
    and never read whole.
    """

    name: str
    part: str
    most: Callable[[int, int, int], int] | None


RECORDS = SegmentFile("records.lmdb", "text", None)
CODES = SegmentFile("vectors.faiss", "codes",
                    lambda rows, length, tokens: rows * code_bytes(length) + 4 * length)
ROWS = SegmentFile("rows.npy", "codes", lambda rows, length, tokens: ROW.itemsize * rows)
TOKENS = SegmentFile("tokens.npz", "words",
                     lambda rows, length, tokens: 16 * rows * (tokens + 1))
NOTES = SegmentFile("segment.json", "codes", lambda rows, length, tokens: 1024 * rows)
SEGMENT_FILES = (RECORDS, CODES, ROWS, TOKENS, NOTES)
PARTS = ("text", "codes", "words", "background", "curvature")  # of an index, as `info` counts them


def code_bytes(length: int) -> int:
    """Bytes that a code of K = `length` bits takes: its signs, and two floats."""
    return length // 8 + 8


def curvature_file(module: Module) -> str:
    """The name of a module's file of curvature."""
    return f"{CURVATURE}/{module.name}.safetensors"


def deleted_file(generation: int) -> str:
    """The name of the list of the deleted that a commit writes."""
    return f"{DELETED}/{generation:06d}.npy"


def segment_name(number: int) -> str:
    """What a segment is called by its number."""
    return f"{number:06d}"


def segment_file(segment: str, file: SegmentFile) -> str:
    """The name of one of a segment's files."""
    return f"{SEGMENTS}/{segment}/{file.name}"


def segment_files(segment: str) -> list[str]:
    """The names of all of a segment's files."""
    return [segment_file(segment, file) for file in SEGMENT_FILES]


def segment_folder(index: Path, segment: str) -> Path:
    """Where a whole segment lies."""
    return index / SEGMENTS / segment


def partial_folder(index: Path, segment: str) -> Path:
    """Where a segment is made."""
    return index / SEGMENTS / f"{segment}{PARTIAL}"


def segment_of(file: str) -> str | None:
    """The segment that a file belongs to, by its name; None for the others."""
    parts = PurePosixPath(file).parts
    return parts[1] if parts[0] == SEGMENTS else None


def part_of(file: str) -> str:
    """Which of PARTS a file belongs to, by its name."""
    own = PurePosixPath(file).name
    by_name = {one.name: one.part for one in SEGMENT_FILES}
    return "background" if own == BACKGROUND else by_name.get(own, "curvature")


def most_bytes(
    modules: list[Module], segments: dict[str, int], length: int, tokens: int, next_id: int,
    background: int | None, deleted: tuple[str, int] | None,
) -> dict[str, int]:
    """The most bytes that each file which is read into memory can have, by its name.

    `segments` gives the rows of each; codes have `length` bits and sequences `tokens` tokens;
    `background` queries and so many `deleted` ids, in a file of that name, where there are such.
    A file that says it is larger is hostile or damaged, and isn't read.
    """
    most = {FIT: MARGIN + 1024 * next_id}
    if deleted is not None:
        most[deleted[0]] = MARGIN + 8 * deleted[1]
    if background is not None:
        most[BACKGROUND] = MARGIN + background * (2 * length + 32)
    for module in modules:
        o, i = module.shape
        most[curvature_file(module)] = MARGIN + 8 * (o * o + i * i + o * i)
    for segment, rows in segments.items():
        for file in SEGMENT_FILES:
            if file.most is not None:
                most[segment_file(segment, file)] = MARGIN + file.most(rows, length, tokens)
    return most
