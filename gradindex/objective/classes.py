"""Classifiers: log p(label | text), and its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradindex.objective.batch import AnyRow, Batch, Row
from gradindex.objective.next_token import sample_labels
from gradindex.objective.pairs import deviation
from gradindex.objective.whole_texts import WholeTexts
from gradindex.transfers import to_device


@dataclass
class Classification:
    """Classifiers of texts: log p of a row's label, the softmax over the classes being p."""

    reader: WholeTexts

    def predictions(self, row: Row) -> int:
        """One: a row is one prediction."""
        return 1

    def length(self, row: Row) -> int:
        """How many padded tokens a row takes in a batch by itself."""
        return len(row.tokens)

    def as_query(self, record: AnyRow) -> AnyRow:
        """A sequence that serves as a query: of its own label."""
        return record

    def batch(self, rows: Sequence[Row], device: torch.device) -> Batch:
        """Rows as one batch, padded on the right to the longest of them."""
        return self.reader.batch(rows, np.array([row.label for row in rows], np.int64), device)

    def outputs(self, network: Any, batch: Batch) -> Tensor:
        """Logits [b, c]: what the network says of each text's class."""
        return self.reader.outputs(network, batch)

    def label_numbers(self, batch: Batch, draw: Callable[[int, int], np.ndarray]) -> Tensor:
        """The random numbers in [0, 1) that draw a label for each row: float64 [b]."""
        return to_device(np.concatenate([draw(row, 1) for row in range(len(batch.real))]),
                         batch.tokens.device)

    def divergence(self, before: Tensor, after: Tensor, batch: Batch) -> Tensor:
        """KL(p ‖ p′) of a row's classes in nats: float64 [b], of outputs before and after."""
        log_p, other = (one.detach().double().log_softmax(-1) for one in (before, after))
        return (log_p.exp() * (log_p - other)).sum(-1)

    def log_p(
        self, outputs: Tensor, batch: Batch, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p [b, 1] of the rows' labels in nats, and its gradient [b, c] by the outputs.

        With `numbers` [b], the gradient is one whose square has the Fisher's expectation: that of a
        label drawn from the model, or of two classes exactly, √(p₀ p₁) times that of the difference
        of the logits, from which no label need be drawn.

        >>> logits = torch.tensor([[1.0, 3.0]]).log()  # p = ¼, ¾
        >>> batch = Batch.of(np.ones((1, 2), np.int64), np.array([1]), np.ones((1, 2), bool),
        ...                  torch.device("cpu"))
        >>> objective = Classification(WholeTexts())
        >>> log_p, gradient = objective.log_p(logits, batch)
        >>> log_p.exp(), gradient
        (tensor([[0.7500]], dtype=torch.float64), tensor([[-0.2500,  0.2500]]))
        >>> objective.log_p(logits, batch, torch.zeros(1))[1]
        tensor([[-0.4330,  0.4330]])
        """
        labels = batch.targets.to(outputs.device)[:, None]
        # few numbers: of a label that is all but certain 1 − p would be lost in float32
        log_p = outputs.detach().double().log_softmax(-1)
        p = log_p.exp()
        found = log_p.gather(1, labels)
        if numbers is not None and p.shape[1] == 2:
            root = deviation(log_p[:, 1:] - log_p[:, :1])
            return found, torch.cat([-root, root], 1).to(outputs.dtype)
        if numbers is not None:
            labels = sample_labels(p, numbers.to(outputs.device))[:, None]
            found = log_p.gather(1, labels)
        gradient = -p
        gradient.scatter_add_(1, labels, torch.ones_like(found))
        return found, gradient.to(outputs.dtype)
