"""What is scored: which predictions of a row count, and what a model's outputs say of them.

An objective is what a kind of model is trained for. Gradients, curvature, codes, storage and search
know of it only what stands here: how rows become a batch, how a batch becomes outputs, how outputs
become log p and its gradient, how the curvature's gradient is formed, and what is asked about where
a row serves as a query. Another kind of model is another class like those in these files, and a
line in `objective_of`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gradindex.objective.batch import AnyRow, Batch, Row
from gradindex.objective.classes import Classification
from gradindex.objective.next_token import NextToken
from gradindex.objective.pairs import Preference, Reward
from gradindex.objective.whole_texts import WholeTexts
from gradindex.task import Task


class Objective(Protocol):
    """What every objective can do; `NextToken` says more of each."""

    def predictions(self, row: Row) -> int: ...

    def length(self, row: Row) -> int: ...

    def as_query(self, record: AnyRow) -> AnyRow: ...

    def batch(self, rows: Sequence[Row], device: torch.device) -> Batch: ...

    def outputs(self, network: Any, batch: Batch) -> Tensor: ...

    def label_numbers(self, batch: Batch, draw: Callable[[int, int], np.ndarray]) -> Tensor: ...

    def log_p(
        self, outputs: Tensor, batch: Batch, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def divergence(self, before: Tensor, after: Tensor, batch: Batch) -> Tensor: ...


def objective_of(
    task: Task, network: Any, tokenizer: Any = None, soft_cap: float | None = None
) -> Objective:
    """The objective of a task; `network` is None where rows alone are looked at.

    >>> type(objective_of(Task("causal"), None)).__name__
    'NextToken'
    """
    if task.name == "causal":
        return NextToken(soft_cap)
    if task.name == "preference":
        return Preference(NextToken(soft_cap), task.beta)
    reader = WholeTexts() if network is None else WholeTexts.of(network, tokenizer)
    return Classification(reader) if task.name == "classification" else Reward(reader)
