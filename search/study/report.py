"""`gradindex report`: a survey as one HTML page that asks for nothing else, with plots.

Works without JavaScript, in light and dark, on paper and on narrow screens. Text of training data
is never trusted: Jinja2 escapes everything, hidden characters are shown, and the page's own policy
allows nothing but its style sheet, named by digest.
"""

from collections.abc import Callable

import numpy as np
from markupsafe import Markup

from gradindex.meaning import units_of
from gradindex.modules import Module
from gradindex.results import Query
from gradindex.storage.background_file import ONE_IN
from gradindex.storage.layout import code_bytes
from gradindex.storage.manifest import model_name
from gradindex.terminal import visible, visible_lines
from gradindex.version import VERSION
from search.show import html, plots, wording
from search.show.task_words import asked_of
from search.study.exact_sample import TOP_BY_CODE, QuerySurvey
from search.study.gradient_sizes import FENCE
from search.study.survey import Survey
from search.study.tail import FEWEST_IN_TAIL, REJECTED, SYNTHETIC_SAMPLES
from search.study.texts import Amount, FieldAmounts

STYLES = ("plots.css", "report.css")
MOST_BARS = 12
MOST_ROWS = 50
MOST_TAILS = 6  # plots shown at once
MOST_MODULES = 24  # beyond, modules are added up by layer and kind
MOST_FIELDS = 6
HISTOGRAM_BINS = 40
LETTERS_SHOWN = 220  # letters of a query's prompt, and of its completion


def render_report(survey: Survey) -> str:
    """The report as one HTML page."""
    environment = html.environment(
        line=visible, lines=visible_lines, whole=_whole, number=wording.unsigned, percent=_percent,
        short=plots.short)
    # the policy names the style by its digest, so it is put together once and used for both
    style = "".join(map(html.asset, STYLES))
    of_a_reward = _of_a_reward(survey)
    return environment.get_template("report.html").render(
        found=survey, manifest=survey.manifest, version=VERSION,
        style=Markup(style),  # ours; escaping it would change what the digest is of
        policy=html.policy(style),
        units=units_of(survey.manifest.task.name, exact=True, query=of_a_reward),
        of_a_reward=of_a_reward, model=model_name(survey.manifest),
        code_bytes=code_bytes(survey.manifest.code["length"]),
        limits={"bars": MOST_BARS, "tails": MOST_TAILS, "rows": MOST_ROWS, "top": TOP_BY_CODE,
                "generic": 1 / ONE_IN, "fewest": FEWEST_IN_TAIL, "rejected": REJECTED,
                "draws": SYNTHETIC_SAMPLES, "fence": FENCE},
        documents=sum(source.documents for source in survey.texts.sources),
        tracked=sum(module.size for module in survey.manifest.modules),
        dimension=sum(survey.manifest.effective_dimension.values()),
        **_texts(survey), **_gradients(survey), **_influence(survey),
    )


# ---- the parts


def _texts(survey: Survey) -> dict[str, object]:
    """What the page says of texts: sources, fields, lengths."""
    lengths = survey.texts.lengths
    return {
        "sources": survey.texts.sources,
        "source_plot": _source_bars(survey.texts.sources, "Sequences by source"),
        "fields": [(field, _field_bars(field)) for field in survey.texts.fields[:MOST_FIELDS]
                   if field.values is not None],
        "wide_fields": [field.name for field in survey.texts.fields if field.values is None],
        "more_fields": max(0, len(survey.texts.fields) - MOST_FIELDS),
        "lengths": {"median": float(np.median(lengths)), "least": int(lengths.min()),
                    "most": int(lengths.max()), "full": survey.texts.full / len(lengths),
                    "tokens": int(lengths.sum(dtype=np.int64))},
        "length_plot": _as_markup(plots.histogram(
            *plots.bins(lengths, HISTOGRAM_BINS), "Length of sequences", "tokens", "sequences")),
    }


def _gradients(survey: Survey) -> dict[str, object]:
    """What the page says of the curvature and of the sizes of gradients."""
    sizes, lengths = survey.sizes, survey.texts.lengths
    positive, exact = sizes.estimates > 0, sizes.exact > 0
    content: dict[str, object] = {"dimension_plot": _dimensions(survey), "ratio": None,
                                  "size_plot": None, "length_size_plot": None, "ratio_plot": None}
    if positive.any():
        content["size_plot"] = _as_markup(plots.histogram(
            *plots.bins(sizes.estimates[positive], HISTOGRAM_BINS, log=True), "Self-influence",
            "self-influence ‖v‖², by code", "sequences", log=True))
        content["length_size_plot"] = _as_markup(plots.scatter(
            lengths[positive], sizes.estimates[positive], "Self-influence by length",
            "tokens", "self-influence ‖v‖²", log=True))
        content["sizes"] = np.quantile(sizes.estimates, [0.05, 0.5, 0.95]).tolist()
    if exact.any():
        low, middle, high = np.quantile(sizes.ratios, [0.05, 0.5, 0.95]).tolist()
        estimates = sizes.estimates[sizes.random_sample][exact]
        content["ratio"] = {"median": middle, "low": low, "high": high, "count": int(exact.sum())}
        content["ratio_plot"] = _as_markup(plots.scatter(
            # a code may say 0 of a small gradient, which a logarithmic axis has no place for
            sizes.exact[exact], np.maximum(estimates, sizes.exact[exact].min() * 1e-3),
            "Self-influence by code against exact", "exact ‖m̃‖²", "by code ‖v‖²", log=True,
            diagonal=True))
    return content


def _influence(survey: Survey) -> dict[str, object]:
    """What the page says of influence over queries: by layer and kind, and its upper tail."""
    absolute, proponents = survey.shares("absolute"), survey.shares("proponents")
    queries = survey.queries
    tails = [query.tail for query in queries if query.tail is not None]
    return {
        "absolute_plot": _as_markup(_strip(survey, absolute, "Share of |influence| by layer")),
        "proponent_plot": _as_markup(_strip(survey, proponents, "Share of proponents' influence")),
        "kinds": _kinds(survey, absolute, proponents),
        "queries": [_query(query.query, survey.manifest.task.name) for query in queries],
        "tail_plots": [_tail_plot(number, query) for number, query in enumerate(queries, 1)
                       if (query.values > 0).any()],
        "alpha": _range([tail.alpha for tail in tails]),
        "rejected": sum(tail.rejected for tail in tails), "fitted": len(tails),
        "half": _range([query.half for query in queries]),
        "half_share": _range([query.half / query.sequences for query in queries
                              if query.sequences]),
        "positive": _range([float((query.values > 0).mean()) for query in queries
                            if len(query.values)]),
    }


def _range(values: list[float]) -> dict[str, float] | None:
    """Least, median and most; None of nothing."""
    if not values:
        return None
    return {"low": min(values), "median": float(np.median(values)), "high": max(values)}


def _kinds(survey: Survey, absolute: np.ndarray, proponents: np.ndarray) -> list[dict[str, object]]:
    """The two shares of attention and MLP, and how much of the tracked parameters they are."""
    rows = []
    for kind in dict.fromkeys(kind for _, kind in survey.groups):
        groups = [number for number, group in enumerate(survey.groups) if group[1] == kind]
        parameters = sum(module.size for module in survey.manifest.modules if module.kind == kind)
        rows.append({"kind": kind, "parameters": parameters,
                     "absolute": float(absolute[groups].sum()),
                     "proponents": float(proponents[groups].sum())})
    return rows


# ---- plots of a survey


def _as_markup(text: str) -> Markup:
    """A plot, which has escaped its own labels."""
    return Markup(text)


def _source_bars(sources: list[Amount], title: str) -> Markup:
    """The largest of them."""
    return _as_markup(plots.bars([(source.name, source.sequences)
                                  for source in sources[:MOST_BARS]], title, form=_whole))


def _field_bars(field: FieldAmounts) -> Markup:
    assert field.values is not None
    return _source_bars(field.values, f"Sequences by {field.name}")


def _dimensions(survey: Survey) -> Markup:
    """The effective dimension of each module, or of each layer and kind."""
    dimension, modules = survey.manifest.effective_dimension, survey.manifest.modules
    title = "Effective dimension by module"
    # a bar a module while they can be read, else summed by layer and kind
    if len(modules) <= MOST_MODULES:
        return _as_markup(plots.bars([(_within(module), dimension.get(module.name, 0.0))
                                      for module in modules], title))
    sums = np.zeros(len(survey.groups))
    for module in modules:
        group = survey.groups.index((module.layer, module.kind))
        sums[group] += dimension.get(module.name, 0.0)
    return _as_markup(_strip(survey, sums, title, plots.short))


def _strip(
    survey: Survey, values: np.ndarray, title: str, form: Callable[[float], str] | None = None
) -> str:
    """A number of each group as bars by layer, a row for each kind of module."""
    layers = sorted({layer for layer, _ in survey.groups})
    rows: dict[str, list[float]] = {}
    for (layer, kind), value in zip(survey.groups, values.tolist(), strict=True):
        row = rows.setdefault(KIND_NAMES.get(kind, kind), [0.0] * len(layers))
        row[layers.index(layer)] = value
    return plots.strip(rows, layers, title, form or _percent)


def _within(module: Module) -> str:
    """A module's layer and its name there: 3 · mlp.dense_h_to_4h."""
    _, layer, rest = module.name.partition(f".{module.layer}.")
    return f"{module.layer} · {rest if layer else module.name}"


KIND_NAMES = {"mlp": "MLP", "attention": "attention", "adapter": "adapter"}


def _tail_plot(number: int, query: QuerySurvey) -> tuple[int, Markup]:
    """A query's number, and the plot of its positive influence with the law fitted to it."""
    tail = query.tail
    law = None if tail is None else plots.Law(tail.x_min, tail.alpha, tail.points / tail.total)
    return number, _as_markup(plots.tail(
        query.values, law, f"Positive influence on query {number}", "influence"))


# ---- words


def _of_a_reward(survey: Survey) -> Query | None:
    """One of the queries, where all are about rewards and none is about log p."""
    queries = [query.query for query in survey.queries]
    return queries[0] if queries and all(query.unit == "reward" for query in queries) else None


def _query(query: Query, task: str) -> dict[str, object]:
    """The end of what comes before, and the beginning of what is scored, from there on."""
    # what is asked about stands in the middle of a long text: its surroundings are cut at both ends
    scored = list(filter(query.is_scored, range(len(query.labels))))
    first = scored[0] if scored else len(query.tokens)
    before, after = "".join(query.token_texts[:first]), "".join(query.token_texts[first:])
    return {
        "before": before if len(before) <= LETTERS_SHOWN else "…" + before[-LETTERS_SHOWN:],
        "after": after if len(after) <= LETTERS_SHOWN else after[:LETTERS_SHOWN] + "…",
        "asked": asked_of(query, task), "others": len(query.others),
    }


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    """A share: 0.5%, 12%, −3%."""
    percent = 100 * value
    shown = f"{percent:.0f}%" if abs(percent) >= 9.95 or percent == 0 else \
        f"{percent:.1f}%" if abs(percent) >= 0.095 else f"{percent:.1g}%"
    return shown.replace("-", "−")
