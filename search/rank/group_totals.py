"""Influence by document, source or kept field: each group's total over the whole index.

A total is Σ_m share_m · Î_m over every live sequence, share_m being the share of the sequence's
tokens that belongs to the group (1 unless documents are packed). Î_m is the code's score, which has
no bias, but for the rescored: what is known of them replaces it without making the total biased.
A sequence that was to be rescored whatever its code (the random sample, a TF-IDF list) counts with
its exact influence I. One that its code let into the shortlist counts with I + E[error | it was
let in]: putting in I alone would take off the codes that erred upwards and leave those that erred
downwards. That is the conditional expectation of the code's score (Rao & Blackwell), so the total
stays unbiased and its variance can only fall.

The errors of like sequences are alike, being those of one random projection, so the variance of a
sum is not Σ σ_m². It is that of one code, of the summed vector: proportional to ‖Σ share_m x̂_m‖²,
x̂_m being what the code stands for. The ratio of the two, a group's `spread`, belongs to the index.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradindex import draws
from gradindex.draws import Stream
from gradindex.results import UNSURE, Group
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.records import Part, Record
from search.rank.ranking import best

GROUPS_KEPT = 100  # kept in a result, besides those with a hit
COORDINATES = 2048  # of the K, for spreads: standard errors are then right to 2 %
UNPACKED = 1024  # codes held unpacked at once


@dataclass
class Grouping:
    """Which sequences belong to which groups, in entries (group, place, share) in that order.

    `values` [G] are what the groups are called; `spread` [G] is each one's ‖Σ share_m x̂_m‖² /
    Σ ‖share_m x̂_m‖²: the variance of its total's error, over what it would be if the errors of its
    sequences were independent. `whole_spread` is that of the whole index.

    Two groups of three sequences, the second of which belongs to both by halves:

    >>> grouping = Grouping(["a", "b"], np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2]),
    ...                     np.array([1.0, 0.5, 0.5, 1.0]), np.ones(2), 1.0)
    >>> grouping.total(np.array([10.0, 4.0, 1.0])).tolist()
    [12.0, 3.0]
    """

    values: list[Any]
    group: np.ndarray
    place: np.ndarray
    share: np.ndarray
    spread: np.ndarray
    whole_spread: float

    def total(self, values: np.ndarray, power: int = 1) -> np.ndarray:
        """Σ share^power · value of every group, for values of every place [N]: float64 [G].

        Variances are summed with a power of 2.
        """
        weights = self.share**power * values[self.place]
        return np.bincount(self.group, weights, minlength=len(self.values))


def read_grouping(contents: Contents, codes: Sequence[CodeIndex], by: str) -> Grouping:
    """Read which group each live sequence belongs to: `by` document, source or a kept field.

    A packed sequence belongs to the group of each of its documents by its share of the tokens.
    Reads every record and a part of every code once: about 5 CPU seconds per 100,000 sequences of
    80 tokens, and 256 bytes of memory a sequence meanwhile. Raises DamagedIndexError.
    """
    numbers: dict[str, int] = {}  # of groups, by what tells them apart
    values: list[Any] = []
    entries = [np.zeros((3, 0))]
    # a segment at a time: its records are read in order, and held no longer than needed
    for start, end in zip(contents.starts[:-1], contents.starts[1:], strict=True):
        of_segment: list[tuple[int, int, float]] = []
        first, last = np.searchsorted(contents.places, [start, end])
        for place, record in enumerate(contents.records(contents.places[first:last]), int(first)):
            shares: dict[int, float] = {}
            for part, share in _shares(record):
                key, value = _identity(part, by)
                number = numbers.setdefault(key, len(values))
                if number == len(values):
                    values.append(value)
                shares[number] = shares.get(number, 0.0) + share
            of_segment += [(number, place, share) for number, share in shares.items()]
        entries.append(np.array(of_segment, dtype=np.float64).reshape(-1, 3).T)
    signs, steps = chosen_signs(codes, contents.manifest.code["length"])
    return make_grouping(values, np.concatenate(entries, axis=1), signs[contents.places],
                         steps[contents.places])


def _shares(record: Record) -> list[tuple[Part, float]]:
    """The parts of a sequence, each with its share of the tokens."""
    starts = [part.token for part in record.parts]
    ends = [*starts[1:], len(record.tokens)]
    return [(part, (end - start) / len(record.tokens))
            for part, start, end in zip(record.parts, starts, ends, strict=True)]


def _identity(part: Part, by: str) -> tuple[str, Any]:
    """What tells a part's group from others, and what the group is called."""
    # a document's name may be another's too: ids are the user's, and rows are of files of one name
    if by == "document":
        name = f"{part.source}:{part.row}" if part.user_id is None else part.user_id
        return str(part.document), name
    value = part.source if by == "source" else part.fields.get(by)
    # as JSON, 1, true and "1" are told apart, and lists can be keys
    return json.dumps(value, sort_keys=True), value


def make_grouping(
    values: list[Any], entries: np.ndarray, signs: np.ndarray, steps: np.ndarray
) -> Grouping:
    """A grouping from its entries (number of the group, place, share) [3, E], every place in one.

    `signs` [N, octets] (8 coordinates each) and `steps` [N] are those of every place.

    Two equal codes and their opposite. In the group of the two equal ones errors add up, so the
    variance is twice that of independent ones; over all three the third takes off the second's:

    >>> entries = np.array([[0, 0, 1], [0, 1, 2], [1, 1, 1]], dtype=float)
    >>> signs = np.array([[0b00001111], [0b00001111], [0b11110000]], dtype=np.uint8)
    >>> grouping = make_grouping(["equal", "opposite"], entries, signs, np.ones(3))
    >>> grouping.spread.tolist(), round(grouping.whole_spread, 3)
    ([2.0, 1.0], 0.333)
    """
    entries = entries[:, np.lexsort((entries[1], entries[0]))]
    (groups, places), shares = entries[:2].astype(np.int64), entries[2]
    joined, squares = np.zeros(len(values)), 8 * signs.shape[1] * steps.astype(np.float64) ** 2
    whole = carried = np.zeros(1)
    # vectors are unpacked a few at a time: all of an index would be 32 times its codes
    for first in range(0, len(groups), UNPACKED):
        rows = slice(first, first + UNPACKED)
        group, place = groups[rows], places[rows]
        vectors = np.unpackbits(signs[place], axis=1, bitorder="little").astype(np.float32)
        vectors = (2 * vectors - 1) * (steps[place] * shares[rows]).astype(np.float32)[:, None]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        sums = np.add.reduceat(vectors, starts, axis=0)
        whole = whole + sums.sum(0, dtype=np.float64)
        # a group that began before goes on with what it came to by then
        if first and group[0] == groups[first - 1]:
            sums[0] += carried
        joined[group[starts]] = np.einsum("gk,gk->g", sums, sums)  # the last may yet go on
        carried = sums[-1]
    apart = np.bincount(groups, shares**2 * squares[places], minlength=len(values))
    return Grouping(
        values, groups, places, shares,
        np.divide(joined, apart, out=np.ones(len(values)), where=apart > 0),
        float(whole @ whole / squares.sum()) if squares.any() else 1.0)


def chosen_signs(codes: Sequence[CodeIndex], length: int) -> tuple[np.ndarray, np.ndarray]:
    """`some_signs` of all codes of K = `length`, at COORDINATES chosen at random once for all."""
    order = draws.order(Stream.GROUP_COORDINATES, length, length // 8)
    octets = np.sort(order[: COORDINATES // 8])
    signs, steps = zip(*(part.some_signs(octets) for part in codes), strict=True)
    return np.concatenate(signs), np.concatenate(steps)


def total_groups(
    grouping: Grouping, estimate: np.ndarray, variance: np.ndarray, sign: float,
    hits: dict[int, int], nats: Callable[[float], tuple[float | None, str | None]],
) -> tuple[list[Group], Group]:
    """The groups of a result, those with a hit and the GROUPS_KEPT best, and the whole index.

    `estimate` and `variance` [N] are those of `Shortlist.estimates`, times the sign; `hits` are the
    places of the result's hits by id, in order; `nats` is what an influence is in nats, or the
    words for none.
    """
    totals = sign * grouping.total(estimate)
    errors = np.sqrt(grouping.spread * grouping.total(variance, power=2))
    sequences = np.bincount(grouping.group, minlength=len(totals))
    hits_of: dict[int, list[int]] = {}
    for hit, place in hits.items():
        for group in grouping.group[grouping.place == place].tolist():
            hits_of.setdefault(group, []).append(hit)
    # among proponents a group that takes away is worth seeing too, so by size; opponents by sign
    sizes = -totals if sign < 0 else np.abs(totals)
    # by what is certain of it: by size alone those with the largest errors would come first
    order = best(sizes - UNSURE * errors, len(totals)).tolist()
    groups = [
        Group(grouping.values[number], int(sequences[number]), hits_of.get(number, []),
              float(totals[number]), float(errors[number]),
              *nats(float(totals[number])))
        for rank, number in enumerate(order) if rank < GROUPS_KEPT or number in hits_of
    ]
    whole = sign * float(estimate.sum())
    return groups, Group(None, len(estimate), list(hits), whole,
                         float(np.sqrt(grouping.whole_spread * variance.sum())),
                         *nats(whole))
