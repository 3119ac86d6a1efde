"""How many bits a code should have: K, for the sequences and the signal that an index has.

In cosines, a code's score is the exact influence plus Gaussian noise of sd c / √K. How much of the
true top ten stands out from it depends on how far the best cosines lie above the bulk, which the
exact scores of some sequences tell (`calibrate.py`): a Student t is fitted to those of each query,
of one number of degrees of freedom for all, and its upper quantiles stand for the best of N. What a
bit costs is a byte in eight; what it saves is sequences to be scored exactly, a pass each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from gradindex.errors import InputError
from gradindex.influence.codes import CodeSettings
from gradindex.modules import Module
from gradindex.progress import size
from gradindex.storage.layout import code_bytes

FEWEST, MOST = 1 << 14, 1 << 20  # bits
FREELY = 64 << 10  # bytes a sequence that may be spent however small the curvature is
TOP, FIRST = 10, 100  # the share of the true top ten among the first 100 that are scored exactly
WANTED = 0.9  # of it
GAIN = 0.02  # less than this is no reason for more bits
TYPICAL_C = 1.3  # of a code's error; what it is in an index is measured when that has codes
# degrees of freedom that are tried; with the map to a vocabulary the tail is about a Cauchy's
FREEDOM = (1.0, 1.2, 1.5, 1.8, 2.2, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0)
GRID = np.concatenate([np.logspace(-9, -2, 400, endpoint=False), np.linspace(0.01, 0.5, 400)])


@dataclass(frozen=True)
class Spread:
    """How the exact cosines of all sequences with a query are spread: a Student t."""

    center: float
    scale: float
    freedom: float

    def quantiles(self, upper: np.ndarray) -> np.ndarray:
        """The cosines above which a share of the sequences lies: of each share in `upper`."""
        return np.asarray(stats.t.isf(upper, self.freedom, self.center, self.scale))


def spreads(cosines: np.ndarray) -> list[Spread]:
    """A spread for each query that has one, from cosines [q, s] of a sample; NaN is left out."""
    known = [row[np.isfinite(row)] for row in cosines]
    known = [row for row in known if len(row) > 2 and np.ptp(row) > 0]
    if not known:
        return []

    def fits(freedom: float) -> tuple[float, list[Spread]]:
        found = [_fitted(row, freedom) for row in known]
        return sum(float(stats.t.logpdf(row, freedom, one.center, one.scale).sum())
                   for row, one in zip(known, found, strict=True)), found

    # one for all: a few dozen cosines of one query say little of how heavy its tail is
    return max(map(fits, FREEDOM), key=lambda fit: fit[0])[1]


def _fitted(cosines: np.ndarray, freedom: float) -> Spread:
    _, center, scale = stats.t.fit(cosines, fdf=freedom)
    return Spread(float(center), float(scale), freedom)


def expected_share(spread: Spread, count: int, bits: int, c: float = TYPICAL_C) -> float:
    """Which share of a query's true top TOP is among the FIRST by code, of `count` sequences.

    Without noise all of it is; where the noise drowns everything, chance has its share:

    >>> narrow, wide = Spread(0.0, 1e-6, 4.0), Spread(0.0, 1.0, 4.0)
    >>> round(expected_share(wide, 10_000, 1 << 20), 2)
    1.0
    >>> round(expected_share(narrow, 10_000, 1 << 14), 2)
    0.01
    """
    if count <= FIRST:
        return 1.0
    noise = c / bits**0.5
    # all sequences by their quantiles, closest where the best and the worst are
    upper = np.concatenate([GRID, 1 - GRID[-2::-1]])
    edges = np.concatenate([[0.0], (upper[1:] + upper[:-1]) / 2, [1.0]])
    values, weights = spread.quantiles(upper), np.diff(edges)

    def above(cutoff: float) -> float:
        return float(weights @ special.ndtr((values - cutoff) / noise))

    low, high = values.min() - 10 * noise, values.max() + 10 * noise
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) * count > FIRST else (low, middle)
    top = spread.quantiles((np.arange(min(TOP, count)) + 0.5) / count)
    return float(special.ndtr((top - low) / noise).mean())


def mean_share(found: list[Spread], count: int, bits: int) -> float:
    """The mean of `expected_share` over queries; 1 where nothing tells them apart."""
    return float(np.mean([expected_share(spread, count, bits) for spread in found] or [1.0]))


def choose_bits(
    found: list[Spread], count: int, curvature_bytes: int, modules: Sequence[Module]
) -> int:
    """The fewest bits with which the share is as wanted, or as good as with the most allowed.

    Allowed are codes of FREELY bytes a sequence, or that take no more than the curvature; and no
    more bits than the modules fill.
    """
    allowed = [bits for bits in allowed_bits(count, curvature_bytes) if bits <= fill(modules, bits)]
    if not allowed:  # narrow maps, or an adapter's alone
        return longest(modules, FEWEST)
    shares = [mean_share(found, count, bits) for bits in allowed]
    enough = min(WANTED, max(shares) - GAIN)
    return next(bits for bits, share in zip(allowed, shares, strict=True) if share >= enough)


def allowed_bits(count: int, curvature_bytes: int) -> Iterator[int]:
    """The lengths that may be chosen for `count` sequences, ascending: powers of two.

    >>> [*allowed_bits(1000, 0)][0], [*allowed_bits(1000, 0)][-1]
    (16384, 524288)
    """
    bits = FEWEST
    while bits <= MOST and (code_bytes(bits) <= FREELY + code_bytes(0) or
                            count * code_bytes(bits) <= curvature_bytes):
        yield bits
        bits *= 2


def fill(modules: Sequence[Module], bits: int) -> int:
    """How many of K = `bits` the tracked maps have something for, at the least.

    >>> fill([Module("a", 0, "adapter", d_out=8, d_in=64, bias=False)], 1 << 14)
    512
    """
    return min(bits, CodeSettings.of(bits, modules, 0, 0.1).filled(modules))


def check_bits(asked: int | None, modules: Sequence[Module]) -> None:
    """Raise InputError where more bits are asked for than the tracked maps can fill."""
    if asked is not None and (filled := fill(modules, asked)) < asked:
        raise InputError(
            f"--bits {asked:,}: the tracked maps give a code no more than {filled:,} numbers, and "
            "bits without one are alike in all codes, which makes scores wrong. Use --bits "
            f"{longest(modules, asked)} or fewer, or more --modules")


def longest(modules: Sequence[Module], bits: int) -> int:
    """The longest code of no more than so many bits that the tracked maps fill.

    >>> longest([Module("a", 0, "adapter", d_out=8, d_in=65, bias=False)], 1 << 14)
    512
    """
    # again, for fewer bits have a smaller k, which may give fewer numbers
    while bits > 64 and (filled := fill(modules, bits)) < bits:
        bits = max(64, filled // 64 * 64)
    return bits


def describe(found: list[Spread], count: int, bits: int, task: str) -> str:
    """What codes of K, 2 K and 4 K bits are expected to find, and what they take: a line."""
    asked = "half a sequence; of short ones fewer" if task == "causal" else "the data's own rows"
    return f"codes: {shares_of(found, count, bits)} (by queries of {asked})"


def shares_of(found: list[Spread], count: int, bits: int) -> str:
    """The same, without a word before."""
    parts = [f"{length:,} bits ({size(count * code_bytes(length))}) {share:.0%}"
             for length in (bits, 2 * bits, 4 * bits)
             for share in [mean_share(found, count, length)]]
    return (f"of the true top {TOP}, expected among the {FIRST} scored exactly first: "
            + ", ".join(parts))


Say = Callable[[str], object]


def settle_bits(
    asked: int | None, cosines: np.ndarray, count: int, curvature_bytes: int,
    modules: Sequence[Module], task: str, say: Say,
) -> int:
    """K, as asked for or chosen, said with what it is expected to find.

    `cosines` [q, s] are exact ones of a sample, `count` the sequences to be encoded.
    """
    found = spreads(cosines)
    wanted = asked or choose_bits(found, count, curvature_bytes, modules)
    # of the tracked maps some may have turned out to have no gradient
    bits = longest(modules, wanted)
    if bits < wanted:
        say(f"warning: codes get {bits:,} bits: the maps that have a gradient fill no more")
    say(describe(found, count, bits, task))
    share = mean_share(found, count, bits)
    if share < WANTED and asked is None:
        say(f"more bits would cost more than they find here: the gradients of this data have "
            f"little in common, so expect to score more than {FIRST} exactly")
    return bits
