"""An audit as a table: a row a sequence, most suspect first, with its fields as columns."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from gradindex.model import tokenise
from gradindex.terminal import json_text, visible_lines
from search.rank.snapshot import Snapshot
from search.study.audit import Audit


def columns(audit: Audit) -> list[str]:
    """The names of a table's columns, in order; fields that were kept are called as in the data."""
    kept = sorted({name for record in audit.records for name in record.parts[0].fields})
    own = ["rank", "id", "suspicion", "self_influence", "loss", "gradient_norm",
           *["harm"] * (audit.harm is not None), *["label"] * bool(audit.labels),
           *[f"from_{label}" for label in audit.labels], "source", "row", "user_id", "text"]
    # a field of the data never takes the place of a column of ours
    return own + [name if name not in own else f"field_{name}" for name in kept]


def rows(audit: Audit, snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """A dictionary a sequence, most suspect first."""
    names = columns(audit)
    for rank, number in enumerate(audit.order.tolist(), 1):
        record = audit.records[number]
        part = record.parts[0]
        row: dict[str, Any] = {
            "rank": rank, "id": record.id, "suspicion": float(audit.suspicion[number]),
            "self_influence": float(audit.self_influence[number]),
            "loss": float(audit.loss[number]), "gradient_norm": float(audit.gradient_norm[number]),
            "source": part.source, "row": part.row, "user_id": part.user_id,
            "text": "".join(tokenise.pieces(snapshot.tokenizer, record.tokens.tolist())),
        }
        if audit.harm is not None:
            row["harm"] = float(audit.harm[number])
        if record.label is not None:
            row["label"] = audit.labels[record.label]
        if audit.by_class is not None:
            row |= {f"from_{label}": float(value)
                    for label, value in zip(audit.labels, audit.by_class[number], strict=True)}
        for name, value in part.fields.items():
            row[name if name in names and name not in row else f"field_{name}"] = value
        yield row


def as_csv(audit: Audit, snapshot: Snapshot) -> str:
    """The table as CSV; what a spreadsheet would run as a formula is defused."""
    out = io.StringIO()
    names = columns(audit)
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writerow({name: _cell(name) for name in names})
    for row in rows(audit, snapshot):
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    value = json_text(value) if isinstance(value, (dict, list)) else value
    if not isinstance(value, str):
        return value
    shown = visible_lines(value)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@", "\t", "\r")) else shown


def as_parquet(audit: Audit, snapshot: Snapshot) -> bytes:
    """The table as Parquet; fields whose values have no one type are JSON text."""
    import pyarrow
    import pyarrow.parquet

    found = {name: [row.get(name) for row in rows(audit, snapshot)] for name in columns(audit)}
    arrays = {}
    for name, values in found.items():
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            arrays[name] = pyarrow.array([json_text(value) for value in values])
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(arrays), out)
    return bytes(out.getvalue())
