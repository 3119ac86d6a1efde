"""How complete is the answer: the estimated share of the true top k that was found.

A code's score is the exact influence plus Gaussian noise of sd σ_m. A sequence with influence s
entered a shortlist with cut-off τ with probability π = 1 − Φ((τ − s)/σ_m), so each rescored hit
stands for 1/π sequences (Horvitz & Thompson 1952): itself and those like it that were left out.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

SMALLEST_PROBABILITY = 1e-4
LARGEST_MARGIN = 100.0  # standard deviations, beyond which nothing changes any more


def inclusion_probability(
    influence: np.ndarray, error: np.ndarray, cutoff: float | None
) -> np.ndarray:
    """π [n] of sequences with exact `influence` [n] and code error sd `error` [n].

    `cutoff` is the code score of the best sequence left out; with None nothing was and π = 1.
    """
    if cutoff is None:
        return np.ones(len(influence))
    z = torch.from_numpy(_margin(influence, error, cutoff))
    return np.asarray(np.maximum(torch.special.ndtr(z).numpy(), SMALLEST_PROBABILITY))


def included_error(
    influence: np.ndarray, error: np.ndarray, cutoff: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """What the code's error was on average, over σ, where it let a sequence in: λ(z) [n].

    λ(z) = φ(z)/Φ(z), z = (s − τ)/σ: the mean of a normal truncated from below. s + σ λ is the
    conditional expectation of the code's score; second comes the share of σ² that is its own
    variance, λ (λ + z) [n]. Arguments as for `inclusion_probability`; with no cut-off both are 0.
    """
    if cutoff is None:
        return np.zeros(len(influence)), np.zeros(len(influence))
    z = torch.from_numpy(np.clip(_margin(influence, error, cutoff), -LARGEST_MARGIN,
                                 LARGEST_MARGIN))
    density = -z.square() / 2 - math.log(2 * math.pi) / 2
    mean = torch.exp(density - torch.special.log_ndtr(z))
    return mean.numpy(), (mean * (mean + z)).numpy()


def _margin(influence: np.ndarray, error: np.ndarray, cutoff: float) -> np.ndarray:
    """z = (s − τ)/σ: float64 [n], infinite where there is no error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(error > 0, (influence - cutoff) / error,
                                   np.where(influence > cutoff, np.inf, -np.inf)), np.float64)


def estimated_recall(probabilities: Sequence[float] | np.ndarray, k: int) -> float:
    """Share of the true top k held by the top k found, from π in order of exact influence.

    The hits before the running sum of 1/π passes k, plus the fraction of the next that fits.
    True on average where π changes slowly with rank; for k = 1 and a low recall it is cautious
    (claims .58 where .62 is true, in simulation).
    """
    represented = 0.0
    for hits, probability in enumerate(probabilities):
        weight = 1 / probability
        if represented + weight > k:
            return float((hits + (k - represented) / weight) / k)
        represented += weight
    return len(probabilities) / k


def expected_recall(
    probabilities: Sequence[float] | np.ndarray, later: Sequence[float] | np.ndarray, k: int
) -> float:
    """The recall to expect at another cut-off, where the same sequences' π would be `others`.

    Each hit stands for 1/π sequences, of which the other cut-off would let in a share of its own π.
    """
    represented = held = 0.0
    for probability, chance in zip(probabilities, later, strict=True):
        weight = min(1 / probability, k - represented)
        represented += weight
        held += weight * chance
        if represented >= k:
            break
    return float(held / k)
