"""The stages of a search: gradient → approximate hits → exact, n of m → result.

`Searcher` searches a snapshot of an index. `Searcher.stages` yields each stage as it ends, so that
a bar or a page can show it; `Searcher.search` drains them. Several queries share a session: one
pass of gradients and one scan of the codes; then they are rescored and answered one after the
other, each sequence's gradient formed once for all of them.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from gradindex.errors import InputError
from gradindex.model.network import LanguageModel
from gradindex.results import Comparison, Hit, Query, Result
from gradindex.storage.manifest import Manifest
from search.ask.controls import ControlArguments, Controls
from search.ask.keywords import QuestionOptions, SearchArguments, split, with_keywords
from search.ask.make_query import aggregate, make_query
from search.ask.naming import in_python
from search.ask.question import Question
from search.ask.settings import Settings, settle, without_members
from search.rank.named import place_of, rescore_named
from search.rank.query_gradient import form_gradients
from search.rank.query_track import Track
from search.rank.session import Session
from search.rank.snapshot import Snapshot
from search.study.audit_defaults import MOST_EXACT

if TYPE_CHECKING:
    from search.study.audited import Audit

LARGEST_GROUP = 64  # queries of one session
LARGEST_SCORES = 1 << 27  # code scores held at once, of all queries of a session


@dataclass
class SearchStage:
    """Where a search stands: `name` is gradient, approximate, exact or result.

    `provisional` is there after `approximate` (the hits by code, of a single query), `result` at
    the end of each query. `done` of `total` sequences are exact; `influence` are the exact
    influences that a stage `exact` adds, by id.
    """

    name: str
    done: int = 0
    total: int = 0
    query: Query | None = None
    provisional: Result | None = None
    influence: dict[int, float] = field(default_factory=dict)
    result: Result | None = None


class Searcher:
    """What searches a snapshot of an index. Made by `gradindex.open` and `gradindex.build`."""

    def __init__(self, snapshot: Snapshot, batch_tokens: int):
        self.snapshot = snapshot
        self.batch_tokens = batch_tokens

    def __len__(self) -> int:
        return len(self.snapshot)

    @property
    def manifest(self) -> Manifest:
        """What the index is."""
        return self.snapshot.manifest

    @property
    def model(self) -> LanguageModel:
        """The model, loaded and checked at first use. Raises IndexMismatchError for another."""
        return self.snapshot.model

    # ---- what is asked

    @with_keywords
    @in_python()
    def search(
        self, prompt: str | None = None, completion: str | None = None,
        **arguments: Unpack[SearchArguments],
    ) -> Result:
        """The k sequences with the most positive influence on log p(completion | prompt).

        What is asked about are the fields of a `Question`: a prompt and a completion, or
        `token_ids` with `labels`, or chat `messages`; with `versus`, the influence is that on
        log p(completion) − log p(versus). Everything else is a field of `Controls`.
        Interrupted (Ctrl-C) while rescoring, it returns what is exact so far.
        Raises InputError for an unusable query or control, IndexMismatchError for another model.
        """
        question, controls = split(prompt, completion, arguments)
        settings = settle(controls, self.manifest)
        query = make_query(self.snapshot, question)
        return drain(self.stages([query], settings, conclude_early=True))

    @with_keywords
    @in_python()
    def search_many(
        self, queries: Iterable[Query | Mapping[str, Any]], aggregated: bool = False,
        **arguments: Unpack[ControlArguments],
    ) -> Iterator[Result]:
        """Search for many queries together, a result each, in order.

        A query is one of `make_query`, or a dictionary of a Question's fields. `aggregated`: one
        result for the sum of their gradients. Controls and errors as for `search`.
        """
        # not a generator itself, so that what is wrong is told by the call, not by the first result
        settings = settle(Controls(**arguments), self.manifest)
        ready = [query if isinstance(query, Query) else make_query(self.snapshot, Question(**query))
                 for query in queries]
        stages = self.answer([aggregate(ready)] if aggregated else ready, settings)
        return (stage.result for stage in stages if stage.result is not None)

    @with_keywords
    @in_python()
    def compare(
        self, prompt: str, completions: Sequence[str], score_on: str | None = None,
        **arguments: Unpack[ControlArguments],
    ) -> Comparison:
        """Two completions of a prompt side by side: the hits of each, and their influence on both.

        Controls and errors as for `search`; rescore=False can't be compared.
        """
        if len(completions) != 2:
            raise InputError(f"{len(completions)} completions: expected two to compare.")
        settings = settle(Controls(**arguments), self.manifest)
        queries = [make_query(self.snapshot, Question(prompt, completion, score_on=score_on))
                   for completion in completions]
        # both at once: one scan, and each sequence's gradient formed once for the two
        results = [stage.result for stage in self.stages(queries, settings)]
        return self.compared([result for result in results if result is not None], queries,
                             settings)

    def compared(
        self, results: list[Result], queries: list[Query], settings: Settings
    ) -> Comparison:
        """The comparison of two queries' results: hits of one are rescored for the other too."""
        if not settings.rescore:
            raise InputError("a comparison needs exact scores: it can't go with rescore=False.")
        settings = without_members(settings, self.snapshot.absent)
        scores = [{hit.id: hit.influence for hit in result} for result in results]
        for mine, theirs, query in zip(scores, scores[::-1], queries, strict=True):
            # what only the other side shows has been scored for it alone
            places = self.known(sorted(set(theirs) - set(mine)))
            for hits in rescore_named(self.snapshot, query, places, settings, self.batch_tokens):
                mine.update((hit.id, hit.influence) for hit in hits)
        first, second = scores
        return Comparison(results, {hit: (first[hit], second[hit]) for hit in first})

    def answer(self, queries: list[Query], settings: Settings) -> Iterator[SearchStage]:
        """The stages of any number of queries, a group after the other."""
        size = group_size(len(self))
        for first in range(0, len(queries), size):
            yield from self.stages(queries[first : first + size], settings)

    @with_keywords
    @in_python()
    def rescore(
        self, prompt: str | None = None, completion: str | None = None, *, ids: Iterable[int],
        **arguments: Unpack[SearchArguments],
    ) -> list[Hit]:
        """Exact influence of the named sequences, in the order given. Raises like `search`.

        Of the controls, damping, modules, normalize and train_sequences matter; sizes of the
        sequences' gradients come with a `normalize` other than "none".
        """
        question, controls = split(prompt, completion, arguments)
        # ids that nobody has are told before the query is tokenised, and the model loaded
        places = self.known(ids)
        settings = settle(controls, self.manifest)
        query = make_query(self.snapshot, question)
        return [hit for hits in rescore_named(self.snapshot, query, places, settings,
                                              self.batch_tokens) for hit in hits]

    @in_python()
    def audit(
        self, against: "str | Path | Iterable[Query | Mapping[str, Any]] | None" = None,
        truth: str | None = None, exact: int | None = MOST_EXACT, damping: float | None = None,
        modules: str | None = None, truth_as: str | None = None, members: str | None = None,
    ) -> "Audit":
        """Every sequence with what marks it as corrupted, most suspect first.

        `against` are queries that are known to be right, as for `search_many`, or a file of them:
        then sequences are ranked by their harm to these. `truth` is a kept field that says what is
        corrupted, by which each signal is measured; where it may hold marks of it or true labels,
        `truth_as` is "marks" or "labels". At most `exact` sequences are scored exactly
        (None: all), those that are likeliest by their codes. Interrupted (Ctrl-C) while scoring, it
        returns what is exact so far. Raises InputError for what can't be audited so.
        """
        # late: what measures signals takes a second to import, which no search needs
        from search.study.audit import audit
        from search.study.trusted import trusted_queries

        settings = settle(Controls(damping=damping, modules=modules, members=members),
                          self.manifest)
        trusted = None if against is None else trusted_queries(self.snapshot, against)
        return audit(self.snapshot, settings, self.batch_tokens, trusted, exact, truth=truth,
                     truth_as=truth_as)

    @with_keywords
    @in_python()
    def make_query(
        self, prompt: str | None = None, completion: str | None = None, *, id: Any = None,
        **arguments: Unpack[QuestionOptions],
    ) -> Query:
        """Tokenise and check a query, without the model unless it is to continue the prompt.

        Raises InputError for a query that can't be scored.
        """
        return make_query(self.snapshot, Question(prompt, completion, id=id, **arguments))

    @in_python()
    def check(
        self, result: Result, count: int = 3,
        follow: Callable[[int, int], None] = lambda done, total: None,
    ) -> Result:
        """Measure what the first `count` hits of a result change, beside their first-order nats.

        For each the weights make the step that one more copy brings about along the hit's own
        direction, log p of the query is measured, and the weights are put back to the bit:
        `Hit.check` has it. `follow(done, total)` is told how many passes are done; interrupted
        (Ctrl-C) it returns what is checked. Raises InputError where N_train isn't known, and for
        what can't be moved.

        """
        # late: few searches need it
        from search.study.check import check_hits

        asked = result.controls
        settings = settle(Controls(
            damping=asked["damping"], rescore=asked["rescore"], members=asked.get("members"),
            train_sequences=result.train_sequences if result.train_sequences_given else None,
        ), self.manifest)
        chosen = set(asked["modules"])
        settings = replace(settings, modules=[
            module for module in settings.modules if module.name in chosen])
        check_hits(self.snapshot, result, settings, count, self.batch_tokens, follow)
        return result

    def known(self, ids: Iterable[Any]) -> list[int]:
        """The places of sequences' ids. Raises InputError where there is no such sequence."""
        return [place_of(self.snapshot, named) for named in ids]

    # ---- the stages

    def stages(
        self, queries: list[Query], settings: Settings, conclude_early: bool = False
    ) -> Generator[SearchStage, None, None]:
        """Search for some queries together, yielding a SearchStage as each step ends.

        A result comes for each query, in order, as soon as its shortlist is exact. Raises as
        `search`. With `conclude_early`, a KeyboardInterrupt while sequences are rescored ends the
        rescoring only, and what is exact makes the result.
        """
        clock = _Clock()

        # 0) what is read once, at the first search
        self.snapshot.load()
        settings = without_members(settings, self.snapshot.absent)
        if settings.group_by is not None:
            self.snapshot.grouping(settings.group_by)
        clock.lap("load")

        # 1) each query's gradient, preconditioned, as a vector and in full
        gradients, preconditioned = form_gradients(self.snapshot, queries, settings,
                                                   self.batch_tokens)
        clock.lap("gradient")
        yield SearchStage("gradient", query=queries[0])

        # 2) every sequence's code score; the best make the shortlists
        session = Session(self.snapshot, settings, gradients, preconditioned, self.batch_tokens)
        clock.lap("scan")
        yield SearchStage("approximate", 0, session.planned, queries[0],
                          session.provisional(session.tracks[0]) if len(queries) == 1 else None)

        for track in session.tracks:
            # whoever reads the stages may have taken long over them
            clock.restart()
            # 3) exact influence of the shortlist, best first, until the statement is good enough
            interrupted = False
            if settings.rescore:
                try:
                    yield from _rescored(session, track)
                    if not track.timed_out:
                        session.hear_random_sample(track)
                        # the sample tells more of the codes' error, by which it may be less sure
                        yield from _rescored(session, track)
                except KeyboardInterrupt:
                    # a file of queries is gone on with by the next run; here there is none
                    if not conclude_early:
                        raise
                    interrupted = bool(track.missing())
            clock.lap("rescore")

            # 4) the top k and how complete it is; an unfinished shortlist is as long as it got
            result = session.conclude(track, interrupted)
            clock.lap("conclude")
            result.seconds = clock.take("rescore", "conclude")
            yield SearchStage("result", len(session.common.exact), session.planned, track.query,
                              result=result)


def group_size(sequences: int) -> int:
    """How many queries share a session of an index of so many sequences, for memory."""
    # code scores of every sequence and query are held until the shortlists are known
    return max(1, min(LARGEST_GROUP, LARGEST_SCORES // sequences))


def _rescored(session: Session, track: Track) -> Iterator[SearchStage]:
    """A stage for each batch that is rescored of a query."""
    for places in session.rescore(track):
        # told by id: places move when a part of the index is lost
        ids = session.common.snapshot.contents.ids[places].tolist()
        influence = dict(zip(ids, track.influence(places), strict=True))
        yield SearchStage("exact", len(session.common.exact), session.planned, track.query,
                          influence=influence)


def drain(
    stages: Generator[SearchStage, None, None],
    follow: Callable[[SearchStage], None] | None = None
) -> Result:
    """Run a search of one query to its end, showing each stage to `follow`.

    A KeyboardInterrupt, wherever it strikes during rescoring, is handed to the search, which then
    concludes from what is exact.
    """
    result = None
    while result is None:
        try:
            stage = next(stages)
            if follow is not None:
                follow(stage)
        except KeyboardInterrupt:
            # it may have struck in `follow`: the search learns of it only if it is told
            stage = stages.throw(KeyboardInterrupt())
        result = stage.result
    return result


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def restart(self) -> None:
        """Leave out the time since the lap before."""
        self._since = time.monotonic()

    def take(self, *names: str) -> dict[str, float]:
        """All seconds so far; the steps named begin again for the next query."""
        seconds = dict(self.seconds)
        for name in names:
            del self.seconds[name]
        return seconds

    def lap(self, name: str) -> None:
        """Count the time since the lap before for a step."""
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._since, 3)
        self._since = now
