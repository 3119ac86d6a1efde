"""How long what is left of a build will take, said before it is done."""

from gradindex.influence.split_batches import BatchTooLargeError
from gradindex.progress import Progress, duration
from gradindex.storage import layout
from indexer.pace.ahead import Ahead
from indexer.pace.pace import measure_pace
from indexer.pace.stages import stage_seconds
from indexer.prepare import Prepared
from indexer.read import ingest
from indexer.shards import Share
from indexer.state import BuildState

SHARED = ("covariance", "eigenvectors", "eigenvalues", "encode")  # among all shards


def say_expected(
    prepared: Prepared, state: BuildState, share: Share, progress: Progress
) -> None:
    """Measure this machine's pace, and say how long every stage that is left will take."""
    try:
        left = stages_left(prepared, state, share, progress)
    except BatchTooLargeError:  # the build itself halves such a batch, and goes on
        progress.say("expected: can't be told, since memory ran out on the batch that measures it")
        return
    if left:
        progress.say(f"expected: about {duration(sum(left.values()))} more: " + ", ".join(
            f"{name} {duration(seconds)}" for name, seconds in left.items()))


def stages_left(
    prepared: Prepared, state: BuildState, share: Share, progress: Progress
) -> dict[str, float]:
    """Seconds of the stages that this process still has before it. Raises ResourceError."""
    plan, run, settled = state.plan, prepared.run, state.settled
    model, tracked = prepared.model, prepared.tracked
    assert settled is not None
    unsealed = sum(run.segments[number].rows for number in ingest.unsealed(run)) / run.count
    if not unsealed and share.of > 1:
        return {}
    sample = run.records(prepared.settings.ids[: prepared.settings.block])
    ahead = Ahead.of(model, tracked, plan, prepared.allowance,
                     model.lengths(sample), run.count, state.batch_tokens, settled.bits)
    pace = measure_pace(model, tracked, sample, ahead, plan, progress)
    seconds = stage_seconds(pace, ahead, plan)
    seconds["encode"] *= unsealed
    done = {"encode"} if not unsealed else set[str]()
    if (run.index / layout.CURVATURE).is_dir():
        done |= {"covariance", "eigenvectors", "eigenvalues"}
    if settled.influence is not None or not share.first:
        done.add("pairs")
    if share.of > 1:  # `merge` does them
        done |= {"calibrate", "background"}
    return {name: taken / (share.of if name in SHARED else 1)
            for name, taken in seconds.items() if name not in done}
