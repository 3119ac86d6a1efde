"""Controls → settings: what they mean for one index, checked before any model is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradindex.errors import InputError
from gradindex.modules import LAST, Module, choose_modules, weighted
from gradindex.storage.manifest import Manifest
from gradindex.task import DERIVED
from search.ask.controls import (
    CONTROLS,
    DEFAULT_HITS,
    DEFAULT_RECALL,
    DEFAULT_SHORTLIST,
    GROWTH,
    SHORTLIST_FOR_HIT,
    TYPES,
    UNBOUNDED,
    Controls,
    flag_of,
)

SMALLEST_SHORTLIST = 16  # where one that grows begins, or with twice the hits
GROUPINGS = ("document", "source")  # besides the fields that were kept
LARGEST_WEIGHT = 1e6  # of a model; and no less than its inverse
LABEL = "label"  # a row's class; a kept field of that name comes before it


@dataclass(frozen=True)
class Settings:
    """What controls mean for one index.

    A shortlist begins with `first` sequences and grows to at most `most`, until the statement is
    sure of `recall`; where that is None the two are the same. `sign` is −1 for opponents, and
    `time_limit` infinite where there is none. `members` are the weights of the models that count,
    which their modules have; `members_given` says whether they were asked for.
    """

    k: int
    first: int
    most: int
    recall: float | None
    sign: float
    damping: float
    modules: list[Module]
    members: dict[str, float]
    members_given: bool
    normalize: str
    candidates: str
    rescore: bool
    time_limit: float
    rank: int | None
    train_sequences: int
    train_sequences_given: bool
    group_by: str | None

    def facts(self) -> dict[str, Any]:
        """What a result says of how it was found."""
        return {
            "k": self.k, "shortlist": self.most, "recall": self.recall,
            "opponents": self.sign < 0, "damping": self.damping,
            "modules": [module.name for module in self.modules],
            "kinds": sorted({module.kind for module in self.modules}), "members": self.members,
            "normalize": self.normalize,
            "candidates": self.candidates, "rescore": self.rescore, "rank": self.rank,
            "train_sequences": self.train_sequences, "group_by": self.group_by,
            # JSON has no infinity
            "time_limit": None if math.isinf(self.time_limit) else self.time_limit,
        }


def settle(controls: Controls, manifest: Manifest) -> Settings:
    """What controls mean for one index: its defaults are put in where nothing was given.

    Raises InputError for a control that can't have its value, or can't go with another.
    """
    _check_each(controls)
    if controls.recall is not None and controls.candidates == "tfidf":
        raise InputError("--recall needs --candidates code or both: what a TF-IDF list misses is "
                         "unknown.")
    if not controls.rescore and (controls.recall is not None or controls.candidates == "tfidf"
                                 or controls.normalize == "relatif"):
        raise InputError("--no-rescore ranks by code alone: it can't go with --recall, "
                         "--candidates tfidf, or --normalize relatif.")
    if not manifest.sequences:
        raise InputError("the index holds no sequence any more: all were deleted. Append documents "
                         "with `gradindex append`.")
    # what was deleted may leave fewer than k, so the sizes are those of what is there now
    k, first, most, recall = _sizes(controls, manifest.sequences)
    members = weights_of(controls.members, [LAST, *manifest.also])
    if min(members.values()) < 0 and controls.normalize != "none":
        raise InputError(f"--normalize {controls.normalize} divides by sizes of gradients, and "
                         "with a weight below 0 (--members) there are none. Leave one of them "
                         "out.")
    return Settings(
        k=k, first=first, most=most, recall=recall,
        sign=-1.0 if controls.opponents else 1.0, damping=controls.damping or manifest.damping,
        modules=weighted(manifest.modules if controls.modules is None else choose_modules(
            manifest.modules, controls.modules, "the indexed modules"), members),
        members=members, members_given=controls.members is not None,
        normalize=controls.normalize,
        candidates=controls.candidates if controls.rescore else "code", rescore=controls.rescore,
        time_limit=controls.time_limit or math.inf, rank=controls.rank,
        train_sequences=controls.train_sequences or manifest.train_sequences or manifest.next_id,
        train_sequences_given=bool(controls.train_sequences or manifest.train_sequences),
        group_by=_grouping(controls.group_by, manifest),
    )


def bounded(settings: Settings, total: int) -> Settings:
    """Settings for fewer sequences than they were made for."""
    return replace(settings, k=min(settings.k, total), first=min(settings.first, total),
                   most=min(settings.most, total))


def weights_of(text: str | Mapping[str, float] | None, members: list[str]) -> dict[str, float]:
    """The weight of each model that counts, by the name of the member.

    Raises InputError for a name that isn't one of `members`, and for what is no weight.

    >>> weights_of("last=1, base=-0.5", ["last", "base", "early"])
    {'last': 1.0, 'base': -0.5}
    >>> weights_of(None, ["last", "base"])
    {'last': 0.5, 'base': 0.5}
    """
    if isinstance(text, Mapping):
        text = ",".join(f"{name}={weight}" for name, weight in text.items())
    if text is None:
        return dict.fromkeys(members, 1 / len(members))
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, given, weight = (one.strip() for one in part.partition("="))
        if name not in members:
            raise InputError(f"--members {text!r}: the index has no model {name!r}; it has "
                             f"{', '.join(members)}. Expected some of them with their weights, as "
                             f"in {members[0]}=1.")
        # NaN for what is no number: as it lies in no bounds, it is refused with what is too large
        try:
            number = float(weight) if given else 1.0
        except ValueError:
            number = math.nan
        if name in weights or not 1 / LARGEST_WEIGHT <= abs(number) <= LARGEST_WEIGHT:
            raise InputError(f"--members {text!r}: expected each model once, with a weight other "
                             f"than 0 (in size {1 / LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}), as "
                             f"in {members[0]}=1.")
        weights[name] = number
    return weights


def without_members(settings: Settings, absent: Mapping[str, str]) -> Settings:
    """Settings without models that can't be had, `absent` says why; of the others the mean.

    Raises InputError where one of them was asked for, or no other is left.
    """
    gone = sorted(settings.members.keys() & set(absent))
    if not gone:
        return settings
    rest = {name: weight for name, weight in settings.members.items() if name not in gone}
    if settings.members_given or not rest:
        raise InputError(
            f"the model {gone[0]} of this index can't be loaded: {absent[gone[0]]} "
            "Say where it is with --model "
            f"{gone[0]}=PATH, or leave it out of --members.")
    rest = dict.fromkeys(rest, 1 / len(rest))
    return replace(settings, members=rest, modules=weighted(settings.modules, rest))


def groupings(manifest: Manifest) -> list[str]:
    """What groups of an index can be made by."""
    label = (LABEL,) if manifest.task.name == "classification" else ()
    return list(dict.fromkeys((*GROUPINGS, *label, *manifest.plan.record_fields)))


def _grouping(by: str | None, manifest: Manifest) -> str | None:
    """What groups are made by. Raises InputError for a field that was not kept."""
    known, fields = groupings(manifest), manifest.plan.record_fields
    if by is None or by in known:
        return by
    if by in list(DERIVED):  # of Python it may be anything
        raise InputError(f"--group-by {by}: the index has no such field; build it with --derive "
                         f"{by}." if manifest.task.of_pairs else
                         f"--group-by {by} is of pairs of a chosen and a rejected answer; the "
                         f"index's task is {manifest.task.name}.")
    available = f"kept were {', '.join(fields)}" if fields else \
        "none was kept; build with --keep-fields for more"
    named = [name for name in known if name not in fields]
    raise InputError(f"--group-by {by}: expected {', '.join(named)} or a field that was "
                     f"kept at the build ({available}).")


def _sizes(controls: Controls, total: int) -> tuple[int, int, int, float | None]:
    """k, the lengths that a shortlist begins with and at most grows to, and what ends it."""
    k, shortlist, recall = controls.k, controls.shortlist, controls.recall
    # a k that was asked for is refused where it can't be; one that wasn't shrinks with the index
    if k is not None and not 1 <= k <= total:
        raise InputError(f"-k {k}: expected 1 to {total}, the sequences in the index.")
    k = min(DEFAULT_HITS, total) if k is None else k
    length = max(DEFAULT_SHORTLIST, SHORTLIST_FOR_HIT * k)
    if shortlist == "all":
        length = total
    elif shortlist is not None:
        try:
            length = int(shortlist)
        except ValueError:
            raise InputError(f"--shortlist {shortlist}: expected a number or all.") from None
        if length < k:
            raise InputError(f"--shortlist {length}: expected at least -k, {k}.")
    # a length that was asked for is fixed; and what a TF-IDF list misses is never known
    if recall is None and (shortlist is not None or controls.candidates == "tfidf"
                           or not controls.rescore):
        return k, min(length, total), min(length, total), None
    # together with `recall` it is the limit of how far the shortlist may grow
    most = min(total, length if recall is None or shortlist is not None else GROWTH * length)
    return k, min(most, max(SMALLEST_SHORTLIST, 2 * k)), most, recall or DEFAULT_RECALL


def _check_each(controls: Controls) -> None:
    """Raise InputError for the first control that has a value it can't have."""
    for name, control in CONTROLS.items():
        value, flag = getattr(controls, name), flag_of(name)
        if control.choices and value not in control.choices:
            *others, last = control.choices
            raise InputError(f"{flag} {value}: expected {', '.join(others)} or {last}.")
        # users of Python may give anything; what compares as a number need not be one
        if value is not None and TYPES[name] == int | None and (
                isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"{flag} {value!r}: expected a whole number.")
        if value is not None and control.bounds != UNBOUNDED and not (
                isinstance(value, (int, float)) and control.bounds.hold(value)):
            raise InputError(f"{flag} {value}: expected {control.bounds}.")
