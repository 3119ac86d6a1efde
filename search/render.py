"""One result, several renderings: terminal, JSON, JSON lines, CSV, HTML.

Sign and units are said on each. Text of training data is never trusted: control characters are
made visible in all of them, everything is escaped in HTML.
"""

import csv
import html
import io
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from gradindex.progress import duration
from gradindex.results import Hit, Query, Result
from gradindex.terminal import json_text, visible, visible_lines

WINDOW = 48  # tokens of text shown around the strongest of them
MOST_TEXTS = 3  # of a query's further texts, shown
MARKED = 0.25  # a token is marked from this share of the strongest token's influence on
BARS = "▁▂▃▄▅▆▇█"


# ---- terminal


def terminal(result: Result, width: int | None = None, color: bool = False) -> str:
    """The result for people: `color` uses ANSI, else strong tokens stand in [brackets]."""
    width = max(60, min(width or shutil.get_terminal_size((100, 24)).columns, 160))
    lines = [*_heading(result, width), ""]
    for rank, hit in enumerate(result.hits, 1):
        lines += _hit_lines(rank, hit, result, width, color)
    lines += ["", *_wrap(recall_statement(result), width)]
    lines += _wrap(_sentence(result, color), width)
    lines += [line for warning in result.warnings
              for line in _wrap(f"warning: {visible(warning)}", width)]
    times = ", ".join(f"{name} {duration(value)}" for name, value in result.seconds.items()
                      if value >= 0.05)
    lines += [f"seconds: {times}"] if times else []
    return "\n".join(lines)


def _heading(result: Result, width: int) -> list[str]:
    query = result.query
    lines = _query_lines(query, "query: ", width)
    for text in query.others[:MOST_TEXTS]:
        lines += _query_lines(text, "versus " if text.weight < 0 else "plus   ", width)
    if len(query.others) > MOST_TEXTS:
        lines.append(f"       and {len(query.others) - MOST_TEXTS} more texts")
    scored = sum(text.scored for text in query.texts)
    tokens = "token" if scored == 1 else "tokens"
    what = {(): "log p", (-1.0,): "log p − log p(versus)"}.get(
        tuple(text.weight for text in query.others), "weighted sum of log p")
    lines.append(f"       ⟦{scored} {tokens} scored⟧, {what} = {query.log_p:.2f} nats")
    kind = "opponents (most negative influence)" if result.opponents else "proponents"
    how = f"{result.rescored:,} rescored exactly" if result.controls["rescore"] else \
        "approximate, by code alone"
    lines.append(f"{kind}: {len(result)} of {result.sequences:,} sequences, {how}")
    return [*lines, *_wrap(_how(result), width)]


def _how(result: Result) -> str:
    """What the numbers depend on, besides the query."""
    controls, layers = result.controls, result.layers
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    modules = len(controls["modules"])
    ranked = {"none": "influence", "cosine": "cosine", "relatif": "θ-RelatIF"}
    return (f"ranked by {ranked[controls['normalize']]}; {modules} module{'s' * (modules != 1)} in "
            f"{where}, damping {controls['damping']:g} × mean eigenvalue")


def _query_lines(query: Query, label: str, width: int) -> list[str]:
    """The text with what is scored in ⟦brackets⟧."""
    shown, inside = "", False
    for place, (piece, target) in enumerate(zip(query.token_texts, query.labels, strict=True)):
        scored = place > 0 and target != -100
        shown += ("⟦" if scored else "⟧") * (scored != inside) + visible(piece)
        inside = scored
    own = " (the model's own continuation)" if query.generated else ""
    return _wrap(label + shown + "⟧" * inside + own, width)


def _hit_lines(rank: int, hit: Hit, result: Result, width: int, color: bool) -> list[str]:
    place = visible(f"{hit.source}:{hit.row}")
    label = "" if hit.user_id is None else f"{hit.user_id}  "
    copies = f"  ×{len(hit.duplicates) + 1} equal" if hit.duplicates else ""
    was = f"  code rank {hit.code_rank}" if hit.code_rank > 0 else ""
    ranked_by = result.controls["normalize"]
    value = {"cosine": hit.cosine, "relatif": hit.relatif}.get(ranked_by)
    by = "" if value is None else f"{ranked_by} {_number(value)}  "
    about = "" if hit.exact else "≈ "
    head = f"{rank:>3}  {by}{about}{_number(hit.influence)}  {_number(hit.nats)} nats  {label}"
    head += f"sequence {hit.id}{copies}{was}"
    if hit.tfidf_rank is not None:
        head += f"  TF-IDF rank {hit.tfidf_rank}"
    strip = f"  layers {layer_strip(hit.layer_influence)}" if hit.layer_influence else ""
    body = _wrap(_window(hit, color), width - 5)
    lines = [*_wrap(visible(head), width), f"     {place}{strip}"]
    lines += [f"     {line}" for line in body]
    if hit.fields:
        fields = ", ".join(f"{name}={value}" for name, value in hit.fields.items())
        lines.append(f"     {visible(fields)[: width - 5]}")
    return lines


def _window(hit: Hit, color: bool) -> str:
    """The strongest stretch of the text, its strong tokens marked with their sign."""
    strength = [abs(value) for value in hit.token_influence] or [0.0] * len(hit.tokens)
    best = max(range(len(strength)), key=lambda start: sum(strength[start : start + WINDOW]),
               default=0)
    best = max(0, min(best, len(strength) - WINDOW))
    strongest = max(strength, default=0.0) or 1.0
    shown = []
    for place in range(best, min(best + WINDOW, len(hit.tokens))):
        piece = visible(hit.tokens[place])
        if strength[place] >= MARKED * strongest:
            piece = _mark(piece, hit.token_influence[place] > 0, color)
        shown.append(piece)
    before = "…" if best > 0 else ""
    after = "…" if best + WINDOW < len(hit.tokens) else ""
    return before + "".join(shown) + after


def _mark(piece: str, positive: bool, color: bool) -> str:
    if color:
        return f"\x1b[{'44;97' if positive else '43;30'};1m{piece}\x1b[0m"
    return f"[+{piece}]" if positive else f"[-{piece}]"


def layer_strip(values: list[float]) -> str:
    """A bar per layer for the size of its influence; a layer below zero stands in parentheses."""
    top = max((abs(value) for value in values), default=0.0) or 1.0
    bars = (BARS[min(7, int(8 * abs(value) / top))] for value in values)
    return "".join(bar if value >= 0 else f"({bar})"
                   for bar, value in zip(bars, values, strict=True))


def recall_statement(result: Result) -> str:
    """What the answer holds of the true top k, in a sentence or two."""
    recall, controls = result.recall, result.controls
    if not controls["rescore"]:
        return "recall: unknown, nothing was rescored; influence is the code's estimate."
    if recall.estimate is None:
        return ("recall: unknown; who else there is can't be told from a TF-IDF list "
                f"({result.rescored:,} of {result.sequences:,} rescored).")
    if result.rescored == result.sequences:
        return f"recall: complete, all {result.sequences:,} sequences were rescored exactly."
    said = (
        f"recall: an estimated {_share(recall.estimate)} of the true top {recall.k} are in this "
        f"list ({result.rescored:,} of {result.sequences:,} rescored{_cutoff(result)})."
    )
    if recall.asked is not None and recall.estimate < recall.asked:
        why = "was interrupted" if result.interrupted else \
            "ran out of --time-limit" if result.timed_out else \
            f"ended at its limit, --shortlist {controls['shortlist']}"
        said += f" {recall.asked:.1%} was asked for; rescoring {why}."
    if recall.shortlist_for_95 is not None and recall.estimate < 0.9:
        said += f" For 95%, about {recall.shortlist_for_95:,} must be rescored."
    return said


def _cutoff(result: Result) -> str:
    if result.recall.cutoff is None:
        return ""
    by = "" if result.controls["normalize"] == "none" else " a unit of gradient"
    side, cutoff = ("least", -result.recall.cutoff) if result.opponents else (
        "most", result.recall.cutoff)
    return f"; the code scores the others{by} {_number(cutoff)} at {side}"


def _share(estimate: float) -> str:
    return f"{estimate:.1%}" if estimate < 0.9995 else "99.9% or more"


def _sentence(result: Result, color: bool) -> str:
    n = f"N_train = {result.train_sequences:,}" + (
        "" if result.train_sequences_given
        else ", taken as the number indexed; set --train-sequences if it was trained on more"
    )
    marks = "blue tokens add to it, yellow ones take from it" if color else \
        "[+tokens] add to it, [-tokens] take from it"
    if not result.controls["rescore"]:
        return f"{result.units} {n}."
    return (f"{result.units} {n}. In the text, {marks}; a token's share belongs to predicting what "
            "follows.")


# ---- machine formats


def json_lines(hits: Iterable[Hit]) -> str:
    """One JSON object a hit and line."""
    return "".join(json_text(asdict(hit)) + "\n" for hit in hits)


CSV_COLUMNS = (
    "rank", "id", "influence", "nats", "exact", "percentile", "cosine", "relatif",
    "self_influence", "code_score", "code_rank", "tfidf_rank", "source", "row", "document",
    "start", "end", "user_id", "duplicates", "text",
)


def csv_table(result: Result) -> str:
    """A table with a row a hit; text that a spreadsheet would run as a formula is defused."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for rank, hit in enumerate(result.hits, 1):
        content = {**asdict(hit), "rank": rank, "duplicates": " ".join(map(str, hit.duplicates))}
        writer.writerow([_defuse(content[name]) for name in CSV_COLUMNS])
    return out.getvalue()


def _defuse(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = visible_lines(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value


# ---- HTML


def render_html(result: Result) -> str:
    """Token-highlighted cards as a self-contained fragment, for notebooks."""
    cards = "".join(_card(rank, hit) for rank, hit in enumerate(result.hits, 1))
    warnings = "".join(f"<p>⚠ {_html(warning)}</p>" for warning in result.warnings)
    about = f"{result.units} N_train = {result.train_sequences:,}; {_how(result)}."
    return (
        '<div style="font-family:system-ui,sans-serif;max-width:60em">'
        f"<p><b>{_html(recall_statement(result))}</b></p>{warnings}"
        f'<p style="font-size:85%">{_html(about)} Blue underlined tokens add to it, orange '
        f"dotted ones take from it.</p>{cards}</div>"
    )


def _card(rank: int, hit: Hit) -> str:
    strongest = max((abs(value) for value in hit.token_influence), default=0.0) or 1.0
    spans = []
    for piece, value in zip(hit.tokens, hit.token_influence or [0.0] * len(hit.tokens),
                            strict=True):
        share = abs(value) / strongest
        color = f"rgba(30,100,230,{share:.2f})" if value >= 0 else f"rgba(240,140,0,{share:.2f})"
        line = "underline solid" if value >= 0 else "underline dotted"
        style = f"background:{color};" + (f"text-decoration:{line};" if share >= MARKED else "")
        spans.append(f'<span style="{style}" title="{value:+.4g}">{_html(piece)}</span>')
    label = "" if hit.user_id is None else hit.user_id
    who = _html(f"{label} {hit.source}:{hit.row}")
    kind = "" if hit.exact else " (estimated)"
    return (
        f'<div style="border-top:1px solid #8888;padding:.5em 0"><b>{rank}</b> '
        f"<b>{hit.influence:+.4g}</b>{kind} ({hit.nats:+.3g} nats a copy) {who} "
        f"<span>layers {_html(layer_strip(hit.layer_influence))}</span>"
        f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</div></div>'
    )


# ---- helpers


def _html(text: str) -> str:
    return html.escape(visible_lines(text))


def _number(value: float) -> str:
    return f"{value:+.3g}" if abs(value) < 999.5 else f"{value:+,.0f}"


_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def _wrap(text: str, width: int) -> list[str]:
    """Break into lines of at most `width` letters, colour codes not counted or cut."""
    lines, line, length, active = [], "", 0, ""
    for piece in re.findall(r"\x1b\[[0-9;]*m|[^\s\x1b]+|\s+", text):
        if _ANSI.fullmatch(piece):
            active = "" if piece == "\x1b[0m" else piece
            line += piece
            continue
        while length + len(piece) > width:
            whole = length and not piece.isspace() and len(piece) <= width
            room = 0 if whole else width - length
            lines.append((line + piece[:room]).rstrip(" ") + ("\x1b[0m" if active else ""))
            piece = piece[room:].lstrip(" ")
            line, length = active, 0
        line += piece
        length += len(piece)
    return [*lines, line] if line else lines
