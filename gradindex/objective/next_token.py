"""Causal language models: log p of each next token, its gradient, and the labels it draws."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradindex.objective.batch import AnyRow, Batch, Row, halves, padded
from gradindex.results import UNSCORED
from gradindex.transfers import to_device

# logits turned into probabilities at a time: on a CPU they stay in its cache, on a GPU each part
# costs some thirty launches
LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
SOFT_CAP = "final_logit_softcapping"  # what transformers calls the cap in a configuration
RUN = 64  # labels that are summed up before one of them is drawn


@dataclass
class NextToken:
    """Causal language models: Σ log p of each scored token, given all tokens before it.

    Position t predicts token t + 1. So a sequence's first token is never scored, and what belongs
    to predicting a token stands one position before it. `soft_cap` is the c of a network's last
    step, logits = c·tanh(x / c), if that is made here: a part of the logits at a time, where the
    network would keep two more tensors of their size for its backward pass.
    """

    soft_cap: float | None = None

    def counted(self, scored: np.ndarray) -> np.ndarray:
        """Which tokens log p sums over where the mask is `scored` bool [n]: bool [n].

        >>> NextToken().counted(np.array([True, False, True])).tolist()
        [False, False, True]
        """
        counted = scored.copy()
        counted[:1] = False
        return counted

    def targets(self, tokens: np.ndarray, scored: np.ndarray) -> np.ndarray:
        """The token that each position is to predict, UNSCORED where that doesn't count: int64 [n].

        `tokens` int32 [n] are token ids, `scored` bool [n] the mask.

        >>> NextToken().targets(np.array([5, 6, 7]), np.array([True, False, True])).tolist()
        [-100, 7, -100]
        """
        targets = np.full(len(tokens), UNSCORED, dtype=np.int64)
        targets[:-1] = np.where(scored[1:], tokens[1:], UNSCORED)
        return targets

    def predictions(self, row: Row) -> int:
        """How many log p are added up for a row; one with none has no gradient."""
        return int(self.counted(row.scored).sum())

    def length(self, row: Row) -> int:
        """How many padded tokens a row takes in a batch by itself."""
        return len(row.tokens)

    def as_query(self, record: AnyRow) -> AnyRow:
        """A sequence that serves as a query: of its later half given the first.

        That is the later half of the tokens that its own mask counts; what was said before is
        context, not target.

        >>> from gradindex.storage.records import Record
        >>> record = Record(7, np.arange(5, dtype=np.int32), np.ones(5, dtype=bool), [])
        >>> NextToken().as_query(record).scored.tolist()
        [False, False, False, True, True]
        """
        numbers = np.flatnonzero(self.counted(record.scored))
        later = np.zeros(len(record.scored), dtype=bool)
        later[numbers[len(numbers) // 2 :]] = True
        told: Any = record  # a dataclass, as indexed sequences are
        asked: AnyRow = replace(told, scored=later)
        return asked

    def batch(self, rows: Sequence[Row], device: torch.device, texts: int = 1) -> Batch:
        """Rows as one batch, padded on the right; of pairs, each row has two `texts`."""
        # Any token id serves as padding: a causal model (`model/probe.py`) keeps real positions
        # from seeing it, and its output gradients are zero.
        tokens, real = padded(rows, texts)
        targets = np.full(tokens.shape, UNSCORED, np.int64)
        for number, row in enumerate(rows):
            targets[number, real[number]] = self.targets(row.tokens, row.scored) if texts == 1 \
                else np.concatenate([self.targets(*part) for part in zip(
                    halves(row.tokens, row.border), halves(row.scored, row.border), strict=True)])
        batch = Batch.of(tokens, targets, real, device, texts)
        # numbers that the host finds: a GPU that finds them in a mask keeps the host waiting
        batch.unscored = to_device(np.flatnonzero(targets == UNSCORED), device)
        return batch

    def outputs(self, network: Any, batch: Batch) -> Tensor:
        """Logits [b, t, v]: what the network says of each position's next token, before the cap."""
        # No attention mask: the network is causal, so no real position depends on the padding, and
        # with a mask another attention kernel would run, which rounds otherwise.
        with uncapped(network) if self.soft_cap else contextlib.nullcontext():
            logits: Tensor = network(
                input_ids=batch.by_text(batch.tokens), use_cache=False).logits
        return logits

    def label_numbers(
        self, batch: Batch, draw: Callable[[int, int], np.ndarray]
    ) -> Tensor:
        """The random numbers in [0, 1) that draw a label at each position: float64 [b, t].

        `draw(row, count)` gives those of one row, [count]; padding has 0.
        """
        numbers = np.zeros(batch.real.shape)
        for row, real in enumerate(batch.real):
            numbers[row, real] = draw(row, int(real.sum()))
        return to_device(numbers, batch.tokens.device)

    def log_p(
        self, outputs: Tensor, batch: Batch, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p [b, t] of a batch's targets in nats, and its gradient [b, t, v] by the outputs.

        The gradient takes the memory of the outputs. With `numbers` [b, t] of `label_numbers`,
        labels drawn from the model take the targets' places. See `log_probability`.
        """
        # a model that is spread over devices gives its outputs on the last of them
        there = outputs.device
        assert batch.unscored is not None
        return log_probability(
            outputs, batch.targets.to(there), batch.unscored.to(there),
            None if numbers is None else numbers.to(there), self.soft_cap)


    def divergence(self, before: Tensor, after: Tensor, batch: Batch) -> Tensor:
        """Σ KL(p ‖ p′) over a row's predictions, in nats: float64 [b], of outputs before and after.

        The Bregman divergence of the loss; to second order half the Gauss–Newton matrix's square
        of the change.

        >>> batch = Batch.of(*np.ones((3, 1, 2), dtype=np.int64), torch.device("cpu"))
        >>> batch.unscored = torch.tensor([1])
        >>> even, odd = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 1.0], [5.0, 1.0]]]).log()
        >>> NextToken().divergence(even, odd, batch)  # ½ log (½ / ¾) + ½ log (½ / ¼)
        tensor([0.1438], dtype=torch.float64)
        """
        assert batch.unscored is not None
        flat = [one.detach().flatten(0, 1) for one in (before, after)]
        found = flat[0].new_zeros(len(flat[0]), dtype=torch.float64)
        rows = max(1, LOGITS_AT_ONCE[flat[0].device.type] // flat[0].shape[1])
        for part in map(slice, range(0, len(found), rows), range(rows, len(found) + rows, rows)):
            said = [one[part].double() if self.soft_cap is None else
                    bounded(one[part].double(), self.soft_cap) * self.soft_cap for one in flat]
            log_p, other = (one.log_softmax(-1) for one in said)
            found[part] = (log_p.exp() * (log_p - other)).sum(-1)
        found.index_fill_(0, batch.unscored.to(found.device), 0)
        return found.view(len(batch.real), -1).sum(1)


@contextlib.contextmanager
def uncapped(network: Any) -> Iterator[None]:
    """Let a network leave out the soft cap of its logits for a while."""
    settings = vars(network.config.get_text_config())  # Gemma 3n's itself refuses to have no cap
    cap = settings[SOFT_CAP]
    try:
        settings[SOFT_CAP] = None
        yield
    finally:
        settings[SOFT_CAP] = cap


def bounded(logits: Tensor, cap: float) -> Tensor:
    """tanh(logits / cap), as networks round it; times `cap`, these are soft-capped logits."""
    return (logits / cap).tanh_()


def log_probability(
    logits: Tensor, targets: Tensor, unscored: Tensor, uniforms: Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log p of the targets and its gradient with respect to the logits, whose memory it takes.

    logits [b, t, v]; targets [b, t], the token to predict at each position or UNSCORED, whose
    numbers among all b·t are `unscored` [n]. With `uniforms` [b, t] in [0, 1), a label drawn from
    the model takes the place of each target. With `soft_cap` c, the logits of p are
    c·tanh(logits / c), and the gradient is that of what is given.
    Returns log p of each position [b, t] in nats (0 where unscored; float32, or float64 for such
    logits) and ∂(Σ log p)/∂logits = onehot(target) − softmax(logits), 0 where unscored, [b, t, v].

    >>> logits = torch.tensor([[[1.0, 3.0], [1.0, 1.0]]]).log()
    >>> log_p, gradient = log_probability(
    ...     logits, torch.tensor([[1, UNSCORED]]), unscored=torch.tensor([1]))
    >>> torch.exp(log_p), gradient.round(decimals=2)
    (tensor([[0.7500, 1.0000]]), tensor([[[-0.2500,  0.2500],
             [ 0.0000,  0.0000]]]))
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat, flat_targets = logits.detach().flatten(0, 1), targets.flatten()
    token_log_p = torch.zeros(flat_targets.shape, dtype=wide, device=flat.device)
    # Some positions at a time, from logits to gradient in one go: every step of it reads what the
    # one before left in the cache, and no second tensor of the logits' size is made.
    rows = max(1, LOGITS_AT_ONCE[flat.device.type] // flat.shape[1])
    for part in map(slice, range(0, len(flat), rows), range(rows, len(flat) + rows, rows)):
        part_logits = flat[part]
        said, bounds = part_logits, None
        if soft_cap is not None:
            bounds = bounded(part_logits, soft_cap)
            said = bounds * soft_cap
        log_p = torch.log_softmax(said.to(wide), dim=-1)
        p = torch.exp(
            log_p, out=part_logits if part_logits.dtype == wide else torch.empty_like(log_p))
        labels = (flat_targets[part].clamp(min=0) if uniforms is None else
                  sample_labels(p, uniforms.flatten()[part])).unsqueeze(-1)
        token_log_p[part] = log_p.gather(-1, labels).squeeze(-1)
        p.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=wide))
        if bounds is not None:
            p.mul_(1 - bounds.to(wide).square_())  # the derivative of c·tanh(x / c)
        if p is not part_logits:
            part_logits.copy_(p)
    # Unscored positions went through as if their target were 0; now they count for nothing.
    token_log_p.index_fill_(0, unscored, 0)
    flat.index_fill_(0, unscored, 0)
    return token_log_p.view(targets.shape), flat.view(logits.shape)


def sample_labels(p: Tensor, uniforms: Tensor) -> Tensor:
    """A label for each row, int64 [n], drawn from its probabilities p [n, v].

    The cumulative distribution is inverted at `uniforms` [n] in [0, 1), so a label depends on
    nothing but its row and its number, and not on the batch.

    >>> sample_labels(torch.tensor([[0.5, 0.25, 0.25]] * 3), torch.tensor([0.49, 0.5, 0.99]))
    tensor([0, 1, 2])
    """
    v = p.shape[1]
    # First the run of labels that the number falls into, then the label within it: p is read once,
    # and step by step only one run is summed up, not the whole vocabulary.
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
    label = torch.searchsorted(inside, threshold, right=True)
    # Rounding can put the threshold at the end of its run: the run's last possible label is meant.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    return (run * RUN + torch.minimum(label, last)).squeeze(-1).clamp_(max=v - 1)  # NaN: beyond
