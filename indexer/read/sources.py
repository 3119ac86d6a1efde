"""Sources of rows: files of every form that is read, and rows that were given, a row at a time.

A row is a dictionary; one that can't be used is a BadRowError with the reason, so that the
reader goes on with the next.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gradindex.errors import BadRowError, InputError
from gradindex.storage.files import digest_of_files
from indexer.read.compressed import opened
from indexer.read.json_rows import json_rows, jsonl_rows
from indexer.read.rows import Columns, Row, as_object
from indexer.read.tables import table_rows

DATA_FORMS = (
    "JSON lines, JSON, CSV, TSV, Parquet, Arrow or text (each also .gz, .zst, .bz2 or .xz where it "
    "is text), token files (.npy), folders of these, or a folder that datasets saved"
)
SHOWN = 3  # files named of those of one kind


@dataclass
class DataSource:
    """A file, a folder that datasets wrote, or rows that were given."""

    kind: str  # jsonl, json, csv, parquet, ipc, arrow, npy, text or rows
    name: str
    content: Any

    @property
    def holds_records(self) -> bool:
        """Whether its rows are records with fields, neither texts nor token ids."""
        return self.kind not in ("npy", "text")


def shown_files(paths: list[str]) -> str:
    """The first of some files, and how many more there are."""
    more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more


class TableRows:
    """The rows of a table that was given, made one by one."""

    def __init__(self, table: pyarrow.Table):
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[Row]:
        for batch in self._table.to_batches():
            yield from _batch_rows(batch)


def given_rows(item: Any) -> DataSource:
    """The source of rows that were given. Raises InputError for what holds none."""
    if hasattr(item, "__arrow_c_stream__"):  # a table of pyarrow, pandas, polars, duckdb, …
        try:
            item = TableRows(pyarrow.table(item))
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise InputError(
                f"the {type(item).__name__} given can't be read as a table: {error}. Give its rows "
                "as a list of dictionaries.") from None
    elif isinstance(item, (Mapping, Iterator)) or not isinstance(item, Iterable):
        # a mapping: one of splits, or of columns
        there = f" (found {', '.join(map(str, item))})" if isinstance(item, Mapping) else ""
        raise InputError(
            f"the data given is a {type(item).__name__}; expected paths, or records that can be "
            "read more than once: a list of dictionaries, a table, or one split of a dataset"
            f"{there}.")
    return DataSource("rows", "the data given", item)


# ---- rows


def read_source(
    source: DataSource, columns: Columns, names: Sequence[str], text_field: str, length: int
) -> Iterable[Row | None]:
    """The rows of a source, None for a blank line.

    `columns` says which to read of a table's, `names` are those of a table in text that has no
    header, `text_field` is the field of a text file's row, `length` that of a stream of tokens cut
    into rows. Raises InputError.
    """
    content = source.content
    # generators all, and none of them opens its file before the first row is asked for
    if source.kind == "jsonl":
        return jsonl_rows(content)
    if source.kind == "json":
        return json_rows(content)
    if source.kind == "csv":
        return table_rows(content, names)
    if source.kind == "parquet":
        return parquet_rows(content, columns)
    if source.kind == "ipc":
        return ipc_rows(content, columns)
    if source.kind == "arrow":
        return arrow_rows(content, columns)
    if source.kind == "npy":
        return token_rows(content, length)
    return text_rows(content, text_field) if source.kind == "text" else map(as_object, content)


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


def ipc_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Rows of an Arrow file or stream (.arrow, .feather). Raises InputError."""
    try:
        # not mapped: a file that is shorter than it says would end the process
        with pyarrow.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = reader = pyarrow.ipc.open_stream(file)
            names = columns(reader.schema.names)
            for batch in batches:
                yield from _checked_rows(batch.select(names))
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} can't be read as Arrow: {error}. Expected version 2 of Feather, "
                         "or an Arrow file or stream.") from None


def arrow_rows(folder: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a folder that `datasets.Dataset.save_to_disk` wrote, without importing datasets."""
    try:
        state = json.loads((folder / "state.json").read_text())
        for entry in state["_data_files"]:
            with pyarrow.OSFile(str(folder / entry["filename"])) as file:
                for batch in pyarrow.ipc.open_stream(file):
                    yield from _checked_rows(batch.select(columns(batch.schema.names)))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(f"{folder} can't be read as a datasets folder: {error}.") from None


def _checked_rows(batch: pyarrow.RecordBatch) -> Iterator[Row]:
    """Rows of a batch as it lay in a file, which Arrow believes unchecked."""
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:  # a text that is no UTF-8, or places outside of the file
        for row in range(len(batch)):
            try:
                batch.slice(row, 1).validate(full=True)
                yield from _batch_rows(batch.slice(row, 1))
            except pyarrow.ArrowInvalid as error:
                yield BadRowError(f"damaged ({error})")
        return
    yield from _batch_rows(batch)


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
    with opened(path) as file:
        content = file.read()
    try:
        yield {name: content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield BadRowError(f"invalid UTF-8 (byte {error.start}; if it is CP1252 or Latin-1: iconv "
                          "-f CP1252 -t UTF-8 OLD > NEW)")


# ---- what `datasets` notes beside a table


def noted_features(source: DataSource) -> dict[str, Any]:
    """What `datasets` noted of a table's fields, by their names; empty where it noted nothing."""
    content = source.content
    if source.kind == "rows":
        to_dict = getattr(getattr(content, "features", None), "to_dict", None)
        return to_dict() if callable(to_dict) else {}
    try:
        noted = json.loads((_schema(source).metadata or {}).get(b"huggingface", b"{}"))
        found = noted["info"]["features"]
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException):
        return {}  # what is wrong with a file is said where it is read
    return found if isinstance(found, dict) else {}


def _schema(source: DataSource) -> pyarrow.Schema:
    """The schema of a file of columns, an empty one of any other."""
    path = source.content
    if source.kind == "parquet":
        return pyarrow.parquet.read_schema(path)
    if source.kind == "arrow":
        path = path / json.loads((path / "state.json").read_text())["_data_files"][0]["filename"]
    elif source.kind != "ipc":
        return pyarrow.schema([])
    with pyarrow.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).schema


# ---- tokens


def token_file_width(sources: Iterable[DataSource]) -> int | None:
    """The widest row of 2-D token files, or None where there is none."""
    shapes = [load_tokens(source.content).shape for source in sources if source.kind == "npy"]
    return max((shape[1] for shape in shapes if len(shape) == 2), default=None)


def load_tokens(path: Path) -> np.ndarray:
    """A file of token ids, mapped. Raises InputError."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, SyntaxError, TokenError) as error:  # its header is read as Python
        raise InputError(f"{path} can't be read as a .npy file: {error}.") from None
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2) or not array.size:
        raise InputError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected integer token ids, 2-D "
            "(one sequence a row) or 1-D (one stream)."
        )
    return array


def token_rows(path: Path, length: int) -> Iterator[dict[str, Any]]:
    """The rows of a token file, or a stream of tokens cut into rows. Raises InputError."""
    array = load_tokens(path)
    if array.ndim == 2 and array.shape[1] > length:
        raise InputError(
            f"{path} has rows of {array.shape[1]} tokens, more than the sequence length of "
            f"{length}. Give --seq-len {array.shape[1]} if the model's context allows it, or "
            "cut the rows."
        )
    rows = array if array.ndim == 2 else (
        array[start : start + length] for start in range(0, len(array), length))
    yield from ({"tokens": np.asarray(row)} for row in rows)


# ---- what a source is known by


def content_size(content: Any) -> int | None:
    """Bytes of a file or of a folder's files, or how many rows were given, where that is known.

    Raises InputError where a file is gone.
    """
    if not isinstance(content, Path):
        return len(content) if hasattr(content, "__len__") else None
    try:
        files = content.iterdir() if content.is_dir() else [content]
        return sum(file.stat().st_size for file in files)
    except OSError as error:
        raise _unreadable(content, error) from None


def content_digest(content: Any) -> str:
    """SHA-256 of the bytes of a file or folder of files, or of rows as JSON. Raises InputError."""
    if isinstance(content, Path):
        try:
            return digest_of_files(sorted(content.iterdir()) if content.is_dir() else [content])
        except OSError as error:
            raise _unreadable(content, error) from None
    # rows may hold anything; what JSON has no word for goes in as Python shows it
    digest = hashlib.sha256()
    for row in content:
        digest.update(json.dumps(row, default=repr).encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} can't be read: {error.strerror}. See that it is there and may be "
                      "read.")


def count_rows(source: DataSource, length: int) -> int:
    """How many rows a source has, blank lines included; where it can, without parsing them.

    `length` is that of a stream of tokens cut into rows. Raises InputError.
    """
    content = source.content
    if source.kind == "jsonl":
        with opened(content) as file:  # line ends alone, nothing is parsed
            return sum(chunk.count(b"\n") for chunk in iter(partial(file.read, 1 << 20), b""))
    if source.kind == "parquet":
        try:
            with pyarrow.parquet.ParquetFile(content) as file:
                return int(file.metadata.num_rows)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{content} is damaged or can't be read: {error}.") from None
    if source.kind == "npy":
        array = load_tokens(content)
        return array.shape[0] if array.ndim == 2 else -(-len(array) // length)
    if source.kind == "rows" and hasattr(content, "__len__"):
        return len(content)
    if source.kind == "text":
        return 1
    return sum(1 for _ in read_source(source, lambda names: names[:1], (), "", length))
