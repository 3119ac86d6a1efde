"""How complete is the answer: the estimated share of the true top k that was found.

A code's score is the exact influence plus Gaussian noise of sd σ_m. A sequence with influence s
entered a shortlist with cut-off τ with probability π = 1 − Φ((τ − s)/σ_m), so each rescored hit
stands for 1/π sequences (Horvitz & Thompson 1952): itself and those like it that were left out.

Where sequences are much alike, their codes err together: a query's scores are then all too high or
all too low by a part of σ, and nearer to each other than σ says. What was rescored shows it
(`fit_error`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SMALLEST_PROBABILITY = 1e-4
LARGEST_MARGIN = 100.0  # standard deviations, beyond which nothing changes any more
# What is known of a query's own errors before any is seen, in σ: the sd of their mean, and of the
# logarithm of their sd. The grids are where they are looked for.
SHIFT_SPREAD, FACTOR_SPREAD = 0.4, 0.15
SHIFTS = np.linspace(-3, 3, 25) * SHIFT_SPREAD
FACTORS = np.exp(np.linspace(-4, 4, 25) * FACTOR_SPREAD)
TELLING = 4.0  # σ around the cut-off, within which errors say something of who was left out


@dataclass(frozen=True)
class CodeError:
    """How one query's codes err, in units of the σ_m expected: N(`shift`, `factor`²)."""

    shift: float = 0.0
    factor: float = 1.0


AS_EXPECTED = CodeError()


def fit_error(margin: np.ndarray, errors: np.ndarray, sample: np.ndarray) -> CodeError:
    """A query's own error: the mean over what its exact scores leave likely.

    `errors` [n] are (code − exact)/σ of sequences that their code let in, `margin` [n] their
    (s − τ)/σ; `sample` [m] are the errors of sequences that were rescored whatever their code.

    Nobody seen is as expected; a sample that errs by half a σ upwards, all alike, is believed
    nearly:

    >>> error = fit_error(np.zeros(0), np.zeros(0), np.zeros(0))
    >>> round(abs(error.shift), 9), round(error.factor, 9)
    (0.0, 1.0)
    >>> error = fit_error(np.zeros(0), np.zeros(0), np.full(64, 0.5))
    >>> round(error.shift, 2), round(error.factor, 2)
    (0.49, 0.55)
    """
    near = np.abs(margin) <= TELLING
    z, m, free = (torch.from_numpy(np.asarray(part, np.float64))
                  for part in (errors[near], margin[near], sample))
    shift, factor = torch.from_numpy(SHIFTS)[:, None, None], torch.from_numpy(FACTORS)[:, None]
    # those let in have a normal truncated where their code would have kept them out
    likely = (-((z - shift) / factor).square() / 2 - factor.log()
              - torch.special.log_ndtr((m + shift) / factor)).sum(-1)
    likely += (-((free - shift) / factor).square() / 2 - factor.log()).sum(-1)
    shift, factor = shift[..., 0], factor[:, 0]
    likely -= (shift / SHIFT_SPREAD).square() / 2 + (factor.log() / FACTOR_SPREAD).square() / 2
    weight = (likely - likely.max()).exp()
    weight /= weight.sum()
    return CodeError(float((weight * shift).sum()), float((weight * factor.log()).sum().exp()))


def inclusion_probability(
    influence: np.ndarray, error: np.ndarray, cutoff: float | None, own: CodeError = AS_EXPECTED
) -> np.ndarray:
    """π [n] of sequences with exact `influence` [n] and code error sd `error` [n].

    `cutoff` is the code score of the best sequence left out; with None nothing was and π = 1. `own`
    is how the query's codes err.

    A sequence whose influence is the cut-off had one chance in two; one that is a standard
    deviation above it had 84 in 100, one without an error had to come in:

    >>> influence, error = np.array([5.0, 7.0, 7.0]), np.array([2.0, 2.0, 0.0])
    >>> inclusion_probability(influence, error, 5.0).round(3).tolist()
    [0.5, 0.841, 1.0]
    """
    if cutoff is None:
        return np.ones(len(influence))
    z = torch.from_numpy((margin(influence, error, cutoff) + own.shift) / own.factor)
    # bounded below: a hit that came in against all odds would stand for millions
    return np.asarray(np.maximum(torch.special.ndtr(z).numpy(), SMALLEST_PROBABILITY))


def included_error(
    influence: np.ndarray, error: np.ndarray, cutoff: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """What the code's error was on average, over σ, where it let a sequence in: λ(z) [n].

    λ(z) = φ(z)/Φ(z), z = (s − τ)/σ: the mean of a normal truncated from below. s + σ λ is the
    conditional expectation of the code's score; second comes the share of σ² that is its own
    variance, λ (λ + z) [n]. Arguments as for `inclusion_probability`; with no cut-off both are 0.

    At the cut-off only codes that erred upwards came in, by 0.8 σ on average; far above it a code
    comes in whatever its error, which says nothing of it:

    >>> influence, error = np.array([5.0, 25.0]), np.array([2.0, 2.0])
    >>> mean, variance = included_error(influence, error, 5.0)
    >>> mean.round(3).tolist(), variance.round(3).tolist()
    ([0.798, 0.0], [0.637, 0.0])
    """
    if cutoff is None:
        return np.zeros(len(influence)), np.zeros(len(influence))
    z = torch.from_numpy(np.clip(margin(influence, error, cutoff), -LARGEST_MARGIN,
                                 LARGEST_MARGIN))
    # in logarithms: far below the cut-off φ and Φ are both 0 in float64, and their ratio isn't
    density = -z.square() / 2 - math.log(2 * math.pi) / 2
    mean = torch.exp(density - torch.special.log_ndtr(z))
    return mean.numpy(), (mean * (mean + z)).numpy()


def margin(influence: np.ndarray, error: np.ndarray, cutoff: float) -> np.ndarray:
    """z = (s − τ)/σ: float64 [n], infinite where there is no error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(error > 0, (influence - cutoff) / error,
                                   np.where(influence > cutoff, np.inf, -np.inf)), np.float64)


def estimated_recall(
    probabilities: Sequence[float] | np.ndarray, k: int
) -> tuple[float, float]:
    """Share of the true top k held by the top k found, from π in order of exact influence.

    The hits before the running sum of 1/π passes k, plus the fraction of the next that fits.
    Second comes its standard error: that of the number left out, Σ (1 − π)/π², over k.
    True on average where π changes slowly with rank; for k = 1 and a low recall it is cautious
    (claims .58 where .62 is true, in simulation).

    Two hits that were certain and two that had one chance in two stand for six sequences. Of a top
    4 they hold three: the two, and one of those that the third stands for:

    >>> estimate, error = estimated_recall([1.0, 1.0, 0.5, 0.5], 4)
    >>> estimate, round(error, 2)
    (0.75, 0.35)
    >>> estimated_recall([1.0, 1.0, 1.0, 1.0], 4)
    (1.0, 0.0)
    """
    represented = variance = 0.0
    for hits, probability in enumerate(probabilities):
        weight = 1 / probability
        # of the last only as much counts as is missing to k
        part = min(1.0, (k - represented) / weight)
        variance += part * (1 - probability) * weight**2
        if part < 1:
            return float((hits + part) / k), float(variance**0.5 / k)
        represented += weight
    return len(probabilities) / k, float(variance**0.5 / k)


def expected_recall(
    probabilities: Sequence[float] | np.ndarray, later: Sequence[float] | np.ndarray, k: int
) -> float:
    """The recall to expect at another cut-off, where the same sequences' π would be `later`.

    Each hit stands for 1/π sequences, of which the other cut-off would let in a share of its own π.

    The third and its like had one chance in two, and would have nine in ten:

    >>> round(expected_recall([1.0, 1.0, 0.5], [1.0, 1.0, 0.9], 4), 3)
    0.95
    """
    represented = included = 0.0
    for now, then in zip(probabilities, later, strict=True):
        weight = min(1 / now, k - represented)
        represented += weight
        included += weight * then
        if represented >= k:
            break
    return float(included / k)
