"""What a search may be told besides its question: one table for Python, flags, form and JSON.

Nothing heavy is imported here, so that the command line can show its flags at once. What controls
mean for an index, and whether they can be had, is told by `settings.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from typing_extensions import TypedDict

from gradindex.memory import LOW_RANK

Normalization = Literal["none", "cosine", "relatif"]
Candidates = Literal["code", "tfidf", "both"]
# what a search does where it is told nothing else
DEFAULT_HITS = 20
DEFAULT_SHORTLIST = 1000  # at most
SHORTLIST_FOR_HIT = 10  # or so many for each hit
DEFAULT_RECALL = 0.99  # what a search is to be sure of
GROWTH = 10  # with `recall`, the shortlist may grow to this many times its default
LARGEST_IN_FULL = 1 << 31  # bytes of preconditioned gradients kept in full
# what each page's hits, and each search's time, cost a server that strangers may ask
MOST_HITS = 200  # that the page is asked for at once
MOST_RESCORED = 100_000
# layers, kinds, or a regular expression that can't take for ever: no groups, few repetitions
PLAIN_MODULES = r"^[ \w.,|^$\\-]*([*+?][ \w.,|^$\\-]*){0,3}$"
MEMBERS = r"^[ \w.,=+-]*$"  # names and weights, one behind the other


@dataclass(frozen=True)
class Bounds:
    """The limits of a control's value; None where there is no limit.

    A number is more than `above`, or `least` or more, and `most` or less. A text has at most so
    many `letters` and matches `pattern`.
    """

    above: float | None = None
    least: float | None = None
    most: float | None = None
    letters: int | None = None
    pattern: str | None = None

    def hold(self, number: float) -> bool:
        """Whether a number lies between them; infinities and NaN never do."""
        # NaN compares as false with everything, so it would pass every bound that is a negation
        return math.isfinite(number) and (self.above is None or number > self.above) and (
            self.least is None or number >= self.least) and (
            self.most is None or number <= self.most)

    def __str__(self) -> str:
        """What is expected, for errors."""
        return "a share above 0, at most 1" if self == SHARE else f"a number above {self.above:g}"


UNBOUNDED = Bounds()
ABOVE_ZERO = Bounds(above=0)
SHARE = Bounds(above=0, most=1)


@dataclass(frozen=True)
class Control:
    """What is known of one control, wherever it is set.

    `help` is what the command line says of it; brackets hold what is taken where it isn't given
    and the index decides. `flag` is its flag, `unit` what the flag's value is called. `bounds` hold
    everywhere, `page` where strangers ask; `api` is what is said of it there.
    """

    help: str
    flag: str
    unit: str | None
    choices: tuple[str, ...]
    bounds: Bounds
    page: Bounds
    api: str | None


def about(
    help: str, flag: str = "", *, unit: str | None = None, choices: tuple[str, ...] = (),
    bounds: Bounds = UNBOUNDED, page: Bounds | None = None, api: str | None = None,
) -> dict[str, Control]:
    """Describe a control, for `metadata` of a field of `Controls`.

    Where no `unit` is given it is the choices; where no `page` is given, the page has the `bounds`.
    """
    return {"control": Control(help, flag, unit or "|".join(choices) or None, choices, bounds,
                               bounds if page is None else page, api)}


@dataclass(frozen=True)
class Controls:
    """How to search. Everything here is chosen at query time; the index stays as it is.

    k: hits [min(20, N)]. shortlist: rescore so many sequences exactly, or "all" [best first, until
    the recall statement is sure of .99 (one standard error below its estimate), at most
    min(N, max(1000, 10 k))]. recall: be sure of this much instead; rescored are at most
    `shortlist` [then ten times that]. opponents: the most negative influence.
    damping: λ as a factor of mean(Λ) [the build's]. modules: as for `choose_modules`, such as
    "8-15", "attention" or a regular expression [all that are indexed].
    members: of an index of several models, which count and how much, "last=1,base=-0.5": the
    influence is the sum over them times these weights [all of them, their mean].
    normalize: rank by influence ("none"), by influence / (‖q̃‖ ‖m̃‖) ("cosine") or by θ-RelatIF
    ("relatif"). candidates: who is rescored: the best by "code", by "tfidf" (shared rare words), or
    "both": a fifth of the shortlist by words, the rest by code. rescore: False ranks by code
    alone. time_limit: stop rescoring a query after so many seconds.
    rank: of the preconditioned gradients of many queries [exact while they fit in 2 GiB, else
    32]. train_sequences: N_train, which only scales `nats`; without it and
    the build's there are none.
    group_by: also total influence by "document", "source", a field that was kept or derived at the
    build, or of a classifier "label"; in order of standard errors from the index's mean.
    """

    # None is what the index decides: `settings.settle` puts it in
    k: int | None = field(default=None, metadata=about(
        f"Hits [{DEFAULT_HITS}].", "-k", page=Bounds(least=1, most=MOST_HITS)))
    shortlist: int | str | None = field(default=None, metadata=about(
        # a text, too: the command line has numbers and "all" as one
        f"Rescore so many exactly [as many as it takes to be sure of {DEFAULT_RECALL}, at most "
        f"{DEFAULT_SHORTLIST} or {SHORTLIST_FOR_HIT} k].",
        unit="N|all",
        page=Bounds(least=1, most=MOST_RESCORED)))
    recall: float | None = field(default=None, metadata=about(
        f"Rescore until it is sure of R of the true top k [{DEFAULT_RECALL}], at most --shortlist "
        f"[{GROWTH * DEFAULT_SHORTLIST}].", unit="R", bounds=SHARE))
    opponents: bool = field(default=False, metadata=about(
        "The most negative influence instead."))
    damping: float | None = field(default=None, metadata=about(
        "λ as a factor of each module's mean eigenvalue [the build's].",
        # beyond these Λ + λ is Λ or λ alone in float32, and a stranger could ask for overflow
        bounds=ABOVE_ZERO, page=Bounds(least=1e-12, most=1e12)))
    modules: str | None = field(default=None, metadata=about(
        "Layers (8-15), mlp, attention, head, embeddings, adapter, several with commas, or names "
        "that match [all indexed].",
        unit="RANGE|KIND|REGEX", page=Bounds(letters=256, pattern=PLAIN_MODULES),
        api="Layers (8-15), kinds (mlp, attention, head, embeddings), or a regular expression of "
            "letters, digits and . , | ^ $ \\ - with at most three of * + ?."))
    members: str | None = field(default=None, metadata=about(
        "Of an index of several models (build --also): which count, and how much [all, their "
        "mean].", unit="NAME=WEIGHT,…", page=Bounds(letters=1024, pattern=MEMBERS),
        api="Of an index of several models: which count and how much, as in last=1,base=-0.5."))
    normalize: Normalization = field(default="none", metadata=about(
        "Rank by influence, by influence / (‖q̃‖ ‖m̃‖), or by θ-RelatIF.",
        choices=get_args(Normalization)))
    candidates: Candidates = field(default="both", metadata=about(
        "Who is rescored: the best by code, by shared rare words, or of both.",
        choices=get_args(Candidates)))
    rescore: bool = field(default=True, metadata=about(
        "Rank by code alone: fast, approximate.", "--no-rescore"))
    time_limit: float | None = field(default=None, metadata=about(
        "Stop rescoring a query after this long.", unit="SECONDS", bounds=ABOVE_ZERO))
    rank: int | None = field(default=None, metadata=about(
        "With --queries: rank of the preconditioned gradients "
        f"[all if {LARGEST_IN_FULL >> 30} GiB, else {LOW_RANK}].",
        bounds=ABOVE_ZERO))
    train_sequences: int | None = field(default=None, metadata=about(
        "On how many the model was trained: then nats are told [the build's].", bounds=ABOVE_ZERO))
    group_by: str | None = field(default=None, metadata=about(
        "Also total the influence of all sequences by document, source, kept or derived field, or "
        "a classifier's label, in order of standard errors from the index's mean.",
        unit="document|source|FIELD", page=Bounds(letters=256),
        api="document, source, a kept or derived field, or a classifier's label."))


class ControlArguments(TypedDict, total=False):
    """The fields of `Controls` as keywords of a function; editors read them here.

    Names and types are said twice; `test_the_keywords_are_the_fields` holds them equal.
    """

    k: int | None
    shortlist: int | str | None
    recall: float | None
    opponents: bool
    damping: float | None
    modules: str | None
    members: str | None
    normalize: Normalization
    candidates: Candidates
    rescore: bool
    time_limit: float | None
    rank: int | None
    train_sequences: int | None
    group_by: str | None


# read from `Controls`, so that no flag, form or JSON has to say it again
TYPES: Mapping[str, Any] = get_type_hints(Controls)
DEFAULTS = Controls()
CONTROLS: Mapping[str, Control] = {one.name: one.metadata["control"] for one in fields(Controls)}


def flag_of(name: str) -> str:
    """A control's flag on the command line."""
    return CONTROLS[name].flag or f"--{name.replace('_', '-')}"
