"""Which form the records of each source have: as it was named, or as their first ones tell."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from gradindex.errors import BadRowError, InputError
from gradindex.model.messages import BESIDE_MESSAGES, is_messages, is_quoted
from gradindex.model.task_rows import REFERENCE
from gradindex.storage.build_plan import CorpusSettings
from gradindex.task import TASKS
from indexer.read.known_forms import (
    PREFERENCE_LABELS,
    Form,
    columns_for_records,
    form_of,
    holds_columns,
    lacking,
    named_form,
    other_forms,
    refuse_preferences,
    refuse_unlearned,
    unknown_fields,
)
from indexer.read.label_names import class_names_of, compare_names
from indexer.read.rows import Columns, Row
from indexer.read.sources import DataSource, read_source, shown_files
from indexer.read.task_forms import FIELDS, check_prompt, holds_chats, task_form, unsuitable

# kind: the fields it needs, by their default names
NEEDED_FIELDS = {
    "text": ("text",), "completion": ("prompt", "completion"), "messages": ("messages",),
}


def field_names(settings: CorpusSettings, given: bool = False) -> dict[str, str]:
    """What the fields are called in the data, by their names here; or those alone that are given.
    """
    named = {name: getattr(settings, f"{name}_field")
             for name in ("text", "prompt", "completion", "messages")}
    return {name: called or name for name, called in named.items() if called or not given}


@dataclass
class ChosenForms:
    """The forms of some sources' records.

    `kind` is what they come to: text, completion, messages, tokens, labelled or pairs. `forms` has
    each source's by its name, None where fields are named or there are no records; `unread` are the
    fields that it has no use for, `others` the forms that its records have as well, `seen` all
    fields of the rows that were read, `chats` whether there was one among rows whose fields are
    named, or among the first ones of pairs; `by_place` are the sources whose labels are numbers of
    classes, as `datasets` noted.
    """

    kind: str
    sources: list[DataSource]
    forms: dict[str, Form | None]
    unread: dict[str, list[str]]
    others: dict[str, list[str]]
    settings: CorpusSettings
    seen: dict[str, set[str]] = field(default_factory=dict)
    chats: bool = False
    said_of_labels: list[str] = field(default_factory=list)
    by_place: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, sources: list[DataSource], settings: CorpusSettings) -> "ChosenForms":
        """Look at the first record of every source. Raises InputError for what has no form."""
        _check_fields(settings)
        next_token = settings.task == "causal"
        chosen = cls(_named_kind(settings) if next_token else "", sources,
                     {source.name: None for source in sources}, {}, {}, settings)
        files = {source.kind for source in sources}
        if not next_token:
            _check_records(sources, settings)
        elif files == {"npy"}:
            chosen.kind = "tokens"
        elif "npy" in files:
            raise InputError(
                "the data holds token files (.npy) and text; an index takes one kind. Give one."
            )
        if chosen.kind:
            return chosen
        # by kind: where it was seen first
        kinds: dict[str, str] = {}
        for source in sources:
            if source.holds_records:
                form = chosen._choose(source)
                kind = form.kind if form else None
            else:
                kind = "text"
            if kind:
                kinds.setdefault(kind, source.name)
        if len(kinds) > 1:
            shown = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
            raise InputError(
                f"the data holds records of several kinds: {shown}; an index takes one. Give "
                "one of them, or name a form (--rows) or fields that all have.")
        if settings.rows and "text" in kinds and not any(one.holds_records for one in sources):
            raise InputError(f"--rows {settings.rows} is a form of records; the data holds texts "
                             f"({kinds['text']}), each one document. Leave it out.")
        chosen.kind = next(iter(kinds), named_form(settings.rows).kind if settings.rows else "text")
        return chosen

    def _choose(self, source: DataSource) -> Form | None:
        """The form of a source's records, None where it has none that can be read."""
        first, names = _first_record(source, self.settings)
        if first is None:
            return None
        task = self.settings.task
        form = self._form_of(source, first, names) if task == "causal" else \
            task_form(task, names, self.settings)
        if form is None:
            raise unsuitable(source.name, names, self.settings) if task != "causal" else \
                unknown_fields(source.name, first, source.kind == "csv")
        if source.kind in ("json", "jsonl") and holds_columns(first, form) and _is_alone(source):
            raise columns_for_records(source.name, form)
        self.forms[source.name] = form
        self._compare(source, form, first, names)
        used = self._used(source)
        self.unread[source.name] = [name for name in names if name not in used]
        self.others[source.name] = other_forms(form, names) if task == "causal" else []
        return form

    def _compare(
        self, source: DataSource, form: Form, first: dict[str, Any], names: list[str]
    ) -> None:
        """Look at what a source says of its labels, or at the first of its pairs."""
        if self.settings.task == "classification":
            theirs = class_names_of(source, form.needs[-1])
            if theirs is not None:
                self.by_place.add(source.name)
                said = compare_names(source.name, form.needs[-1], theirs, self.settings.labels)
                self.said_of_labels += [] if said is None else [said]
        elif self.settings.task != "causal":
            check_prompt(source.name, form, names, self.settings)
            self.chats |= holds_chats(first, form)

    def _form_of(
        self, source: DataSource, first: dict[str, Any], names: list[str]
    ) -> Form | None:
        """The form of records of next tokens, by name or as their first one tells."""
        named = self.settings.rows
        form = named_form(named) if named else form_of(names)
        if named is None:
            refuse_preferences(source.name, first, form)
        if form is not None and not set(form.needs) <= set(names):
            raise lacking(source.name, form, names)
        return form

    def standard(self, source: DataSource, content: dict[str, Any]) -> dict[str, Any]:
        """A row with the fields of its kind, under the names of the settings. Raises BadRowError.
        """
        form, read = self.forms[source.name], content
        if form is not None:
            if self.settings.task == "causal" and self.settings.rows is None and \
                    form.kind != "text":
                refuse_unlearned(content)
            read = form.read(content)
            if form.kind == "labelled":
                read["by_place"] = source.name in self.by_place
        elif not self.chats:
            self.chats = any(is_messages(content.get(name)) or is_quoted(content.get(name))
                             for name in field_names(self.settings, given=True).values())
        self._see(source, (name for name, value in content.items() if value is not None))
        return read

    def columns(self, source: DataSource) -> Columns:
        """Which columns of a source's table are read: those that are used.

        Where it has none of the fields that hold content, all are read, for the error to name.
        """
        used = {*self._used(source), *PREFERENCE_LABELS}
        form = self.forms[source.name]
        content = set(form.needs) if form else set(field_names(self.settings).values())

        def chosen(names: list[str]) -> list[str]:
            self._see(source, names)
            return [name for name in names if name in used] if content & set(names) else names
        return chosen

    def _used(self, source: DataSource) -> set[str | None]:
        """The fields of a source's records that are read, or looked at."""
        form, settings = self.forms[source.name], self.settings
        content = (*form.needs, *form.takes, *form.lost) if form else \
            (*field_names(settings).values(), *BESIDE_MESSAGES)
        return {*content, settings.id_field, *settings.keep_fields}

    def _see(self, source: DataSource, names: Iterable[Any]) -> None:
        self.seen.setdefault(source.name, set()).update(map(str, names))

    @property
    def two_texts(self) -> bool:
        """Whether records have two texts and a label."""
        return any(form is not None and form.kind == "labelled" and len(form.needs) > 2
                   for form in self.forms.values())

    def unread_later(self) -> list[str]:
        """Fields of the records that were read so far that have no use, and that no note said."""
        found: set[str] = set()
        for source in self.sources:
            if source.holds_records:
                # what goes with chats is of no use beside texts
                beside = () if self.forms[source.name] or self.chats else BESIDE_MESSAGES
                used = self._used(source).difference(beside)
                found |= self.seen.get(source.name, set()).difference(
                    used, self.unread.get(source.name, ()))
        return sorted(found)

    def notes(self) -> list[str]:
        """What was recognised, a line for each form."""
        by_form: dict[str, list[str]] = {}
        for name, form in self.forms.items():
            if form is not None:
                unread = self.unread[name]
                said = f" ({', '.join(form.needs)}), {form.said}" if form.said else ""
                beside = f"; not read: {shown_files(unread)}" if unread else ""
                if self.others[name]:
                    beside += f"; they could be read as {self.others[name][0]} (--rows)"
                line = f"rows: {form.name}{said}{beside}"
                by_form.setdefault(line, []).append(name)
        # one form is the rule, and then there is no need to say whose it is
        return [line if len(by_form) == 1 else f"{line}; in {shown_files(names)}"
                for line, names in by_form.items()] + self.said_of_labels


def say_references(sources: list[DataSource], settings: CorpusSettings) -> bool:
    """Whether the data say what a reference gives the answers of their pairs.

    Raises InputError where only some of them do.
    """
    found = {source.name: set(REFERENCE) <= set(_first_record(source, settings)[1])
             for source in sources if source.holds_records}
    if len(set(found.values())) > 1:
        having, lacks = (next(name for name, has in found.items() if has is wanted)
                         for wanted in (True, False))
        raise InputError(
            f"{having} says what a reference gives the answers ({' and '.join(REFERENCE)}), "
            f"{lacks} doesn't; expected all of the data to, or none of them. Give them apart, or "
            "take the fields out.")
    return True in found.values()


def are_preferences(sources: list[DataSource]) -> bool:
    """Whether all data are pairs of answers, with what a reference gives each."""
    wanted = {"chosen", "rejected", *REFERENCE}
    return bool(sources) and all(
        source.holds_records and wanted <= set(_first_record(source, CorpusSettings(1))[1])
        for source in sources)


def _named_kind(settings: CorpusSettings) -> str:
    """The kind whose fields are named; empty for none. Raises InputError for two."""
    given = field_names(settings, given=True)
    kinds = [kind for kind, needed in NEEDED_FIELDS.items() if set(needed) & set(given)]
    if len(kinds) > 1:
        raise InputError(
            "--text-field, --prompt-field/--completion-field and --messages-field exclude each "
            "other; give one kind."
        )
    if kinds and settings.rows:
        raise InputError(
            f"--rows {settings.rows} and fields that are named exclude each other: a form has "
            "fields of its own. Give one.")
    if settings.rows:
        named_form(settings.rows)
    return kinds[0] if kinds else ""


def _check_records(sources: list[DataSource], settings: CorpusSettings) -> None:
    """Raise InputError for files without records, which hold neither labels nor pairs."""
    texts = [source.name for source in sources if not source.holds_records]
    if texts:
        raise InputError(
            f"{texts[0]} holds no records; expected {TASKS[settings.task]} in each, as JSON lines, "
            "Parquet or a table.")
    if settings.rows:
        raise InputError(f"--rows {settings.rows} is a form of records of next tokens, and the "
                         f"task is {settings.task}. Leave it out.")


def _check_fields(settings: CorpusSettings) -> None:
    """Raise InputError for fields that are named and that rows of the task don't have."""
    foreign = [name for name in dict.fromkeys(chain(*FIELDS.values()))
               if name not in FIELDS[settings.task] and getattr(settings, f"{name}_field")]
    if foreign:
        raise InputError(f"--{foreign[0].replace('_', '-')}-field has no use with --task "
                         f"{settings.task}; a row is {TASKS[settings.task]}. Leave it out.")


def _is_alone(source: DataSource) -> bool:
    """Whether a file of JSON holds one value."""
    found = (row for row in read_source(source, list, (), "", 0) if row is not None)
    return len(list(islice(found, 2))) == 1


def _first_record(
    source: DataSource, settings: CorpusSettings
) -> tuple[dict[str, Any] | None, list[str]]:
    """The first row that can be read, None for none, and the names of all its fields."""
    all_names: list[str] = []

    def columns(names: list[str]) -> list[str]:
        all_names[:] = names
        form = None if {"chosen", "rejected"} <= set(names) else form_of(names)
        # of a table whose form its columns tell nothing else is read: pictures take long
        looked_at = (*form.needs, *PREFERENCE_LABELS) if form else names
        return [name for name in names if name in looked_at]

    rows: Iterable[Row | None] = read_source(
        source, columns, settings.columns, "text", settings.sequence_length)
    for row in rows:
        if row is not None and not isinstance(row, BadRowError):  # which is counted when it is read
            return row, all_names or list(row)
    return None, []
