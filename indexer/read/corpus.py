"""Files → documents → sequences, each with the place it came from.

A document is the user's record; a sequence is what the model was trained on at once: a document, or
a window of one or of several (`windows.py`). The order of sequences is a function of the files and
the settings alone.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradindex.errors import BadRowError, InputError
from gradindex.model import tokenise
from gradindex.model.chat_template import check_chat_template, with_chat_template
from gradindex.model.class_labels import UNMARKED
from gradindex.model.label_numbers import note_label
from gradindex.model.messages import BESIDE_MESSAGES, TOLD_BESIDE_PROMPTS
from gradindex.model.task_rows import (
    AS_TEXT,
    encode_labelled,
    encode_preferred,
    missing_tokens,
)
from gradindex.objective.objective import objective_of
from gradindex.storage.build_plan import CorpusSettings, DataFacts
from gradindex.storage.records import Part, Record
from gradindex.task import Task
from indexer.read.choose_form import ChosenForms, field_names
from indexer.read.conversations import encode_conversation, encode_exchange, holds_messages
from indexer.read.derived import derived
from indexer.read.discover import discover
from indexer.read.label_names import advice
from indexer.read.rows import Row, said_of_lost
from indexer.read.sources import (
    DATA_FORMS,
    DataSource,
    content_digest,
    content_size,
    read_source,
    shown_files,
)
from indexer.read.windows import packed, spanned, truncated, windows

KEPT_EXAMPLES = 20  # bad rows remembered with file and line; all are counted


@dataclass
class CorpusFacts:
    """What was counted while a corpus was read.

    `labels` counts a classifier's rows by the names of their classes, `found` the labels as the
    data have them, but for those that are known to be places; `skipped` what was left out by
    reason; `examples` are the first of that, with file and line.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def skip(self, reason: str) -> None:
        """Count something that was left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


class Corpus:
    """The sequences of some data files, in order.

    `data` holds paths (see DATA_FORMS) or dictionaries in a list, a `datasets.Dataset` or the like.
    `strict` stops at the first row that can't be used, `settled` says that it is known how numbers
    of classes are meant (`check_numbers`).
    Raises InputError for a path that can't be read, unsuitable fields, or a missing chat template.
    """

    def __init__(
        self, data: Iterable[Any], tokenizer: Any | None, settings: CorpusSettings,
        vocabulary: int, end_token: int | None = None, strict: bool = False, settled: bool = False,
    ):
        self.settings, self.strict, self.settled = settings, strict, settled
        self.objective = objective_of(Task(settings.task), None)
        self.tokenizer = with_chat_template(tokenizer, settings.chat_template)
        self.vocabulary = vocabulary
        self.end_token = end_token
        self._of_pairs = Task(settings.task).of_pairs
        if settings.task != "causal" and (settings.pack or settings.truncate):
            raise InputError(f"--pack and --truncate say how texts of next tokens are cut; with "
                             f"--task {settings.task} a row is one sequence. Leave them out.")
        if settings.pack and settings.truncate:
            raise InputError("--pack joins documents and cuts nothing off, --truncate does; give "
                             "one.")
        items = list(data)
        found = discover(items, field_names(settings, given=True).values())
        self.sources = found.sources
        self.facts = CorpusFacts()
        self._learned = False  # whether the document that was read last has a scored token
        self.longer = 0  # documents beyond the sequence length
        self.rows = 0  # that were read
        self.lost: dict[str, int] = {}  # of these left out, by reason; but not as unlabelled
        # what the template doesn't show of chats: from where on, and how often
        self._unshown: dict[str, tuple[str, int]] = {}
        self.documents_before = 0  # in the index already
        self.fields_seen: set[str] = set()
        if not self.sources:
            shown = ", ".join(str(item) for item in items) or "nothing"
            raise InputError(f"no data files were found in {shown}; expected {DATA_FORMS}.")
        self.forms = ChosenForms.of(self.sources, settings)
        self.kind = self.forms.kind
        self.notes = [*found.notes(), *self.forms.notes()]  # to be said before anything is read
        if self.kind != "tokens" and tokenizer is None:
            raise InputError(
                "the model has no tokenizer, so text can't be read. Give --tokenizer, or token "
                "files (.npy)."
            )
        if self.kind in ("labelled", "pairs"):
            self.notes += missing_tokens(tokenizer, Task(settings.task), self.forms.two_texts)
        if self.kind == "messages":
            check_chat_template(self.tokenizer, self._fields()["messages"])
        elif self.kind == "pairs" and self.forms.chats:
            check_chat_template(self.tokenizer, settings.chosen_field or "chosen", AS_TEXT)
        if settings.pack and self.kind != "tokens" and end_token is None:
            raise InputError(
                "--pack joins documents with the end token, but the tokenizer has none. Use "
                "--no-pack, or a tokenizer with an eos_token."
            )

    def said_of_rows(self) -> list[str]:
        """What is to be known of the rows that were read, a line each."""
        to_do = advice(self.facts.found, self.settings.labels)
        lines = (said_of_lost(self.lost, self.rows, to_do), self._cut_documents(),
                 self._unread_fields(), self._unshown_parts())
        return [line for line in lines if line]

    def _cut_documents(self) -> str | None:
        """How many documents were longer than a sequence, and what became of them; None for none.
        """
        settings = self.settings
        if not self.longer or settings.pack or self.kind == "tokens":
            return None
        if settings.task != "causal":
            return (f"{self.longer:,} of {self.facts.documents:,} rows are longer than "
                    f"{settings.sequence_length} tokens: cut there, as trainers do (--seq-len)")
        done = "cut there, what is behind is left out" if settings.truncate else (
            "cut into windows; --truncate drops what is behind, as trainers do")
        verb = "is" if self.longer == 1 else "are"
        return (f"{self.longer:,} of {self.facts.documents:,} documents {verb} longer than "
                f"{settings.sequence_length} tokens: {done}")

    def _unread_fields(self) -> str | None:
        """Which fields of the records that were read aren't, beyond what `notes` said; None for
        none.
        """
        names = self.forms.unread_later()
        shown = [name for name in names if name in (*TOLD_BESIDE_PROMPTS, *BESIDE_MESSAGES)]
        others = [name for name in names if name not in shown]
        parts = [f"{', '.join(shown)} (which training may have shown to the model)"] * bool(shown)
        parts += [shown_files(others)] * bool(others)
        return f"rows: not read: {'; '.join(parts)}" if parts else None

    def _unshown_parts(self) -> str | None:
        """What the chat template doesn't show of chats, and of how many; None for nothing."""
        if not self._unshown:
            return None
        kinds = [f"{what} ({count:,} × from {first} on)" for what, (first, count) in
                 self._unshown.items()]
        return (f"warning: the chat template doesn't show {', '.join(kinds)}; these rows are "
                "indexed as it writes them. --chat-template FILE gives the one that training used")

    def data_facts(self) -> list[DataFacts]:
        """Name, size (bytes, or rows) and digest of every source, to notice that it changed."""
        return [{"name": source.name, "size": content_size(source.content),
                 "sha256": content_digest(source.content)} for source in self.sources]

    def sequences(self) -> Iterator[Record]:
        """Every sequence in order, with ids from 0; `facts` are of what was read so far."""
        facts = self.facts = CorpusFacts()  # another reading counts anew
        self.longer = self.rows = 0
        self.lost, self._unshown = {}, {}
        length, documents = self.settings.sequence_length, self._documents()
        if self.settings.task != "causal":  # a row is one sequence, and cut already
            for part, one in documents:
                yield self._count(Record(
                    facts.sequences, one.tokens, one.scored, [spanned(part, one.spans)],
                    one.border, one.label, one.offset))
            return
        if self.settings.pack and self.kind != "tokens":
            assert self.end_token is not None  # as checked at the start
            cut = packed(documents, length, self.end_token)
        elif self.settings.truncate:
            cut = truncated(documents, length)
        else:
            cut = windows(documents, length)
        for tokens, scored, parts in cut:
            record = Record(facts.sequences, tokens, scored, parts)
            if not self.objective.predictions(record):
                # its gradient would be 0
                self._skip_unscored(parts[0])
                continue
            yield self._count(record)

    def _count(self, record: Record) -> Record:
        self.facts.sequences += 1
        self.facts.tokens += len(record.tokens)
        self.facts.scored_tokens += self.objective.predictions(record)
        if record.label is not None:
            name = self.settings.labels[record.label]
            self.facts.labels[name] = self.facts.labels.get(name, 0) + 1
        return record

    # ---- rows → documents

    def _documents(self) -> Iterator[tuple[Part, tokenise.Tokenised]]:
        """Every document that can be used, as a part that isn't cut yet, and its tokens."""
        for source, row, content in self._rows():
            self.rows += 1
            try:
                if isinstance(content, BadRowError):
                    raise content
                tokenised = self._tokenised(self.forms.standard(source, content))
                _check_tokens(tokenised, self.vocabulary)
                user_id, fields = self._metadata(content)
                fields |= derived(self.settings.derive, tokenised)
            except BadRowError as bad:
                self._skip(f"{source.name}:{row}", str(bad))
                continue
            except InputError as error:  # the whole data's fault: a template that can't be used
                raise InputError(f"{source.name}:{row}: {error}") from None
            number = self.documents_before + self.facts.documents
            self.facts.documents += 1
            for part in tokenised.unshown:
                what = part.split(" (")[0]  # in brackets is which message
                first, count = self._unshown.get(what, (f"{source.name}:{row}", 0))
                self._unshown[what] = first, count + 1
            self.longer += tokenised.longer or \
                len(tokenised.tokens) > self.settings.sequence_length * (1 + self._of_pairs)
            self._learned = self.objective.predictions(tokenised) > 0
            yield Part(number, source.name, row, -1, -1, 0, user_id, fields), tokenised
            if self.facts.documents == self.settings.limit:
                return

    def _skip(self, place: str, reason: str) -> None:
        """Count a row that can't be used. Raises InputError where that is to stop the build."""
        where = f"{place}: {reason}"
        if self.strict:
            raise InputError(f"{where}. Correct it, or leave out --strict to skip such rows.")
        kind = reason.split(" (")[0]  # what is in brackets differs from row to row
        self.facts.skip(kind)
        if kind != UNMARKED:
            self.lost[kind] = self.lost.get(kind, 0) + 1
        if len(self.facts.examples) < KEPT_EXAMPLES:
            self.facts.examples.append(where)

    def _skip_unscored(self, part: Part) -> None:
        """Count a sequence without a scored token, whose first part this is.

        Where it is all that there is of a row, that row can't be used.
        """
        place = f"{part.source}:{part.row}"
        if self.settings.truncate:
            self._skip(place, "no scored token before the cut")
        elif self._learned or self.settings.pack or self.kind == "tokens":
            self.facts.skip("sequence without a scored token")
        else:  # windows are cut of the last document that was read
            self._skip(place, "sequence without a scored token (its first token is never "
                              "predicted)")

    # ---- rows → tokens

    def _fields(self) -> dict[str, str]:
        """What the fields are called in the data, by their names here."""
        return field_names(self.settings)

    def _tokenised(self, content: dict[str, Any]) -> tokenise.Tokenised:
        """A row's tokens, which of them are scored, and where each stands in its text.

        Raises BadRowError.
        """
        fields = self._fields()
        if self.kind == "labelled":
            if not content["by_place"]:
                note_label(self.facts.found, content["label"])
            return encode_labelled(self.tokenizer, content, self.settings.labels,
                                   self.settings.sequence_length)
        if self.kind == "pairs":
            return encode_preferred(self.tokenizer, content, Task(self.settings.task),
                                    self.settings.sequence_length)
        if self.kind == "tokens":
            tokens = content["tokens"].astype(np.int64)
            n = len(tokens)  # all are scored, and of no text
            return tokenise.Tokenised(tokens, np.ones(n, bool), np.full((n, 2), -1))
        if self.kind == "text":
            document = _string(content, fields["text"])
            if not document.strip():
                raise BadRowError("empty text")
            return tokenise.encode(self.tokenizer, document)
        if self.kind == "messages":
            return encode_conversation(self.tokenizer, content, fields["messages"])
        # a prompt and a completion
        if holds_messages(content, fields["prompt"], fields["completion"]):
            check_chat_template(self.tokenizer, fields["prompt"])
            return encode_exchange(
                self.tokenizer, content, fields["prompt"], fields["completion"])
        completion = _string(content, fields["completion"])
        if not completion.strip():
            raise BadRowError("empty completion")
        prompt = _string(content, fields["prompt"])
        return tokenise.encode_pair(self.tokenizer, prompt, completion)

    def _metadata(self, content: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The user's own id of a document, and the fields to keep. Raises BadRowError."""
        self.fields_seen.update(map(str, content))  # to say what there is, where a name is wrong
        id_field = self.settings.id_field
        user_id = None if id_field is None else _as_json(_field(content, id_field))
        return user_id, {name: _as_json(content.get(name)) for name in self.settings.keep_fields}

    # ---- files → rows

    def _rows(self) -> Iterator[tuple[DataSource, int, Row]]:
        """Every row of every source, with its number from 1."""
        settings, text_field = self.settings, self._fields()["text"]
        for source in self.sources:
            content = read_source(source, self.forms.columns(source), settings.columns, text_field,
                                  settings.sequence_length)
            for number, row in enumerate(content, 1):
                if row is not None:  # a blank line
                    yield source, number, row


def _check_tokens(tokenised: tokenise.Tokenised, vocabulary: int) -> None:
    """Raise BadRowError for no token, or ids outside the vocabulary; else make them int32."""
    if not len(tokenised.tokens):
        raise BadRowError("no token")
    least, most = tokenised.tokens.min(), tokenised.tokens.max()
    if least < 0 or most >= vocabulary:
        raise BadRowError(
            f"token id outside the vocabulary (found {least} to {most}, expected 0 to "
            f"{vocabulary - 1})"
        )
    tokenised.tokens = tokenised.tokens.astype(np.int32)


def _field(content: dict[str, Any], name: str) -> Any:
    if name not in content:
        raise BadRowError(f"missing field {name!r}")
    return content[name]


def _string(content: dict[str, Any], name: str) -> str:
    value = _field(content, name)
    if not isinstance(value, str):
        raise BadRowError(f"field {name!r} is not text (a {type(value).__name__})")
    _check_characters(name, value)
    return value


def _check_characters(name: str, value: str) -> None:
    """Raise BadRowError for half a character, which neither a tokenizer nor JSON can take."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"invalid UTF-8 (a lone surrogate in {name!r})") from None


def _as_json(value: Any) -> Any:
    """A metadata value as JSON can hold it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _as_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
