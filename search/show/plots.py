"""Plots as text: numbers in, one inline SVG out.

No style attribute and no script: colours are the classes of page/plots.css, so light, dark, print
and a strict Content-Security-Policy are the page's affair. The values are in each plot's label, for
those who can't see it, and under the pointer. Labels come from data: they are escaped, and hidden
characters shown.

A plot is WIDTH units wide and meant to be shown at about that many pixels, so that its text has the
size of the text around it on narrow screens too.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradindex.terminal import visible

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44  # margins of the axes
ROW = 23  # units a bar
NAMES_WIDTH = 172  # units at most for the names of bars
UPRIGHT = 64  # units at most an upright bar
LETTER = 6.9  # units a letter, about
MOST_POINTS = 1500  # of a scatter plot
MOST_STEPS = 150  # points that a tail is drawn with
MOST_SAID = 40  # values in a label

Values = Sequence[float] | np.ndarray


# ---- the plots


def histogram(
    counts: Values, edges: Values, title: str, x_label: str, y_label: str, log: bool = False,
) -> str:
    """Counts [n] between edges [n + 1], with `log` over a logarithmic axis."""
    counts, edges = np.asarray(counts, float), np.asarray(edges, float)
    x, y = Axis.of(edges, log, whole=True), Axis.of([0, max(1.0, counts.max())])
    parts = _axes(x, y, x_label, y_label)
    # bars keep a gap, but narrow ones keep most of themselves
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        left, right, top = _x(x, low), _x(x, high), _y(y, count)
        gap = min(1.0, (right - left) / 4)
        parts.append(_g(f"{short(low)} to {short(high)}: {count:,.0f}",
                        _rect("plot-a", left, top, right - left - gap, _y(y, 0) - top)))
    most = int(counts.argmax())
    description = (f"{title}: {counts.sum():,.0f} from {short(edges[0])} to {short(edges[-1])}; "
                   f"most, {counts[most]:,.0f}, from {short(edges[most])} to "
                   f"{short(edges[most + 1])}")
    return _svg(title, description, parts, HEIGHT)


def bars(
    rows: Sequence[tuple[str, float]], title: str, form: Callable[[float], str] | None = None,
    kind: str = "plot-a",
) -> str:
    """A horizontal bar a row (name, value); values below zero go to the left. `kind` is a class."""
    form = form or short
    values = [value for _, value in rows]
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    room = LETTER * max((len(form(value)) for value in values), default=0) + 10
    names = min(NAMES_WIDTH, 10 + LETTER * max((len(visible(name)) for name, _ in rows), default=0))
    first, last = names + (room if low < 0 else 0), WIDTH - (room if high > 0 else 6)
    scale = (last - first) / ((high - low) or 1.0)
    zero = first - low * scale  # values below zero go to the left of it
    parts = []
    for number, (name, value) in enumerate(rows):
        y, end = number * ROW, zero + value * scale
        at, anchor = (end + 5, "start") if value >= 0 else (end - 5, "end")
        parts.append(_g(f"{name}: {form(value)}", "".join((
            _rect("plot-track", 0, y, WIDTH, ROW),
            _text("plot-name", names - 8, y + 16, "end", _clipped(name, int((names - 8) / LETTER))),
            _rect(kind, min(zero, end), y + 4, abs(end - zero), ROW - 8),
            _text("plot-value", at, y + 16, anchor, form(value)),
        ))))
    if low < 0:
        parts.append(_line("plot-zero", zero, 0, zero, len(rows) * ROW))
    return _svg(title, _listed(title, [(name, form(value)) for name, value in rows]), parts,
                max(1, len(rows)) * ROW)


@dataclass(frozen=True)
class Law:
    """A power law to draw: x_min, α (density), and the share of all values from x_min on."""

    x_min: float
    alpha: float
    share: float


def tail(
    values: Values, law: Law | None, title: str, x_label: str, y_label: str = "share at or above",
) -> str:
    """The share of the values at or above x, both axes logarithmic, and the law fitted to it.

    Values that are not positive are left out; there must be some that are. The axis begins at the
    lower quartile, or below x_min: what is smaller is not the tail.
    """
    falling = np.sort(np.asarray(values, float))[::-1]
    falling = falling[falling > 0]
    # of all positive values, so that the share is right though the plot begins further up
    n = len(falling)
    least = float(np.quantile(falling, 0.25))
    drawn = falling[falling >= (least if law is None else min(least, law.x_min / 2))]
    x, y = Axis.of(drawn, log=True), Axis.of([1 / n, 1.0], log=True)
    parts = _axes(x, y, x_label, y_label)
    # evenly in the logarithm of the rank: a point a value would be megabytes of one black line
    steps = np.unique(np.geomspace(1, len(drawn), MOST_STEPS).round().astype(int))
    points = "".join(_dot("plot-point", _x(x, drawn[k - 1]), _y(y, k / n), 2.1) for k in steps)
    parts.append(points)
    description = f"{title}: {n:,} positive values from {short(falling[-1])} to {short(falling[0])}"
    if law is not None:
        largest = falling[0]
        end = law.share * (largest / law.x_min) ** -(law.alpha - 1)
        if end < 1 / n:  # where the line leaves the plot
            end = 1 / n
            largest = law.x_min * (law.share * n) ** (1 / (law.alpha - 1))
        at = _x(x, law.x_min)
        parts.append(_line("plot-mark", at, TOP, at, HEIGHT - BOTTOM))
        parts.append(_line("plot-law", at, _y(y, law.share), _x(x, largest), _y(y, end)))
        side = ("end", -5) if at > WIDTH / 2 else ("start", 5)
        parts.append(_text("plot-note", at + side[1], HEIGHT - BOTTOM - 7, side[0],
                           f"x_min {short(law.x_min)}"))
        description += (f"; power law from {short(law.x_min)} on with density exponent "
                        f"{law.alpha:.2f}, {law.share:.1%} of the values")
    return _svg(title, description, parts, HEIGHT)


def scatter(
    xs: Values, ys: Values, title: str, x_label: str, y_label: str, log: bool = False,
    diagonal: bool = False,
) -> str:
    """A point a pair; with `log` on logarithmic axes (then all must be positive).

    `diagonal` draws y = x. Of many points some are drawn, evenly in their order.
    """
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    values = np.concatenate([xs, ys])
    x, y = Axis.of(values if diagonal else xs, log), Axis.of(values if diagonal else ys, log)
    parts = _axes(x, y, x_label, y_label)
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(_line("plot-mark", _x(x, low), _y(y, low), _x(x, high), _y(y, high)))
    # evenly in their order, so that the same points are drawn each time
    chosen = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), MOST_POINTS)).round().astype(int))
    radius = 2.6 if len(chosen) <= 200 else 1.5
    parts.append("".join(_dot("plot-point", _x(x, xs[n]), _y(y, ys[n]), radius) for n in chosen))
    description = (f"{title}: {len(xs):,} points, {x_label} {short(xs.min())} to "
                   f"{short(xs.max())}, {y_label} {short(ys.min())} to {short(ys.max())}")
    return _svg(title, description, parts, HEIGHT)


def curves(
    lines: Mapping[str, tuple[Values, Values]], title: str, x_label: str, y_label: str,
) -> str:
    """A line through the points (xs, ys) of each name, at most four, told apart by colour.

    Both axes are of shares, and a dashed line says where the two are equal.
    """
    x, y = Axis.of([0, 1], whole=True), Axis.of([0, 1])
    parts = [*_axes(x, y, x_label, y_label),
             _line("plot-mark", _x(x, 0), _y(y, 0), _x(x, 1), _y(y, 1))]
    for number, (name, (own_xs, own_ys)) in enumerate(lines.items()):
        kind = f"plot-line-{'abcd'[number % 4]}"
        points = " ".join(f"{_x(x, one):.1f},{_y(y, other):.1f}"
                          for one, other in zip(own_xs, own_ys, strict=True))
        # names stand in the lower right, where a line that rises early leaves room
        at = HEIGHT - BOTTOM - 10 - 17 * (len(lines) - 1 - number)
        parts.append(_g(name, f'<polyline class="{kind}" points="{points}"/>'
                        + _line(kind, WIDTH - 150, at - 4, WIDTH - 132, at - 4)
                        + _text("plot-note", WIDTH - 127, at, "start", name)))
    middles = [(f"{name} at a half", short(float(np.interp(0.5, *pair))))
               for name, pair in lines.items()]
    return _svg(title, _listed(title, middles), parts, HEIGHT)


def strip(
    rows: Mapping[str, Values], columns: Sequence[int], title: str,
    form: Callable[[float], str] | None = None, what: str = "layer",
) -> str:
    """A row of upright bars for each name, a bar a column, all on one scale; signs point up, down.

    `columns` are the numbers of the layers (or of `what` else).
    """
    form = form or short
    values = np.array([list(row) for row in rows.values()], float)
    low, high = min(0.0, values.min()), max(0.0, values.max())
    span, tall = (high - low) or 1.0, 84.0
    step = min((WIDTH - 20) / len(columns), UPRIGHT)
    # numbers above the bars, if all of them have room: some would look chosen
    fits = LETTER * max(len(form(value)) for value in values.flat) < step - 2
    parts, top = [], 0.0
    for number, (name, row) in enumerate(zip(rows, values, strict=True)):
        parts.append(_text("plot-name", 10, top + 14, "start", name))
        base = top + 36 + high / span * tall
        for position, (column, value) in enumerate(zip(columns, row, strict=True)):
            x, size = 10 + position * step, abs(value) / span * tall
            y = base - size if value >= 0 else base
            bar = _rect(f"plot-{'abcd'[number % 4]}", x + step * 0.1, y, step * 0.8, size)
            if fits:
                above = y - 4 if value >= 0 else y + size + 12
                bar += _text("plot-value", x + step / 2, above, "middle", form(value))
            parts.append(_g(f"{what} {column}, {name}: {form(value)}", bar))
        parts.append(_line("plot-zero", 10, base, 10 + step * len(columns), base))
        top += 48 + tall
    every = max(1, math.ceil(26 / step))  # or numbers of many layers would lie over each other
    parts += [_text("plot-tick", 10 + (position + 0.5) * step, top + 4, "middle", str(column))
              for position, column in enumerate(columns) if position % every == 0]
    parts.append(_text("plot-label", 10 + step * len(columns) / 2, top + 22, "middle", what))
    values_shown = [(f"{what} {column}, {name}", form(value))
                    for name, row in zip(rows, values, strict=True)
                    for column, value in zip(columns, row, strict=True)]
    return _svg(title, _listed(title, values_shown), parts, top + 28)


# ---- axes


def bins(values: Values, most: int, log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Counts [n] and edges [n + 1] of at most `most` bins of equal width, or of equal ratio.

    Whole numbers get whole widths, so that no bin holds more of them than another.
    """
    values = np.asarray(values, float)
    if log:
        values = values[values > 0]
    low, high = (values.min(), values.max()) if len(values) else (1.0, 2.0)
    if log:
        edges = np.geomspace(low, max(high, low * 1.01), most + 1)
        edges[0], edges[-1] = low, max(high, edges[-1])
    # a bin of 1.5 would hold one whole number or two, and the plot look like a comb
    elif (values == np.round(values)).all():
        width = max(1, math.ceil((high - low + 1) / most))
        edges = np.arange(low, high + width + 1, width) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, most + 1)
    return np.histogram(values, edges)[0], edges


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Values, log: bool = False, whole: bool = False) -> "Axis":
        """An axis that holds the values, with a little room unless they are the `whole`."""
        low, high = float(np.min(values)), float(np.max(values))
        if log:
            low, high = (low, high) if high > low else (low / 2, high * 2)
            room = 1.0 if whole else (high / low) ** 0.03
            return cls(low / room, high * room, True)
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        room = 0.0 if whole else 0.04 * (high - low)
        return cls(low - room if low != 0 else 0.0, high + room)

    def position(self, value: float) -> float:
        """Where a value lies on it: 0 at the lower end, 1 at the upper."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Four to eight round numbers on it."""
        if not self.log:
            return _round_steps(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        # powers of ten if there are enough, else what people count in between
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
            found = [one for one in found if self.low <= one * 1.000001 and one <= self.high]
            if len(found) >= 3:
                every = math.ceil(len(found) / 7)
                return found[::-every][::-1]
        return _round_steps(self.low, self.high)


def _round_steps(low: float, high: float) -> list[float]:
    """About five numbers at round distances that lie between two others."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.99)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float, digits: int = 3) -> str:
    """A number in a few letters: 0.25, 1.5k, 20M, 3e−5."""
    sign, size = ("−" if value < 0 else ""), abs(value)
    # 0.9995: what would be rounded to 1,000 is 1k
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit * 0.9995 <= size < limit * 1e3:
            return f"{sign}{size / limit:.{digits}g}{unit}"
    if size and not 1e-3 <= size < 1e15:
        factor, power = f"{size:.{digits - 1}e}".split("e")
        return f"{sign}{float(factor):.{digits}g}e{int(power)}".replace("e-", "e−")
    return f"{sign}{size:.{digits}g}"


def _tick_names(ticks: list[float]) -> list[str]:
    """The names of ticks, as short as tells them apart."""
    # equal names on two ticks would say that nothing lies between them
    for digits in range(3, 12):
        names = [short(tick, digits) for tick in ticks]
        if len(set(names)) == len(names):
            break
    return names


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.position(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.position(value) * (HEIGHT - TOP - BOTTOM)


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    """The grid, the ticks and the labels of a plot's two axes."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick, name in zip(y.ticks, _tick_names(y.ticks), strict=True):
        at = _y(y, tick)
        parts += [_line("plot-grid", LEFT, at, WIDTH - RIGHT, at),
                  _text("plot-tick", LEFT - 6, at + 4, "end", name)]
    for tick, name in zip(x.ticks, _tick_names(x.ticks), strict=True):
        at = _x(x, tick)
        parts += [_line("plot-grid", at, TOP, at, bottom),
                  _text("plot-tick", at, bottom + 15, "middle", name)]
    middle = (TOP + bottom) / 2
    parts += [
        _line("plot-axis", LEFT, bottom, WIDTH - RIGHT, bottom),
        _text("plot-label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 7, "middle", x_label),
        f'<text class="plot-label" transform="translate(10 {middle:.1f}) rotate(-90)" '
        f'text-anchor="middle">{_safe(y_label)}</text>',
    ]
    return parts


# ---- SVG


def _svg(title: str, description: str, parts: list[str], height: float) -> str:
    return (f'<svg class="gradindex-plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
            f'aria-label="{_safe(description)}"><title>{_safe(title)}</title>{"".join(parts)}</svg>')


def _listed(title: str, values: list[tuple[str, str]]) -> str:
    """A label that says the values, for who can't see the plot."""
    shown = ", ".join(f"{name} {value}" for name, value in values[:MOST_SAID])
    more = f", and {len(values) - MOST_SAID} more" if len(values) > MOST_SAID else ""
    return f"{title}: {shown}{more}"


def _safe(text: str) -> str:
    return html.escape(visible(text))


def _clipped(text: str, letters: int) -> str:
    """At most so many letters of a name: its beginning and more of its end, where names differ."""
    text = visible(text)
    if len(text) <= letters:
        return text
    end = (letters - 1) * 2 // 3  # paths and modules of one layer begin alike
    return f"{text[: letters - 1 - end]}…{text[-end:]}"


def _g(title: str, content: str) -> str:
    return f"<g><title>{_safe(title)}</title>{content}</g>"


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return (f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" '
            f'height="{max(height, 0):.1f}"/>')


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(kind: str, x: float, y: float, radius: float) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _text(kind: str, x: float, y: float, anchor: str, content: str) -> str:
    return (f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{_safe(content)}</text>")
