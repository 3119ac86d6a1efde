"""An audit: every sequence with what marks it as corrupted, or as harmful to a trusted set.

Of every sequence: its self-influence ‖m̃‖² (large for what the model can only have learned by
heart, such as a wrong label), its loss −log p, the size of its gradient, the fields that were kept;
of a classifier's the mean influence of the other sequences of each class on it (`class_means.py`),
which speak against a wrong label, and of a pair that of all others; and with a trusted set minus
the mean influence on it.

The work is two passes over the sequences, one for next tokens: in parts of the modules and of the
classes where memory doesn't hold all of them at once. Records are never all in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradindex import draws
from gradindex.draws import Stream
from gradindex.errors import InputError
from gradindex.influence.exact import Exact, Rescorer, rescore
from gradindex.influence.preconditioned import Preconditioned, precondition
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.results import Query
from gradindex.storage.records import Record
from gradindex.storage.row_file import digest_of
from search.ask.controls import LARGEST_IN_FULL
from search.ask.make_query import aggregate
from search.ask.settings import Settings
from search.rank.query_gradient import as_row, coordinates_of, form_gradients, together
from search.rank.ray_search import SharedSnapshot
from search.rank.snapshot import Snapshot
from search.study.audit_defaults import MOST_EXACT
from search.study.audit_rows import RowFacts, read_rows
from search.study.audited import Audit
from search.study.class_means import add_classes, as_queries, empty_sums, others_means
from search.study.texts import RECORDS_HELD
from search.study.truth import READINGS

SCORING = 2.0  # what a token takes to score, of what it takes to be added up by class, about


def audit(
    snapshot: Snapshot, settings: Settings, batch_tokens: int, trusted: list[Query] | None = None,
    exact: int | None = MOST_EXACT, progress: Progress | None = None, truth: str | None = None,
    truth_as: str | None = None,
) -> Audit:
    """Audit the sequences of an index, against `trusted` queries or by themselves.

    At most `exact` are scored [None: all]: those with the largest stored norms, against a trusted
    set those that their codes find most harmful. `truth` is the kept field that says what is
    corrupted, as `truth_as` (one of READINGS) [as can be told]. A KeyboardInterrupt while sequences
    are scored ends that, and the rest of them has the code's estimates alone. Raises InputError for
    what can't be audited.
    """
    progress = progress or Progress()
    if isinstance(snapshot, SharedSnapshot):
        raise InputError("an audit scores in this process: it can't go with ray. Open the index "
                         "without it.")
    if exact is not None and exact < 1:
        raise InputError(f"--exact {exact}: expected a number above 0, or None for all.")
    if truth_as is not None and (truth is None or truth_as not in READINGS):
        raise InputError(f"--truth-as {truth_as}: expected {' or '.join(READINGS)}, and with "
                         "--truth the field that it is about.")
    if min(settings.members.values()) < 0:
        raise InputError("--members: an audit goes by sizes of gradients, and with a weight below "
                         "0 there are none. Give weights above 0.")
    if trusted is not None and not trusted:
        raise InputError("--against: there is no query to audit against; give one or more that are "
                         "known to be right, or leave it out.")

    # 1) what the sequences are: every record is read once, and the truth is checked
    rows = read_rows(snapshot, truth, truth_as, progress)

    # 2) who is scored, and whose gradients are added up by class
    trusted = trusted or []
    sums: list[Query] = []
    by_code: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    if trusted:
        sums, by_code = _sums(snapshot, trusted, settings, batch_tokens)
    likely = snapshot.norms if by_code[1] is None else by_code[1]
    most = len(snapshot) if exact is None else min(exact, len(snapshot))
    order = np.argsort(-likely, kind="stable")[:most]  # most suspect first: an end may come early
    summed = _added_up(snapshot, rows, most)

    # 3) the passes
    passes = _Passes(snapshot, settings, batch_tokens, rows, order, summed, sums, progress)
    passes.run()

    # 4) what follows
    done = np.sort(order[passes.done])
    found = passes.of(done)
    by_class, cosines = _class_means(snapshot, rows, done, found, summed)
    harm = harm_cosine = None
    if trusted:
        harm, harm_cosine = (-found.on_trusted / len(trusted)).T
        harm_cosine = harm_cosine * _reciprocal(np.sqrt(found.self_influence))
    return Audit(
        snapshot, settings, rows, done, found.self_influence, -found.log_p, found.predictions,
        np.sqrt(found.squared_norm), by_class, cosines, len(summed), harm, harm_cosine, *by_code,
        trusted=len(trusted), trusted_inside=_inside(snapshot, trusted),
        interrupted=passes.interrupted)


def _sums(
    snapshot: Snapshot, trusted: list[Query], settings: Settings, batch_tokens: int
) -> tuple[list[Query], tuple[np.ndarray, np.ndarray]]:
    """The sum of trusted queries, and that of each over its own size ‖q̃‖; what codes know of both.

    The latter are minus the mean influence on them and minus the mean cosine with them, float64 [N]
    each.
    """
    gradients, _ = form_gradients(
        snapshot, trusted, replace(settings, rescore=False), batch_tokens)
    weights = _reciprocal(np.array([one.norm for one in gradients]))
    alike = [replace(text, weight=text.weight * weight, others=[])
             for query, weight in zip(trusted, weights.tolist(), strict=True)
             for text in query.texts]
    vectors = np.stack([one.vector for one in gradients])
    harm, cosine = -snapshot.code_scores(np.stack(
        [vectors.mean(0), (vectors * weights[:, None]).mean(0)]).astype(np.float32))
    return [aggregate(trusted), aggregate(alike)], (
        harm.astype(np.float64), cosine * _reciprocal(snapshot.norms))


def _added_up(snapshot: Snapshot, rows: RowFacts, most: int) -> np.ndarray:
    """The places of the sequences that are added up by class, ascending: int64 [n].

    All of them, or where not all are scored as many, drawn at random, of each class alike.
    """
    classes = len(rows.classes)
    if not classes:
        return np.zeros(0, np.int64)
    if most == len(snapshot):
        return np.flatnonzero(rows.labels >= 0)
    each, seed = -(-most // classes), snapshot.manifest.code["seed"]
    members = [np.flatnonzero(rows.labels == label) for label in range(classes)]
    return np.sort(np.concatenate([
        mine[draws.choose(Stream.AUDIT_CLASSES, seed, len(mine), each)] for mine in members]))


def _inside(snapshot: Snapshot, trusted: Sequence[Query]) -> int:
    """How many trusted queries are sequences of the index, token by token."""
    # a query of several texts, as a preference has, is no sequence
    texts = [as_row(query) for query in trusted if not query.others]
    if not texts:
        return 0
    theirs = np.stack([digest_of(Record(0, text.tokens, text.scored, [], text.border, text.label,
                                        text.offset)) for text in texts])
    ours = snapshot.contents.rows["digest"][snapshot.contents.places]
    # by the first 64 bits, which leaves few: a set of all would take more than the index's rows
    alike = {tuple(one) for one in ours[np.isin(ours[:, 0], theirs[:, 0])].tolist()}
    return sum(tuple(one) in alike for one in theirs.tolist())


def _class_means(
    snapshot: Snapshot, rows: RowFacts, places: np.ndarray, found: "Scores", summed: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The mean influence of the others of each class, and their mean cosine: [n, c]."""
    if not len(summed):
        return None, None
    labels = rows.labels[places]
    counts = np.bincount(rows.labels[summed], minlength=len(rows.classes))
    own = np.where(np.isin(places, summed), found.self_influence, np.nan)
    means = others_means(found.on_classes, own, labels, counts)
    weights = _reciprocal(snapshot.norms[places])
    cosines = others_means(found.on_weighted, own * weights, labels, counts)
    return means, cosines * _reciprocal(np.sqrt(found.self_influence))[:, None]


def _reciprocal(values: np.ndarray) -> np.ndarray:
    """1 / values, and 0 for 0."""
    return np.asarray(np.divide(1.0, values, out=np.zeros(len(values)), where=values > 0))


@dataclass
class Scores:
    """What the passes add up of sequences, float64 [n] each.

    Those of classes are [n, classes], and `on_trusted` is [n, 2]: on the sum of the trusted, and on
    the sum of each of them over its size.
    """

    log_p: np.ndarray
    predictions: np.ndarray
    self_influence: np.ndarray
    squared_norm: np.ndarray
    on_trusted: np.ndarray
    on_classes: np.ndarray
    on_weighted: np.ndarray

    @classmethod
    def zeros(cls, n: int, classes: int) -> "Scores":
        """Of n sequences, nothing yet."""
        return cls(np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n), np.zeros((n, 2)),
                   np.zeros((n, classes)), np.zeros((n, classes)))


class _Passes:
    """The passes over the sequences at `order`, whose scores they add up, first to last.

    `summed` are the places that are added up by class, `trusted` are the two sums of the trusted
    queries, if there are any.
    """

    def __init__(
        self, snapshot: Snapshot, settings: Settings, batch_tokens: int, rows: RowFacts,
        order: np.ndarray, summed: np.ndarray, trusted: list[Query], progress: Progress,
    ):
        self.snapshot, self.settings, self.batch_tokens = snapshot, settings, batch_tokens
        self.rows, self.order, self.summed, self.trusted = rows, order, summed, trusted
        self.progress, self.interrupted, self.part = progress, False, ""
        self.classes = len(rows.classes)
        self.done = np.zeros(len(order), dtype=bool)
        self.scores = Scores.zeros(len(order), self.classes)
        self.weights = _reciprocal(snapshot.norms)

    def of(self, places: np.ndarray) -> Scores:
        """The scores of some places that are done."""
        rank = np.zeros(len(self.snapshot), np.int64)
        rank[self.order] = np.arange(len(self.order))
        return Scores(*(values[rank[places]] for values in vars(self.scores).values()))

    def run(self) -> None:
        """Run all passes. An interrupt counts from the last pass on: before, no score is whole."""
        parts = list(self._parts())
        self.snapshot.load()
        for number, (modules, first, last) in enumerate(parts):
            model, ekfac = self.snapshot.model, self.snapshot.ekfac
            by = Rescorer(model, modules, ekfac, self.settings.damping, self.batch_tokens)
            left = len(parts) - number - 1
            self.part = f" {number + 1}/{len(parts)}" if len(parts) > 1 else ""
            queries = self._queries(by, first, last, left)
            try:
                self._score(by, queries, first, last, left)
            except KeyboardInterrupt:
                if left or not self.done.any():
                    raise
                self.interrupted = True
                self.progress.finish()

    def _parts(self) -> Iterator[tuple[list[Module], int, int]]:
        """Modules and classes (from the first to before the last) that are taken together."""
        snapshot = self.snapshot
        room = snapshot.allowance.part(1 / 4, LARGEST_IN_FULL) // snapshot.model.accumulate.itemsize
        for modules in together(snapshot, self.settings.modules):
            # of each class two sums, and a batch's part of them
            at_once = max(1, room // (4 * sum(module.size for module in modules)))
            for first in range(0, max(1, self.classes), at_once):
                yield modules, first, min(self.classes, first + at_once)

    def _queries(self, by: Rescorer, first: int, last: int, left: int) -> Preconditioned | None:
        """The sums of these classes as queries, plain and weighted, and behind them the trusted."""
        queries = []
        if self.classes:
            queries.append(self._class_queries(by, first, last, left))
        if self.trusted and not first:
            coordinates = coordinates_of(
                self.snapshot, self.trusted, by.modules, by.damping, by.batch_tokens)
            queries.append(Preconditioned(precondition(by.ekfac, coordinates)))
        return Preconditioned.join(queries) if queries else None

    def _class_queries(self, by: Rescorer, first: int, last: int, left: int) -> Preconditioned:
        """A pass over the sequences of some classes, which adds their gradients up."""
        labels = self.rows.labels
        places = self.summed[(labels[self.summed] >= first) & (labels[self.summed] < last)]
        follow = self._started("what others say", places, SCORING * self._tokens(self.order) * (
            1 + left) + left * self._tokens(self.summed))
        sums = empty_sums(by, last - first)
        for some, records in self._records(places):
            add_classes(by, sums, records, self.weights[some], labels[some] - first, follow)
        self.progress.finish()
        return as_queries(by, sums)

    def _score(
        self, by: Rescorer, queries: Preconditioned | None, first: int, last: int, left: int
    ) -> None:
        """A pass over the sequences at `order`, which adds to their scores."""
        follow = self._started("exact", self.order, left * (
            self._tokens(self.order) + self._tokens(self.summed) / SCORING))
        begun = 0
        for _, records in self._records(self.order):
            # sizes are those of the modules, once for all classes
            for batch in rescore(by, queries, records, sizes=not first, one_chunk=True):
                for number, exact in batch:
                    self._add(begun + number, records[number], exact, first, last)
                    self.done[begun + number] = not left
                follow(sum(len(records[number].tokens) for number, _ in batch))
            begun += len(records)
        self.progress.finish()

    def _add(self, number: int, record: Record, exact: Exact, first: int, last: int) -> None:
        scores, influence, count = self.scores, exact.influence, last - first
        scores.on_classes[number, first:last] += influence[:count]
        scores.on_weighted[number, first:last] += influence[count : 2 * count]
        if self.trusted and not first:
            scores.on_trusted[number] += influence[2 * count :]
        scores.log_p[number] = exact.log_p
        scores.predictions[number] = self.snapshot.objective.predictions(record)
        scores.self_influence[number] += exact.self_influence or 0.0
        scores.squared_norm[number] += exact.squared_norm or 0.0

    def _started(self, stage: str, places: np.ndarray, ahead: float) -> Callable[[int], None]:
        """Begin a stage; what is given back is told of tokens that are done.

        `ahead` is what comes after the stage, in tokens of it.
        """
        total = self._tokens(places)
        self.progress.start(f"{stage}{self.part}", total, "tokens")
        done = 0

        def follow(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.progress.update(tokens)
            if self.progress.measured:
                self.progress.say_expected(self.progress.seconds_each() * (total - done + ahead))

        return follow

    def _tokens(self, places: np.ndarray) -> int:
        return int(self.rows.lengths[places].sum(dtype=np.int64))

    def _records(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, list[Record]]]:
        """Some places and their records at a time."""
        for first in range(0, len(places), RECORDS_HELD):
            some = places[first : first + RECORDS_HELD]
            yield some, self.snapshot.records(some.tolist())
