"""Pairs of texts of which one was preferred: log σ(z), z the difference of their scores.

A reward model's score of a text is its output r: z = r(chosen) − r(rejected) − margin. A policy
that learned preferences directly has β log π(text): z = β (log π(chosen) − log π(rejected) − what
the reference makes of that). A row's gradient is that of both texts with their weights, ±σ(−z).

Where curvature is fitted nothing is drawn: which text is preferred has two outcomes, and
√(σ(z) σ(−z)) ∇z has the Fisher's second moments exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradindex.objective.batch import AnyRow, Batch, Row, halves
from gradindex.objective.next_token import NextToken
from gradindex.objective.whole_texts import WholeTexts
from gradindex.transfers import to_device


class _Pairs:
    """What rows of two texts have in common, whatever scores the texts."""

    def length(self, row: Row) -> int:
        """How many padded tokens a row takes in a batch by itself: both texts are as long.

        >>> from gradindex.objective.batch import Text
        >>> Reward(WholeTexts()).length(Text(np.arange(5), np.ones(5, bool), border=2))
        6
        """
        n, border = len(row.tokens), row.border
        return n if border is None else 2 * max(border, n - border)

    def as_query(self, record: AnyRow) -> AnyRow:
        """A sequence that serves as a query: of its own preference."""
        return record

    def label_numbers(self, batch: Batch, draw: Callable[[int, int], np.ndarray]) -> Tensor:
        """None are needed: what is given to `log_p` says that the curvature's gradient is meant."""
        return torch.zeros(0, device=batch.tokens.device)


@dataclass
class Reward(_Pairs):
    """Reward models: log σ(r(chosen) − r(rejected) − margin); of one text, r itself."""

    reader: WholeTexts

    def predictions(self, row: Row) -> int:
        """One: a row is one comparison."""
        return 1

    def batch(self, rows: Sequence[Row], device: torch.device) -> Batch:
        """Rows as one batch, each text padded on the right; all are pairs, or all single texts."""
        return self.reader.batch(rows, _offsets(rows), device, _texts(rows))

    def outputs(self, network: Any, batch: Batch) -> Tensor:
        """Rewards [b · texts, 1]."""
        return self.reader.outputs(network, batch)

    def log_p(
        self, outputs: Tensor, batch: Batch, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log σ(z) [b, 1] in nats, and its gradient [b · texts, 1] by the outputs.

        Of single texts it is the reward, in its own units. With `numbers` the gradient is the
        curvature's, √(σ(z) σ(−z)) times that of z.

        >>> batch = Batch.of(*np.ones((3, 1, 2), np.int64), torch.device("cpu"), texts=2)
        >>> batch.targets = torch.zeros(1, dtype=torch.float64)
        >>> rewards = torch.tensor([[1.0986], [0.0]])  # a difference of log 3: σ is ¾
        >>> log_p, gradient = Reward(WholeTexts()).log_p(rewards, batch)
        >>> log_p.exp(), gradient
        (tensor([[0.7500]], dtype=torch.float64), tensor([[ 0.2500],
                [-0.2500]]))
        """
        scores = outputs.detach().double().view(-1, batch.texts)
        found, weights = _preference(scores, batch.targets.to(outputs.device), numbers)
        return found, weights.view(outputs.shape).to(outputs.dtype)

    def divergence(self, before: Tensor, after: Tensor, batch: Batch) -> Tensor:
        """KL of which text is preferred in nats: float64 [b], of outputs before and after."""
        return _divergence(*(self.log_p(one, batch)[0] for one in (before, after)))


@dataclass
class Preference(_Pairs):
    """Policies that learned preferences directly (DPO): log σ(β (log π(c) − log π(r) − offset)).

    The offset is what the reference makes of the same difference. Of one text, the reward
    that training gave it but for the reference's constant part: β log π.
    """

    policy: NextToken
    beta: float

    def predictions(self, row: Row) -> int:
        """One: a row is one comparison; 0 where no token of its texts is predicted.

        >>> from gradindex.objective.batch import Text
        >>> pair = Text(np.arange(2), np.ones(2, bool), border=1)  # of one token each
        >>> Preference(NextToken(), 0.1).predictions(pair)
        0
        """
        texts = (row.scored,) if row.border is None else halves(row.scored, row.border)
        return int(any(self.policy.counted(scored).any() for scored in texts))

    def batch(self, rows: Sequence[Row], device: torch.device) -> Batch:
        """Rows as one batch, each text padded on the right; all are pairs, or all single texts."""
        batch = self.policy.batch(rows, device, _texts(rows))
        batch.offsets = to_device(_offsets(rows), device)
        return batch

    def outputs(self, network: Any, batch: Batch) -> Tensor:
        """Logits [b · texts, t, v]."""
        return self.policy.outputs(network, batch)

    def log_p(
        self, outputs: Tensor, batch: Batch, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log σ(z) [b, 1] in nats, and its gradient [b · texts, t, v] by the outputs.

        Of single texts it is β log π. The gradient takes the memory of the outputs. With `numbers`
        it is the curvature's, √(σ(z) σ(−z)) times that of z.
        """
        assert batch.offsets is not None
        token_log_p, gradient = self.policy.log_p(outputs, batch)
        # in float64: two sums of thousands of nats are taken off each other
        scores = self.beta * _of_answers(token_log_p, batch)
        found, weights = _preference(
            scores, self.beta * batch.offsets.to(outputs.device), numbers)
        weights = (self.beta * weights).to(gradient.dtype)
        return found, gradient.mul_(weights.flatten()[:, None, None])

    def divergence(self, before: Tensor, after: Tensor, batch: Batch) -> Tensor:
        """KL of which answer is preferred in nats: float64 [b], of outputs before and after."""
        # clones, as log p takes the memory of what it is given
        return _divergence(*(self.log_p(one.clone(), batch)[0] for one in (before, after)))

    def answers(self, network: Any, batch: Batch) -> Tensor:
        """What a network gives each row's answers: Σ log p of their tokens, float64 [b, texts]."""
        return _of_answers(self.policy.log_p(self.outputs(network, batch), batch)[0], batch)


def _of_answers(token_log_p: Tensor, batch: Batch) -> Tensor:
    """log p [b · texts, t] added up by text: float64 [b, texts]."""
    return token_log_p.view(len(batch.real), batch.texts, -1).double().sum(-1)


def deviation(z: Tensor) -> Tensor:
    """√(σ(z) σ(−z)) [b, 1], the standard deviation of an outcome of two whose log odds are z.

    Times ∇z it is a gradient that has the Fisher's second moments without any drawing.

    >>> deviation(torch.tensor([[0.0], [1.0986123]]))  # of ½ and ¾
    tensor([[0.5000],
            [0.4330]])
    """
    return (torch.sigmoid(z) * torch.sigmoid(-z)).sqrt()


def _divergence(chosen: Tensor, after: Tensor) -> Tensor:
    """KL [b] between two outcomes of which one has log p `chosen` [b, 1], then `after`, in float64.

    >>> _divergence(torch.tensor([[0.5]]).log(), torch.tensor([[0.75]]).log())
    tensor([0.1438])
    """
    rejected, rejected_after = (torch.log(-torch.expm1(one)) for one in (chosen, after))
    # of one that is certain nothing is left: 0 · −∞
    return (chosen.exp() * (chosen - after) + torch.nan_to_num(
        rejected.exp() * (rejected - rejected_after)))[:, 0]


def _texts(rows: Sequence[Row]) -> int:
    return 1 if rows[0].border is None else 2


def _offsets(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.offset for row in rows])


def _preference(
    scores: Tensor, offsets: Tensor, numbers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log σ(z) [b, 1] of scores [b, 2] in float64, and its gradient by them; of [b, 1], the scores.
    """
    if scores.shape[1] == 1:
        return scores, torch.ones_like(scores)
    z = scores[:, :1] - scores[:, 1:] - offsets[:, None].to(scores.dtype)
    log_p = torch.nn.functional.logsigmoid(z)
    weight = torch.sigmoid(-z) if numbers is None else deviation(z)
    return log_p, torch.cat([weight, -weight], 1)
