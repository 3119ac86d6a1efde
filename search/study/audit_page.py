"""An audit as one HTML page that asks for nothing else, with plots, and as a notebook shows it.

Text of training data is never trusted: Jinja2 escapes everything, hidden characters are shown, and
the page's own policy allows nothing but its style sheet, named by digest.
"""

from typing import Any

import numpy as np
from markupsafe import Markup

from gradindex.terminal import visible, visible_lines
from gradindex.version import VERSION
from search.show import html, plots, wording
from search.study.audit_defaults import EXCERPT, LISTED, SHOWN
from search.study.audit_table import field_names, rows, shown_texts, text_columns
from search.study.audit_text import cells_of
from search.study.audit_words import percent, sentences, units
from search.study.audited import RIVALS, Audit
from search.study.truth import INSPECTED, curve

STYLES = ("plots.css", "report.css")
HISTOGRAM_BINS = 40
MOST_BARS = 12
FIRST_PART = 0.1  # of the sequences, whose labels are counted


def page(audit: Audit) -> str:
    """The audit as one HTML page."""
    # the policy names the style by its digest, so it is put together once and used for both
    style = "".join(map(html.asset, STYLES))
    return str(_environment().get_template("audit.html").render(
        name=audit.snapshot.path.resolve().name, digest=audit.snapshot.digest, version=VERSION,
        style=Markup(style), policy=html.policy(style), sentences=sentences(audit),
        units=units(audit), classes=audit.rows.classes, total=len(audit),
        exact=len(audit.places), inspected=INSPECTED,
        detections=audit.detections, found_plot=_found(audit) if audit.detections else None,
        plots=_plots(audit), listed=[_item(audit, row) for row in rows(audit, LISTED)]))


def fragment(audit: Audit) -> str:
    """The first sequences of an audit as a table, for notebooks."""
    heads, lines = cells_of(audit, SHOWN)
    return str(_environment().get_template("suspects.html").render(
        sentences=sentences(audit), heads=heads, lines=lines))


def _environment() -> Any:
    return html.environment(line=visible, lines=visible_lines, whole=_whole, share=percent)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


# ---- plots


def _plots(audit: Audit) -> list[tuple[Markup, str]]:
    """The plots of all that was scored, each with its caption."""
    suspicion, name = audit.suspicion, audit.ranked_by
    counts, edges = plots.bins(suspicion, HISTOGRAM_BINS)
    found = [(_as_markup(plots.histogram(counts, edges, name, name, "sequences")),
              f"{name}, all that were scored exactly; to the right the more suspect.")]
    if audit.detections:
        mine = suspicion[audit.known][audit.corrupted]
        found.append((_as_markup(plots.histogram(
            np.histogram(mine, edges)[0], edges, f"{name} of the corrupted", name, "sequences")),
            f"The corrupted among them, {len(mine):,}."))
    positive = (audit.self_influence > 0) & (audit.loss > 0)
    if positive.any():
        found.append((_as_markup(plots.scatter(
            audit.loss[positive], audit.self_influence[positive], "Self-influence by loss", "loss",
            "self-influence ‖m̃‖²", log=True)), "Self-influence by loss, both logarithmic."))
    if audit.labels:
        first = audit.order[: max(1, int(FIRST_PART * len(audit)))]
        named = np.bincount(audit.rows.labels[first], minlength=len(audit.labels))
        bars = sorted(zip(audit.labels, named.tolist(), strict=True), key=lambda one: -one[1])
        found.append((_as_markup(plots.bars(
            bars[:MOST_BARS], "Labels of the most suspect tenth", form=_whole)),
            "Labels of the most suspect tenth."))
    return found


def _found(audit: Audit) -> Markup:
    """What is found against what is inspected, by our signal and by rivals."""
    signals = audit.signals()
    drawn: list[tuple[str, np.ndarray, np.ndarray]] = []
    for name in dict.fromkeys([audit.ranked_by, *RIVALS]):  # by which it may be ranked itself
        shares, found = curve(signals[name][audit.known], audit.corrupted)
        # of one prediction a sequence some rank alike: a line that another hides is named with it
        alike = [n for n, (_, _, other) in enumerate(drawn) if np.allclose(found, other)]
        if alike:
            drawn[alike[0]] = (f"{drawn[alike[0]][0]}, {name}", shares, found)
        else:
            drawn.append((name, shares, found))
    return _as_markup(plots.curves(
        {name: (shares, found) for name, shares, found in drawn},
        "Found against inspected", "share inspected", "share of the corrupted found"))


def _as_markup(text: str) -> Markup:
    """A plot, which has escaped its own labels."""
    return Markup(text)


# ---- the list


def _item(audit: Audit, row: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a sequence, given as a row of the table."""
    tags = [row["label"]] if row.get("label") is not None else []
    tags += ["corrupted"] if row.get("corrupted") else []
    names, texts = field_names(audit), shown_texts(audit, row, EXCERPT)
    others = "from others of {}" if audit.labels else "from {} others"
    facts = [(others.format(one), wording.number(row[f"from_{one}"]))
             for one in audit.rows.classes if row[f"from_{one}"] is not None]
    facts += [(name, wording.plain(row[column])) for name, column in names.items()
              if row.get(column) is not None]
    score = "not scored exactly"
    if row["exact"]:
        score = wording.number(row["suspicion"])
        facts = [("loss", wording.unsigned(row["loss"])),
                 ("self-influence", wording.unsigned(row["self_influence"])), *facts]
    return {"row": row, "score": score, "tags": tags, "facts": facts,
            "texts": list(zip(text_columns(audit) if len(texts) > 1 else [""],
                              map(_excerpt, texts), strict=True))}


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…"
