"""The sequences of a class as one query: what the others of each class say of a sequence.

The influence of all sequences of a class together is that of the sum of their gradients. Of the sum
a sequence's own part, its self-influence, is taken off again: so two passes give the mean influence
of the *other* sequences of each class on each one, whatever their number.

A few sequences with large gradients, the wrongly labelled among them, rule such a sum. So a second
sum has each gradient divided by ‖v‖, its size as the code knows it: of that the mean is a mean
cosine, to which every sequence of the class contributes alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradindex.influence.exact import Rescorer, collect
from gradindex.influence.gradients import gradient
from gradindex.influence.preconditioned import Gradients, Preconditioned, precondition
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.influence.vocabulary import OutputGradients, OverVocabulary
from gradindex.modules import Module
from gradindex.storage.records import Record
from gradindex.transfers import to_device


@dataclass
class Members:
    """The sequences of a batch that are of one class: its place among the sums, which rows of the
    batch they are, int64 [n], and their weights in the second sum, [n].
    """

    slot: int
    rows: Tensor
    weights: Tensor


class ClassSums:
    """A batch's gradients by class, added up plainly and with weights: [2 c, o, i] by module name.

    >>> m = Module("m", 0, "mlp", d_out=1, d_in=1, bias=False)
    >>> sums = ClassSums([Members(1, torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))], 2)
    >>> sums(m, a=torch.tensor([[[2.0]], [[4.0]]]), d=torch.ones(2, 1, 1))
    >>> {name: part.flatten().tolist() for name, part in sums.parts.items()}
    {('m', 1): [6.0], ('m', 3): [4.0]}
    """

    def __init__(self, members: list[Members], classes: int, dtype: torch.dtype = torch.float32):
        self._members, self._classes, self._dtype = members, classes, dtype
        self.parts: dict[tuple[str, int], Tensor] = {}  # [o, i] by module and place

    def __call__(self, module: Module, a: Tensor, d: OutputGradients) -> None:
        for one in self._members:  # one product a class and sum, and no gradient a row
            rows, weights = one.rows.to(a.device), one.weights.to(a.device)
            if isinstance(d, OverVocabulary):
                for slot, sizes in ((one.slot, torch.ones_like(weights)),
                                    (one.slot + self._classes, weights)):
                    [self.parts[module.name, slot]] = gradient(
                        module, *d.of_rows(a.to(self._dtype), rows, sizes))
                continue
            inputs = a.index_select(0, rows).flatten(0, 1)[None].to(self._dtype)
            plain = d.index_select(0, rows).to(self._dtype)
            weighted = plain * weights[:, None, None]
            for slot, part in ((one.slot, plain), (one.slot + self._classes, weighted)):
                [self.parts[module.name, slot]] = gradient(
                    module, inputs, part.flatten(0, 1)[None])

    def add_to(self, total: Gradients) -> None:
        """Add everything to the sums of all batches, [2 c, o, i] by module name."""
        for (name, slot), part in self.parts.items():
            total[name][slot] += part


def empty_sums(by: Rescorer, classes: int) -> Gradients:
    """Sums of nothing yet, [2 c, o, i] by module name."""
    model = by.model
    return {module.name: torch.zeros(2 * classes, *module.shape, dtype=model.accumulate,
                                     device=model.device_of(module)) for module in by.modules}


def add_classes(
    by: Rescorer, total: Gradients, records: list[Record], weights: np.ndarray, slots: np.ndarray,
    follow: Callable[[int], None],
) -> None:
    """Add the gradients of sequences to the sums of their classes, in one pass.

    `slots` [n] are the places of their classes among the sums, −1 for those that have none there;
    `weights` [n] are those of the second sums. `follow` is told of the tokens that are done.
    """
    model, classes = by.model, len(next(iter(total.values()))) // 2
    chosen = np.flatnonzero(slots >= 0).tolist()

    def run(rows: list[int]) -> ClassSums:
        numbers = [chosen[row] for row in rows]
        batch = model.batch([records[number] for number in numbers])
        members = []
        # told apart on the host, which knows the labels: a GPU is not waited for
        for slot in np.unique(slots[numbers]).tolist():
            mine = np.flatnonzero(slots[numbers] == slot)
            members.append(Members(slot, to_device(mine, model.device), to_device(
                weights[numbers][mine], model.device).to(model.accumulate)))
        sums = ClassSums(members, classes, model.accumulate)
        collect(model, by.modules, batch, sums)
        return sums

    lengths = model.lengths([records[number] for number in chosen])
    for rows, sums in in_batches(lengths, by.batch_tokens, Splits(), run):
        # here, and not in the pass, of which a part may be done when memory runs out
        sums.add_to(total)
        follow(sum(len(records[chosen[row]].tokens) for row in rows))


def as_queries(by: Rescorer, sums: Gradients) -> Preconditioned:
    """The sums as preconditioned queries; `sums` are empty afterwards."""
    queries = Preconditioned({})
    for name in list(sums):  # taken out, so that memory holds one module twice at most
        coordinates = by.ekfac[name].coordinates(sums.pop(name), by.damping)
        queries.add(precondition(by.ekfac, {name: coordinates}))
    return queries


def others_means(
    influence: np.ndarray, own: np.ndarray, labels: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """The mean over the others of each class, [n, c], from the influence of all of it, [n, c].

    `own` [n] is each sequence's own part in the sum of its class, NaN for those that were not added
    up; `labels` [n] are its classes and `counts` [c] says how many were added up of each. Where
    there are no others it is NaN.

    >>> others_means(np.array([[5.0, 8.0]]), np.array([2.0]), np.array([0]), np.array([4, 2]))
    array([[1., 4.]])
    """
    rows = np.flatnonzero(~np.isnan(own))
    total, others = influence.copy(), np.tile(counts.astype(np.float64), (len(influence), 1))
    total[rows, labels[rows]] -= own[rows]  # a sequence says nothing of itself
    others[rows, labels[rows]] -= 1
    means: np.ndarray = np.divide(
        total, others, out=np.full_like(total, np.nan), where=others > 0)
    return means
