"""How often sequences come up for the background queries (`storage/background_file.py`)."""

from collections.abc import Sequence

import numpy as np

from gradindex.results import Hit
from search.rank.snapshot import OpenIndex


def add_rates(index: OpenIndex, hits: Sequence[Hit]) -> None:
    """Fill in `generic_rate` of hits, at the side that their influence has.

    Raises DamagedIndexError where the file of background queries is not what it was.
    """
    queries, contents = index.tables.background_queries, index.contents
    if queries is None or not hits:
        return
    places = np.searchsorted(contents.ids, [hit.id for hit in hits])
    digests = contents.rows["digest"][contents.places[places]]
    rates = queries.rates(index.codes_at(places.tolist()), digests)
    for hit, (upper, lower) in zip(hits, rates.T.tolist(), strict=True):
        rate = lower if hit.influence < 0 else upper
        hit.generic_rate = None if np.isnan(rate) else rate


def all_rates(index: OpenIndex) -> np.ndarray | None:
    """The generic rates of every place, as proponents and as opponents: float64 [2, N].

    NaN where no background query counts; None where the index keeps none. Segments are scanned one
    after the other. Raises DamagedIndexError.
    """
    queries, contents = index.tables.background_queries, index.contents
    if queries is None:
        return None
    rates = np.empty((2, len(contents.rows)))
    for codes, start in zip(index.segments(), contents.starts.tolist(), strict=False):
        here = slice(start, start + len(codes))
        rates[:, here] = queries.rates(codes, contents.rows["digest"][here])
    return rates[:, contents.places]
