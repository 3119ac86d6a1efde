"""An audit: every sequence with what marks it as corrupted, or as harmful to a trusted set.

Of every sequence: its self-influence ‖m̃‖² (large for what the model can only have learned by heart,
such as a wrong label), its loss −log p, the size of its gradient, the fields that were kept; of a
classifier's the mean influence of the other sequences of each class on it. What others of its own
class say against a label is the strongest sign that it is wrong.

The influence of all sequences of a class is one query, the sum of their gradients. So an audit is
two passes over the sequences, whatever their number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gradindex.errors import InputError
from gradindex.influence.exact import Exact, Rescorer, collect, rescore
from gradindex.influence.gradients import gradient
from gradindex.influence.preconditioned import Gradients, Preconditioned, precondition
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.results import Query
from gradindex.storage.records import Record
from search.ask.settings import Settings
from search.rank.query_gradient import form_gradients
from search.rank.snapshot import Snapshot

MOST_EXACT = 20_000  # sequences whose self-influence is exact, unless all are
AT_ONCE = 4096  # records held together
INSPECTED = (0.05, 0.1, 0.2, 0.3)  # shares of which is said how much they find


@dataclass
class Audit:
    """What was found of every sequence that was scored, by place.

    `suspicion` [n] is what is ranked by, largest first: see `ranked_by`. `self_influence`, `loss`
    (in nats) and `gradient_norm` [n] are exact; `by_class` [n, classes] is the mean influence of
    the other sequences of each class on it, and `harm` [n] minus the mean influence on trusted
    queries, each None where there is none. `total` sequences are in the index.
    """

    places: list[int]
    records: list[Record]
    total: int
    task: str
    labels: tuple[str, ...]
    self_influence: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    by_class: np.ndarray | None
    harm: np.ndarray | None
    ranked_by: str
    suspicion: np.ndarray
    texts: list[str] = field(default_factory=list)

    @property
    def order(self) -> np.ndarray:
        """The numbers of the sequences, most suspect first; of equal ones the first of the data."""
        return np.argsort(-self.suspicion, kind="stable")

    def signals(self) -> dict[str, np.ndarray]:
        """What may tell corrupted sequences, by name, each larger for more suspect ones."""
        found = {"self-influence": self.self_influence, "loss": self.loss,
                 "gradient norm": self.gradient_norm}
        if self.by_class is not None:
            found |= {"own class": -self._own_class(), "least class": -self.by_class.min(1)}
        return found | ({} if self.harm is None else {"harm": self.harm})

    def _own_class(self) -> np.ndarray:
        assert self.by_class is not None
        own = np.array([record.label for record in self.records])
        return np.asarray(self.by_class[np.arange(len(own)), own])


class ClassSums:
    """Adds up a batch's gradients by class: [classes, o, i] by module name."""

    def __init__(self, sums: Gradients, labels: Tensor):
        self._sums, self._labels = sums, labels

    def __call__(self, module: Module, a: Tensor, d: Tensor) -> None:
        total = self._sums[module.name]
        for label in self._labels.unique().tolist():  # one product a class, and no gradient a row
            rows = self._labels == label
            one = (a[rows].flatten(0, 1)[None], d[rows].flatten(0, 1)[None])
            total[label] += gradient(module, *(part.to(total.dtype) for part in one))[0]


def audit(
    snapshot: Snapshot, settings: Settings, batch_tokens: int, trusted: list[Query] | None,
    exact: int | None, progress: Progress,
) -> Audit:
    """Audit the sequences of an index, against `trusted` queries or by themselves.

    At most `exact` are scored [all up to MOST_EXACT; beyond, those with the largest stored norms].
    Raises InputError for an index without sequences that can be scored.
    """
    places = _chosen(snapshot, exact)
    by = Rescorer(snapshot.model, settings.modules, snapshot.ekfac, settings.damping, batch_tokens)
    task, labels = snapshot.manifest.task.name, snapshot.manifest.plan.labels
    records = [record for part in _parts(snapshot, places) for record in part]
    passes = 2 if task == "classification" else 1
    progress.start("audit", passes * len(records), "sequences")
    queries, counts = Preconditioned({}), np.zeros(0)
    if task == "classification":
        sums, counts = _class_sums(by, records, len(labels), progress)
        queries = Preconditioned(_preconditioned(by, sums))
    if trusted is not None:
        _, asked = form_gradients(snapshot, trusted, settings, batch_tokens)
        queries = _beside(queries, asked, by) if counts.size else asked
    found = _score(by, queries, records, progress, empty=not (counts.size or trusted))
    progress.finish()
    influence = np.stack([one.influence for one in found]) if counts.size or trusted else \
        np.zeros((len(found), 0))
    own = np.array([one.self_influence for one in found])
    by_class = _others(influence[:, : len(counts)], own, records, counts) if counts.size else None
    harm = -influence[:, len(counts):].mean(1) if trusted is not None else None
    norms = np.sqrt(np.array([one.squared_norm for one in found], dtype=np.float64))
    name, suspicion = _ranked(own, by_class, harm, records)
    return Audit(places, records, len(snapshot), task, labels, own,
                 -np.array([one.log_p for one in found]), norms, by_class, harm, name, suspicion)


def _chosen(snapshot: Snapshot, exact: int | None) -> list[int]:
    most = MOST_EXACT if exact is None else exact
    if not len(snapshot):
        raise InputError("the index has no sequence to audit.")
    if len(snapshot) <= most:
        return list(range(len(snapshot)))
    return sorted(np.argsort(-snapshot.norms, kind="stable")[:most].tolist())


def _parts(snapshot: Snapshot, places: Sequence[int]) -> Iterator[list[Record]]:
    for first in range(0, len(places), AT_ONCE):
        yield snapshot.records(places[first : first + AT_ONCE])


def _class_sums(
    by: Rescorer, records: list[Record], classes: int, progress: Progress
) -> tuple[Gradients, np.ndarray]:
    """The sum of the gradients of each class, [classes, o, i] by module, and how many there are."""
    model = by.model
    sums = {module.name: torch.zeros(classes, *module.shape, dtype=model.accumulate,
                                     device=model.device_of(module)) for module in by.modules}

    def run(rows: list[int]) -> int:
        batch = model.batch([records[row] for row in rows])
        collect(model, by.modules, batch, ClassSums(sums, batch.targets))
        return len(rows)

    for rows, _ in in_batches(model.lengths(records), by.batch_tokens, Splits(), run):
        progress.update(len(rows))
    return sums, np.bincount([record.label or 0 for record in records], minlength=classes)


def _preconditioned(by: Rescorer, sums: Gradients) -> Gradients:
    return precondition(by.ekfac, {
        name: by.ekfac[name].coordinates(g, by.damping) for name, g in sums.items()})


def _beside(one: Preconditioned, other: Preconditioned, by: Rescorer) -> Preconditioned:
    """The queries of both; those of low rank as the matrices that they stand for."""
    return Preconditioned({
        module.name: torch.cat([one.of(module).matrices(), other.of(module).matrices()])
        for module in by.modules})


def _score(
    by: Rescorer, queries: Preconditioned, records: list[Record], progress: Progress, empty: bool
) -> list[Exact]:
    found: list[Exact | None] = [None] * len(records)
    if empty:  # nothing is asked, and sizes are wanted all the same
        queries = Preconditioned({module.name: torch.zeros(
            1, *module.shape, dtype=by.model.accumulate, device=by.model.device_of(module))
            for module in by.modules})
    for batch in rescore(by, queries, records, sizes=True, one_chunk=True):
        for number, exact in batch:
            found[number] = exact
        progress.update(len(batch))
    return [exact for exact in found if exact is not None]


def _others(
    influence: np.ndarray, own: np.ndarray, records: list[Record], counts: np.ndarray
) -> np.ndarray:
    """The mean influence of the *other* sequences of each class, [n, classes]."""
    labels = np.array([record.label for record in records])
    rows = np.arange(len(labels))
    total, others = influence.copy(), np.broadcast_to(counts, influence.shape).astype(float).copy()
    total[rows, labels] -= own  # a sequence says nothing of itself
    others[rows, labels] -= 1
    means: np.ndarray = np.divide(total, others, out=np.zeros_like(total), where=others > 0)
    return means


def _ranked(
    own: np.ndarray, by_class: np.ndarray | None, harm: np.ndarray | None, records: list[Record]
) -> tuple[str, np.ndarray]:
    """What sequences are ranked by, and its value, larger for more suspect ones."""
    if harm is not None:
        return "harm", harm
    if by_class is None:
        return "self-influence", own
    labels = np.array([record.label for record in records])
    own_class: np.ndarray = by_class[np.arange(len(labels)), labels]
    return "own class", -own_class
