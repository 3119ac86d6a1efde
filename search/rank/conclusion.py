"""The result of one query, made of what is exact: hits, statement, warnings, totals by group."""

import numpy as np

from gradindex.first_order import first_order_nats
from gradindex.influence.exact import Exact
from gradindex.results import Group, Hit, Recall, Result
from gradindex.storage.manifest import model_name
from gradindex.storage.records import Record
from search.rank.generic_rate import add_rates
from search.rank.group_totals import total_groups
from search.rank.hits import make_hit, normalized
from search.rank.likeness import fold_near
from search.rank.query_gradient import rescore_in_full
from search.rank.query_track import Track
from search.rank.snapshot import unlike

SMALLEST_SAMPLE = 32  # of the random sample, before anything is said of the error on a query
ODD_CALIBRATION = 1.5  # c on this query's random sample, as a factor of the index's: warn beyond it
HOPELESS = 0.5  # a statement below this comes with what would help
GOOD = 0.95  # what a longer shortlist is suggested for


def provisional(track: Track) -> Result:
    """The best k by code alone, of which nothing is known yet. Raises LostError."""
    settings, c = track.common.settings, track.common.snapshot.manifest.calibration["c"]
    unknown = Recall(settings.k, None, None, c)
    result = _result(track, _approximate_hits(track), unknown, 0, _about(track))
    result.controls["rescore"] = False
    return result


def conclude(track: Track, interrupted: bool) -> Result:
    """The top k, exact by token and module, and how complete it is. Raises LostError.

    An unfinished shortlist, `interrupted` or out of time, is as long as it got.
    """
    settings, snapshot = track.common.settings, track.common.snapshot
    if not settings.rescore:
        return provisional(track)
    unfinished = interrupted or track.timed_out
    warnings = _about(track)
    # equal sequences count together in the statement, as they stand together in the answer
    groups, made = track.statement()
    counted = sum(map(len, groups))
    complete = counted == len(snapshot)
    # of a TF-IDF list alone nothing can be said: who isn't on it had no known chance
    unknown = settings.candidates == "tfidf" and not complete
    recall = Recall(
        settings.k, None if unknown else made.estimate,
        None if unknown or complete else track.shortlist.cutoff,
        snapshot.manifest.calibration["c"], _error_here(track), settings.recall,
        lower=None if unknown else made.lower,
    )
    if recall.estimate is not None and recall.estimate < GOOD and groups:
        recall.shortlist_for_95 = track.length_for(GOOD, groups, made)
    hits = _exact_hits(track, groups)
    warnings += _warnings(track, hits, recall, unfinished)
    if unfinished:
        total = len(track.shortlist.places(track.length))
        why = "interrupted" if interrupted else "--time-limit reached"
        warnings.append(f"{why}: {counted} of {total} sequences are exact")
    result = _result(track, hits, recall, counted, warnings)
    result.interrupted, result.timed_out = interrupted, track.timed_out
    # one of each: a law fitted to the tail would take copies for as many draws
    result.exact_influence = sorted(track.influence(group[0] for group in groups),
                                    reverse=settings.sign > 0)
    result.sample_influence = track.influence(track.common.random_sample)
    return result


def _about(track: Track) -> list[str]:
    """What to know before any score: what is not searched, how the query was read."""
    snapshot = track.common.snapshot
    told = dict.fromkeys(unlike(snapshot, text) for text in track.query.texts)
    absent = [f"the model {name} can't be loaded, and the score is without it: {why}"
              for name, why in sorted(snapshot.absent.items())
              if not track.common.settings.members_given]
    return ([] if snapshot.coverage.whole else [str(snapshot.coverage)]) + absent + \
        [one for one in told if one is not None] + \
        [note for text in track.query.texts for note in text.notes]


# ---- hits


def _approximate_hits(track: Track) -> list[Hit]:
    """The best k by code alone."""
    snapshot, k = track.common.snapshot, track.common.settings.k
    first, count = snapshot.contents.first_equal, k
    # some of the best may equal each other: so many are fetched that k different ones remain
    while True:
        places, _ = track.ranking.best(count)
        different = places[first[places] == places]  # equal sequences are one hit
        if len(different) >= k or count >= len(first):
            break
        count *= 2
    places = different[:k].tolist()
    scores = track.ranking.scores_at(places).tolist()
    records = snapshot.records(places)
    hits = [_hit(track, place, record, None, rank, score)
            for rank, (place, record, score) in enumerate(
                zip(places, records, scores, strict=True), 1)]
    add_rates(snapshot, hits)
    return fold_near(hits, _learned(records), snapshot.tables.wording)


def _exact_hits(track: Track, groups: list[list[int]]) -> list[Hit]:
    """The best k groups, scored again by token and module; at full rank, if that wasn't so."""
    common, settings, snapshot = track.common, track.common.settings, track.common.snapshot
    low = common.preconditioned.rank is not None
    # at low rank the order is rough: more are scored again, and the best of them are shown
    chosen = groups[: 2 * settings.k if low else settings.k]
    places = [group[0] for group in chosen]
    if low:
        scores = rescore_in_full(snapshot, common.by, track.query, places)
    else:
        scores = {place: exact for part in snapshot.rescore(
            common.by, common.preconditioned.one(track.number), places, sizes=True, terms=True)
            for place, exact in part}
    # equal sequences differ by rounding, which must not rank a copy above its original
    same = {int(snapshot.contents.first_equal[group[0]]): group[0] for group in chosen}
    sample = np.array([
        track.value(same.get(int(snapshot.contents.first_equal[place]), place))
        for place in common.random_sample])
    ranked = []
    code_ranks = track.shortlist.ranks(places)
    code_scores = track.ranking.scores_at(places).tolist()
    records = snapshot.records(places)
    for place, record, rank, score in zip(places, records, code_ranks, code_scores, strict=True):
        exact = scores[place]
        value = settings.sign * normalized(
            float(exact.influence[0]), exact, settings.normalize)
        hit = _hit(track, place, record, exact, rank, score)
        if len(sample):
            hit.percentile = float(np.mean(sample <= track.value(place)) * 100)
        ranked.append((-value, record.id, hit))
    hits = [hit for _, _, hit in sorted(ranked, key=lambda entry: entry[:2])[: settings.k]]
    add_rates(snapshot, hits)
    return fold_near(hits, _learned(records), snapshot.tables.wording)


def _learned(records: list[Record]) -> dict[int, np.ndarray]:
    """The loss masks of sequences, by id."""
    return {record.id: record.scored for record in records}


def _hit(
    track: Track, place: int, record: Record, exact: Exact | None, rank: int, score: float
) -> Hit:
    """A hit of the query, with its rank in a TF-IDF list."""
    common = track.common
    hit = make_hit(common.snapshot, common.settings, track.gradient, place, record, exact, score,
                   rank)
    hit.tfidf_rank = track.shortlist.rank_in_list(place)
    return hit


# ---- what is said of them


def _error_here(track: Track) -> float | None:
    """c measured on the query's random sample, or None where that says too little."""
    common, sample = track.common, track.common.random_sample
    error = track.noise * common.snapshot.norms[sample]
    # a gradient of zero has a code without error, of which nothing can be learned
    real = error > 0
    if real.sum() < SMALLEST_SAMPLE:
        return None
    truth = np.array(track.influence(sample))
    z = (track.ranking.scores_at(sample) - truth)[real] / error[real]
    return common.snapshot.manifest.calibration["c"] * float(np.sqrt(np.mean(z**2)))


def _warnings(track: Track, hits: list[Hit], recall: Recall, unfinished: bool) -> list[str]:
    """What to know before the hits are believed."""
    common, sign, warnings = track.common, track.common.settings.sign, []
    if common.by.halved:
        warnings.append(
            f"memory ran out on {common.by.halved} batches, which were halved; smaller "
            "--batch-tokens avoid that"
        )
    # where fewer than k proponents are in the shortlist, opponents fill up the k
    wrong = sum(sign * hit.influence <= 0 for hit in hits)
    if wrong:
        warnings.append(
            f"{wrong} of these hits have influence of the other sign: fewer than "
            f"{common.settings.k} sequences of the shortlist are "
            f"{'opponents' if sign < 0 else 'proponents'}"
        )
    low = common.preconditioned.rank is not None  # whose own error would be taken for the code's
    odd = recall.c_here is not None and recall.cutoff is not None and not low and not (
        recall.c / ODD_CALIBRATION < recall.c_here < recall.c * ODD_CALIBRATION)
    if odd and recall.c_here is not None:
        warnings.append(
            f"on this query the code's error is {recall.c_here / recall.c:.1f} times what the "
            "index was calibrated to, so the recall statement is "
            + ("too hopeful" if recall.c_here > recall.c else "too cautious")
            + "; a longer --shortlist helps"
        )
    if recall.estimate is not None and recall.estimate < HOPELESS and hits and not unfinished:
        warnings.append(_what_would_help(track, hits[-1], recall.shortlist_for_95))
    if low:
        warnings.append(
            "these hits were chosen, and the recall statement made, with the query's gradient "
            f"reduced to rank {common.preconditioned.rank} a module; their influence is that of "
            "all of it"
        )
    return warnings


def _what_would_help(track: Track, last: Hit, length: int | None) -> str:
    """The warning for an answer that drowns in the code's noise: which flags would help."""
    snapshot = track.common.snapshot
    total, place = len(snapshot), snapshot.contents.place_of(last.id)
    assert place is not None
    error = track.noise * snapshot.norms[place]
    means = ["only --shortlist all would hold 95% of it" if not length or length >= total else
             f"--shortlist {_round_up(length, total)} would hold about 95% of it",
             "or an index with more --bits"]
    if track.common.settings.candidates == "code":
        means.append("or --candidates both")
    return ("the code's noise hides this answer: the influence of the last hit is "
            f"{abs(last.influence) / error if error > 0 else 0:.1f} times the noise of a "
            f"code's score; {', '.join(means)}")


def _round_up(length: int, total: int) -> str:
    """A length people would type: two digits, upwards."""
    step = 10 ** max(0, len(str(length)) - 2)
    return str(min(total, -(-length // step) * step))


# ---- all of it together


def _result(
    track: Track, hits: list[Hit], recall: Recall, rescored: int, warnings: list[str]
) -> Result:
    """The result, but for what only an exact search knows."""
    snapshot, settings = track.common.snapshot, track.common.settings
    groups, total, count = _groups(track, hits)
    return Result(
        query=track.query, hits=hits, recall=recall,
        sequences=snapshot.manifest.sequences, shortlist=track.length, rescored=rescored,
        train_sequences=settings.train_sequences,
        train_sequences_given=settings.train_sequences_given,
        coverage=snapshot.coverage.share, damaged=list(snapshot.coverage.damaged),
        layers=sorted({module.layer for module in settings.modules}),
        controls=settings.facts(), seconds={}, warnings=warnings,
        model=model_name(snapshot.manifest), index=snapshot.digest, groups=groups,
        group_count=count, total=total, task=snapshot.manifest.task.name,
    )


def _groups(track: Track, hits: list[Hit]) -> tuple[list[Group], Group | None, int]:
    """The groups asked for, the whole index as one, and how many groups there are."""
    common, settings = track.common, track.common.settings
    if settings.group_by is None:
        return [], None, 0
    # the sample counts with its exact scores whether or not its codes let it in
    counted, sample = track.advance(), common.random_sample
    estimate, variance = track.shortlist.estimates(
        settings.sign * track.ranking.scores(), counted, track.signed(counted), sample,
        track.signed(sample))
    grouping = common.snapshot.grouping(settings.group_by)
    ids = [hit.id for hit in hits]
    places = np.searchsorted(common.snapshot.contents.ids, ids).tolist()
    groups, total = total_groups(
        grouping, estimate, variance, settings.sign, dict(zip(ids, places, strict=True)),
        lambda influence: first_order_nats(influence, track.query, settings.train_sequences,
                                           settings.train_sequences_given))
    return groups, total, len(grouping.values)
