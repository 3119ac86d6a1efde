"""How well signals find what is corrupted, beside each other, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
RIVALS = ("loss", "gradient norm", "self-confidence", "random")  # which need no curvature
INSPECTED = (0.1, 0.2)


@dataclass
class Found:
    """Signals [n] by name, each larger for more suspect rows, and which rows are corrupted [n]."""

    signals: dict[str, np.ndarray]
    truth: np.ndarray


def draw_counts(count: int, seed: int) -> np.ndarray:
    """How often each of `count` rows is in all of them as they are, and in each of DRAWS draws.

    int64 [count, 1 + DRAWS]; a draw takes as many rows with replacement.
    """
    draws = np.random.default_rng([5, seed]).multinomial(count, np.full(count, 1 / count), DRAWS)
    return np.vstack([np.ones(count, np.int64), draws]).T


def auroc(signal: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The share of pairs, one row corrupted and one not, that a signal [n] ranks rightly: [draws].

    `counts` [n, draws] says how often each draw has each row. Equal signals count half.

    >>> auroc(np.array([3.0, 1, 2, 1]), np.array([True, True, False, False]), np.ones((4, 1)))
    array([0.625])
    """
    order = np.argsort(signal)
    starts = np.flatnonzero(np.diff(signal[order], prepend=np.nan) != 0)
    right, wrong = (np.add.reduceat(counts[order] * kind[order, None], starts, axis=0)
                    for kind in (truth, ~truth))
    below = np.cumsum(wrong, axis=0) - wrong / 2
    found: np.ndarray = (right * below).sum(0) / (right.sum(0) * wrong.sum(0))
    return found


def share_found(
    signal: np.ndarray, truth: np.ndarray, counts: np.ndarray, inspected: float
) -> np.ndarray:
    """The share of the corrupted that is among the largest `inspected` of a signal: [draws].

    >>> truth = np.array([True, True, False, False])
    >>> share_found(np.array([3.0, 1, 2, 0]), truth, np.ones((4, 1)), 0.5)
    array([0.5])
    """
    order = np.argsort(-signal, kind="stable")
    some, truth = counts[order], truth[order, None]
    before = np.cumsum(some, axis=0) - some
    taken = np.clip(round(inspected * len(signal)) - before, 0, some)
    found: np.ndarray = (taken * truth).sum(0) / (some * truth).sum(0)
    return found


def measured(audits: Sequence[Found]) -> dict[str, dict[str, np.ndarray]]:
    """By measure and signal the mean over seeds, of the rows and of draws: [1 + DRAWS].

    A draw is the same for all signals: differences are paired.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for seed, one in enumerate(audits):
        counts = draw_counts(len(one.truth), seed)
        for name, signal in one.signals.items():
            values = {"AUROC": auroc(signal, one.truth, counts)} | {
                f"found in {share:.0%}": share_found(signal, one.truth, counts, share)
                for share in INSPECTED}
            for measure, draws in values.items():
                found.setdefault(measure, {}).setdefault(name, []).append(draws)
    return {measure: {name: np.mean(draws, axis=0) for name, draws in by_name.items()}
            for measure, by_name in found.items()}


def interval(draws: np.ndarray, sign: str = "") -> str:
    """The first value and the 95 % percentile interval of the draws behind it."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return f"{draws[0]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def paired(differences: np.ndarray) -> str:
    """The mean of differences [seeds], and the 95 % interval of draws of seeds."""
    counts = draw_counts(len(differences), 0)
    return interval(differences @ counts / len(differences), "+")


def print_tables(audits: Sequence[Found], rivals: Sequence[str]) -> None:
    """Each signal's measures, best first, then how far those that are no rivals are above these."""
    values = measured(audits)
    print(f"| signal | {' | '.join(values)} |\n|---|{'---|' * len(values)}")
    aucs = values["AUROC"]
    names = sorted(aucs, key=lambda name: -aucs[name][0])
    for name in names:
        cells = " | ".join(interval(by_name[name]) for by_name in values.values())
        print(f"| {name} | {cells} |")
    print(f"\n| AUROC less a rival's | {' | '.join(rivals)} |\n|---|{'---|' * len(rivals)}")
    for name in names:
        if name not in rivals:
            cells = " | ".join(interval(aucs[name] - aucs[rival], "+") for rival in rivals)
            print(f"| {name} | {cells} |")
