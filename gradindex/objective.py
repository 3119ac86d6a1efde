"""What is scored."""

import torch
from torch import Tensor

UNSCORED = -100  # a position whose next token is not scored, as in transformers
CACHED_LOGITS = 1 << 20  # logits turned into probabilities at a time: they stay in a CPU's cache
RUN = 64  # labels that are summed up before one of them is drawn


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
