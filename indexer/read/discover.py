"""Paths and rows that were given → sources of rows, with what is left out of a folder.

A folder that is data holds more than data: what says about them (README, LICENSE), pictures, hidden
files. These are left out and counted. Nothing else is: a file that may hold records and can't be
read ends the build, and so do two splits, and records beside texts.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from gradindex.errors import InputError
from gradindex.storage.layout import SEGMENTS
from indexer.read.known_forms import form_of
from indexer.read.recognise import Content, recognise
from indexer.read.sources import DATA_FORMS, DataSource, given_rows, shown_files
from indexer.read.splits import note_splits, refuse_splits
from indexer.read.tables import has_fields

DOCUMENTATION = re.compile(r"(readme|licen[cs]e|copying|notice|citation|authors|contributing|"
                           r"code_of_conduct|changelog|dataset_card|datasheet)(?![a-z])")
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json",
         "croissant.json", "_success", "_metadata", "_common_metadata", "sha256sums", "md5sums",
         "checksums.txt", "manifest.json", "thumbs.db", "desktop.ini")
# beside records these are about them, or make them
BESIDE = (".md", ".rst", ".py", ".sh", ".xml", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".cff",
          ".bib", ".html", ".css", ".js", ".ipynb", ".log", ".md5", ".sha256", ".crc", ".lock")


@dataclass
class Discovery:
    """The sources of what was given, in order; `left_out` has the files that are none, by reason.

    `given` are the paths that were given, `walked` whether a folder was among them, `tables` the
    texts that look like tables.
    """

    sources: list[DataSource] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    walked: bool = False
    tables: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, path: Path) -> None:
        """Note a file that isn't read."""
        self.left_out.setdefault(reason, []).append(str(path))

    def notes(self) -> list[str]:
        """What is to be said of it, a line each."""
        lines = note_splits(self.given)
        if self.walked:
            names = [source.name for source in self.sources]
            lines.append(f"files: {len(names):,} read ({shown_files(names)})")
        if self.tables:
            lines.append(f"texts: {shown_files(self.tables)} read as one document each, though the "
                         "lines look like a table's; call a table .csv or .tsv")
        kinds = [f"{len(paths):,} × {reason} ({shown_files(paths)})"
                 for reason, paths in self.left_out.items()]
        return [*lines, f"left out: {', '.join(kinds)}"] if kinds else lines


def discover(items: Iterable[Any], named: Collection[str] = ()) -> Discovery:
    """The sources behind paths, or the rows given. `named` are fields that the user named.

    The order is that of the items, and sorted within a folder: the order of sequences, and so their
    ids, must not depend on the file system. Raises InputError for what isn't there or isn't read.
    """
    found = Discovery()
    for item in items:
        if isinstance(item, (str, Path)):
            found.given.append(str(item))
            _add(Path(item), str(item), found, named)
        else:
            found.sources.append(given_rows(item))
    # a shell's data/* brings the README along
    about = [source for source in found.sources
             if source.kind == "text" and _is_about(Path(source.name))]
    if any(source.holds_records for source in found.sources):
        found.sources = [source for source in found.sources if source not in about]
        for source in about:
            found.leave_out("documentation", source.content)
    return found


def _add(path: Path, given: str, found: Discovery, named: Collection[str]) -> None:
    """Add what a path that was given leads to."""
    mode = _mode(path, given)
    if stat.S_ISDIR(mode):
        within = Discovery(left_out=found.left_out, tables=found.tables)
        documents: list[tuple[DataSource, Content]] = []
        _walk(path, within, documents, named, {_identity(path)})
        _settle_documents(within, documents, named)
        _refuse_mixture(path, within)
        refuse_splits(path, within.sources)
        found.sources += within.sources
        found.walked = True
        return
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path} is no file ({_kind_of(mode)}); data are read more than once, so a pipe won't "
            "do. Write it to a file, and give that.")
    content = recognise(path)
    if content.kind in ("refused", "structured", "media", "binary"):
        raise _refused(path, content)
    kind = {"document": "json", "empty": "text"}.get(content.kind, content.kind)
    found.sources.append(DataSource(kind, str(path), path))
    if kind == "table":
        _settle_table(found, content.names, named)


def _mode(path: Path, given: str) -> int:
    """What kind of file a path is, by stat. Raises InputError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise InputError(f"the name {shown} is not UTF-8, and an index says where each sequence is "
                         "from in UTF-8. Rename it.") from None
    if given == "-":
        raise InputError("- is standard input; data are read more than once. Write it to a file, "
                         "and give that.")
    try:
        return path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ELOOP) \
                and path.is_symlink():
            raise InputError(f"{path} is a link that leads nowhere ({path.readlink()}: {reason}). "
                             "Mend it, or give what it was to lead to.") from None
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{given} does not exist; expected {DATA_FORMS}."
                             f"{_perhaps(given)}") from None
        raise InputError(f"{path} can't be read: {reason}. See that it may be read.") from None


def _perhaps(given: str) -> str:
    """What a path that isn't there may have been meant as, with the space before it."""
    if "://" in given:
        return " Data are read from this machine: download it first."
    if set("*?[") & set(given):
        return " A pattern is the shell's to expand: leave out the quotes."
    return ""


def _kind_of(mode: int) -> str:
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _refused(path: Path, content: Content) -> InputError:
    remedy = content.remedy or "Leave it out."
    return InputError(f"{path} is {content.what}; expected {DATA_FORMS}. {remedy}")


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


# ---- folders


def _walk(
    folder: Path, found: Discovery, documents: list[tuple[DataSource, Content]],
    named: Collection[str], seen: set[tuple[int, int]], within: bool = False,
) -> None:
    """Add what a folder holds, perhaps `within` another that was given.

    `seen` are the folders that were read: a link may lead back.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} can't be read: {error.strerror}. See that it may be read, or "
                         "give what is to be read of it.") from None
    names = {path.name for path in entries}
    if SEGMENTS in names and within:  # perhaps the index that is being built
        found.leave_out("an index", folder)
        return
    if _datasets_folder(folder, names):
        found.sources.append(DataSource("arrow", str(folder), folder))
        return
    for path in entries:
        if path.name.startswith("."):
            found.leave_out("hidden", path)
            continue
        mode = _mode(path, str(path))
        if stat.S_ISDIR(mode):
            if (identity := _identity(path)) in seen:
                found.leave_out("link to a folder that is read already", path)
            else:
                seen.add(identity)
                _walk(path, found, documents, named, seen, within=True)
        elif _is_about(path):
            found.leave_out("documentation", path)
        elif not stat.S_ISREG(mode):
            found.leave_out(_kind_of(mode), path)
        else:
            _add_file(path, found, documents, named)


def _add_file(
    path: Path, found: Discovery, documents: list[tuple[DataSource, Content]],
    named: Collection[str],
) -> None:
    """Add a file of a folder."""
    content = recognise(path)
    if content.kind == "refused":
        raise InputError(f"{_refused(path, content)} If it is no data, move it out of the folder.")
    if content.kind in ("media", "binary", "empty"):
        found.leave_out({"empty": "an empty file"}.get(content.kind, content.what), path)
        return
    source = DataSource(content.kind, str(path), path)
    if content.kind == "document":
        source.kind = "json"
        documents.append((source, content))
    elif content.kind == "structured":
        source.kind = "text"
        documents.append((source, content))
    found.sources.append(source)
    if content.kind == "table":
        _settle_table(found, content.names, named)


def _settle_table(found: Discovery, names: Sequence[str], named: Collection[str]) -> None:
    """Tell whether the last file is a table: if its columns are called as fields of records are.
    """
    source = found.sources[-1]
    if has_fields(names, named):
        source.kind = "csv"
        return
    source.kind = "text"
    found.tables.append(source.name)


def _is_about(path: Path) -> bool:
    """Whether a file is about the data, by its name."""
    name = path.name.lower()
    stem = PurePath(name).stem.replace("-", "_")
    plain = PurePath(name).suffix in ("", ".md", ".txt", ".rst", ".html", ".cff", ".bib", ".json")
    return name in ABOUT or (plain and DOCUMENTATION.match(stem) is not None)


def _datasets_folder(folder: Path, names: set[str]) -> bool:
    """Whether `datasets` saved one split there. Raises InputError for a folder of several."""
    if "dataset_dict.json" in names:
        listed = folder / "dataset_dict.json"
        try:
            found = json.loads(listed.read_text())["splits"]
            splits = ", ".join(str(folder / name) for name in found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{listed} can't be read: {error}. Give one split's folder.") from None
        raise InputError(f"{folder} holds several splits; give one of them: {splits}.")
    return "state.json" in names


def _settle_documents(
    found: Discovery, documents: list[tuple[DataSource, Content]], named: Collection[str]
) -> None:
    """Files of one JSON object are records, if that is all there is, or by their fields.

    Else they are settings and the like, and left out. Where YAML and the like are all there is, it
    may hold records. Raises InputError for these.
    """
    if len(documents) == len(found.sources):
        for source, content in documents:
            if content.kind == "structured":
                raise _refused(source.content, content)
        return
    for source, content in documents:
        if content.kind == "document" and form_of(content.names) is None \
                and not set(named) & set(content.names):
            found.sources.remove(source)
            found.leave_out("one JSON object, no record", source.content)


def _refuse_mixture(folder: Path, found: Discovery) -> None:
    """Leave out what is beside records by its ending; raise InputError for other texts."""
    records = [source for source in found.sources if source.holds_records]
    if not records:
        return
    for source in [source for source in found.sources if source.kind == "text"]:
        if PurePath(source.name.lower()).suffix in BESIDE:
            found.sources.remove(source)
            found.leave_out("beside records", source.content)
    texts = [source.name for source in found.sources if source.kind == "text"]
    if texts:
        raise InputError(
            f"{folder} holds records ({shown_files([source.name for source in records])}) and "
            f"texts ({shown_files(texts)}), each of which would be one document. Give those that "
            "are meant.")
