"""Plots as text: where things stand, what is said, and that nothing of the data is markup."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from search.show import plots

HOSTILE = '"><script>alert(1)</script><b style="x">&amp;\u202e\x1b[31m'


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def numbers(svg: str, tag: str, attribute: str, kind: str) -> list[float]:
    return [float(one.get(attribute)) for one in parse(svg).iter(tag) if one.get("class") == kind]


def every_plot(label: str) -> list[str]:
    return [
        plots.histogram([1, 2], [0, 1, 2], label, label, label),
        plots.bars([(label, 3.0), ("b", -1.0)], label),
        plots.tail([1.0, 2, 3], plots.Law(1.5, 2.5, 0.5), label, label, label),
        plots.scatter([1, 2], [3, 4], label, label, label, diagonal=True),
        plots.strip({label: [0.1, -0.2]}, [0, 1], label, what=label),
        plots.curves({label: ([0, 1], [0, 1]), "b": ([0, 1], [1, 1])}, label, label, label),
    ]


@pytest.mark.parametrize("number", range(6))
def test_text_is_escaped_and_nothing_is_styled_inline(number):
    svg = every_plot(HOSTILE)[number]
    root = parse(svg)  # well-formed
    assert "<script" not in svg and "<b " not in svg
    assert "\u202e" not in svg and "\x1b" not in svg and "\\u202e" in svg
    for element in root.iter():
        assert element.tag in ("svg", "title", "g", "rect", "line", "circle", "text",
                               "polyline")
        assert not {"style", "href", "onload"} & set(element.attrib)
    assert root.get("role") == "img" and HOSTILE[:3] in root.get("aria-label")
    assert next(root.iter("title")).text.startswith(HOSTILE[:3])


@pytest.mark.parametrize("number", range(5))
def test_everything_lies_inside(number):
    root = parse(every_plot("label")[number])
    _, _, width, height = map(float, root.get("viewBox").split())
    for element in root.iter():
        for names, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
            for name in names:
                assert 0 <= float(element.get(name, 0)) <= limit, (element.tag, element.attrib)


def test_bars_are_as_long_as_their_values():
    svg = plots.bars([("a", 10.0), ("b", 5.0), ("c", 0.0), ("d", -2.5)], "t")
    widths = numbers(svg, "rect", "width", "plot-a")
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1) and widths[2] == 0
    assert widths[3] == pytest.approx(widths[0] / 4, abs=0.1)
    starts = numbers(svg, "rect", "x", "plot-a")
    assert starts[3] + widths[3] == pytest.approx(starts[0], abs=0.11)  # they meet at zero
    assert parse(svg).get("aria-label") == "t: a 10, b 5, c 0, d −2.5"


def test_a_histogram_is_as_high_as_its_counts():
    svg = plots.histogram([4, 8, 0], [1, 10, 100, 1000], "t", "x", "y", log=True)
    heights = numbers(svg, "rect", "height", "plot-a")
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1) and heights[2] == 0
    left = numbers(svg, "rect", "x", "plot-a")
    assert left[1] - left[0] == pytest.approx(left[2] - left[1], abs=0.1)  # equal ratios
    assert "12 from 1 to 1k; most, 8, from 10 to 100" in svg


def test_a_tail_is_a_straight_line_where_the_law_holds():
    n, alpha = 1000, 2.5
    values = (np.arange(1, n + 1) / n) ** (-1 / (alpha - 1))  # its quantiles
    svg = plots.tail(values, plots.Law(1.0, alpha, 1.0), "t", "x")
    [line] = [one for one in parse(svg).iter("line") if one.get("class") == "plot-law"]
    x1, y1, x2, y2 = (float(line.get(name)) for name in ("x1", "y1", "x2", "y2"))
    for x, y in zip(numbers(svg, "circle", "cx", "plot-point"),
                    numbers(svg, "circle", "cy", "plot-point"), strict=True):
        assert y == pytest.approx(y1 + (x - x1) * (y2 - y1) / (x2 - x1), abs=0.2)


def test_a_tail_leaves_out_what_is_not_positive():
    one = plots.tail([1.0, 2, 4, 8], None, "t", "x")
    assert plots.tail([8.0, -5, 1, 0, 4, 2], None, "t", "x") == one
    assert "4 positive values from 1 to 8" in one


def test_a_scatter_plot_puts_points_in_place():
    svg = plots.scatter([1, 10, 100], [1, 10, 100], "t", "x", "y", log=True, diagonal=True)
    [line] = [one for one in parse(svg).iter("line") if one.get("class") == "plot-mark"]
    x1, y1, x2, y2 = (float(line.get(name)) for name in ("x1", "y1", "x2", "y2"))
    xs, ys = (numbers(svg, "circle", name, "plot-point") for name in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    for x, y in zip(xs, ys, strict=True):
        assert y == pytest.approx(y1 + (x - x1) * (y2 - y1) / (x2 - x1), abs=0.2)
    many = plots.scatter(range(9000), range(9000), "t", "x", "y")
    assert many.count("<circle") == plots.MOST_POINTS and "9,000 points" in many


def test_a_strip_has_a_bar_a_layer_on_one_scale():
    svg = plots.strip({"MLP": [0.5, -0.25], "attention": [0.25, 0.5]}, [3, 7], "t")
    first, second = (numbers(svg, "rect", "height", kind) for kind in ("plot-a", "plot-b"))
    assert first == pytest.approx([56, 28], abs=0.1) and second == pytest.approx([28, 56], abs=0.1)
    tops = numbers(svg, "rect", "y", "plot-a")
    assert tops[0] + first[0] == pytest.approx(tops[1], abs=0.1)  # the second hangs from zero
    assert "layer 3, MLP 0.5, layer 7, MLP −0.25, layer 3, attention 0.25" in svg


@pytest.mark.parametrize("value, said", [
    (0, "0"), (0.25, "0.25"), (-1500, "−1.5k"), (999.6, "1k"), (2e7, "20M"), (3.2e9, "3.2G"),
    (1e12, "1T"), (4e15, "4e15"), (3e-5, "3e−5"), (-1e-7, "−1e−7"), (123.4, "123"),
])
def test_short(value, said):
    assert plots.short(value) == said


@pytest.mark.parametrize("low, high, log, expected", [
    (0, 10, False, [0, 2, 4, 6, 8, 10]), (-1, 1, False, [-1, -0.5, 0, 0.5, 1]),
    (0.5, 5000, True, [1, 10, 100, 1000]), (2, 70, True, [3, 10, 30]),
])
def test_ticks(low, high, log, expected):
    assert plots.Axis(low, high, log).ticks == pytest.approx(expected)


@pytest.mark.parametrize("low, high", [(1e-12, 1e12), (1.0, 1.1), (3.0, 4.0), (1e-300, 1e-299)])
def test_a_logarithmic_axis_always_has_ticks(low, high):
    ticks = plots.Axis(low, high, True).ticks
    assert 2 <= len(ticks) <= 8 and all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_ticks_close_together_are_told_apart():
    svg = plots.scatter([1e6, 1e6 + 4], [0, 1], "t", "x", "y")
    names = re.findall(r'class="plot-tick"[^>]*middle">([^<]*)<', svg)
    assert len(names) == len(set(names)) >= 3


def test_bins_hold_every_value():
    values = np.random.default_rng(0).lognormal(3, 2, 1000)
    for log in (False, True):
        counts, edges = plots.bins(values, 30, log)
        assert counts.sum() == 1000 and len(edges) == 31
    counts, edges = plots.bins([1, 1, 2, 5], 40)
    assert edges.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5] and counts.tolist() == [2, 1, 0, 0, 1]
    counts, edges = plots.bins(np.arange(1000), 40)
    assert set(counts.tolist()) == {25} and set(np.diff(edges).tolist()) == {25.0}
    assert plots.bins([7], 40)[0].tolist() == [1]


def test_curves_go_through_their_points():
    svg = plots.curves({"ours": ([0, 0.25, 1], [0, 1, 1]), "theirs": ([0, 1], [0, 1])}, "found",
                       "inspected", "found")
    ours, theirs = (one.get("points") for one in parse(svg).iter() if one.tag == "polyline")
    ours = [tuple(map(float, pair.split(","))) for pair in ours.split()]
    theirs = [tuple(map(float, pair.split(","))) for pair in theirs.split()]
    assert ours[0] == theirs[0] and ours[2] == theirs[1]
    assert ours[1] == pytest.approx((0.75 * ours[0][0] + 0.25 * ours[2][0], ours[2][1]), abs=0.06)
    label = parse(svg).get("aria-label")
    assert "ours at a half 1" in label and "theirs at a half 0.5" in label
