"""Files → documents → sequences, each with the place it came from.

A document is the user's record; a sequence is what the model was trained on at once. Without
packing, a document longer than the sequence length becomes consecutive windows and a shorter one
stays alone. With packing, documents are joined by the end token and cut into full windows.
The order of sequences is a function of the files and the settings alone.
"""

import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gradindex import text
from gradindex.errors import InputError
from gradindex.records import Part, Record

LONGEST_LINE = 64 << 20  # bytes; a longer JSONL line is taken for damage
KEPT_EXAMPLES = 20  # bad rows remembered with file and line; all are counted

FORMS = (
    "a .jsonl (.gz, .zst), .parquet, .npy or text file, a folder of such files, or a folder "
    "written by datasets' save_to_disk"
)


@dataclass(frozen=True)
class CorpusSettings:
    """How records are read and cut; lengths in tokens, `limit` in documents."""

    sequence_length: int
    pack: bool = False
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    id_field: str | None = None
    keep_fields: tuple[str, ...] = ()
    limit: int | None = None
    strict: bool = False


@dataclass
class Skipped:
    """Rows that could not be used: counted by reason, the first few kept with file and line."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


class _BadRowError(Exception):
    """A row that can't be used, with the reason."""


@dataclass
class _Source:
    kind: str  # jsonl, parquet, arrow, npy, text or rows
    name: str
    content: Any


class Corpus:
    """The sequences of some data files, in order.

    `data` holds paths (see FORMS) or iterables of dictionaries (a `datasets.Dataset`, a list).
    Raises InputError for a path that can't be read, unsuitable fields, or a missing chat template.
    """

    def __init__(
        self, data: Iterable[Any], tokenizer: Any | None, settings: CorpusSettings,
        vocabulary: int, end_token: int | None = None,
    ):
        self.settings = settings
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.end_token = end_token
        self.sources = [source for item in data for source in _discover(item)]
        self.skipped = Skipped()
        self.documents = 0
        if not self.sources:
            raise InputError(f"no data files were found; expected {FORMS}.")
        self.task = self._find_task()
        if self.task != "tokens" and tokenizer is None:
            raise InputError(
                "the model has no tokenizer, so text can't be read. Give --tokenizer, or token "
                "files (.npy)."
            )
        if self.task == "messages":
            text.check_chat_template(tokenizer, self._fields()["messages"])
        if settings.pack and self.task != "tokens" and end_token is None:
            raise InputError(
                "--pack joins documents with the end token, but the tokenizer has none. Use "
                "--no-pack, or a tokenizer with an eos_token."
            )

    def data_facts(self) -> list[dict[str, Any]]:
        """Name and size of every file, to notice that the data changed."""
        return [
            {"name": source.name, "size": source.content.stat().st_size}
            if isinstance(source.content, Path) else {"name": source.name, "size": None}
            for source in self.sources
        ]

    def sequences(self) -> Iterator[Record]:
        """Every sequence in order, with ids from 0."""
        made = self._packed() if self.settings.pack and self.task != "tokens" else self._windows()
        for number, record in enumerate(made):
            record.id = number
            yield record

    # ---- documents → sequences

    def _windows(self) -> Iterator[Record]:
        length = self.settings.sequence_length
        for part, tokens in self._documents():
            for start in range(0, len(tokens.ids), length):
                cut = slice(start, start + length)
                first, last = _characters(tokens.spans[cut])
                here = Part(part.document, part.source, part.row, first, last, 0, part.user_id,
                            part.fields)
                yield from self._record(tokens.ids[cut], tokens.scored[cut], [here])

    def _packed(self) -> Iterator[Record]:
        length = self.settings.sequence_length
        ids: list[int] = []
        scored: list[bool] = []
        parts: list[Part] = []
        for part, tokens in self._documents():
            end = np.array([self.end_token], dtype=np.int32)
            stream = np.concatenate([tokens.ids, end])
            mask = np.append(tokens.scored, tokens.scored[-1])
            spans = np.vstack([tokens.spans, [[0, 0]]])
            done = 0
            while done < len(stream):
                cut = slice(done, done + length - len(ids))
                first, last = _characters(spans[cut])
                parts.append(Part(part.document, part.source, part.row, first, last, len(ids),
                                  part.user_id, part.fields))
                ids.extend(stream[cut].tolist())
                scored.extend(mask[cut].tolist())
                done += length - (parts[-1].token)
                if len(ids) == length:
                    yield from self._record(np.array(ids, np.int32), np.array(scored), parts)
                    ids, scored, parts = [], [], []
        if ids:
            yield from self._record(np.array(ids, np.int32), np.array(scored), parts)

    def _record(self, ids: np.ndarray, scored: np.ndarray, parts: list[Part]) -> Iterator[Record]:
        if scored[1:].any():
            yield Record(-1, ids, scored, parts)
        else:
            self.skipped.counts["sequence without a scored token"] += 1

    def _documents(self) -> Iterator[tuple[Part, text.Tokens]]:
        for source, row, content in self._rows():
            if self.settings.limit is not None and self.documents >= self.settings.limit:
                return
            try:
                if isinstance(content, _BadRowError):
                    raise content
                tokens = self._tokens(content)
                user_id, fields = self._metadata(content)
            except _BadRowError as bad:
                self._skip(source, row, str(bad))
                continue
            yield Part(self.documents, source.name, row, -1, -1, 0, user_id, fields), tokens
            self.documents += 1

    def _skip(self, source: _Source, row: int, reason: str) -> None:
        where = f"{source.name}:{row}: {reason}"
        if self.settings.strict:
            raise InputError(f"{where}. Correct it, or leave out --strict to skip such rows.")
        self.skipped.counts[reason.split(" (")[0]] += 1
        if len(self.skipped.examples) < KEPT_EXAMPLES:
            self.skipped.examples.append(where)

    # ---- rows → tokens

    def _fields(self) -> dict[str, str]:
        s = self.settings
        return {"text": s.text_field or "text", "prompt": s.prompt_field or "prompt",
                "completion": s.completion_field or "completion",
                "messages": s.messages_field or "messages"}

    def _find_task(self) -> str:
        s = self.settings
        tokens = [source.kind == "npy" for source in self.sources]
        if any(tokens):
            if not all(tokens):
                raise InputError("token files (.npy) and text can't be mixed in one index.")
            return "tokens"
        wanted = {
            "text": s.text_field, "completion": s.prompt_field or s.completion_field,
            "messages": s.messages_field,
        }
        named = [task for task, given in wanted.items() if given]
        if len(named) > 1:
            raise InputError(
                "--text-field, --prompt-field/--completion-field and --messages-field exclude each "
                "other; give one kind."
            )
        if named:
            return named[0]
        fields = self._fields()
        seen: list[str] = []
        for _, _, content in self._rows():
            if isinstance(content, dict):
                seen = [str(name) for name in content]
                if fields["text"] in content:
                    return "text"
                if fields["prompt"] in content and fields["completion"] in content:
                    return "completion"
                if fields["messages"] in content:
                    return "messages"
                break
        else:
            return "text"
        raise InputError(
            f"the first record of {self.sources[0].name} has the fields {', '.join(seen) or 'none'}"
            "; expected text, prompt and completion, or messages. Name yours with --text-field, "
            "--prompt-field and --completion-field, or --messages-field."
        )

    def _tokens(self, content: dict[str, Any]) -> text.Tokens:
        fields = self._fields()
        if self.task == "tokens":
            return self._check_tokens(content["tokens"])
        if self.task == "text":
            document = _string(content, fields["text"])
            if not document.strip():
                raise _BadRowError("empty text")
            return text.encode(self.tokenizer, document)
        if self.task == "completion":
            completion = _string(content, fields["completion"])
            if not completion.strip():
                raise _BadRowError("empty completion")
            return text.encode_pair(self.tokenizer, _string(content, fields["prompt"]), completion)
        messages = content.get(fields["messages"])
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("content"), str)
            and isinstance(message.get("role"), str) for message in messages
        ):
            raise _BadRowError(f"field {fields['messages']!r} is not a list of role and content")
        if not any(message["role"] == "assistant" for message in messages):
            raise _BadRowError("no assistant message")
        return text.encode_messages(self.tokenizer, messages)

    def _check_tokens(self, ids: np.ndarray) -> text.Tokens:
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise _BadRowError(
                f"token id outside the vocabulary (found {ids.min()} to {ids.max()}, expected 0 to "
                f"{self.vocabulary - 1})"
            )
        spans = np.full((len(ids), 2), -1, dtype=np.int64)
        return text.Tokens(ids.astype(np.int32), np.ones(len(ids), dtype=bool), spans)

    def _metadata(self, content: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        id_field = self.settings.id_field
        if id_field is not None and id_field not in content:
            raise _BadRowError(f"missing field {id_field!r}")
        user_id = _plain(content[id_field]) if id_field is not None else None
        return user_id, {name: _plain(content.get(name)) for name in self.settings.keep_fields}

    # ---- files → rows

    def _rows(self) -> Iterator[tuple[_Source, int, dict[str, Any] | _BadRowError]]:
        wanted = {*self._fields().values(), self.settings.id_field, *self.settings.keep_fields}
        for source in self.sources:
            if source.kind == "jsonl":
                rows = _jsonl_rows(source.content)
            elif source.kind == "parquet":
                rows = _parquet_rows(source.content, wanted)
            elif source.kind == "arrow":
                rows = _arrow_rows(source.content)
            elif source.kind == "npy":
                rows = self._token_rows(source.content)
            elif source.kind == "text":
                rows = _text_rows(source.content, self._fields()["text"])
            else:
                rows = iter(source.content)
            for number, content in enumerate(rows, 1):
                if content is not None:  # a blank line
                    yield source, number, content

    def _token_rows(self, path: Path) -> Iterator[dict[str, Any]]:
        array = _load_tokens(path)
        length = self.settings.sequence_length
        if array.ndim == 2:
            if array.shape[1] > length:
                raise InputError(
                    f"{path} has rows of {array.shape[1]} tokens, more than the sequence length "
                    f"of {length}. Give --seq-len {array.shape[1]} if the model's context allows "
                    "it, or cut the rows."
                )
            yield from ({"tokens": np.asarray(row)} for row in array)
        else:
            for start in range(0, len(array), length):
                yield {"tokens": np.asarray(array[start : start + length])}


def token_file_width(data: Iterable[Any]) -> int | None:
    """The widest row of 2-D token files, or None where there is none."""
    widths = [
        _load_tokens(source.content).shape[1]
        for item in data for source in _discover(item)
        if source.kind == "npy" and _load_tokens(source.content).ndim == 2
    ]
    return max(widths, default=None)


def _load_tokens(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as a .npy file: {error}.") from None
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2) or not array.size:
        raise InputError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected integer token ids, 2-D "
            "(one sequence a row) or 1-D (one stream)."
        )
    return array


def _discover(item: Any) -> list[_Source]:
    if not isinstance(item, (str, Path)):
        return [_Source("rows", "the data given", item)]
    path = Path(item)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = ", ".join(str(path / name) for name in
                               json.loads((path / "dataset_dict.json").read_text())["splits"])
            raise InputError(f"{path} holds several splits; give one of them: {splits}.")
        if (path / "state.json").is_file():
            return [_Source("arrow", str(path), path)]
        files = sorted(file for file in path.rglob("*") if file.is_file() and not any(
            part.startswith(".") for part in file.relative_to(path).parts))
        return [source for file in files for source in _discover(file)]
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected {FORMS}.")
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson")):
        return [_Source("jsonl", str(path), path)]
    for suffix in ("parquet", "npy"):
        if path.name.endswith(f".{suffix}"):
            return [_Source(suffix, str(path), path)]
    return [_Source("text", str(path), path)]


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any] | _BadRowError | None]:
    with _decompressed(path) as file:
        while True:
            try:
                line = file.readline(LONGEST_LINE)
            except (OSError, EOFError) as error:
                raise InputError(f"{path} is damaged or cut short: {error}.") from None
            if not line:
                return
            yield _parse_line(line)


def _decompressed(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        # Buffered, since an Arrow stream has no readline with a limit.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _parse_line(line: bytes) -> dict[str, Any] | _BadRowError | None:
    if not line.strip():
        return None
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _BadRowError(f"invalid UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return _BadRowError(f"invalid JSON ({error})")
    if not isinstance(content, dict):
        return _BadRowError(f"not a JSON object (a {type(content).__name__})")
    return content


def _parquet_rows(path: Path, wanted: set[str | None]) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            # Without a known column, show what is there: the first record names the fields.
            for batch in file.iter_batches(batch_size=1024, columns=columns or None):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} can't be read as Parquet: {error}.") from None


def _arrow_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder that `datasets.Dataset.save_to_disk` wrote, without importing datasets."""
    try:
        state = json.loads((folder / "state.json").read_text())
        for entry in state["_data_files"]:
            with pyarrow.memory_map(str(folder / entry["filename"])) as file:
                for batch in pyarrow.ipc.open_stream(file):
                    yield from batch.to_pylist()
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise InputError(f"{folder} can't be read as a datasets folder: {error}.") from None


def _text_rows(path: Path, name: str) -> Iterator[dict[str, Any] | _BadRowError]:
    try:
        yield {name: path.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield _BadRowError(f"invalid UTF-8 (byte {error.start})")


def _string(content: dict[str, Any], name: str) -> str:
    if name not in content:
        raise _BadRowError(f"missing field {name!r}")
    value = content[name]
    if not isinstance(value, str):
        raise _BadRowError(f"field {name!r} is not text (a {type(value).__name__})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRowError(f"invalid UTF-8 (a lone surrogate in {name!r})") from None
    return value


def _characters(spans: np.ndarray) -> tuple[int, int]:
    """First and last character of a run of tokens; special tokens don't count."""
    real = spans[spans[:, 1] > spans[:, 0]]
    return (int(real[:, 0].min()), int(real[:, 1].max())) if len(real) else (-1, -1)


def _plain(value: Any) -> Any:
    """A metadata value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
