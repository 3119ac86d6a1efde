"""An audit as a table: a row a sequence, most suspect first, with its kept fields as columns."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradindex.model import tokenise
from gradindex.storage.records import Record
from search.rank.snapshot import Snapshot
from search.show.table_files import Table
from search.study.audit_rows import fields_of
from search.study.audit_words import sentences
from search.study.audited import Audit
from search.study.texts import RECORDS_HELD
from search.study.truth import INSPECTED


def table(audit: Audit) -> Table:
    """The table of an audit, whose rows are made as they are read."""
    return Table(columns(audit), lambda: rows(audit), facts(audit))


def columns(audit: Audit) -> dict[str, type | None]:
    """The columns with the type that all values of each have, in order."""
    names = field_names(audit)
    fields = {names[name]: kind for name, kind in audit.rows.fields.items()}
    return _own_columns(audit) | fields


def facts(audit: Audit) -> dict[str, Any]:
    """What is said of all of an audit, as plain JSON types."""
    return {
        "schema": 1, "sentences": sentences(audit), "task": audit.snapshot.manifest.task.name,
        "sequences": len(audit), "exact": len(audit.places), "ranked_by": audit.ranked_by,
        "damping": audit.settings.damping,
        "modules": [module.name for module in audit.settings.modules],
        "index": audit.snapshot.digest, "interrupted": audit.interrupted,
        "truth": None if audit.rows.truth is None else audit.rows.truth.field,
        "detections": [
            {"signal": one.signal, "auroc": one.auroc, "average_precision": one.average_precision,
             "found": dict(zip(map(str, INSPECTED), one.found, strict=True))}
            for one in audit.detections],
    }


def _own_columns(audit: Audit) -> dict[str, type | None]:
    """The columns of ours with their types, in order."""
    causal, harm = audit.snapshot.manifest.task.name == "causal", audit.harm is not None
    found: dict[str, type | None] = {"rank": int, "id": int, "suspicion": float, "exact": bool}
    found |= dict.fromkeys(
        ["self_influence", "self_influence_by_code", "loss", *["loss_per_token"] * causal,
         "gradient_norm",
         *["harm", "harm_by_code", "harm_cosine", "harm_cosine_by_code"] * harm], float)
    found |= {"label": str} if audit.labels else {}
    for prefix in ("from", "cosine_from"):
        found |= dict.fromkeys([f"{prefix}_{name}" for name in audit.rows.classes], float)
    found |= {"corrupted": bool} if audit.rows.truth is not None else {}
    # an id of the user's may be text or a number
    found |= {"source": str, "row": int, "user_id": None}
    return found | dict.fromkeys(text_columns(audit), str)


def text_columns(audit: Audit) -> list[str]:
    """The columns that hold texts of ours: one, or of pairs two."""
    return ["chosen", "rejected"] if audit.snapshot.manifest.task.of_pairs else ["text"]


def shown_texts(audit: Audit, row: dict[str, Any], most: int) -> list[str]:
    """The texts of a row for a list that has room for `most` letters of each.

    Of a pair what both begin with is left out where it would take a third of that.
    """
    texts = [row[name] for name in text_columns(audit)]
    alike = 0 if len(texts) == 1 else next(
        (n for n, (one, other) in enumerate(zip(*texts, strict=False)) if one != other),
        min(map(len, texts)))
    while alike and not texts[0][alike - 1].isspace():  # words stay whole
        alike -= 1
    return [f"…{text[alike:]}" for text in texts] if alike > most / 3 else texts


def field_names(audit: Audit) -> dict[str, str]:
    """What the columns of kept fields are called: as in the data, unless it is a name of ours."""
    own = set(_own_columns(audit))
    names = {}
    for name in audit.rows.fields:
        column = name
        while column in own or (column != name and column in audit.rows.fields):
            column = f"field:{column}"
        names[name] = column
    return names


def rows(audit: Audit, most: int | None = None) -> Iterator[dict[str, Any]]:
    """A dictionary by column for each sequence, most suspect first, of the first `most` [all].

    What isn't known of a sequence is None.
    """
    snapshot, names, wanted = audit.snapshot, field_names(audit), columns(audit)
    exact = np.full(len(audit), -1, np.int64)
    exact[audit.places] = np.arange(len(audit.places))
    order, estimates = audit.order[:most], audit.self_by_code
    for first in range(0, len(order), RECORDS_HELD):
        places = order[first : first + RECORDS_HELD].tolist()
        for rank, (place, record) in enumerate(
                zip(places, snapshot.records(places), strict=True), first + 1):
            row = {"rank": rank, "id": record.id, "exact": bool(exact[place] >= 0),
                   "self_influence_by_code": float(estimates[place]),
                   **_about(audit, place, record), **_texts(snapshot, record)}
            for name in ("harm_by_code", "harm_cosine_by_code"):
                if (by_code := getattr(audit, name)) is not None:
                    row[name] = float(by_code[place])
            if exact[place] >= 0:
                row |= _scores(audit, int(exact[place]))
            row |= {names[name]: value for name, value in fields_of(record).items()}
            yield {name: _known(row.get(name)) for name in wanted}


def _about(audit: Audit, place: int, record: Record) -> dict[str, Any]:
    """What a sequence is, and whether it is known to be corrupted."""
    part, truth = record.parts[0], audit.rows.truth
    found: dict[str, Any] = {"source": part.source, "row": part.row, "user_id": part.user_id}
    if audit.labels and record.label is not None:
        found["label"] = audit.labels[record.label]
    if truth is not None:
        found["corrupted"] = bool(truth.corrupted[place]) if truth.known[place] else None
    return found


def _texts(snapshot: Snapshot, record: Record) -> dict[str, str]:
    """A sequence's text, or of a pair both."""
    pieces = tokenise.pieces(snapshot.tokenizer, record.tokens.tolist())
    if not snapshot.manifest.task.of_pairs:
        return {"text": "".join(pieces)}
    assert record.border is not None  # as pairs have it
    chosen, rejected = tokenise.two_texts(pieces, record.border)
    return {"chosen": chosen, "rejected": rejected}


def _scores(audit: Audit, number: int) -> dict[str, Any]:
    """The exact scores of a sequence."""
    loss = float(audit.loss[number])
    found = {"suspicion": float(audit.suspicion[number]), "loss": loss,
             "self_influence": float(audit.self_influence[number]),
             "gradient_norm": float(audit.gradient_norm[number])}
    if audit.snapshot.manifest.task.name == "causal" and audit.predictions[number]:
        found["loss_per_token"] = loss / float(audit.predictions[number])
    for name in ("harm", "harm_cosine"):
        if (harm := getattr(audit, name)) is not None:
            found[name] = float(harm[number])
    for prefix, means in (("from", audit.by_class), ("cosine_from", audit.cosines)):
        if means is not None:
            found |= {f"{prefix}_{name}": float(value)
                      for name, value in zip(audit.rows.classes, means[number], strict=True)}
    return found


def _known(value: Any) -> Any:
    """A value, None for a number that isn't one."""
    return None if isinstance(value, float) and math.isnan(value) else value
