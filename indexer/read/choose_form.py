"""Which form the records of each source have: as it was named, or as their first ones tell."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from gradindex.errors import InputError
from gradindex.model.messages import is_messages, is_quoted
from gradindex.storage.build_plan import CorpusSettings
from indexer.read.known_forms import (
    BESIDE_MESSAGES,
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
from indexer.read.rows import BadRowError, Columns, Row
from indexer.read.sources import DataSource, read_source, shown_files

# task: the fields it needs, by their default names
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

    `task` is what they come to: text, completion, messages or tokens. `forms` has each source's by
    its name, None where fields are named or there are no records; `unread` are the fields that it
    has no use for, `others` the forms that its records have as well, `seen` all fields of the rows
    that were read, `chats` whether there was one among rows whose fields are named.
    """

    task: str
    sources: list[DataSource]
    forms: dict[str, Form | None]
    unread: dict[str, list[str]]
    others: dict[str, list[str]]
    settings: CorpusSettings
    seen: dict[str, set[str]] = field(default_factory=dict)
    chats: bool = False

    @classmethod
    def of(cls, sources: list[DataSource], settings: CorpusSettings) -> "ChosenForms":
        """Look at the first record of every source. Raises InputError for what has no form."""
        chosen = cls(_named_task(settings), sources,
                     {source.name: None for source in sources}, {}, {}, settings)
        kinds = {source.kind for source in sources}
        if kinds == {"npy"}:
            chosen.task = "tokens"
        elif "npy" in kinds:
            raise InputError(
                "the data holds token files (.npy) and text; an index takes one kind. Give one."
            )
        if chosen.task:
            return chosen
        # by task: where it was seen first
        tasks: dict[str, str] = {}
        for source in sources:
            if source.holds_records:
                form = chosen._choose(source)
                task = form.task if form else None
            else:
                task = "text"
            if task:
                tasks.setdefault(task, source.name)
        if len(tasks) > 1:
            kinds_found = ", ".join(f"{task} ({name})" for task, name in tasks.items())
            raise InputError(
                f"the data holds records of several kinds: {kinds_found}; an index takes one. Give "
                "one of them, or name a form (--rows) or fields that all have.")
        if settings.rows and "text" in tasks and not any(one.holds_records for one in sources):
            raise InputError(f"--rows {settings.rows} is a form of records; the data holds texts "
                             f"({tasks['text']}), each one document. Leave it out.")
        chosen.task = next(iter(tasks), named_form(settings.rows).task if settings.rows else "text")
        return chosen

    def _choose(self, source: DataSource) -> Form | None:
        """The form of a source's records, None where it has none that can be read."""
        first, names = _first_record(source, self.settings)
        if first is None:
            return None
        form = named_form(self.settings.rows) if self.settings.rows else form_of(names)
        if self.settings.rows is None:
            refuse_preferences(source.name, first, form)
        if form is not None and not set(form.needs) <= set(names):
            raise lacking(source.name, form, names)
        if form is None:
            raise unknown_fields(source.name, first, source.kind == "csv")
        if source.kind in ("json", "jsonl") and holds_columns(first, form) and _is_alone(source):
            raise columns_for_records(source.name, form)
        self.forms[source.name] = form
        used = self._used(source)
        self.unread[source.name] = [name for name in names if name not in used]
        self.others[source.name] = other_forms(form, names)
        return form

    def standard(self, source: DataSource, content: dict[str, Any]) -> dict[str, Any]:
        """A row with the fields of its task, under the names of the settings. Raises BadRowError.
        """
        form, read = self.forms[source.name], content
        if form is not None:
            if self.settings.rows is None and form.task != "text":
                refuse_unlearned(content)
            read = form.read(content)
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
                for line, names in by_form.items()]


def _named_task(settings: CorpusSettings) -> str:
    """The task whose fields are named; empty for none. Raises InputError for two."""
    given = field_names(settings, given=True)
    tasks = [task for task, needed in NEEDED_FIELDS.items() if set(needed) & set(given)]
    if len(tasks) > 1:
        raise InputError(
            "--text-field, --prompt-field/--completion-field and --messages-field exclude each "
            "other; give one kind."
        )
    if tasks and settings.rows:
        raise InputError(
            f"--rows {settings.rows} and fields that are named exclude each other: a form has "
            "fields of its own. Give one.")
    if settings.rows:
        named_form(settings.rows)
    return tasks[0] if tasks else ""


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
