"""What is shown of a hit, the same in every rendering: its window, tints, shares and marks."""

import math
from dataclasses import dataclass
from typing import Any

from gradindex.first_order import in_words, room
from gradindex.modules import LAST
from gradindex.progress import duration
from gradindex.results import FEW_IN_GROUP, UNSURE, Group, Hit, Result
from gradindex.terminal import json_text
from search.show.task_words import layers_of, texts_of

WINDOW = 48  # tokens of text shown around the strongest of them
SHADES = 7  # shades of a sign
LITTLE_OVERLAP = 0.1
GROUPS_SHOWN = 20  # shown at once
GROUP_ORDER = "by z: standard errors from the index's mean"


@dataclass(frozen=True)
class Mark:
    """Something to notice of a hit: a word or two, and what it means."""

    name: str
    text: str
    meaning: str


def window(
    hit: Hit, size: int = WINDOW, begin: int = 0, end: int | None = None
) -> tuple[int, int]:
    """First and last + 1 of the tokens with the most absolute influence among `size` in a row.

    They are chosen from token `begin` to `end` [all].
    """
    # a sum that slides along, so that it takes time n and not n times the window
    values = hit.token_influence or [0.0] * len(hit.tokens)
    strength = [abs(value) for value in values[begin:end]]
    total = sum(strength[:size])
    best, start = total, 0
    for first in range(1, max(1, len(strength) - size + 1)):
        total += strength[first + size - 1] - strength[first - 1]
        # clearly more, or rounding would move the window from machine to machine
        if total > best * (1 + 1e-9):
            best, start = total, first
    return begin + start, begin + min(start + size, len(strength))


def is_cut(hit: Hit, result: Result) -> bool:
    """Whether the windows of a hit's texts leave some of it out."""
    return any(window(hit, begin=first, end=last) != (first, last)
               for _, first, last in texts_of(hit, result))


def strongest(hits: list[Hit]) -> float:
    """The largest absolute influence of a token of any hit: the scale all tints share."""
    return max((abs(value) for hit in hits for value in hit.token_influence), default=0.0) or 1.0


def shade(value: float, scale: float) -> int:
    """−SHADES to SHADES, 0 for what is below half a shade."""
    return max(-SHADES, min(SHADES, round(value / scale * SHADES)))


def part_shares(hit: Hit) -> dict[str, float]:
    """What each kind of module and each model adds, in parts of the sum of their sizes, signed.

    Neither is there where there is one only.
    """
    members = {f"from {member}": value for member, value in hit.member_influence.items()}
    return _shares(hit.kind_influence) | _shares(members)


def _shares(parts: dict[str, float]) -> dict[str, float]:
    total = sum(map(abs, parts.values()))
    return {name: value / total for name, value in parts.items()} \
        if len(parts) > 1 and total else {}


def moved(result: Result) -> dict[int, int]:
    """How many ranks each hit rose (above 0) or fell among these hits by rescoring, by id."""
    # among these hits alone: whom rescoring let in from far down would dwarf all else
    before = sorted(result.hits, key=lambda hit: hit.code_rank)
    by_code = {hit.id: rank for rank, hit in enumerate(before)}
    return {hit.id: by_code[hit.id] - rank for rank, hit in enumerate(result.hits)}


def ranked_by(hit: Hit, normalize: str) -> float:
    """The value that a hit is ranked by; −∞ where it has none, since its gradient is zero."""
    value = {"cosine": hit.cosine, "relatif": hit.relatif}.get(normalize, hit.influence)
    return -math.inf if value is None else value


def plain(value: object) -> str:
    """A kept value as people read it: text as it is, anything else as JSON has it."""
    return value if isinstance(value, str) else json_text(value)


def folded(result: Result) -> list[tuple[int, Hit]]:
    """(rank, hit) without those that are near another."""
    return [(rank, hit) for rank, hit in enumerate(result.hits, 1) if hit.near is None]


def where(hit: Hit) -> str:
    """Where the sequence's text stands in the data: source, row, and of one text the characters."""
    one = hit.start >= 0 and hit.text_b is None and hit.chosen is None
    span = f", characters {hit.start:,} to {hit.end:,}" if one else ""
    more = f" and {len(hit.parts) - 1} more" if len(hit.parts) > 1 else ""
    return f"{hit.source}:{hit.row}{span}{more}"


def percentile(hit: Hit, result: Result) -> str:
    """Which part of the random sample a hit ranks above; empty where none was scored."""
    if hit.percentile is None:
        return ""
    side = "below" if result.opponents else "above"
    part = "all" if hit.percentile >= 100 else f"{hit.percentile:.0f}%"
    return f"{side} {part} of {len(result.sample_influence)} random sequences"


def rank_before(hit: Hit) -> str:
    """The rank before rescoring; empty for a sequence that was named."""
    return f"rank {hit.code_rank:,} by code" if hit.code_rank > 0 else ""


def overlap(hit: Hit) -> str:
    """The share of the query's tokens that a hit holds too; empty where it wasn't counted."""
    return "" if hit.lexical is None else f"lexical overlap {hit.lexical:.2f}"


def marks(hit: Hit) -> list[Mark]:
    """What to notice of a hit."""
    noticed = []
    if hit.duplicates:
        noticed.append(Mark("equal", f"×{len(hit.duplicates) + 1} equal",
                            "so many sequences of the index have these very tokens"))
    if hit.near_duplicates:
        noticed.append(Mark("near", f"+{len(hit.near_duplicates)} alike",
                            "so many hits below share most of its wording and are folded into it"))
    if hit.generic and hit.generic_rate is not None:
        noticed.append(Mark("generic", "generic",
                            f"among the {'lowest' if hit.influence < 0 else 'highest'} 1% for "
                            f"{hit.generic_rate:.0%} of the index's background queries"))
    if hit.lexical is not None and hit.lexical < LITTLE_OVERLAP and hit.exact:
        noticed.append(Mark("unlike", "other words",
                            "it shares hardly any of the query's rarer tokens"))
    return noticed


def group_name(group: Group, by: str) -> str:
    """A group's value as text."""
    if group.value is None:
        return f"no {by}"
    return plain(group.value)


def standard_errors(group: Group) -> str:
    """How far a group is from the index's mean, with a ? where chance may be why; or nothing."""
    return "" if group.z is None else f"{group.z:+.1f}{'?' * group.unsure}"


def group_notes(groups: list[Group]) -> list[str]:
    """What to know of the groups shown: who of them is there by chance, or few."""
    notes, unsure = [], sum(group.unsure for group in groups)
    if unsure:
        verb = "is" if unsure == 1 else "are"
        notes.append(f"? {unsure} of the {len(groups)} shown {verb} within {UNSURE} standard "
                     "errors of the index's mean: chance may have put them here")
    if few := sum(group.sequences < FEW_IN_GROUP for group in groups):
        notes.append(f"groups of fewer than {FEW_IN_GROUP} sequences ({few} of these) come last")
    return notes


def how(result: Result) -> str:
    """What the numbers depend on besides the query: order, modules, layers, damping."""
    controls = result.controls
    modules = len(controls["modules"])
    ranked = {"none": "influence", "cosine": "cosine", "relatif": "θ-RelatIF"}
    return (f"ranked by {ranked[controls['normalize']]}{_of_models(controls)}; {modules} "
            f"module{'s' * (modules != 1)} in {layers_of(result)}, damping "
            f"{controls['damping']:g} × mean eigenvalue")


def _of_models(controls: dict[str, Any]) -> str:
    """Which models share the score, where they are several or not as they were built."""
    members = controls.get("members") or {}
    if not members or members == {LAST: 1.0}:
        return ""
    if list(members.values()) == [1.0]:
        return f" of the model {next(iter(members))}"
    if len({*members.values()}) == 1 and math.isclose(sum(members.values()), 1):
        return f", the mean over the models {', '.join(members)}"
    return ", summed over the models " + ", ".join(
        f"{weight:g} × {name}" for name, weight in members.items())


def counted(result: Result) -> str:
    """How many hits of how many sequences, and how they were found."""
    kind = "opponents (most negative influence)" if result.opponents else "proponents"
    found = f"{result.rescored:,} rescored exactly" if result.controls["rescore"] else \
        "approximate, by code alone"
    alike = len(result) - len(folded(result))
    inside = f" ({alike} folded into a like one)" if alike else ""
    return f"{kind}: {len(result)} of {result.sequences:,} sequences{inside}, {found}"


def times(result: Result) -> str:
    """Seconds of the steps that took any."""
    return ", ".join(f"{name} {duration(value)}" for name, value in result.seconds.items()
                     if value >= 0.05)


def meaning(result: Result) -> str:
    """Units and sign in a sentence, and what N_train is."""
    if result.train_sequences_given:
        return f"{result.units} N_train = {result.train_sequences:,}."
    return (f"{result.units} N_train is unknown, so {unit(result)} are left out: give "
            "--train-sequences if the model was trained on this data.")


def unit(result: Result) -> str:
    """What one more copy is counted in: to first order nats, or units of reward."""
    return "first-order nats" if result.query.unit == "nats" else "first-order units of reward"


def number(value: float) -> str:
    """A score with its sign: three digits, or whole with commas where it is large."""
    return f"{'' if value < 0 else '+'}{unsigned(value)}"


def unsigned(value: float) -> str:
    """The same without a plus."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def nats(of: Hit | Group, result: Result, named: bool = True) -> str:
    """What one more copy would add to first order, in nats or reward; or words in its place."""
    name = result.query.unit
    if of.nats is not None:
        return number(of.nats) + f" first-order {name}" * named
    said = of.no_nats or in_words(result.train_sequences_given)
    # the reward itself is known: what a copy would change of it isn't
    return said if name == "nats" else said.replace("nats", "change")


def checked(hit: Hit, result: Result) -> str:
    """What was measured of a hit's first-order nats; nothing where it wasn't."""
    check, name = hit.check, result.query.unit
    if check is None:
        return ""
    wrong = f" ({', '.join(check.wrong)})" if check.wrong else ""
    return (f"checked: by its own step {number(check.nats)} {name}, measured "
            f"{number(check.measured)} {name}; the step is {check.scale:.3g} ± "
            f"{check.scale_error:.2g} of the first-order one{wrong}")


def nats_room(result: Result) -> str:
    """The largest gain and loss of log p, for a page whose numbers become exact in place."""
    # as JavaScript writes what has no end
    return " ".join("Infinity" if math.isinf(end) else str(end) for end in room(result.query))


def recall_statement(result: Result) -> str:
    """How much of the true top k the answer holds, in a sentence or two."""
    recall, controls = result.recall, result.controls
    if not controls["rescore"]:
        return "recall: unknown, nothing was rescored; influence is the code's estimate."
    # each case says why, and what the number would have been about
    if recall.estimate is None:
        return ("recall: unknown; who else there is can't be told from a TF-IDF list "
                f"({result.rescored:,} of {result.sequences:,} rescored).")
    if result.rescored == result.sequences:
        return f"recall: complete, all {result.sequences:,} sequences were rescored exactly."
    statement = (
        f"recall: an estimated {share(recall.estimate)} of the true top {recall.k} are in this "
        f"list ({result.rescored:,} of {result.sequences:,} rescored{_cutoff(result)})."
    )
    lower = recall.estimate if recall.lower is None else recall.lower
    if recall.asked is not None and lower < recall.asked:
        why = "was interrupted" if result.interrupted else \
            "ran out of --time-limit" if result.timed_out else \
            f"ended at its limit, --shortlist {controls['shortlist']}"
        statement += f" That is short of being sure of {recall.asked:.1%}; rescoring {why}."
    if recall.shortlist_for_95 is not None and recall.estimate < 0.9:
        statement += f" For 95%, about {recall.shortlist_for_95:,} must be rescored."
    return statement


def _cutoff(result: Result) -> str:
    """What the code says at most of a sequence that was left out; empty where none was."""
    if result.recall.cutoff is None:
        return ""
    # the cut-off is in the unit of the order
    by = "" if result.controls["normalize"] == "none" else " a unit of gradient"
    side, cutoff = ("least", -result.recall.cutoff) if result.opponents else (
        "most", result.recall.cutoff)
    return f"; the code scores the others{by} {number(cutoff)} at {side}"


def share(estimate: float) -> str:
    """A recall as text, never more certain than three digits."""
    return f"{estimate:.1%}" if estimate < 0.9995 else "99.9% or more"
