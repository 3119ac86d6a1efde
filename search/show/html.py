"""A result as HTML: the page, one self-contained file, a fragment for notebooks.

All three come from the same templates (`page/`), filled by Jinja2 with escaping on. Tints are
classes, not styles, so that the page's Content-Security-Policy needs no exception.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from itertools import groupby

import jinja2
from markupsafe import Markup, escape

from gradindex.results import Hit, Query, Result
from gradindex.terminal import visible, visible_lines
from gradindex.version import VERSION
from search.show import task_words, wording
from search.show.task_words import texts_apart

MOST_CELLS = 200_000  # of token × layer maps in a self-contained file


def asset(name: str) -> str:
    """A file of the page, as text."""
    return files("search.show").joinpath("page", name).read_text(encoding="utf-8")


def style() -> str:
    """The style sheet of everything that shows a result."""
    return asset("style.css") + asset("plots.css")


def environment(**filters: Callable[..., object]) -> jinja2.Environment:
    """Templates of the page, with escaping on, hidden characters shown, and some filters."""
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    made.finalize = _shown  # no template can forget it
    made.filters.update(filters)
    return made


@cache
def _environment() -> jinja2.Environment:
    made = environment(number=wording.number, unsigned=wording.unsigned, one_line=visible,
                       as_is=_as_is)
    made.globals.update(wording=wording, words=task_words, runs=runs, layer_bars=layer_bars,
                        columns=columns, query=query, version=VERSION)
    return made


def _shown(value: object) -> object:
    """What every {{ expression }} goes through: hidden characters become visible."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else \
        visible_lines(value)


def _as_is(value: str) -> Markup:
    """The user's own text in a field of the form: what is sent again must be what was sent."""
    return escape(value)


def fill(template: str, **content: object) -> str:
    """A filled template of the page."""
    return _environment().get_template(template).render(**content)


def document(result: Result) -> str:
    """The result as one file that needs nothing else: styles and script inside, no request out."""
    styles, script = style(), asset("page.js")
    # maps are most of such a file: the best hits get theirs, as long as browsers can open it
    mapped, cells = set(), 0
    for hit in result.hits:
        cells += len(hit.tokens) * len(hit.layer_influence)
        if cells <= MOST_CELLS:
            mapped.add(hit.id)
    return fill("document.html", result=result, style=Markup(styles), script=Markup(script),
                policy=policy(styles, script), scale=wording.strongest(result.hits), mapped=mapped)


def render_html(result: Result) -> str:
    """Token-highlighted cards as a self-contained fragment, for notebooks and other pages."""
    return fill("fragment.html", result=result, style=Markup(style()),
                scale=wording.strongest(result.hits), mapped=set())


def policy(styles: str, script: str | None = None) -> str:
    """The Content-Security-Policy of a file that holds these and asks for nothing else."""
    script_source = "" if script is None else f"script-src 'sha256-{_digest(script)}'; "
    return (f"default-src 'none'; style-src 'sha256-{_digest(styles)}'; {script_source}"
            "base-uri 'none'; form-action 'none'")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- pieces of a card


def runs(hit: Hit, scale: float, first: int = 0, last: int | None = None) -> Iterator[
        tuple[str, str, str]]:
    """Text of tokens first to last − 1 as (text, class, influence); untinted neighbours joined."""
    values, tokens = hit.token_influence or [0.0] * len(hit.tokens), texts_apart(hit)
    positions = range(first, len(hit.tokens) if last is None else last)
    # where another document begins a run ends, for a border is drawn there
    starts = {part.get("token", 0) for part in hit.parts} - {0}

    def key(position: int) -> tuple[int, int]:
        tint = wording.shade(values[position], scale)
        return tint, position if tint or position in starts else -1

    for (tint, _), members in groupby(positions, key):
        run = list(members)
        text = "".join(tokens[position] for position in run)
        border = " border" if run[0] in starts else ""
        yield text, _tint(tint) + border, wording.number(values[run[0]]) if tint else ""


def _tint(shade: int) -> str:
    return f"p{shade}" if shade > 0 else f"n{-shade}" if shade < 0 else ""


def query(text: Query, first: int = 0, last: int | None = None) -> Iterator[
        tuple[str, bool, int]]:
    """Tokens first to last − 1 of a query as (piece, scored, number among those that are scored).
    """
    number = -1
    for position, piece in list(enumerate(texts_apart(text)))[first:last]:
        scored = text.is_scored(position)
        number += scored
        yield piece, scored, number


def layer_bars(hit: Hit, layers: list[str]) -> Markup:
    """A bar a layer, upwards and blue for influence above zero, downwards and orange below.

    `layers` are their names, from the first to the last.
    """
    top = max(map(abs, hit.layer_influence), default=0.0) or 1.0
    wide, high = max(4, min(12, 120 // max(1, len(layers)))), 12
    bars, labels = [], []
    for column, (layer, value) in enumerate(zip(layers, hit.layer_influence, strict=True)):
        # at least a hair: no bar would look like no layer
        size = max(0.6, abs(value) / top * high)
        kind, y = ("p", high - size) if value >= 0 else ("n", high)
        labels.append(f"{layer}: {wording.number(value)}")
        bars.append(f'<rect class="{kind}" x="{column * wide}" y="{y:.1f}" width="{wide - 1}" '
                    f'height="{size:.1f}"><title>{labels[-1]}</title></rect>')
    width = max(1, len(layers) * wide)
    return Markup(
        f'<svg class="strip" role="img" aria-label="influence by layer, {"; ".join(labels)}" '
        f'width="{width}" height="{2 * high}" viewBox="0 0 {width} {2 * high}">'
        f'<path class="axis" d="M0 {high}H{width}"/>{"".join(bars)}</svg>')


def columns(
    hit: Hit, layers: list[str], first: int = 0, last: int | None = None
) -> Iterator[tuple[str, Markup, str]]:
    """A hit's token × layer map: each token, its column of layers, and what they are in words.

    They are tokens first to last − 1, on the scale of all.
    """
    top = max((abs(value) for row in hit.token_layer_influence for value in row),
              default=0.0) or 1.0
    high = 5
    shown = slice(first, last)
    for token, values in zip(texts_apart(hit)[shown], hit.token_layer_influence[shown],
                             strict=True):
        cells = "".join(
            f'<rect class="{_tint(shade)}" y="{row * high}" width="100%" height="{high}"/>'
            for row, value in enumerate(values) if (shade := wording.shade(value, top)))
        label = f"{wording.number(sum(values))}"
        if cells:
            label += "; " + ", ".join(
                f"{layer}: {wording.number(value)}"
                for layer, value in zip(layers, values, strict=True) if wording.shade(value, top))
        yield token, Markup(f'<svg height="{high * len(values)}">{cells}</svg>'), label
