"""How often sequences come up for the background queries (`storage/background_file.py`)."""

from collections.abc import Sequence

import numpy as np

from gradindex.influence.device_codes import many_scores
from gradindex.results import Hit
from search.rank.snapshot import Snapshot


def add_rates(snapshot: Snapshot, hits: Sequence[Hit]) -> None:
    """Fill in `generic_rate` of hits, at the side that their influence has.

    Raises DamagedIndexError where the file of background queries is not what it was when the index
    was written.
    """
    queries, contents = snapshot.tables.background_queries, snapshot.contents
    if queries is None or not hits:
        return
    # a query that was made of this very text doesn't count for it, and is known by its digest
    places = np.searchsorted(contents.ids, [hit.id for hit in hits])
    digests = contents.rows["digest"][contents.places[places]]
    # where the build scanned them: what is at a threshold's border is to be there again
    scores = many_scores(snapshot.codes_at(places.tolist()), queries.vectors.astype(np.float32),
                         snapshot.model.device)
    rates = queries.rates(scores, digests)
    for hit, (upper, lower) in zip(hits, rates.T.tolist(), strict=True):
        rate = lower if hit.influence < 0 else upper
        hit.generic_rate = None if np.isnan(rate) else rate


def all_rates(snapshot: Snapshot) -> np.ndarray | None:
    """The generic rates of every place, as proponents and as opponents: float64 [2, N].

    NaN where no background query counts; None where the index keeps none. Segments are scanned one
    after the other. Raises DamagedIndexError.
    """
    queries, contents = snapshot.tables.background_queries, snapshot.contents
    if queries is None:
        return None
    vectors, rates = queries.vectors.astype(np.float32), np.empty((2, len(contents.rows)))
    for codes, start in zip(snapshot.segments(), contents.starts.tolist(), strict=False):
        rows = slice(start, start + len(codes))
        scores = many_scores(codes, vectors, snapshot.model.device)
        rates[:, rows] = queries.rates(scores, contents.rows["digest"][rows])
    # the deleted and the quarantined have codes too, and no place
    return rates[:, contents.places]
