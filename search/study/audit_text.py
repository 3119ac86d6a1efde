"""An audit as text for people, on a terminal."""

import shutil
import textwrap
from typing import Any

from gradindex.terminal import visible
from search.show import wording
from search.study.audit_defaults import SHOWN
from search.study.audit_table import rows, shown_texts
from search.study.audit_words import detection_lines, sentences, units
from search.study.audited import Audit

LEAST_TEXT = 24  # columns of a terminal
ROOMY = 96  # columns that all of a table, and some of the texts, need
BETWEEN = " ▸ "  # the two texts of a pair
LEFT = ("label", "corrupted")  # columns that begin at the left
# signals whose name is short enough for a column, and the column of what codes know of them
SHORT = {"harm, cosine": "harm_cosine_by_code", "self-influence": "self_influence_by_code"}


def render(audit: Audit, width: int | None = None) -> str:
    """What was ranked by what, the first sequences, and how well that finds the corrupted."""
    width = max(60, min(width or shutil.get_terminal_size((100, 24)).columns, 160))
    lines = [line for sentence in sentences(audit)
             for line in textwrap.wrap(visible(sentence), width)]
    table = _table(audit, width)
    lines += ["", *table, *(["…"] if len(audit) > SHOWN else [])]
    if audit.detections:
        lines += ["", *detection_lines(audit.detections, width)]
    return "\n".join([*lines, "", *textwrap.wrap(units(audit), width)])


def cells_of(
    audit: Audit, most: int, width: int | None = None
) -> tuple[list[str], list[list[str]]]:
    """The heads of a short table, and the cells of the first sequences; their text is last.

    A `width` that leaves too little for it has no column of self-influence beside what is ranked.
    """
    other = [] if audit.ranked_by == "self-influence" or (
        width is not None and width < ROOMY) else ["self-influence"]
    truth = [] if audit.rows.truth is None else ["corrupted"]
    heads = ["rank", "id", _short(audit.ranked_by), *other, "loss",
             *["label"] * bool(audit.labels), *truth]
    room = 3 * LEAST_TEXT if width is None else LEAST_TEXT
    return [*heads, "text"], [
        [*_cells(audit, row, heads), BETWEEN.join(map(visible, shown_texts(audit, row, room)))]
        for row in rows(audit, most)]


def _table(audit: Audit, width: int) -> list[str]:
    """The first sequences, one a line."""
    heads, found = cells_of(audit, SHOWN, width)
    cells = [heads, *found]
    wide = [max(map(len, column)) for column in list(zip(*cells, strict=True))[:-1]]
    lines = []
    for line in cells:
        *others, text = line
        parts = text.split(BETWEEN, 1)
        shown = "  ".join(f"{cell:<{size}}" if head in LEFT else f"{cell:>{size}}"
                          for head, cell, size in zip(heads, others, wide, strict=False))
        room = (max(LEAST_TEXT, width - len(shown) - 2) - len(BETWEEN)) // len(parts)
        cut = [part if len(part) <= room else part[: room - 1] + "…" for part in parts]
        lines.append(f"{shown}  {BETWEEN.join(cut)}".rstrip())
    return lines


def _short(signal: str) -> str:
    """What the column of a signal is called: what ranks sequences has been said above it."""
    return signal if signal in SHORT else "suspicion"


def _cells(audit: Audit, row: dict[str, Any], heads: list[str]) -> list[str]:
    """What the columns say of a sequence; what codes estimate has a ~."""
    by_code = SHORT.get(audit.ranked_by)
    found = {
        "rank": f"{row['rank']:,}", "id": str(row["id"]),
        _short(audit.ranked_by): wording.number(row["suspicion"]) if row["exact"] else
        f"~{wording.number(row[by_code])}" if by_code else "",
        "self-influence": wording.unsigned(row["self_influence"]) if row["exact"] else
        f"~{wording.unsigned(row['self_influence_by_code'])}",
        "loss": wording.unsigned(row["loss"]) if row["exact"] else "",
        "label": visible(row.get("label") or ""),
        "corrupted": {True: "yes", False: "no", None: ""}[row.get("corrupted")],
    }
    if audit.ranked_by == "self-influence":
        found["self-influence"] = found["self-influence"].lstrip("+")
    return [found[head] for head in heads]
