"""What a search may be asked besides its query, checked before any model is loaded."""

import math
from dataclasses import dataclass, replace
from typing import Any

from gradindex.errors import InputError
from gradindex.modules import Module, choose_modules
from gradindex.storage.manifest import Manifest

DEFAULT_HITS = 20
DEFAULT_SHORTLIST = 1000
SMALLEST_SHORTLIST = 100  # where `recall` begins
GROWTH = 10  # with `recall`, the shortlist may grow to this many times its default
NORMALIZATIONS = ("none", "cosine", "relatif")
CANDIDATES = ("code", "tfidf", "both")
GROUPINGS = ("document", "source")  # besides the fields that were kept


@dataclass(frozen=True)
class Controls:
    """How to search. Everything here is chosen at query time; the index stays as it is.

    k: hits [min(20, N)]. shortlist: sequences to rescore exactly, or "all" [min(N, max(1000,
    10 k))]. recall: grow the shortlist from 100 until the statement says this much, at most to
    `shortlist` [then ten times its default]. opponents: the most negative influence.
    damping: λ as a factor of mean(Λ) [the build's]. modules: as for `choose_modules`, such as
    "8-15", "attention" or a regular expression [all that are indexed].
    normalize: rank by influence ("none"), by influence / (‖q̃‖ ‖m̃‖) ("cosine") or by θ-RelatIF
    ("relatif"). candidates: who is rescored: the best by "code", by "tfidf", or "both" (a TF-IDF
    list, as long as the shortlist by code begins, on top of it). rescore: False ranks by code
    alone. time_limit: stop rescoring a query after so many seconds.
    rank: of the preconditioned gradients of many queries [exact while they fit in 2 GiB, else
    32]. train_sequences: N_train, which only scales `nats`.
    group_by: also total influence by "document", "source", or a field that was kept at the build.
    """

    k: int | None = None
    shortlist: int | str | None = None
    recall: float | None = None
    opponents: bool = False
    damping: float | None = None
    modules: str | None = None
    normalize: str = "none"
    candidates: str = "code"
    rescore: bool = True
    time_limit: float | None = None
    rank: int | None = None
    train_sequences: int | None = None
    group_by: str | None = None


@dataclass(frozen=True)
class Settings:
    """What Controls mean for one index; `first` and `most` bound the shortlist's length."""

    k: int
    first: int
    most: int
    recall: float | None
    sign: float
    damping: float
    modules: list[Module]
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
            "modules": [module.name for module in self.modules], "normalize": self.normalize,
            "candidates": self.candidates, "rescore": self.rescore, "rank": self.rank,
            "train_sequences": self.train_sequences, "group_by": self.group_by,
            "time_limit": None if math.isinf(self.time_limit) else self.time_limit,
        }


def settle(controls: Controls, index: Manifest) -> Settings:
    """Controls with the index's defaults put in. Raises InputError for what can't be."""
    _whole(k=controls.k, rank=controls.rank, train_sequences=controls.train_sequences)
    _above_zero(damping=controls.damping, time_limit=controls.time_limit, rank=controls.rank,
                train_sequences=controls.train_sequences)
    _one_of("normalize", controls.normalize, NORMALIZATIONS)
    _one_of("candidates", controls.candidates, CANDIDATES)
    if controls.recall is not None and not (
            isinstance(controls.recall, (int, float)) and 0 < controls.recall <= 1):
        raise InputError(f"--recall {controls.recall}: expected a share above 0, at most 1.")
    if controls.recall is not None and controls.candidates == "tfidf":
        raise InputError("--recall needs --candidates code or both: what a TF-IDF list misses is "
                         "unknown.")
    if not controls.rescore and (controls.recall is not None or controls.candidates != "code"
                                 or controls.normalize == "relatif"):
        raise InputError("--no-rescore ranks by code alone: it can't go with --recall, "
                         "--candidates tfidf or both, or --normalize relatif.")
    if not index.sequences:
        raise InputError("the index holds no sequence any more: all were deleted. Append documents "
                         "with `gradindex append`.")
    k, first, most = _sizes(controls, index.sequences)
    return Settings(
        k=k, first=first, most=most, recall=controls.recall,
        sign=-1.0 if controls.opponents else 1.0, damping=controls.damping or index.damping,
        modules=index.modules if controls.modules is None else choose_modules(
            index.modules, controls.modules, "the indexed modules"),
        normalize=controls.normalize,
        candidates=controls.candidates, rescore=controls.rescore,
        time_limit=controls.time_limit or math.inf, rank=controls.rank,
        train_sequences=controls.train_sequences or index.train_sequences or index.next_id,
        train_sequences_given=bool(controls.train_sequences or index.train_sequences),
        group_by=_grouping(controls.group_by, index.plan.keep_fields),
    )


def bounded(settings: Settings, total: int) -> Settings:
    """Settings for fewer sequences than they were made for."""
    return replace(settings, k=min(settings.k, total), first=min(settings.first, total),
                   most=min(settings.most, total))


def _grouping(asked: str | None, kept: tuple[str, ...]) -> str | None:
    """What groups are made by. Raises InputError for a field that was not kept."""
    known = [*GROUPINGS, *kept]
    if asked is None or asked in known:
        return asked
    fields = f"kept were {', '.join(kept)}" if kept else \
        "none was kept; build with --keep-fields for more"
    raise InputError(f"--group-by {asked}: expected {', '.join(GROUPINGS)} or a field that was "
                     f"kept at the build ({fields}).")


def _sizes(controls: Controls, total: int) -> tuple[int, int, int]:
    """k, and the lengths that a shortlist begins with and at most grows to."""
    k, shortlist = controls.k, controls.shortlist
    if k is not None and not 1 <= k <= total:
        raise InputError(f"-k {k}: expected 1 to {total}, the sequences in the index.")
    k = min(DEFAULT_HITS, total) if k is None else k
    length = max(DEFAULT_SHORTLIST, 10 * k)
    if shortlist == "all":
        length = total
    elif shortlist is not None:
        try:
            length = int(shortlist)
        except ValueError:
            raise InputError(f"--shortlist {shortlist}: expected a number or all.") from None
        if length < k:
            raise InputError(f"--shortlist {length}: expected at least -k, {k}.")
    if controls.recall is None:
        return k, min(length, total), min(length, total)
    most = min(total, length if shortlist is not None else GROWTH * length)
    return k, min(most, max(SMALLEST_SHORTLIST, 2 * k)), most


def _whole(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"--{name.replace('_', '-')} {value!r}: expected a whole number.")


def _above_zero(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")


def _one_of(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise InputError(f"--{name} {value}: expected {', '.join(expected[:-1])} or "
                         f"{expected[-1]}.")
