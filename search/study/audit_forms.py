"""The forms in which an audit is written, and which of them a file's name asks for."""

import contextlib
from pathlib import Path

from gradindex.errors import InputError
from gradindex.storage.files import atomic_write
from search.show.table_files import FORMS, Sink, write_table
from search.study.audit_page import page
from search.study.audit_table import table
from search.study.audited import Audit


def form_of_name(path: Path) -> str:
    """The form that a file's name ends in. Raises InputError for another."""
    form = path.suffix.lower().removeprefix(".")
    if form in (*FORMS, "html"):
        return form
    raise InputError(f"-o {path}: expected a name that ends in "
                     f"{', '.join(f'.{name}' for name in FORMS)} or .html, or --format.")


def put(audit: Audit, form: str, sink: Sink) -> None:
    """Write an audit in one of the forms."""
    if form == "html":
        sink.write(page(audit).encode())
    else:
        write_table(table(audit), form, sink)


def write(audit: Audit, path: Path) -> None:
    """Write an audit as the file's name says. Raises InputError for a name that says nothing."""
    form = form_of_name(path)
    with contextlib.suppress(OSError):  # or a link would be replaced by a file
        path = path.resolve()
    atomic_write(path, lambda sink: put(audit, form, sink))
