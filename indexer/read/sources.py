"""Files → rows: every form of data that `gradindex build` reads, one row at a time.

A row is a dictionary; one that can't be used is a BadRowError with the reason, so that the
reader goes on with the next.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gradindex.errors import InputError
from gradindex.storage.files import digest_of_files
from gradindex.storage.layout import SEGMENTS

LONGEST_LINE = 64 << 20  # bytes; a longer JSONL line is taken for damage and left out

DATA_FORMS = (
    "a .jsonl (.gz, .zst), .parquet, .npy or text file, a folder of such files, or a folder "
    "written by datasets' save_to_disk"
)


class BadRowError(Exception):
    """A row that can't be used, with the reason."""


Row = dict[str, Any] | BadRowError
Columns = Callable[[list[str]], list[str]]


@dataclass
class DataSource:
    """A file, a folder that datasets wrote, or rows that were given."""

    kind: str  # jsonl, parquet, arrow, npy, text or rows
    name: str
    content: Any


def token_file_width(data: Iterable[Any]) -> int | None:
    """The widest row of 2-D token files, or None where there is none."""
    files = [source.content for item in data for source in discover(item) if source.kind == "npy"]
    shapes = [load_tokens(file).shape for file in files]
    return max((shape[1] for shape in shapes if len(shape) == 2), default=None)


def load_tokens(path: Path) -> np.ndarray:
    """A file of token ids, mapped. Raises InputError."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as a .npy file: {error}.") from None
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2) or not array.size:
        raise InputError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected integer token ids, 2-D "
            "(one sequence a row) or 1-D (one stream)."
        )
    return array


def discover(item: Any, direct: bool = True) -> list[DataSource]:
    """The files behind a path (or the rows given); `direct` unless met while walking a folder.

    Raises InputError for what isn't there or isn't read.
    """
    if not isinstance(item, (str, Path)):
        if isinstance(item, (Mapping, Iterator)) or not isinstance(item, Iterable):
            raise InputError(
                f"the data given is a {type(item).__name__}; expected paths, or records that can "
                "be read more than once: a list of dictionaries, or one split of a dataset."
            )
        return [DataSource("rows", "the data given", item)]
    path = Path(item)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = ", ".join(str(path / name) for name in
                               json.loads((path / "dataset_dict.json").read_text())["splits"])
            raise InputError(f"{path} holds several splits; give one of them: {splits}.")
        if (path / "state.json").is_file():
            return [DataSource("arrow", str(path), path)]
        if (path / SEGMENTS).is_dir() and not direct:  # an index, perhaps the one being built
            return []
        # sorted: the order of sequences, and so their ids, must not depend on the file system
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        return [source for entry in entries for source in discover(entry, direct=False)]
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected {DATA_FORMS}.")
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson")):
        return [DataSource("jsonl", str(path), path)]
    # alone it would be read as one text; in a folder of texts it may well be one
    if direct and path.suffix in (".json", ".csv", ".tsv"):
        raise InputError(
            f"{path}: {path.suffix} isn't read as records; expected {DATA_FORMS}. Write one JSON "
            "object a line into a .jsonl file."
        )
    kind = {".parquet": "parquet", ".npy": "npy"}.get(path.suffix, "text")
    return [DataSource(kind, str(path), path)]


def content_size(content: Any) -> int | None:
    """Bytes of a file or of a folder's files, or how many rows were given, where that is known."""
    if not isinstance(content, Path):
        return len(content) if hasattr(content, "__len__") else None
    files = content.iterdir() if content.is_dir() else [content]
    return sum(file.stat().st_size for file in files)


def content_digest(content: Any) -> str:
    """SHA-256 of the bytes of a file or folder of files, or of rows as JSON."""
    if isinstance(content, Path):
        return digest_of_files(sorted(content.iterdir()) if content.is_dir() else [content])
    # rows may hold anything; what JSON has no word for goes in as Python shows it
    digest = hashlib.sha256()
    for row in content:
        digest.update(json.dumps(row, default=repr).encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def count_rows(source: DataSource, length: int) -> int:
    """How many rows a source has, blank lines included, without parsing them.

    `length` is that of a stream of tokens cut into rows. Raises InputError.
    """
    content = source.content
    try:
        if source.kind == "jsonl":
            with _decompressed(content) as file:  # line ends alone, nothing is parsed
                return sum(chunk.count(b"\n") for chunk in iter(partial(file.read, 1 << 20), b""))
        if source.kind == "parquet":
            with pyarrow.parquet.ParquetFile(content) as file:
                return int(file.metadata.num_rows)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise InputError(f"{content} is damaged or can't be read: {error}.") from None
    if source.kind == "npy":
        array = load_tokens(content)
        return array.shape[0] if array.ndim == 2 else -(-len(array) // length)
    if source.kind == "arrow":
        return sum(1 for _ in arrow_rows(content, lambda names: names[:1]))
    if source.kind == "rows":
        return len(content) if hasattr(content, "__len__") else sum(1 for _ in content)
    return 1


def jsonl_rows(path: Path) -> Iterator[Row | None]:
    """Rows of a file of JSON objects, a line each; None for a blank line. Raises InputError."""
    try:
        with _decompressed(path) as file:
            while line := file.readline(LONGEST_LINE):  # bounded: a damaged file may have no lines
                whole = True
                # the rest of a line that is too long is read away, a piece at a time
                while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    line, whole = file.readline(LONGEST_LINE), False
                yield _parse_line(line) if whole else BadRowError(
                    f"line longer than {LONGEST_LINE:,} bytes")
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is damaged, cut short or can't be read: {error}.") from None


def _decompressed(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        # Buffered, since an Arrow stream has no readline with a limit.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _parse_line(line: bytes) -> Row | None:
    try:
        content = line.decode("utf-8-sig").strip()  # with or without a byte order mark
        return as_object(json.loads(content)) if content else None
    except UnicodeDecodeError as error:
        return BadRowError(f"invalid UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRowError(f"invalid JSON ({error})")


def as_object(content: Any) -> Row:
    """What a line holds as a row; a BadRowError where that is no JSON object."""
    if isinstance(content, dict):
        return content
    return BadRowError(f"not an object (a {type(content).__name__})")


def parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a Parquet file, with the `columns` that are chosen. Raises InputError."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = columns(file.schema_arrow.names)
            # a part of the file at a time, which may be larger than memory
            for batch in file.iter_batches(batch_size=1024, columns=names):
                yield from _batch_rows(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} can't be read as Parquet: {error}.") from None


def arrow_rows(folder: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a folder that `datasets.Dataset.save_to_disk` wrote, without importing datasets."""
    try:
        state = json.loads((folder / "state.json").read_text())
        for entry in state["_data_files"]:
            with pyarrow.memory_map(str(folder / entry["filename"])) as file:
                for batch in pyarrow.ipc.open_stream(file):
                    yield from _batch_rows(batch.select(columns(batch.schema.names)))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{folder} can't be read as a datasets folder: {error}.") from None


def _batch_rows(batch: pyarrow.RecordBatch) -> Iterator[Row]:
    """Rows one by one: where a column is no UTF-8, only the row with it is lost."""
    for row in range(len(batch)):
        try:
            content = batch.slice(row, 1).to_pylist()[0]
            for field in batch.schema:
                content[field.name] = _decoded(content[field.name], field.type)
        except UnicodeDecodeError as error:
            content = BadRowError(f"invalid UTF-8 (byte {error.start})")
        except ValueError as error:
            content = BadRowError(f"invalid JSON ({error})")
        yield content


def _decoded(value: Any, kind: pyarrow.DataType) -> Any:
    """A value with what stands in it as JSON text, as `datasets` stores objects of any fields."""
    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return [_decoded(one, kind.value_type) for one in value]
    return value


def text_rows(path: Path, name: str) -> Iterator[Row]:
    """A text file, as one row with a field of that name. Raises InputError."""
    try:
        yield {name: path.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield BadRowError(f"invalid UTF-8 (byte {error.start})")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error}.") from None
