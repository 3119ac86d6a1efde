"""`gradindex report`: a survey as one HTML page that asks for nothing else, with plots.

Works without JavaScript, in light and dark, on paper and on narrow screens. Text of training data
is never trusted: Jinja2 escapes everything, hidden characters are shown, and the page's own policy
allows nothing but its style sheet, named by digest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup

from gradindex.modules import Module
from gradindex.results import UNITS, Query
from gradindex.storage.background_file import ONE_IN
from gradindex.storage.layout import code_bytes
from gradindex.storage.manifest import model_name
from gradindex.terminal import visible, visible_lines
from gradindex.version import VERSION
from search.show import html, plots, wording
from search.study.exact_sample import TOP_BY_CODE, QuerySurvey
from search.study.gradient_sizes import FENCE
from search.study.survey import Survey
from search.study.tail import DRAWS, FEWEST, REJECTED
from search.study.texts import Amount, FieldAmounts

STYLES = ("plots.css", "report.css")
MOST_BARS = 12
MOST_ROWS = 50
MOST_TAILS = 6  # plots shown at once
MOST_MODULES = 24  # beyond, modules are added up by layer and kind
MOST_FIELDS = 6
BINS = 40
SHOWN = 220  # letters of a query's prompt, and of its completion


def render_report(found: Survey) -> str:
    """The page."""
    environment = html.environment(
        line=visible, lines=visible_lines, whole=_whole, number=wording.unsigned, percent=_percent,
        short=plots.short)
    style = "".join(map(html.asset, STYLES))
    return environment.get_template("report.html").render(
        found=found, manifest=found.manifest, version=VERSION,
        style=Markup(style),  # ours; escaping it would change what the digest is of
        policy=html.policy(style),
        units=UNITS.format(how="exact"), model=model_name(found.manifest),
        code_bytes=code_bytes(found.manifest.code["length"]),
        limits={"bars": MOST_BARS, "tails": MOST_TAILS, "rows": MOST_ROWS, "top": TOP_BY_CODE,
                "generic": 1 / ONE_IN, "fewest": FEWEST, "rejected": REJECTED, "draws": DRAWS,
                "fence": FENCE},
        documents=sum(source.documents for source in found.texts.sources),
        tracked=sum(o * i for o, i in (module.shape for module in found.manifest.modules)),
        dimension=sum(found.manifest.effective_dimension.values()),
        **_texts(found), **_gradients(found), **_influence(found),
    )


# ---- the parts


def _texts(found: Survey) -> dict[str, Any]:
    lengths = found.texts.lengths
    full = int((lengths == found.manifest.sequence_length).sum())
    return {
        "sources": found.texts.sources,
        "source_plot": _source_bars(found.texts.sources, "Sequences by source"),
        "fields": [(kept, _field_bars(kept)) for kept in found.texts.fields[:MOST_FIELDS]
                   if kept.values is not None],
        "wide_fields": [kept.name for kept in found.texts.fields if kept.values is None],
        "more_fields": max(0, len(found.texts.fields) - MOST_FIELDS),
        "lengths": {"median": float(np.median(lengths)), "least": int(lengths.min()),
                    "most": int(lengths.max()), "full": full / len(lengths),
                    "tokens": int(lengths.sum(dtype=np.int64))},
        "length_plot": _svg(plots.histogram(
            *plots.bins(lengths, BINS), "Length of sequences", "tokens", "sequences")),
    }


def _gradients(found: Survey) -> dict[str, Any]:
    sizes, lengths = found.sizes, found.texts.lengths
    positive, exact = sizes.estimates > 0, sizes.exact > 0
    made: dict[str, Any] = {"dimension_plot": _dimensions(found), "ratio": None,
                            "size_plot": None, "length_size_plot": None, "ratio_plot": None}
    if positive.any():
        made["size_plot"] = _svg(plots.histogram(
            *plots.bins(sizes.estimates[positive], BINS, log=True), "Self-influence",
            "self-influence ‖v‖², by code", "sequences", log=True))
        made["length_size_plot"] = _svg(plots.scatter(
            lengths[positive], sizes.estimates[positive], "Self-influence by length",
            "tokens", "self-influence ‖v‖²", log=True))
        made["sizes"] = np.quantile(sizes.estimates, [0.05, 0.5, 0.95]).tolist()
    if exact.any():
        low, middle, high = np.quantile(sizes.ratios, [0.05, 0.5, 0.95]).tolist()
        estimates = sizes.estimates[sizes.background][exact]
        made["ratio"] = {"median": middle, "low": low, "high": high, "count": int(exact.sum())}
        made["ratio_plot"] = _svg(plots.scatter(
            sizes.exact[exact], np.maximum(estimates, sizes.exact[exact].min() * 1e-3),
            "Self-influence by code against exact", "exact ‖m̃‖²", "by code ‖v‖²", log=True,
            diagonal=True))
    return made


def _influence(found: Survey) -> dict[str, Any]:
    absolute, proponents = found.shares("absolute"), found.shares("proponents")
    tails = [one.tail for one in found.queries if one.tail is not None]
    return {
        "absolute_plot": _svg(_strip(found, absolute, "Share of |influence| by layer")),
        "proponent_plot": _svg(_strip(found, proponents, "Share of proponents' influence")),
        "kinds": _kinds(found, absolute, proponents),
        "queries": [_query(one.query) for one in found.queries],
        "tail_plots": [_tail_plot(number, one) for number, one in enumerate(found.queries, 1)
                       if (one.values > 0).any()],
        "alpha": _range([tail.alpha for tail in tails]),
        "rejected": sum(tail.rejected for tail in tails), "fitted": len(tails),
        "half": _range([one.half for one in found.queries]),
        "half_share": _range([one.half / one.others for one in found.queries if one.others]),
        "positive": _range([float((one.values > 0).mean()) for one in found.queries
                            if len(one.values)]),
    }


def _range(values: list[float]) -> dict[str, float] | None:
    """Least, median and most; None of nothing."""
    if not values:
        return None
    return {"low": min(values), "median": float(np.median(values)), "high": max(values)}


def _kinds(found: Survey, absolute: np.ndarray, proponents: np.ndarray) -> list[dict[str, Any]]:
    """The two shares of attention and MLP, and how much of the tracked parameters they are."""
    rows = []
    for kind in dict.fromkeys(kind for _, kind in found.groups):
        own = [number for number, group in enumerate(found.groups) if group[1] == kind]
        parameters = sum(module.shape[0] * module.shape[1] for module in found.manifest.modules
                         if module.kind == kind)
        rows.append({"kind": kind, "parameters": parameters,
                     "absolute": float(absolute[own].sum()),
                     "proponents": float(proponents[own].sum())})
    return rows


# ---- plots of a survey


def _svg(text: str) -> Markup:
    """A plot, which has escaped its own labels."""
    return Markup(text)


def _source_bars(sources: list[Amount], title: str) -> Markup:
    """The largest."""
    return _svg(plots.bars([(one.name, one.sequences) for one in sources[:MOST_BARS]], title,
                           form=_whole))


def _field_bars(kept: FieldAmounts) -> Markup:
    assert kept.values is not None
    return _source_bars(kept.values, f"Sequences by {kept.name}")


def _dimensions(found: Survey) -> Markup:
    dimension, modules = found.manifest.effective_dimension, found.manifest.modules
    title = "Effective dimension by module"
    if len(modules) <= MOST_MODULES:
        return _svg(plots.bars([(_within(module), dimension.get(module.name, 0.0))
                                for module in modules], title))
    sums = np.zeros(len(found.groups))
    for module in modules:
        place = found.groups.index((module.layer, module.kind))
        sums[place] += dimension.get(module.name, 0.0)
    return _svg(_strip(found, sums, title, plots.short))


def _strip(
    found: Survey, values: np.ndarray, title: str, form: Callable[[float], str] | None = None
) -> str:
    """A number of each group as bars by layer, a row for each kind of module."""
    layers = sorted({layer for layer, _ in found.groups})
    rows: dict[str, list[float]] = {}
    for (layer, kind), value in zip(found.groups, values.tolist(), strict=True):
        row = rows.setdefault(KINDS.get(kind, kind), [0.0] * len(layers))
        row[layers.index(layer)] = value
    return plots.strip(rows, layers, title, form or _percent)


def _within(module: Module) -> str:
    """A module's layer and its name there: 3 · mlp.dense_h_to_4h."""
    _, found, rest = module.name.partition(f".{module.layer}.")
    return f"{module.layer} · {rest if found else module.name}"


KINDS = {"mlp": "MLP", "attention": "attention", "adapter": "adapter"}


def _tail_plot(number: int, one: QuerySurvey) -> tuple[int, Markup]:
    law = None if one.tail is None else plots.Law(
        one.tail.x_min, one.tail.alpha, one.tail.points / one.tail.total)
    return number, _svg(plots.tail(one.values, law, f"Positive influence on query {number}",
                                   "influence"))


# ---- words


def _query(query: Query) -> dict[str, Any]:
    """The end of what comes before, and the beginning of what is scored, from there on."""
    scored = list(filter(query.is_scored, range(len(query.labels))))
    first = scored[0] if scored else len(query.tokens)
    before, after = "".join(query.token_texts[:first]), "".join(query.token_texts[first:])
    return {
        "before": before if len(before) <= SHOWN else "…" + before[-SHOWN:],
        "after": after if len(after) <= SHOWN else after[:SHOWN] + "…",
        "scored": sum(text.scored for text in query.texts), "log_p": query.log_p,
        "others": len(query.others),
    }


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    """A share: 0.5%, 12%, −3%."""
    percent = 100 * value
    shown = f"{percent:.0f}%" if abs(percent) >= 9.95 or percent == 0 else \
        f"{percent:.1f}%" if abs(percent) >= 0.095 else f"{percent:.1g}%"
    return shown.replace("-", "−")
