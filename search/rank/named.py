"""Sequences that are named by their ids: where they are, and their exact influence on a query."""

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import SupportsIndex, cast

from gradindex.errors import InputError
from gradindex.influence.exact import LARGEST_CHUNK, Exact, Rescorer
from gradindex.results import Hit, Query
from search.ask.settings import Settings
from search.rank.generic_rate import add_rates
from search.rank.hits import make_hit
from search.rank.query_gradient import form_gradients
from search.rank.snapshot import Snapshot, finite


def place_of(snapshot: Snapshot, named: object) -> int:
    """The place of a sequence's id. Raises InputError where it is none, or nobody has it."""
    try:
        # True would be sequence 1; whatever else counts as an integer may come, NumPy's too
        number = -1 if isinstance(named, bool) else operator.index(cast(SupportsIndex, named))
    except TypeError:
        number = -1
    place = snapshot.contents.place_of(number)
    if place is None:
        last = snapshot.manifest.next_id - 1
        gone = " (it was deleted, or is in no segment that is searched)" \
            if 0 <= number <= last else ""
        raise InputError(f"no sequence has the id {named!r}{gone}; expected 0 to {last}.")
    return place


def rescore_named(
    snapshot: Snapshot, query: Query, places: list[int], settings: Settings, batch_tokens: int
) -> Iterator[list[Hit]]:
    """Hits with the exact influence of the sequences at some places, a chunk at a time, in order.

    A place may come twice. Raises InputError, LostError.
    """
    # a single query's gradient is kept in full, and exact is what is asked for, whatever a search
    # would do
    settings = replace(settings, rank=None, rescore=True)
    [gradient], preconditioned = form_gradients(snapshot, [query], settings, batch_tokens)
    by = Rescorer(snapshot.model, settings.modules, snapshot.ekfac, settings.damping, batch_tokens)
    # a chunk at a time, so that a long list of ids is shown as it comes
    for first in range(0, len(places), LARGEST_CHUNK):
        chunk = places[first : first + LARGEST_CHUNK]
        code_scores = finite(
            snapshot.codes_at(chunk).scores(gradient.vector), snapshot.path).tolist()
        scores: dict[int, Exact] = {}
        for batch in snapshot.rescore(by, preconditioned, chunk, terms=True,
                                      sizes=settings.normalize != "none"):
            scores.update(batch)
        # no rank: nobody looked at the order of the others
        hits = [make_hit(snapshot, settings, gradient, place, record, scores[place], code_score, -1)
                for place, record, code_score in zip(
                    chunk, snapshot.records(chunk), code_scores, strict=True)]
        add_rates(snapshot, hits)
        yield hits
