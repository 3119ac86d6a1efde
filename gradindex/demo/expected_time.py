"""How long the demo will take on this machine, from a few training steps measured before it begins.

Every part of the demo is known in training steps: what it took where it was measured, divided by
what a step took there. So is a part's time here, from the time of a step here.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from gradindex.demo.small_model import new_optimizer

WIDTH = 48  # tokens of a batch's sequences, about the documents' mean
STEPS = 12  # measured, and half as many before them: the first ones load libraries and grow memory


@dataclass(frozen=True)
class DemoParts:
    """What the parts of a demo take, in training steps."""

    documents: int
    build: int
    search: int
    later_search: int


@dataclass(frozen=True)
class Expected:
    """Seconds until the first answer, and until the last."""

    first: float
    whole: float


def expected(
    step: float, training: int | None, build: bool, parts: DemoParts, questions: int = 3
) -> Expected:
    """How long what is still to come will take, where a step takes `step` seconds.

    `training` is how many steps are to be made, None for a model that is there; `build` is whether
    the index has to be built.
    """
    first = parts.search + parts.build * build
    first += 0 if training is None else parts.documents + training
    return Expected(step * first, step * (first + (questions - 1) * parts.later_search))


def meaningless(vocabulary: int, batch: int) -> torch.Tensor:
    """Token ids that mean nothing, of a batch that is as wide as most: int64 [batch, WIDTH]."""
    return torch.arange(batch * WIDTH).reshape(batch, WIDTH) % vocabulary


def seconds_of_a_step(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """The median time of a training step of a new model on a batch."""
    optimizer = new_optimizer(model, 1e-3)
    seconds = []
    for _ in range(STEPS + STEPS // 2):
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    # the middle one: another process may have taken a core for a moment
    return sorted(seconds[STEPS // 2:])[STEPS // 2]
