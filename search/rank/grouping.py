"""Which sequences belong to which document, source or value of a field, and how their codes err.

The errors of like sequences are alike, being those of one random projection, so the variance of a
sum is not Σ σ_m². It is that of one code, of the summed vector: proportional to ‖Σ a_m x̂_m‖² where
each counts a_m times, x̂_m being what the code stands for. The ratio of the two, a group's
`spread`, belongs to the index.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradindex import draws
from gradindex.draws import Stream
from gradindex.storage import layout
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.records import Part, Record
from gradindex.task import LENGTH_DIFFERENCE
from search.ask.settings import LABEL

COORDINATES = 2048  # of the K, for spreads: standard errors are then right to 2 %
UNPACKED = 1024  # codes held unpacked at once
ROUNDING = 1e-12  # of all squares: fewer are what rounding leaves, as of a group that is all
LONGEST = 1 << 31  # tokens that an answer may have


@dataclass
class Grouping:
    """Which sequences belong to which groups, in entries (group, place, share) in that order.

    `values` [G] are what the groups are called; `spread` [G] is each one's ‖Σ share_m x̂_m‖² /
    Σ ‖share_m x̂_m‖²: the variance of its total's error, over what it would be if the errors of its
    sequences were independent. `excess_spread` [G] is the same of its excess, in which a sequence
    counts with its share less f, and every other one with −f; f is the group's part of all shares.
    `whole_spread` is that of the whole index.

    Two groups of three sequences, the second of which belongs to both by halves:

    >>> grouping = Grouping(["a", "b"], np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2]),
    ...                     np.array([1.0, 0.5, 0.5, 1.0]), np.ones(2), np.ones(2), 1.0)
    >>> grouping.total(np.array([10.0, 4.0, 1.0])).tolist()
    [12.0, 3.0]
    """

    values: list[Any]
    group: np.ndarray
    place: np.ndarray
    share: np.ndarray
    spread: np.ndarray
    excess_spread: np.ndarray
    whole_spread: float

    def total(self, values: np.ndarray, power: int = 1) -> np.ndarray:
        """Σ share^power · value of every group, for values of every place [N]: float64 [G].

        Variances are summed with a power of 2; with a power of 0 sequences are counted whole.
        """
        return self._sum(self.share**power * values[self.place])

    def parts(self, total: int) -> np.ndarray:
        """f, the part that every group has of all shares, of `total` sequences: float64 [G]."""
        return np.asarray(self._sum(self.share) / max(1, total))

    def excess_of_squares(self, values: np.ndarray, others: bool = True) -> np.ndarray:
        """Σ (share − f)² · value of every group, for values of every place [N]: float64 [G].

        The sum is over all places, or without the `others` over the group's own.
        """
        f = self.parts(len(values))
        own = self._sum((self.share - f[self.group]) ** 2 * values[self.place])
        if not others:
            return own
        return np.asarray(own + f**2 * np.maximum(values.sum() - self.total(values, power=0), 0.0))

    def _sum(self, entries: np.ndarray) -> np.ndarray:
        return np.asarray(np.bincount(self.group, entries, minlength=len(self.values)))


def read_grouping(contents: Contents, codes: Sequence[CodeIndex], by: str) -> Grouping:
    """Read which group each live sequence belongs to.

    `by` is document, source, a kept or derived field, or of a classifier label, a row's class. A
    packed sequence belongs to the group of each of its documents by its share of the tokens.
    Reads every record once and a part of every code twice: about 6 CPU seconds per 100,000
    sequences of 80 tokens, and 256 bytes of memory a sequence meanwhile. Raises DamagedIndexError.
    """
    plan = contents.manifest.plan
    labels = plan.labels if by == LABEL and by not in plan.record_fields else None
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
                key, value = _identity(part, by) if labels is None else \
                    (str(record.label), None if record.label is None else labels[record.label])
                number = numbers.setdefault(key, len(values))
                if number == len(values):
                    values.append(value)
                shares[number] = shares.get(number, 0.0) + share
            of_segment += [(number, place, share) for number, share in shares.items()]
        entries.append(np.array(of_segment, dtype=np.float64).reshape(-1, 3).T)
    made = np.concatenate(entries, axis=1)
    if by == LENGTH_DIFFERENCE and by in plan.derive:
        if any(type(value) is not int or abs(value) > LONGEST for value in values):
            raise contents.files.damaged(layout.MANIFEST, f"says that records have {by}, which "
                                         "some have not, or as no number of tokens")
        values, made[0] = in_quarters(values, made[0].astype(np.int64))
    signs, steps = chosen_signs(codes, contents.manifest.code["length"])
    return make_grouping(values, made, signs[contents.places], steps[contents.places])


def in_quarters(values: list[int], numbers: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Groups of a number each, joined to four of about as many sequences, by the number's size.

    `values` [G] are the numbers, `numbers` [n] the group of every sequence; returned are the names
    of the quarters and the quarter of every sequence. Equal numbers stay together: it is cut where
    numbers differ, nearest to each quarter, so that one may be larger than others, or not be there.

    >>> names, quarters = in_quarters([-7, 3, 12, 0], np.array([0, 1, 2, 1, 3, 0, 2, 2]))
    >>> names, quarters.tolist()
    (['-7', '0', '3', '12'], [0, 2, 3, 2, 1, 0, 3, 3])
    """
    of_rows = np.array(values)[numbers]
    found, counts = np.unique(of_rows, return_counts=True)
    below = np.cumsum(counts)[:-1]  # sequences up to each place where it may be cut
    cuts = {int(np.abs(below - share * len(of_rows)).argmin())
            for share in (0.25, 0.5, 0.75) if len(below)}
    quarters = np.searchsorted(found[sorted(cuts)], of_rows)  # by the last number of each
    ends = [(int(own.min()), int(own.max())) for own in (
        of_rows[quarters == number] for number in range(int(quarters.max()) + 1))]
    return [str(low) if low == high else f"{low} to {high}" for low, high in ends], quarters


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
    made = Grouping(values, groups, places, shares, np.ones(len(values)), np.ones(len(values)), 1.0)
    squares = 8 * signs.shape[1] * steps.astype(np.float64) ** 2
    whole = np.zeros(8 * signs.shape[1])
    for _, sums in _summed(made, signs, steps):
        whole += sums.sum(0, dtype=np.float64)
    # once more, now that the sum of all is known: ‖Σ share_m x̂_m‖², and its product with that sum
    joined, along = np.zeros((2, len(values)))
    carried, last = np.zeros(1), -1
    for numbers, sums in _summed(made, signs, steps):
        # a group that began before goes on with what it came to by then
        if numbers[0] == last:
            sums[0] += carried
        joined[numbers] = np.einsum("gk,gk->g", sums, sums)  # the last may yet go on
        along[numbers] = sums @ whole
        carried, last = sums[-1], numbers[-1]
    f, in_all = made.parts(len(squares)), float(whole @ whole)
    least = ROUNDING * float(squares.sum())
    made.spread = _ratio(joined, made.total(squares, power=2), least)
    made.excess_spread = _ratio(joined - 2 * f * along + f**2 * in_all,
                                made.excess_of_squares(squares), least)
    made.whole_spread = float(in_all / squares.sum()) if squares.any() else 1.0
    return made


def _summed(
    grouping: Grouping, signs: np.ndarray, steps: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Σ share_m x̂_m by group, of some entries after the others: numbers [g] and sums [g, k].

    Vectors are unpacked a few at a time: all of an index would be 32 times its codes.
    """
    for first in range(0, len(grouping.group), UNPACKED):
        rows = slice(first, first + UNPACKED)
        group, place = grouping.group[rows], grouping.place[rows]
        vectors = np.unpackbits(signs[place], axis=1, bitorder="little").astype(np.float32)
        scales = (steps[place] * grouping.share[rows]).astype(np.float32)
        vectors = (2 * vectors - 1) * scales[:, None]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        yield group[starts], np.add.reduceat(vectors, starts, axis=0)


def _ratio(joined: np.ndarray, apart: np.ndarray, least: float) -> np.ndarray:
    """joined / apart, 1 where there is nothing to compare: no more than `least`."""
    one = np.ones(len(joined))
    return np.asarray(np.divide(np.maximum(joined, 0.0), apart, out=one, where=apart > least))


def chosen_signs(codes: Sequence[CodeIndex], length: int) -> tuple[np.ndarray, np.ndarray]:
    """`some_signs` of all codes of K = `length`, at COORDINATES chosen at random once for all."""
    order = draws.order(Stream.GROUP_COORDINATES, length, length // 8)
    octets = np.sort(order[: COORDINATES // 8])
    signs, steps = zip(*(part.some_signs(octets) for part in codes), strict=True)
    return np.concatenate(signs), np.concatenate(steps)
