"""What is scored: which predictions of a sequence count, and what outputs say of them.

An objective is what a kind of model is trained for. Gradients, curvature, codes, storage and search
know of it only what stands here: how sequences become a batch, how a batch becomes outputs, how
outputs become log p and its gradient, which labels the curvature draws, and what part of a sequence
is asked about where it serves as a query. Another kind of model is another class like `NextToken`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradindex.modules import Module
from gradindex.results import UNSCORED

CACHED_LOGITS = 1 << 20  # logits turned into probabilities at a time: they stay in a CPU's cache
RUN = 64  # labels that are summed up before one of them is drawn


class Scored(Protocol):
    """A text to be scored: token ids int32 [n], and which of them count, bool [n]."""

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def scored(self) -> np.ndarray: ...


class Text(NamedTuple):
    """A text that isn't indexed, such as a query's."""

    tokens: np.ndarray
    scored: np.ndarray


@dataclass
class Batch:
    """Right-padded sequences: tokens [b, t], targets [b, t] (next token or −100), real [b, t].

    `positions` [b, m] belongs to modules that saw other than every token once, in order: fused
    experts, and maps that ran more than once. It says at which position of its sequence each of the
    m inputs stood, −1 for padding.
    """

    tokens: Tensor
    targets: Tensor
    real: Tensor
    positions: dict[str, Tensor] = field(default_factory=dict)

    def real_inputs(self, module: Module) -> Tensor:
        """Which of the inputs that a module had were real tokens: [b, t], or [b, m]."""
        positions = self.positions.get(module.name)
        if positions is None:
            return self.real
        return self.real.gather(1, positions.clamp(min=0)) & (positions >= 0)

    def by_position(self, module: Module, terms: Tensor) -> Tensor:
        """A term of each input of a module, [b, m], added up by its position: [b, t]."""
        positions = self.positions.get(module.name)
        if positions is None:
            return terms
        return torch.zeros_like(self.tokens, dtype=terms.dtype).scatter_add_(
            1, positions.clamp(min=0), terms)  # the terms of padding are zero


class NextToken:
    """Causal language models: Σ log p of each scored token, given all before it.

    Position t predicts token t + 1, so a sequence's first token is never scored and what is said of
    a token stands one position before it.

    >>> NextToken().targets(np.array([5, 6, 7]), np.array([True, False, True])).tolist()
    [-100, 7, -100]
    """

    def counted(self, scored: np.ndarray) -> np.ndarray:
        """Which tokens log p sums over, of those that a mask [n] lets count: bool [n]."""
        counted = scored.copy()
        counted[:1] = False
        return counted

    def targets(self, tokens: np.ndarray, scored: np.ndarray) -> np.ndarray:
        """What each position is to predict, UNSCORED where that doesn't count: int64 [n]."""
        targets = np.full(len(tokens), UNSCORED, dtype=np.int64)
        targets[:-1] = np.where(scored[1:], tokens[1:], UNSCORED)
        return targets

    def later_half(self, scored: np.ndarray) -> np.ndarray:
        """A sequence as a query: bool [n], the later half of its scored tokens given all before."""
        places = np.flatnonzero(self.counted(scored))
        later = np.zeros(len(scored), dtype=bool)
        later[places[len(places) // 2 :]] = True
        return later

    def batch(self, texts: Sequence[Scored], device: torch.device) -> Batch:
        """Texts, padded on the right.

        Any token id serves as padding: a causal model (`model/probe.py`) keeps real positions from
        seeing it, and its output gradients are zero.
        """
        shape = len(texts), max(len(text.tokens) for text in texts)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, UNSCORED, np.int64)
        real = np.zeros(shape, dtype=bool)
        for row, text in enumerate(texts):
            here = row, slice(len(text.tokens))
            tokens[here], targets[here] = text.tokens, self.targets(text.tokens, text.scored)
            real[here] = True
        tokens_, targets_, real_ = (
            torch.from_numpy(array).to(device) for array in (tokens, targets, real))
        return Batch(tokens_, targets_, real_)

    def outputs(self, network: Any, batch: Batch) -> Tensor:
        """Logits [b, t, v].

        No attention mask is needed: the network is causal, and no longer than its context, so no
        real position depends on the padding.
        """
        logits: Tensor = network(input_ids=batch.tokens, use_cache=False).logits
        return logits

    def label_numbers(
        self, batch: Batch, texts: Sequence[Scored], draw: Callable[[int, int], np.ndarray]
    ) -> Tensor:
        """What draws a label at each position: [b, t] in [0, 1), by `draw(row, count)`."""
        numbers = torch.zeros(batch.tokens.shape, dtype=torch.float64)
        for row, text in enumerate(texts):
            count = len(text.tokens)
            numbers[row, :count] = torch.from_numpy(draw(row, count))
        return numbers.to(batch.tokens.device)

    def log_p(
        self, outputs: Tensor, batch: Batch, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p [b, t] of a batch's targets, and its gradient, see `log_probability`.

        With `numbers` of `label_numbers`, labels drawn from the model take the targets' places.
        """
        return log_probability(outputs, batch.targets, numbers)

    def by_token(self, log_p: Sequence[float], count: int) -> list[float]:
        """log p of each of `count` tokens, from that of each position."""
        return [0.0, *log_p[: count - 1]]


def log_probability(
    logits: Tensor, targets: Tensor, uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p of the targets and its gradient with respect to the logits, whose memory it takes.

    logits [b, t, v]; targets [b, t], the token to predict at each position or UNSCORED. With
    `uniforms` [b, t] in [0, 1), a label drawn from the model takes the place of each target.
    Returns log p per position [b, t] in nats (0 where unscored; float32 or better) and
    ∂(Σ log p)/∂logits = onehot(target) − softmax(logits), zero where unscored, [b, t, v].
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat, flat_targets = logits.detach().flatten(0, 1), targets.flatten()
    token_log_p = torch.zeros(flat_targets.shape, dtype=wide, device=flat.device)
    rows = max(1, CACHED_LOGITS // flat.shape[1])
    for here in map(slice, range(0, len(flat), rows), range(rows, len(flat) + rows, rows)):
        some = flat[here]
        log_p = torch.log_softmax(some.to(wide), dim=-1)
        p = torch.exp(log_p, out=some if some.dtype == wide else torch.empty_like(log_p))
        labels = (flat_targets[here].clamp(min=0) if uniforms is None else
                  sample_labels(p, uniforms.flatten()[here])).unsqueeze(-1)
        token_log_p[here] = log_p.gather(-1, labels).squeeze(-1)
        p.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=wide))
        if p is not some:
            some.copy_(p)
    [unscored] = torch.nonzero(flat_targets == UNSCORED, as_tuple=True)
    token_log_p.index_fill_(0, unscored, 0)
    flat.index_fill_(0, unscored, 0)
    return token_log_p.view(targets.shape), flat.view(logits.shape)


def sample_labels(p: Tensor, uniforms: Tensor) -> Tensor:
    """One label per row drawn from p [n, v], by inverting its cumulative distribution: int64 [n].

    Depends on nothing but the row and its uniform number in [0, 1). First comes the run of labels
    it falls into, then the label within: the sum of all is read once, and only a run is summed up
    step by step.
    """
    v = p.shape[1]
    whole = v // RUN * RUN
    sums = p[:, :whole].unflatten(1, (-1, RUN)).sum(-1)
    if whole < v:
        sums = torch.cat([sums, p[:, whole:].sum(-1, keepdim=True)], dim=1)
    ends = sums.cumsum(-1)
    below_one = 1 - torch.finfo(p.dtype).eps / 2  # or rounding could draw a label of probability 0
    threshold = uniforms.to(p.dtype).clamp(max=below_one).unsqueeze(-1) * ends[:, -1:]
    run = torch.searchsorted(ends, threshold, right=True).clamp_(max=ends.shape[1] - 1)
    threshold -= (ends - sums).gather(-1, run)
    members = run * RUN + torch.arange(RUN, device=p.device)
    inside = p.gather(-1, members.clamp(max=v - 1)).masked_fill_(members >= v, 0).cumsum(-1)
    place = torch.searchsorted(inside, threshold, right=True)
    # Rounding can put the threshold at the end of its run: the run's last possible label is meant.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    return (run * RUN + torch.minimum(place, last)).squeeze(-1).clamp_(max=v - 1)  # NaN: beyond
