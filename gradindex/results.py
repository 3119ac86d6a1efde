"""What a search is asked and what it answers.

The names of fields are those of the saved JSON: they change only with SCHEMA.
"""

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from gradindex.meaning import units_of
from gradindex.terminal import json_text

UNSCORED = -100  # the label of a token that isn't scored, as in transformers
SCHEMA = 2  # of the JSON of a result
UNSURE = 2  # standard errors from the index's mean, within which a group may be like all others
FEW_IN_GROUP = 5  # sequences: smaller groups come after the others
GENERIC = 0.25  # of the background queries: a sequence that comes up for as many is generic


@dataclass
class Query:
    """What is asked about: a text, some of whose tokens are scored.

    `tokens` [t] are token ids, `labels` [t] the same, with −100 where a token isn't scored;
    `token_texts` [t] are their texts and `token_log_p` [t] log p in nats, 0 where not scored.
    `others` are further texts whose log p is added, each times its own `weight`: −1 for the
    completion that this one is compared with (`versus`), 1 for the members of an aggregate.

    Of other tasks than next tokens `labels` are the texts' own tokens; what is asked about is all
    of the row, whose log p in nats (of a single answer its reward) is `row_log_p`. `label` is the
    number of a class and `label_name` its name; `border` is where the second text begins, and
    `offset` what the difference of a pair's scores has to exceed. `unit` is that of `row_log_p`:
    nats, or reward.

    >>> query = Query([7, 8, 9], [-100, 8, 9], token_log_p=[0.0, -1.0, -2.0], weight=0.5)
    >>> query.scored, query.log_p
    (2, -1.5)
    """

    tokens: list[int]
    labels: list[int]
    prompt: str | None = None
    completion: str | None = None
    generated: bool = False  # the completion is the model's own greedy continuation
    id: Any = None
    weight: float = 1.0
    others: list["Query"] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the user should know of how it was read
    token_texts: list[str] = field(default_factory=list)
    token_log_p: list[float] = field(default_factory=list)
    label: int | None = None
    label_name: str | None = None
    border: int | None = None
    offset: float = 0.0
    row_log_p: float | None = None
    unit: str = "nats"

    @property
    def texts(self) -> list["Query"]:
        """This text and the others."""
        return [self, *self.others]

    @property
    def scored(self) -> int:
        """How many predictions log p sums over: tokens, or of other tasks one."""
        return 1 if self.row_log_p is not None else sum(
            map(self.is_scored, range(len(self.labels))))

    def is_scored(self, position: int) -> bool:
        """Whether log p counts the token at a position of the text."""
        return position > 0 and self.labels[position] != UNSCORED  # nothing predicts the first

    @property
    def scored_tokens(self) -> list[int]:
        """The token ids that have a label, of all texts: what the TF-IDF filter looks for.

        A first token may be among them, though nothing predicts it.
        """
        return [token for text in self.texts
                for token, label in zip(text.tokens, text.labels, strict=True) if label != UNSCORED]

    @property
    def log_p(self) -> float:
        """Σ of log p(completion | prompt) in nats, each text times its weight."""
        return float(sum(text.weight * text.own_log_p for text in self.texts))

    @property
    def own_log_p(self) -> float:
        """log p of this text alone in nats, without its weight."""
        return sum(self.token_log_p) if self.row_log_p is None else self.row_log_p


@dataclass
class Check:
    """What one more copy of a hit changes along its own step, beside its first-order nats.

    `scale` is α, the length of the step in units of (Ĝ+λ)⁻¹g / N, with its standard error: what the
    curvature that was measured along it leaves of EK-FAC's step. In nats of the query, `nats` is α
    times the hit's first-order nats, and `measured` by how much log p changed when the weights made
    that step; `own` is what the hit's own log p changed by. `wrong` says what isn't as it should
    be.
    See `search/study/check.py`.

    >>> check = Check(scale=0.15, scale_error=0.01, nats=1.2, measured=1.1, own=3.0)
    >>> check.wrong
    []
    """

    scale: float
    scale_error: float
    nats: float
    measured: float
    own: float
    wrong: list[str] = field(default_factory=list)


@dataclass
class Hit:
    """A training sequence and its influence on the query.

    Size: `influence` is exact where `exact` is true, else the code's estimate; positive: one more
    copy makes the completion more likely. `nats` is influence / N_train: what one more copy would
    add to log p(completion | prompt), to first order; None where that is more than log p has room
    for, or N_train was not given: `no_nats` says which ("beyond first order", "nats unknown").
    `self_influence` is ‖m̃‖², m̃ = (G+λ)^−½ ∇m; `cosine` is influence / (‖q̃‖ ‖m̃‖), the same for
    every scale of the sequence's gradient; `relatif` is influence / ‖(G+λ)⁻¹ ∇m‖ (θ-RelatIF,
    Barshan et al. 2020).

    Shares: `token_influence` [t], `layer_influence` [layers] and `token_layer_influence` [t,
    layers] each sum to `influence`. Token t's entry counts the gradient that enters at t, so it
    belongs to predicting what follows t (Grosse et al. 2023, eq. 31). Layers are those of
    `Result.layers`. `kind_influence` sums influence by kind of module (mlp, attention, adapter),
    `member_influence` by model, each as it counts in the score: "last" and the other members.

    Comparison: `percentile` is the share of a random sample of the index that ranks no higher.
    `lexical` is the share of the query's tokens that the sequence holds too, 0 to 1, each token
    once and weighed by how rare it is in that sample. `generic_rate` is the share of the index's
    background queries (some of its own sequences, as queries) for which the sequence's code score
    is among the highest hundredth, or the lowest where `influence` is negative: 0.01 by chance. It
    is that of the build's damping and of all modules; None where the index has no background
    queries, or none but of equal sequences.

    Of other tasks than next tokens: `label` is the name of the sequence's class, `border` the token
    at which the second of its texts begins (of a pair the rejected). `text` is all that it holds;
    of two texts `text_b` is the second, of a pair `chosen` and `rejected` are its sides, each with
    the prompt. `log_p` is log p of all of the
    sequence in nats, of its label or preference; None where it wasn't scored exactly. `check` is
    what was measured of its first-order nats, where that was asked for.

    Origin: `start` and `end` are characters of the document's text (−1 where it came as tokens).
    `duplicates` are the ids of equal sequences; `near_duplicates` those of hits further down that
    share most of their wording with this one, and have its id as `near`.

    >>> hit = Hit(id=3, influence=250.0, nats=250.0 / 10_000, exact=True, code_score=240.0,
    ...           code_rank=1, text="Ice melts.", source="a.jsonl", row=4, document=3, start=0,
    ...           end=10, generic_rate=0.3)
    >>> hit.nats, hit.generic
    (0.025, True)
    """

    id: int
    influence: float
    nats: float | None
    exact: bool
    code_score: float
    code_rank: int
    text: str
    source: str
    row: int
    document: int
    start: int
    end: int
    self_influence: float | None = None
    cosine: float | None = None
    relatif: float | None = None
    tfidf_rank: int | None = None
    user_id: Any = None
    fields: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    near_duplicates: list[int] = field(default_factory=list)
    near: int | None = None
    no_nats: str | None = None
    percentile: float | None = None
    lexical: float | None = None
    generic_rate: float | None = None
    label: str | None = None
    border: int | None = None
    log_p: float | None = None
    check: Check | None = None
    text_b: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tokens: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    token_influence: list[float] = field(default_factory=list)
    layer_influence: list[float] = field(default_factory=list)
    module_influence: dict[str, float] = field(default_factory=dict)
    kind_influence: dict[str, float] = field(default_factory=dict)
    member_influence: dict[str, float] = field(default_factory=dict)
    token_layer_influence: list[list[float]] = field(default_factory=list)

    @property
    def generic(self) -> bool:
        """Whether the sequence comes up for a quarter of the background queries or more.

        What comes up for every query says little about this one.
        """
        return self.generic_rate is not None and self.generic_rate >= GENERIC


@dataclass
class Recall:
    """How complete the answer is: the estimated share of the true top k that it holds.

    `estimate` is None where completeness is unknown (approximate scores, TF-IDF candidates alone).
    `cutoff` is the highest code score left out of the shortlist, as a statistic of the ranking, or
    None where nothing was left out. `c` is the index's calibration of the error of code scores,
    `c_here` the same as measured on this query's random sample. `lower` is one standard error below
    the estimate: a search goes on until that is `asked`, unless the length of its shortlist was
    fixed (None). `shortlist_for_95` is the length of a shortlist at which the estimate would reach
    .95, where it doesn't.

    >>> recall = Recall(k=10, estimate=0.87, cutoff=12.5, c=1.3, shortlist_for_95=400)
    >>> f"about {recall.estimate:.0%} of the true top {recall.k}"
    'about 87% of the true top 10'
    """

    k: int
    estimate: float | None
    cutoff: float | None
    c: float
    c_here: float | None = None
    asked: float | None = None
    shortlist_for_95: int | None = None
    lower: float | None = None


@dataclass
class Group:
    """The sequences of one document, source or value of a field, and their total influence.

    `influence` is the total over all `sequences` of the group in the index. Where documents are
    packed, a sequence counts by the share of its tokens that belongs to the group. Positive: one
    more copy of each would make the completion more likely, by `nats` = influence / N_train to
    first order (None and `no_nats` as for a hit). `standard_error` is the standard deviation of
    `influence` over draws of the code's random projection; 0 where every sequence was rescored. It
    holds for a group that you had in mind before: those at the top of a list are there for their
    size, and so for their error too (on average about one standard error of it, see
    benchmarks/RESULTS.md).
    `excess` is `influence` less what as many sequences of the index have on average, and `z` that
    over `excess_error`, its standard error by the spread between sequences and by the code: how
    many standard errors the group is from the index's mean (the formula is in
    `search/rank/group_excess.py`). `unsure` marks a |z| below 2, as chance brings about. All of
    these are None or False of the whole index, which is the mean.
    `hits` are the ids of the result's hits in the group, in the result's order. The `value` None is
    that of documents without the field.
    """

    value: Any
    sequences: int
    hits: list[int]
    influence: float
    standard_error: float
    nats: float | None
    no_nats: str | None = None
    excess: float | None = None
    excess_error: float | None = None
    z: float | None = None
    unsure: bool = False


@dataclass
class Result:
    """Hits in order of influence (or what `controls` says), and everything needed to judge them.

    `shortlist` is its length, `rescored` the number of sequences scored exactly for it. `seconds`
    are by step; queries that are searched together share load, gradient and scan. `coverage` is the
    share of the index's sequences that was searched: below 1 where `damaged` segments were left
    out, or some that were lost with their worker (a warning names them).
    `exact_influence` are the exact scores of all that was rescored for the shortlist, most positive
    first (opponents: most negative first), equal sequences once: the tail of their distribution.
    `sample_influence` are those of the random sample.
    With `group_by`, `groups` are the 100 first and every other one with a hit, out of
    `group_count`: largest `z` first (of opponents, the most negative), those of fewer than five
    sequences after the others. `total` is the group of all sequences that were searched, its value
    None.
    """

    query: Query
    hits: list[Hit]
    recall: Recall
    sequences: int  # N, indexed
    shortlist: int
    rescored: int
    train_sequences: int
    train_sequences_given: bool
    layers: list[int]
    controls: dict[str, Any]
    seconds: dict[str, float]
    interrupted: bool = False
    timed_out: bool = False
    coverage: float = 1.0
    damaged: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    exact_influence: list[float] = field(default_factory=list)
    sample_influence: list[float] = field(default_factory=list)
    model: str = ""
    index: str = ""  # of its manifest's SHA-256, the first 16 digits
    task: str = "causal"
    groups: list[Group] = field(default_factory=list)
    group_count: int = 0
    total: Group | None = None

    @property
    def units(self) -> str:
        """What the numbers mean, with their sign, in one sentence."""
        members = self.controls.get("members") or {}
        said = units_of(self.task, bool(self.controls["rescore"]), self.query)
        if list(members.values()) in ([], [1.0]):
            return said
        weights = ", ".join(f"{weight:.3g} × {name}" for name, weight in members.items())
        return f"{said} Here all of it is a weighted sum of each model's own, log p too: {weights}."

    @property
    def opponents(self) -> bool:
        """Whether the search was for sequences that make the completion less likely."""
        return bool(self.controls["opponents"])

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __getitem__(self, rank: int) -> Hit:
        return self.hits[rank]

    def to_list(self) -> list[dict[str, Any]]:
        """A list with a plain dictionary for each hit."""
        return [asdict(hit) for hit in self.hits]

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each hit. Raises ImportError where pandas is missing.
        """
        import pandas  # late: nothing else needs it, so it is no requirement

        return pandas.DataFrame(self.to_list())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        content = asdict(self)
        # What a reader of the JSON would else have to compute; `from_json` takes it out again.
        for text, saved in zip(self.query.texts, [content["query"], *content["query"]["others"]],
                               strict=True):
            saved["scored"] = text.scored
        content["query"]["log_p"] = self.query.log_p
        return {"schema": SCHEMA, "units": self.units, **content}

    def to_json(self) -> str:
        """One JSON object with everything, token and layer arrays included."""
        return json_text(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """A result that `to_json` wrote. Raises ValueError for anything else."""
        import pydantic  # late: only saved results need it

        try:
            content = json.loads(text)
            schema = content["schema"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError("it is not JSON, or has no schema.") from None
        if schema != SCHEMA:
            raise ValueError(f"it has schema {str(schema)[:20]}, this gradindex reads {SCHEMA}; "
                             "search again.")
        if "results" in content:
            raise ValueError("it is a comparison; expected one search's result.")
        # What `to_dict` and files of many results add are no fields. Every step minds the types:
        # the text may be a stranger's, and pydantic sees it only at the end.
        for extra in ("schema", "units", "asked"):
            content.pop(extra, None)
        query = content.get("query")
        for saved in [query, *(query.get("others") or [])] if isinstance(query, dict) else []:
            for extra in ("scored", "log_p"):
                saved.pop(extra, None) if isinstance(saved, dict) else None
        try:
            # strict: a string where a number belongs would fail later, in whatever shows it
            result: Result = pydantic.TypeAdapter(cls).validate_json(
                json.dumps(content), strict=True)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}.") from None
        result._check()
        return result

    def _check(self) -> None:
        """Raise ValueError where lists that belong together have different lengths."""
        if not self.layers or not {"rescore", "normalize", "opponents", "damping", "modules",
                                   "shortlist"} <= set(self.controls):
            raise ValueError("it has no layers, or controls are missing.")
        for text in self.query.texts:
            if not len(text.tokens) == len(text.labels) == len(text.token_texts):
                raise ValueError("a query's tokens, labels and texts differ in number.")
        for hit in self.hits:
            n, layers = len(hit.tokens), len(self.layers)
            fits = len(hit.token_ids) == n and len(hit.token_influence) in (0, n) and \
                len(hit.layer_influence) in (0, layers) and \
                len(hit.token_layer_influence) in (0, n) and \
                all(len(row) == layers for row in hit.token_layer_influence) and \
                all(isinstance(part.get("token"), int) for part in hit.parts)
            if not fits:
                raise ValueError(f"hit {hit.id} has lists of lengths that don't fit.")

    def _repr_html_(self) -> str:
        # by its public name, and late: what shows a result knows results, not the other way round
        return str(importlib.import_module("gradindex").render_html(self))


@dataclass
class Comparison:
    """The results of two completions of one prompt, searched together.

    `influence` gives, for every hit of either (by id), its exact influence on both.
    """

    results: list[Result]
    influence: dict[int, tuple[float, float]]

    def pairs(self) -> list[tuple[Hit, float, float]]:
        """Every hit once, as (hit, influence on the first, influence on the second).

        First come those that speak most for the first completion rather than the second.
        """
        hits = {hit.id: hit for result in self.results for hit in result}
        pairs = [(hit, *self.influence[number]) for number, hit in hits.items()]
        return sorted(pairs, key=lambda pair: pair[2] - pair[1])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {"schema": SCHEMA, "results": [result.to_dict() for result in self.results],
                "influence": {str(number): list(pair) for number, pair in self.influence.items()}}

    def to_json(self) -> str:
        """One JSON object with everything."""
        return json_text(self.to_dict())
