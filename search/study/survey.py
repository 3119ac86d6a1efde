"""What is in an index, as numbers: its texts, the sizes of its gradients, influence over queries.

Without queries of the user's, some of the index's own sequences are asked about (their second half
given the first); such a sequence and its equals are left out of what is said of its query.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gradindex import draws
from gradindex.draws import Stream
from gradindex.errors import InputError
from gradindex.influence.exact import Rescorer, rescore
from gradindex.influence.queries import Preconditioned
from gradindex.model import tokenise
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.results import UNSCORED, Query
from gradindex.storage.background_file import ONE_IN
from gradindex.storage.manifest import Manifest
from gradindex.storage.records import Record
from gradindex.terminal import json_text
from search.ask.make_query import make_query
from search.ask.question import Question
from search.ask.settings import Settings
from search.engine import Searcher
from search.rank.generic_rate import all_rates
from search.rank.query_gradient import Target, make_targets
from search.rank.ranking import best
from search.rank.snapshot import Coverage, OpenIndex
from search.study.tail import Tail, fit_tail, half, half_interval

QUERIES = 16  # of the index's own sequences
SAMPLE = 4096  # sequences scored exactly, where the index has more
TOP = 100  # sequences by code that are scored exactly for each query besides
LISTED = 10  # sequences shown of a kind
READ = 4096  # records held at once
EXCERPT = 400  # letters of a text
TRACKED = 1000  # values of a kept field, beyond which they aren't told apart
FENCE = 3.0  # interquartile ranges above the upper quartile (Tukey's outer fence), of logarithms


@dataclass
class Source:
    """How much of the live index comes from somewhere: a source, or a value of a kept field.

    A sequence packed from several documents counts for each; its tokens are divided.
    """

    name: str
    documents: int
    sequences: int
    tokens: int


@dataclass
class Kept:
    """A kept field: its values, most sequences first; None where they are more than TRACKED."""

    name: str
    values: list[Source] | None


@dataclass
class Texts:
    """What the live sequences are: by source and field, and lengths [N] in tokens, int32."""

    sources: list[Source]
    fields: list[Kept]
    lengths: np.ndarray
    scored: int


@dataclass
class Listed:
    """A sequence that is shown, and how many others equal it."""

    id: int
    where: str
    user_id: Any
    tokens: int
    text: str
    copies: int


@dataclass
class Sizes:
    """Self-influence ‖m̃‖²: the code's estimate ‖v‖² of all [N], and exact of some places.

    `exact` [background] belongs to `background` (places). `fence` is the estimate beyond which a
    sequence is an outlier; `largest` are listed with (estimate, exact).
    """

    estimates: np.ndarray
    background: list[int]
    exact: np.ndarray
    fence: float
    largest: list[tuple[Listed, float, float]]

    @property
    def ratios(self) -> np.ndarray:
        """Estimate / exact of the background sequences that have a gradient."""
        estimates = self.estimates[self.background]
        return estimates[self.exact > 0] / self.exact[self.exact > 0]

    @property
    def outliers(self) -> int:
        return int((self.estimates > self.fence).sum())


@dataclass
class QuerySurvey:
    """A query and its exact scores.

    `others` is how many sequences there are but for the query's own; `values` [n] are the influence
    of the random sample's, equal ones once. `half` of them carry half of the positive influence,
    `interval` where that is an estimate. `absolute` and `proponents` [groups] are sums of |I| over
    the sample, and of I over the top by code with I > 0, by `Survey.groups`.
    """

    query: Query
    own: int | None  # id of the sequence it was made of
    others: int
    values: np.ndarray
    tail: Tail | None
    half: int
    interval: tuple[int, int] | None
    absolute: np.ndarray
    proponents: np.ndarray


@dataclass
class Survey:
    """Everything a report says. `sample` sequences were drawn and scored exactly, N is `total`.

    `groups` are (layer, kind) of modules. `generic` are listed with their generic rate (None
    where the index keeps no background queries); `rank` is that which the queries' gradients were
    reduced to, if they were.
    """

    name: str
    digest: str
    manifest: Manifest
    coverage: Coverage
    settings: Settings
    texts: Texts
    sizes: Sizes
    total: int
    sample: int
    scored: int
    rank: int | None
    groups: list[tuple[int, str]]
    asked: list[QuerySurvey]
    generic: list[tuple[Listed, float]] | None = None

    def shares(self, what: str) -> np.ndarray:
        """Mean share of each group over queries, [groups]: of "absolute" or "proponents"."""
        sums = np.array([getattr(one, what) for one in self.asked])
        whole = sums.sum(axis=1)
        return (sums[whole > 0] / whole[whole > 0, None]).mean(axis=0) if (whole > 0).any() else \
            np.zeros(len(self.groups))


def check_sample(sample: int | None) -> None:
    """Raise InputError for a sample of nothing."""
    if sample is not None and sample < 1:
        raise InputError(f"--sample {sample}: expected a number above 0, or all.")


def survey(
    searcher: Searcher, queries: list[Query] | None, sample: int | None, settings: Settings,
    progress: Progress,
) -> Survey:
    """Survey an index over these queries, or over some of its own sequences.

    `sample` sequences are scored exactly (None: all). `settings` are those without any control but
    train_sequences: everything is said of all modules, at the damping of the codes.
    Raises InputError where there is nothing to ask about, or more queries than are answered
    together, otherwise as `Searcher.search`.
    """
    index, manifest = searcher.index, searcher.manifest
    check_sample(sample)
    most = searcher.group_size
    if queries is not None and not 0 < len(queries) <= most:
        raise InputError(f"--queries: {len(queries)} queries can be scored; a report takes 1 to "
                         f"{most}.")

    # 1) what the sequences are: every record is read once
    texts = read_texts(index, progress)

    # 2) queries, and what the code says of every sequence
    index.load()
    own: list[int | None] = [None] * len(queries or [])
    if queries is None:
        queries, places = own_queries(searcher, min(QUERIES, most))
        own = [*places]
    targets, preconditioned = make_targets(index, queries, settings, searcher.batch_tokens)
    codes = index.code_scores(np.stack([target.vector for target in targets]))
    by = Rescorer(index.model, settings.modules, index.ekfac, settings.damping,
                  searcher.batch_tokens)

    # 3) sizes of gradients
    sizes = measure_sizes(index, by, preconditioned)

    # 4) exact influence of a random sample, and of the top by code
    scores = Scores(index, own, codes, sample)
    scores.fill(by, preconditioned, progress)

    # 5) what follows of each query
    progress.start("tails", len(queries), "queries")
    asked = []
    for number, target in enumerate(targets):
        asked.append(scores.asked(number, target))
        progress.update(1)
    progress.finish()
    return Survey(
        name=index.path.resolve().name, digest=index.digest, manifest=manifest,
        coverage=index.coverage, settings=settings, texts=texts, sizes=sizes, total=len(index),
        sample=len(scores.sample), scored=len(scores.places), rank=preconditioned.rank,
        groups=scores.groups, asked=asked, generic=most_generic(index),
    )


# ---- what the sequences are


class _Tally:
    """Counts of documents, sequences and tokens by name."""

    def __init__(self) -> None:
        self._documents: dict[str, set[int]] = {}
        self._sequences: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._documents)

    def add(self, parts: list[tuple[str, int, int]]) -> None:
        """A sequence's parts, as (name, document, tokens)."""
        for name, document, tokens in parts:
            self._documents.setdefault(name, set()).add(document)
            self._tokens[name] += tokens
        self._sequences.update({name for name, _, _ in parts})

    def listed(self) -> list[Source]:
        """Most sequences first, then by name."""
        return sorted((Source(name, len(documents), self._sequences[name], self._tokens[name])
                       for name, documents in self._documents.items()),
                      key=lambda one: (-one.sequences, one.name))


def read_texts(index: OpenIndex, progress: Progress) -> Texts:
    """Read every live record."""
    sources, fields = _Tally(), dict[str, _Tally | None]()
    objective = index.objective
    lengths, scored = np.zeros(len(index), dtype=np.int32), 0
    progress.start("records", len(index), "sequences")
    for place, record in enumerate(_records(index, range(len(index)))):
        lengths[place] = len(record.tokens)
        scored += int(objective.counted(record.scored).sum())
        starts = [part.token for part in record.parts] + [len(record.tokens)]
        tokens = [end - start for start, end in pairwise(starts)]
        documents = [part.document for part in record.parts]
        sources.add(list(zip([part.source for part in record.parts], documents, tokens,
                             strict=True)))
        for name in {name for part in record.parts for name in part.fields}:
            tally = fields.setdefault(name, _Tally())
            if tally is None:
                continue
            tally.add([(_value(part.fields[name]), document, count) for part, document, count in
                       zip(record.parts, documents, tokens, strict=True) if name in part.fields])
            if len(tally) > TRACKED:
                fields[name] = None
        if (place + 1) % READ == 0 or place + 1 == len(index):
            progress.update(place % READ + 1)
    progress.finish()
    return Texts(sources.listed(), [Kept(name, tally.listed() if tally else None)
                                    for name, tally in sorted(fields.items())], lengths, scored)


def _records(index: OpenIndex, places: Any) -> Iterator[Record]:
    """The records of places, READ of them in memory at once."""
    for first in range(0, len(places), READ):
        yield from index.records(places[first : first + READ])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)


def listed(index: OpenIndex, places: list[int]) -> list[Listed]:
    """Sequences to be shown."""
    found = []
    for place, record in zip(places, index.records(places), strict=True):
        whole = "".join(tokenise.pieces(index.tokenizer, record.tokens.tolist()))
        first = record.parts[0]
        found.append(Listed(
            record.id, f"{first.source}:{first.row}", first.user_id, len(record.tokens),
            whole if len(whole) <= EXCERPT else whole[: EXCERPT - 1] + "…",
            len(index.copies(place)),
        ))
    return found


# ---- sizes of gradients


def measure_sizes(index: OpenIndex, by: Rescorer, preconditioned: Preconditioned) -> Sizes:
    """Self-influence as the codes know it, exact for the background and the largest."""
    estimates, background = index.norms**2, index.background()
    first = index.contents.first_equal == np.arange(len(index))  # equal ones are shown once
    largest = best(np.where(first, estimates, -1.0), min(LISTED, int(first.sum()))).tolist()
    records = index.records([*background, *largest])
    exact = np.zeros(len(records))
    for part in rescore(by, preconditioned, records, sizes=True):
        for place, one in part:
            assert one.self_influence is not None
            exact[place] = one.self_influence
    there = exact[len(background) :].tolist()
    return Sizes(estimates, background, exact[: len(background)], _fence(estimates), [
        (one, float(estimates[place]), size)
        for one, place, size in zip(listed(index, largest), largest, there, strict=True)])


def _fence(estimates: np.ndarray) -> float:
    logs = np.log(estimates[estimates > 0])
    if not len(logs):
        return np.inf
    low, high = np.quantile(logs, [0.25, 0.75])
    return float(np.exp(high + FENCE * (high - low)))


# ---- queries and influence


def own_queries(searcher: Searcher, count: int) -> tuple[list[Query], list[int]]:
    """Some of the index's different sequences as queries, and their places; the same every time.

    Raises InputError where no sequence has a second half to ask about.
    """
    index = searcher.index
    places = np.unique(index.contents.first_equal)
    random = draws.generator(Stream.REPORT_QUERIES, searcher.manifest.code["seed"])
    places = random.permutation(places)
    queries: list[Query] = []
    chosen: list[int] = []
    for first in range(0, len(places), count):
        some = places[first : first + count].tolist()
        for place, record in zip(some, index.records(some), strict=True):
            scored = index.objective.later_half(record.scored)
            if scored.any() and len(queries) < count:
                labels = np.where(scored, record.tokens, UNSCORED).tolist()
                queries.append(make_query(index, Question(
                    token_ids=record.tokens.tolist(), labels=labels, id=record.id)))
                chosen.append(place)
        if len(queries) == count:
            break
    if not queries:
        raise InputError("no sequence of the index has two tokens to score: there is nothing to "
                         "ask about. Give --queries FILE.")
    return queries, chosen


class Scores:
    """Exact influence [q, places] of a random `sample` and of each query's top by code."""

    def __init__(
        self, index: OpenIndex, own: list[int | None], codes: np.ndarray, sample: int | None
    ):
        self.index, self.own, self.codes = index, own, codes
        total, queries = len(index), len(own)
        size = total if sample is None else min(sample, total)
        random = draws.generator(Stream.REPORT_SAMPLE, index.manifest.code["seed"])
        self.sample = np.arange(total) if size == total else \
            np.sort(random.choice(total, size, replace=False))
        self.allowed = np.ones((queries, total), dtype=bool)  # all but a query's own sequences
        for number, place in enumerate(own):
            if place is not None:
                self.allowed[number, index.contents.equal_to(place)] = False
        self.top = [self._best(number, TOP) for number in range(queries)]
        self.places = np.unique(np.concatenate([self.sample, *self.top]))
        self.influence = np.zeros((queries, len(self.places)))
        modules = index.manifest.modules
        self.groups = list(dict.fromkeys((module.layer, module.kind) for module in modules))
        self._group = _indicator(modules, self.groups)
        self._absolute = np.zeros((queries, len(self.groups)))
        self._proponents = np.zeros((queries, len(self.groups)))

    def _best(self, number: int, count: int) -> np.ndarray:
        """A query's best places by code, its own left out."""
        places = np.flatnonzero(self.allowed[number])
        chosen: np.ndarray = places[best(self.codes[number, places], min(count, len(places)))]
        return chosen

    def fill(self, by: Rescorer, preconditioned: Preconditioned, progress: Progress) -> None:
        """Compute them, a batch at a time."""
        allowed = self.allowed[:, self.places]
        drawn = np.isin(self.places, self.sample) & allowed
        high = np.array([np.isin(self.places, top) for top in self.top])
        progress.start("exact", len(self.places), "sequences")
        done = 0
        for first in range(0, len(self.places), READ):
            records = self.index.records(self.places[first : first + READ].tolist())
            for part in rescore(by, preconditioned, records, by_module=True):
                here = [first + place for place, _ in part]
                by_module = [one.by_module for _, one in part if one.by_module is not None]
                groups = np.stack(by_module) @ self._group  # [b, q, g]
                influence = np.stack([one.influence for _, one in part], axis=1)  # [q, b]
                self.influence[:, here] = influence
                self._absolute += np.einsum("bqg,qb->qg", np.abs(groups), drawn[:, here])
                self._proponents += np.einsum(
                    "bqg,qb->qg", groups, high[:, here] & (influence > 0))
                done += len(part)
                progress.update(len(part))
                if progress.measured:
                    progress.say_expected(progress.seconds_each() * (len(self.places) - done))
        progress.finish()

    def asked(self, number: int, target: Target) -> QuerySurvey:
        """What is said of a query."""
        allowed, place = self.allowed[number], self.own[number]
        certain = np.isin(self.places, self.top[number])
        drawn = np.isin(self.places, self.sample) & allowed[self.places]
        values = self.influence[number]
        # equal sequences count once where a continuous law is fitted
        chosen = np.flatnonzero(drawn)
        first = self.index.contents.first_equal[self.places[chosen]]
        different = values[chosen[np.unique(first, return_index=True)[1]]]
        others = int(allowed.sum())
        interval, weights = None, np.ones(len(values))
        if len(self.sample) < len(self.index):
            # all of the top by code is known; the others stand for those that weren't drawn
            rest = int((drawn & ~certain).sum())
            weights[~certain] = (others - len(self.top[number])) / max(1, rest)
            known = drawn | certain
            interval = half_interval(values[known], weights[known], certain[known])
        else:
            known = drawn
        return QuerySurvey(
            query=target.query,
            own=None if place is None else int(self.index.contents.ids[place]), others=others,
            values=different, tail=fit_tail(different), half=half(values[known], weights[known]),
            interval=interval, absolute=self._absolute[number],
            proponents=self._proponents[number],
        )


def most_generic(index: OpenIndex) -> list[tuple[Listed, float]] | None:
    """The sequences with the highest generic rate as proponents, and that rate, above chance.

    Equal ones are one. None where the index keeps no background queries.
    """
    rates = all_rates(index)
    if rates is None:
        return None
    first = index.contents.first_equal == np.arange(len(index))
    upper = np.where(first & ~np.isnan(rates[0]), rates[0], 0.0)
    places = [int(place) for place in np.argsort(-upper, kind="stable")[:LISTED]
              if upper[place] > 1 / ONE_IN]
    return [(one, float(upper[place])) for one, place in
            zip(listed(index, places), places, strict=True)]


def _indicator(modules: list[Module], groups: list[tuple[int, str]]) -> np.ndarray:
    """Which module belongs to which group: float64 [u, groups]."""
    made = np.zeros((len(modules), len(groups)))
    for number, module in enumerate(modules):
        made[number, groups.index((module.layer, module.kind))] = 1.0
    return made
