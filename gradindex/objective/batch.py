"""Rows of data as a model takes them: token ids in batches, and what is known of each row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradindex.modules import Module
from gradindex.transfers import to_device


class Row(Protocol):
    """What an objective reads of a sequence: its token ids, and what is to be said of them.

    `tokens` int32 [n] and the mask `scored` bool [n]. Where the model reads two texts together
    (two sentences of a class, the two answers of a pair), `border` is where the second begins.
    `label` is the class of a text. `offset` is what the difference of a pair's scores has to
    exceed: a margin, or what a reference makes of the same difference.
    """

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def scored(self) -> np.ndarray: ...

    @property
    def border(self) -> int | None: ...

    @property
    def label(self) -> int | None: ...

    @property
    def offset(self) -> float: ...


AnyRow = TypeVar("AnyRow", bound=Row)


class Text(NamedTuple):
    """A row that isn't indexed, such as a query's; see `Row`."""

    tokens: np.ndarray
    scored: np.ndarray
    border: int | None = None
    label: int | None = None
    offset: float = 0.0


@dataclass
class Batch:
    """Rows padded on the right, as a model takes them; `Batch.of` makes one.

    `tokens` int64 [b, m] are token ids. A row may be several texts that the network reads apart:
    then it has them one behind the other, each padded to m / `texts` tokens. `real` bool [b, m], on
    the host, is false for padding; `mask` int64 [b, m] says the same to a network that reads both
    ways, and is None without padding, `types` int64 [b, m] which of two sentences a token is of.

    `targets` are what is to be predicted: int64 [b, m] the next token at each position or UNSCORED,
    `unscored` int64 [n] the numbers of the latter among all b·m; int64 [b] classes; or, as
    `offsets` are beside next tokens, float64 [b] the offsets of pairs.

    `positions` int64 [b, n], by name, are of modules that don't see every token once, in order:
    fused experts, maps that run more than once, or once a text. They say at which position of its
    row each of the module's n inputs stands, −1 for padding.
    """

    tokens: Tensor
    targets: Tensor
    real: np.ndarray
    unscored: Tensor | None = None
    offsets: Tensor | None = None
    texts: int = 1
    mask: Tensor | None = None
    types: Tensor | None = None
    positions: dict[str, Tensor] = field(default_factory=dict)
    # the numbers of real inputs among all of a module's, "" being those that have no positions; of
    # what has only real ones, none
    _real_inputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tokens: np.ndarray, targets: np.ndarray, real: np.ndarray, device: torch.device,
        texts: int = 1,
    ) -> "Batch":
        """The batch of tokens and real [b, m] with their targets on a device.

        >>> tokens, real = np.array([[5, 6, 0]]), np.array([[True, True, False]])
        >>> batch = Batch.of(tokens, np.array([1]), real, torch.device("cpu"))
        >>> batch.tokens, batch.targets
        (tensor([[5, 6, 0]]), tensor([1]))
        """
        batch = cls(to_device(tokens, device), to_device(targets, device), real, texts=texts)
        batch._note_real("", real)
        return batch

    def by_text(self, tensor: Tensor) -> Tensor:
        """A tensor [b, m] as the network takes it, a text a row: [b · texts, m / texts].

        >>> batch = Batch.of(*np.ones((3, 1, 4), dtype=np.int64), torch.device("cpu"), texts=2)
        >>> batch.by_text(torch.tensor([[1, 2, 3, 4]]))
        tensor([[1, 2],
                [3, 4]])
        """
        return tensor.view(len(tensor) * self.texts, -1)

    def starts(self) -> np.ndarray:
        """At which position of its row each text begins: int64 [b, texts].

        >>> Batch.of(*np.ones((3, 1, 4), dtype=np.int64), torch.device("cpu"), texts=2).starts()
        array([[0, 2]])
        """
        rows, m = self.tokens.shape
        return np.broadcast_to(np.arange(0, m, m // self.texts), (rows, self.texts))

    def set_positions(self, name: str, positions: np.ndarray) -> None:
        """Note at which position each of a module's inputs stands, int64 [b, n]; −1 for padding."""
        self.positions[name] = to_device(positions, self.tokens.device)
        self._note_real(name, np.take_along_axis(self.real, positions.clip(min=0), 1)
                        & (positions >= 0))

    def _note_real(self, name: str, real: np.ndarray) -> None:
        # numbers that the host finds: a GPU that finds them in a mask keeps the host waiting
        if not real.all():
            self._real_inputs[name] = to_device(np.flatnonzero(real), self.tokens.device)

    def real_inputs(self, module: Module, a: Tensor) -> Tensor:
        """Those of a module's inputs a [b, n, i] that are of real tokens: [r, i]."""
        real = self._real_inputs.get(module.name if module.name in self.positions else "")
        # picking rows out copies them, which a batch without padding can do without
        inputs = a.flatten(0, 1)
        return inputs if real is None else inputs.index_select(0, real.to(a.device))

    def by_position(self, module: Module, terms: Tensor) -> Tensor:
        """Terms of a module's inputs, [b, n], added up by the position of each: [b, m].

        >>> batch = Batch.of(*np.ones((3, 1, 3), dtype=np.int64), torch.device("cpu"))
        >>> batch.set_positions("expert", np.array([[2, 2, -1]]))
        >>> batch.by_position(Module("expert", 0, "mlp", 1, 1, False), torch.tensor([[1, 2, 0]]))
        tensor([[0, 0, 3]])
        """
        positions = self.positions.get(module.name)
        if positions is None:
            return terms
        return terms.new_zeros(self.tokens.shape).scatter_add_(
            1, positions.clamp(min=0).to(terms.device), terms)  # the terms of padding are zero


def halves(array: np.ndarray, border: int | None) -> tuple[np.ndarray, np.ndarray]:
    """An array of a row of two texts, before its border and from there on."""
    assert border is not None
    return array[:border], array[border:]


def padded(
    rows: Sequence[Row], texts: int = 1, padding: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of rows, int64 [b, m], and which are real, bool [b, m]; each of `texts` texts.

    >>> one = Text(np.array([5, 6, 7], np.int32), np.ones(3, bool), border=1)
    >>> tokens, real = padded([one], texts=2)
    >>> tokens.tolist(), real.astype(int).tolist()
    ([[5, 0, 6, 7]], [[1, 0, 1, 1]])
    """
    parts = [part for row in rows for part in (
        [row.tokens] if texts == 1 else halves(row.tokens, row.border))]
    shape = len(parts), max(map(len, parts))
    tokens, real = np.full(shape, padding, np.int64), np.zeros(shape, dtype=bool)
    for number, part in enumerate(parts):
        tokens[number, : len(part)], real[number, : len(part)] = part, True
    return tokens.reshape(len(rows), -1), real.reshape(len(rows), -1)
