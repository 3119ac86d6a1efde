"""A result as text for people, on a terminal or in a file.

Sign and units are said. Text of training data is never trusted: hidden characters are made
visible. What is shown of a hit is in `wording.py`.
"""

import re
import shutil

from gradindex.results import Group, Hit, Result
from gradindex.terminal import visible
from search.show import task_words, wording

MOST_TEXTS = 3  # of a query's further texts, shown
MARKED = 0.25  # a token is marked from this share of the strongest token's influence on
PLUS, MINUS = "1;94", "1;33"  # ANSI: bold, bright blue or yellow
TABLE = 76  # columns that a table of groups needs, with something of their names
BARS = "▁▂▃▄▅▆▇█"


def render_terminal(
    result: Result, width: int | None = None, color: bool = False
) -> str:
    """The result for people: `color` uses ANSI, else strong tokens stand in [brackets]."""
    # narrower, no line holds two words; wider, lines are hard to follow
    width = max(24, min(width or shutil.get_terminal_size((100, 24)).columns, 160))
    lines = [*_heading(result, width), ""]
    for rank, hit in wording.folded(result):
        lines += [*_hit_lines(rank, hit, result, width, color), ""]
    if result.total is not None:
        lines += [*group_lines(result, width), ""]
    lines += _wrap(wording.recall_statement(result), width)
    lines += _wrap(_sentence(result, color), width)
    lines += [line for warning in result.warnings
              for line in _wrap(f"warning: {visible(warning)}", width)]
    times = wording.times(result)
    lines += _wrap(f"seconds: {times}", width) if times else []
    return "\n".join(lines)


def _heading(result: Result, width: int) -> list[str]:
    """The query, and how it was searched for."""
    first = [id(text) for text in result.query.texts[: MOST_TEXTS + 1]]
    lines = [line for asked in task_words.texts_of_query(result) if id(asked.text) in first
             for line in _query_lines(asked, width)]
    if len(result.query.others) > MOST_TEXTS:
        lines.append(f"       and {len(result.query.others) - MOST_TEXTS} more texts")
    said = visible(task_words.asked_of(result.query, result.task)).replace(" scored,", " scored⟧,")
    lines += [f"       {line}" for line in _wrap(
        "⟦" * said.count("⟧") + said, width - 7)]
    return [*lines, *_wrap(wording.counted(result), width), *_wrap(wording.how(result), width)]


def _query_lines(asked: task_words.Asked, width: int) -> list[str]:
    """A text, what is scored of it in ⟦brackets⟧ where it isn't all, and its label."""
    shown, inside, tokens = "", False, task_words.texts_apart(asked.text)
    for position in range(asked.first, asked.last):
        scored = asked.marked and asked.text.is_scored(position)
        shown += ("⟦" if scored else "⟧") * (scored != inside)
        shown += visible(tokens[position])
        inside = scored
    own = " (the model's own continuation)" * (asked.text.generated and asked.marked)
    name = asked.name if asked.name in ("versus", "plus") else f"{asked.name}:"
    lines = _wrap(f"{name:<6} {shown}" + "⟧" * inside + own, width)
    if asked.label is not None:
        lines += _wrap(f"label: {visible(asked.label)}", width)
    return lines


def _hit_lines(rank: int, hit: Hit, result: Result, width: int, color: bool) -> list[str]:
    """A hit: its score, where it stands, where it is from, its layers and its text."""
    ranked_by = result.controls["normalize"]
    value = {"cosine": hit.cosine, "relatif": hit.relatif}.get(ranked_by)
    by = "" if value is None else f"{ranked_by} {wording.number(value)}  "
    about = "" if hit.exact else "≈ "
    label = "" if hit.user_id is None else f"  {hit.user_id}"
    influence = wording.number(hit.influence)
    if color:
        influence = f"\x1b[{PLUS if hit.influence >= 0 else MINUS}m{influence}\x1b[0m"
    # only our own letters may hold colour codes: what comes from data goes through `visible`
    head = f"{rank:>3}  {by}{about}{influence}  {wording.nats(hit, result)}"
    notes = [visible(task_words.said_of(hit, result)), wording.percentile(hit, result),
             wording.rank_before(hit)]
    if hit.tfidf_rank is not None:
        notes.append(f"TF-IDF rank {hit.tfidf_rank}")
    notes.append(wording.overlap(hit))
    noticed = "".join(f"  [{mark.text}]" for mark in wording.marks(hit))
    head, *rest = _wrap(head + visible(f"{label}  sequence {hit.id}{noticed}"), width)
    lines = [head, *("     " + line for part in (" ".join(rest), ", ".join(filter(None, notes)))
                     for line in _wrap(part, width - 5))]
    lines += [f"     {line}" for line in _wrap(wording.checked(hit, result), width - 5)]
    lines.append(f"     {_clip(wording.where(hit), width - 5)}")
    if hit.layer_influence:
        shares = ", ".join(
            f"{part} {share:+.0%}" for part, share in wording.part_shares(hit).items())
        there = task_words.layers_of(result, "–")
        lines += [f"     {line}" for line in _wrap(
            f"{there} {layer_strip(hit.layer_influence)}" + f"  {shares}" * bool(shares),
            width - 5)]
    for name, first, last in task_words.texts_of(hit, result):
        text = f"{name}: " * bool(name) + _window(hit, color, first, last)
        lines += [f"     {line}" for line in _wrap(text, width - 5)]
    if hit.fields:
        fields = ", ".join(f"{name}={wording.plain(value)}" for name, value in hit.fields.items())
        lines.append(f"     {_clip(fields, width - 5)}")
    return lines


def _clip(text: str, width: int) -> str:
    shown = visible(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _window(hit: Hit, color: bool, begin: int, end: int) -> str:
    """The strongest stretch of a text of a hit, its strong tokens marked with their sign."""
    # each hit by itself: beside one strong hit the others would have no mark at all
    strongest = wording.strongest([hit])
    first, last = wording.window(hit, begin=begin, end=end)
    shown, tokens = [], task_words.texts_apart(hit)
    for position in range(first, last):
        piece = visible(tokens[position])
        value = hit.token_influence[position] if hit.token_influence else 0.0
        if abs(value) >= MARKED * strongest:
            piece = _mark(piece, value > 0, color)
        shown.append(piece)
    return "…" * (first > begin) + "".join(shown) + "…" * (last < end)


def _mark(piece: str, positive: bool, color: bool) -> str:
    if color:
        return f"\x1b[{'44;97' if positive else '43;30'};1m{piece}\x1b[0m"
    return f"[+{piece}]" if positive else f"[-{piece}]"


def layer_strip(values: list[float]) -> str:
    """A bar per layer for the size of its influence; a layer below zero stands in parentheses."""
    top = max((abs(value) for value in values), default=0.0) or 1.0
    # signs by parentheses: blocks that hang down are not in every font
    bars = (BARS[min(7, int(8 * abs(value) / top))] for value in values)
    return "".join(bar if value >= 0 else f"({bar})"
                   for bar, value in zip(bars, values, strict=True))


def _sentence(result: Result, color: bool) -> str:
    """What the numbers and the marks in the text mean."""
    marks = "blue tokens add to it, yellow ones take from it" if color else \
        "[+tokens] add to it, [-tokens] take from it"
    sentence = wording.meaning(result)
    if not result.controls["rescore"]:
        return sentence
    return f"{sentence} In the text, {marks}; {task_words.share_means(result)}."


def group_lines(result: Result, width: int) -> list[str]:
    """The best groups of a result; none where it has no groups."""
    if result.total is None:
        return []
    by = visible(str(result.controls["group_by"]))
    groups = result.groups[: wording.GROUPS_SHOWN]
    said = f"total influence by {by}, ± the code's error, {wording.GROUP_ORDER}"
    lines = _wrap(said, width)
    lines += _narrow_group_lines(result, groups, by, width) if width < TABLE else \
        _group_table(result, groups, by)
    lines += [line for note in wording.group_notes(groups) for line in _wrap(note, width)]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def _narrow_group_lines(result: Result, groups: list[Group], by: str, width: int) -> list[str]:
    """Groups each under its name, for a terminal that holds no table."""
    assert result.total is not None
    lines = []
    more = result.group_count - len(groups)
    shown = [(group, wording.group_name(group, by)) for group in groups]
    for group, name in [*shown, (result.total, f"all {result.group_count:,} together" + (
            f", {more:,} more among them" if more else ""))]:
        z = wording.standard_errors(group)
        numbers = f"z {z}, " * bool(z) + \
            f"{wording.number(group.influence)} ± {wording.unsigned(group.standard_error)}"
        lines.append(_clip(name, width))
        lines += [f"  {line}" for line in _wrap(
            f"{numbers}, {wording.nats(group, result)}, {group.sequences:,} sequences, "
            f"{len(group.hits)} {'hit' if len(group.hits) == 1 else 'hits'}", width - 2)]
    return lines


def _group_table(result: Result, groups: list[Group], by: str) -> list[str]:
    """Groups a line each."""
    assert result.total is not None
    unit = f"first-order {result.query.unit}"
    lines = [f"{'z':>7} {'influence':>12} {'±':>9} {unit:>18} {'sequences':>9} {'hits':>4}  {by}"]
    lines += [_group_line(group, visible(wording.group_name(group, by)), result)
              for group in groups]
    if result.group_count > len(groups):
        lines.append(f"{'':>64}  and {result.group_count - len(groups):,} more")
    return [*lines, _group_line(result.total, f"all {result.group_count:,} together", result)]


def _group_line(group: Group, name: str, result: Result) -> str:
    return (f"{wording.standard_errors(group):>7} {wording.number(group.influence):>12} "
            f"{wording.unsigned(group.standard_error):>9} "
            f"{wording.nats(group, result, named=False):>18} {group.sequences:>9,} "
            f"{len(group.hits):>4}  {name}")


_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def _wrap(text: str, width: int) -> list[str]:
    """Break into lines of at most `width` letters, colour codes not counted or cut."""
    # colours take no room, and are ended and begun again where a line is broken
    lines, line, length, active = [], "", 0, ""
    for piece in re.findall(r"\x1b\[[0-9;]*m|[^\s\x1b]+|\s+", text):
        if _ANSI.fullmatch(piece):
            active = "" if piece == "\x1b[0m" else piece
            line += piece
            continue
        while length + len(piece) > width:
            # a word goes to the next line as a whole, unless no line could hold it
            whole = length and not piece.isspace() and len(piece) <= width
            room = 0 if whole else width - length
            lines.append((line + piece[:room]).rstrip(" ") + ("\x1b[0m" if active else ""))
            piece = piece[room:].lstrip(" ")
            line, length = active, 0
        line += piece
        length += len(piece)
    return [*lines, line] if line else lines
