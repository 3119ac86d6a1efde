"""How long the demo will take on this machine, from a few training steps measured before it begins.

Every part of the demo is known in training steps: what it took where it was measured, divided by
what a step took there. So is a part's time here, from the time of a step here.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from gradindex.demo.small_model import DemoSettings, new_model, new_optimizer

WIDTH = 48  # tokens of a batch's sequences, about the documents' mean
STEPS = 12  # measured, and half as many before them: the first ones load libraries and grow memory

# In training steps of .15 s of processor time, of which two cores do with about .11 s.
DOCUMENTS = 90
BUILD = 490
SEARCH = 30
LATER_SEARCH = 12


@dataclass(frozen=True)
class Expected:
    """Seconds until the first answer, and until the last."""

    first: float
    whole: float


def expected(step: float, training: int | None, build: bool) -> Expected:
    """How long what is still to come will take, where a step takes `step` seconds.

    `training` is how many steps are to be made, None for a model that is there; `build` is whether
    the index has to be built.
    """
    first = SEARCH + BUILD * build + (0 if training is None else DOCUMENTS + training)
    return Expected(step * first, step * (first + 2 * LATER_SEARCH))


def seconds_of_a_step(settings: DemoSettings) -> float:
    """The median time of a training step, on token ids that mean nothing."""
    model: Any = new_model(settings)
    optimizer = new_optimizer(model, settings)
    ids = torch.arange(settings.batch * WIDTH).reshape(settings.batch, WIDTH) % settings.vocabulary
    seconds = []
    for _ in range(STEPS + STEPS // 2):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    # the middle one: another process may have taken a core for a moment
    return sorted(seconds[STEPS // 2:])[STEPS // 2]
