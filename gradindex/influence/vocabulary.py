"""Output gradients over a vocabulary, where an embedding has a part in them.

A weight W [v, h] of a vocabulary may be used in two ways: as the map to the logits, s_t = W a_t,
and as an embedding, e_t = row x_t of W, x_t being a token. With δ_t = ∂(Σ log p)/∂e_t its gradient
is that of both:  G = Σ_t d_t a_tᵀ + Σ_t 1(x_t) δ_tᵀ  [v, h].
So an embedding is a map whose inputs are δ and whose output gradients have a single 1, in the row
of the token. They are kept as the tokens: whole, they would be as large as the logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OverVocabulary:
    """Output gradients of the t inputs of a map to the logits, `logits` [b, t, v], then of u tokens
    that an embedding looked up, `tokens` int64 [b, u]: in all [b, t + u, v].

    >>> d = OverVocabulary(torch.zeros(1, 0, 3), torch.tensor([[2, 0]]))
    >>> d.whole()
    tensor([[[0., 0., 1.],
             [1., 0., 0.]]])
    """

    logits: Tensor
    tokens: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """[b, t + u, v]."""
        b, t, v = self.logits.shape
        return b, t + self.tokens.shape[1], v

    def to(self, dtype: torch.dtype) -> "OverVocabulary":
        """The same in another dtype."""
        return OverVocabulary(self.logits.to(dtype), self.tokens)

    def whole(self, step: int = 1) -> Tensor:
        """All of them [b, t + u, v]; of every `step`-th row of the vocabulary alone."""
        b, u = self.tokens.shape
        v = self.logits.shape[2]
        ones = self.logits.new_zeros(b, u, v).scatter_(2, self.tokens[..., None], 1.0)
        return torch.cat([self.logits, ones], 1)[..., ::step]

    def __matmul__(self, matrix: Tensor) -> Tensor:
        """D M [b, t + u, k] for M [v, k].

        >>> d = OverVocabulary(torch.ones(1, 1, 2), torch.tensor([[1]]))
        >>> d @ torch.tensor([[1.0], [10.0]])
        tensor([[[11.],
                 [10.]]])
        """
        return torch.cat([self.logits @ matrix, matrix[self.tokens]], 1)

    def gradient(self, a: Tensor, rows: slice, outputs: slice) -> Tensor:
        """Dᵀ a of a slice of the batch, in a slice of the vocabulary: [n, o, i].

        a [b, t + u, i] are the inputs, and behind them the gradients of what was looked up.

        >>> d = OverVocabulary(torch.zeros(1, 0, 3), torch.tensor([[2, 0, 2]]))
        >>> d.gradient(torch.tensor([[[1.0], [2.0], [4.0]]]), slice(0, 1), slice(1, 3))
        tensor([[[0.],
                 [5.]]])
        """
        t, v = self.logits.shape[1:]
        found = self.logits[rows, :, outputs].mT @ a[rows, :t]
        first, end, _ = outputs.indices(v)
        tokens = self.tokens[rows] - first
        inside = (tokens >= 0) & (tokens < end - first)
        places = tokens.clamp(0, end - first - 1) + (end - first) * torch.arange(
            len(tokens), device=tokens.device)[:, None]
        looked_up = torch.where(inside[..., None], a[rows, t:], 0.0)
        flat = found.view(-1, found.shape[-1])
        # of the ways to add where places repeat, that which adds in one order: by device another
        if flat.device.type == "cpu":
            flat.index_add_(0, places.flatten(), looked_up.flatten(0, 1))
        else:
            flat.index_put_((places.flatten(),), looked_up.flatten(0, 1), accumulate=True)
        return found

    def of_rows(
        self, a: Tensor, rows: Tensor, weights: Tensor
    ) -> tuple[Tensor, "OverVocabulary"]:
        """a and d of some rows of the batch, int64 [n], times their weights [n], as of one row.

        >>> d = OverVocabulary(torch.zeros(2, 0, 3), torch.tensor([[2, 0], [1, 1]]))
        >>> a, d = d.of_rows(torch.ones(2, 2, 1), torch.tensor([1]), torch.tensor([0.5]))
        >>> a.flatten(), d.tokens
        (tensor([0.5000, 0.5000]), tensor([[1, 1]]))
        """
        t = self.logits.shape[1]
        own = a.index_select(0, rows) * weights[:, None, None]
        inputs = torch.cat([own[:, :t].flatten(0, 1), own[:, t:].flatten(0, 1)])
        return inputs[None], OverVocabulary(
            self.logits.index_select(0, rows).flatten(0, 1)[None].to(a.dtype),
            self.tokens.index_select(0, rows).flatten()[None])

    def terms(self, a: Tensor, p: Tensor) -> Tensor:
        """d_tᵀ P a_t of each of them, [b, t + u], for P [v, i].

        >>> d = OverVocabulary(torch.ones(1, 1, 2), torch.tensor([[1]]))
        >>> d.terms(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1.0], [10.0]]))
        tensor([[11., 20.]])
        """
        t = self.logits.shape[1]
        said = (a[:, :t] @ p.T).mul_(self.logits).sum(-1)
        return torch.cat([said, (a[:, t:] * p[self.tokens]).sum(-1)], 1)


OutputGradients = Tensor | OverVocabulary
