"""What an audit found of every sequence, the signals that may tell the corrupted, and their order.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from search.ask.settings import Settings
from search.rank.snapshot import Snapshot
from search.study.audit_rows import RowFacts
from search.study.truth import Detection, detection

# what sequences are ranked by where no trusted set is given, by task: what the benchmark of
# corrupted labels finds best
RANKED_BY = {"causal": "self-influence"}
OTHERWISE = "all others, cosine"
AGAINST = "harm, cosine"  # where one is given
RIVALS = ("loss", "gradient norm", "self-confidence")
CHANCE = "random"

# signals in words, each larger for more suspect sequences
MEANINGS = {
    "self-influence": "what a sequence does for its own log p, large for what a model can only "
                      "have learned by heart",
    "self-influence per gradient": "self-influence over the gradient's squared length",
    "all others": "how much all other sequences speak against it: minus their mean influence on it",
    "own class": "how much the other sequences of its own class speak against it: minus their mean "
                 "influence on it",
    "least class": "how much the class that speaks most against it does: minus the least of the "
                   "classes' mean influence on it",
    "best other class": "the best mean influence of another class on it less that of its own class",
    "all others, cosine": "how much all other sequences speak against it: minus their mean cosine "
                          "with it",
    "own class, cosine": "how much the other sequences of its own class speak against it: minus "
                         "their mean cosine with it",
    "least class, cosine": "how much the class that speaks most against it does: minus the least "
                           "of the classes' mean cosine with it",
    "best other class, cosine": "the best mean cosine of another class with it less that of its "
                                "own",
    "loss": "−log p of what it was to teach, in nats",
    "gradient norm": "the length of its gradient",
    "self-confidence": "how unlikely the model finds what it was to teach: 1 − p, of several "
                       "predictions their geometric mean",
    "harm": "minus its mean influence on the trusted set",
    "harm, cosine": "minus its mean cosine with the trusted set",
}


@dataclass
class Audit:
    """What was found of the sequences of an index.

    `places` int64 [n], ascending, are those that were scored exactly, of all N; what follows is of
    these. `self_influence` is ‖m̃‖², `loss` −log p in nats, `predictions` how many tokens that is
    of (1 but for causal models), `gradient_norm` ‖∇m‖, all [n]. `by_class` [n, classes] is the mean
    influence of the other sequences of each of `rows.classes`, NaN where there are none, and
    `cosines` the mean of that influence over both sizes, those of the others as the code knows
    them; both are over `summed` sequences. `harm` [n] is minus the mean influence on the trusted
    set, `harm_cosine` [n] minus the mean cosine: each influence over both sizes, ‖m̃‖ ‖q̃‖. Each is
    None where there is none.

    Of all N there are the code's estimates: `self_by_code`, `harm_by_code`, `harm_cosine_by_code`.
    """

    snapshot: Snapshot
    settings: Settings
    rows: RowFacts
    places: np.ndarray
    self_influence: np.ndarray
    loss: np.ndarray
    predictions: np.ndarray
    gradient_norm: np.ndarray
    by_class: np.ndarray | None = None
    cosines: np.ndarray | None = None
    summed: int = 0
    harm: np.ndarray | None = None
    harm_cosine: np.ndarray | None = None
    harm_by_code: np.ndarray | None = None
    harm_cosine_by_code: np.ndarray | None = None
    trusted: int = 0
    trusted_inside: int = 0
    interrupted: bool = False

    def __len__(self) -> int:
        """N: every sequence."""
        return len(self.snapshot)

    # ---- what tells the corrupted

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's classes."""
        return self.snapshot.manifest.plan.labels

    @cached_property
    def self_by_code(self) -> np.ndarray:
        """The code's estimate of self-influence, of every sequence: float64 [N].

        It is ‖v‖² times what exact values are of it, in the median of those that were scored.
        """
        # a code's two sides are whitened by A and S, whose eigenvalues' products aren't quite Λ:
        # sizes are told apart by ‖v‖ well, but may all be off by one factor
        squares = self.snapshot.norms**2
        there = squares[self.places] > 0
        ratios = self.self_influence[there] / squares[self.places][there]
        return np.asarray(squares * (np.median(ratios) if len(ratios) else 1.0))

    @property
    def ranked_by(self) -> str:
        """The signal that sequences are ranked by."""
        return AGAINST if self.harm is not None else RANKED_BY.get(
            self.snapshot.manifest.task.name, OTHERWISE)

    @cached_property
    def suspicion(self) -> np.ndarray:
        """What the sequences at `places` are ranked by: float64 [n]."""
        return self.signals()[self.ranked_by]

    def signals(self) -> dict[str, np.ndarray]:
        """What may tell the corrupted at `places` [n], by name (MEANINGS), larger for more suspect.
        """
        per_gradient = np.divide(self.self_influence, self.gradient_norm**2,
                                 out=np.zeros_like(self.loss), where=self.gradient_norm > 0)
        found = {"self-influence": self.self_influence, "self-influence per gradient": per_gradient}
        counts = np.bincount(self.rows.labels.clip(min=0), minlength=len(self.rows.classes))
        for means, suffix in ((self.by_class, ""), (self.cosines, ", cosine")):
            if means is not None:
                found |= {f"{name}{suffix}": values for name, values in
                          _against(means, self.rows.labels[self.places], counts).items()}
        if self.harm is not None and self.harm_cosine is not None:
            found |= {"harm": self.harm, "harm, cosine": self.harm_cosine}
        confidence = np.exp(-self.loss / np.maximum(1, self.predictions))
        return found | {"loss": self.loss, "gradient norm": self.gradient_norm,
                        "self-confidence": 1 - confidence}

    @cached_property
    def order(self) -> np.ndarray:
        """All places, most suspect first: int64 [N].

        Those that were not scored come after those that were, in the order of what their codes say.
        """
        rest = np.ones(len(self), dtype=bool)
        rest[self.places] = False
        others = np.flatnonzero(rest)
        estimates = self.self_by_code if self.harm_cosine_by_code is None else \
            self.harm_cosine_by_code
        # stable: of equal ones the first of the data is first
        return np.concatenate([
            self.places[np.argsort(-self.suspicion, kind="stable")],
            others[np.argsort(-estimates[others], kind="stable")]])

    # ---- against the truth

    @cached_property
    def known(self) -> np.ndarray:
        """Which of the sequences at `places` the truth is known of: bool [n]."""
        truth = self.rows.truth
        assert truth is not None
        return np.asarray(truth.known[self.places])

    @cached_property
    def corrupted(self) -> np.ndarray:
        """Which of those of `known` truth are corrupted: bool [known]."""
        truth = self.rows.truth
        assert truth is not None
        return np.asarray(truth.corrupted[self.places][self.known])

    @cached_property
    def detections(self) -> list[Detection]:
        """How well each signal finds the corrupted: the one ranked by first, rivals last.

        Empty without a truth, or where those that were scored are all alike.
        """
        if self.rows.truth is None or len(np.unique(self.corrupted)) < 2:
            return []
        values = {name: one[self.known] for name, one in self.signals().items()}
        first = {self.ranked_by: values.pop(self.ranked_by)}
        values[CHANCE] = np.zeros(len(self.corrupted))
        return [detection(name, one, self.corrupted) for name, one in (first | values).items()]

    # ---- in other forms: what shows an audit knows audits, not the other way round

    def to_list(self) -> list[dict[str, Any]]:
        """A dictionary for each sequence, most suspect first."""
        return list(_shown("audit_table").table(self).rows())

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each sequence. Raises ImportError without pandas."""
        import pandas  # late: nothing else needs it, so it is no requirement

        return pandas.DataFrame(
            self.to_list(), columns=list(_shown("audit_table").table(self).columns))

    def write(self, path: str | Path) -> None:
        """Write it as .csv, .parquet, .json, .jsonl or .html. Raises InputError for another name.
        """
        _shown("audit_forms").write(self, Path(path))

    def _repr_html_(self) -> str:
        return str(_shown("audit_page").fragment(self))


def _shown(name: str) -> Any:
    """A module that shows audits."""
    return importlib.import_module(f"search.study.{name}")


def _against(
    means: np.ndarray, labels: Sequence[int] | np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """What the classes' means [n, c] say against sequences of these classes: float64 [n] each.

    `counts` [c] says how many sequences a class has, itself among them. A class without others says
    nothing.

    >>> said = _against(np.array([[-0.5, 0.25]]), [0], np.array([3, 4]))  # 2 · −.5 + 4 · .25 = 0
    >>> {name: values.tolist() for name, values in said.items()}
    {'all others': [-0.0], 'own class': [0.5], 'least class': [0.5], 'best other class': [0.75]}
    """
    said = np.nan_to_num(means)
    rows = np.arange(len(said))
    own = said[rows, labels]
    # all of an index weigh alike, however many of each class were added up
    total = (said * counts).sum(1) - own
    everyone = {"all others": -total / max(1, counts.sum() - 1)}
    if said.shape[1] == 1:
        return everyone
    others = said.copy()
    others[rows, labels] = -np.inf
    return everyone | {"own class": -own, "least class": -said.min(1),
                       "best other class": others.max(1) - own}
