"""How long each stage of a build will take, from a pace and the lengths of the sequences.

Every stage's batches follow from the lengths. Added to the passes are reading records, adding up
and writing the fit's sums, digesting and writing files (SHA-256 as measured; the disk is taken to
write 300 MB/s).
"""

from gradindex.storage.build_plan import Plan
from gradindex.storage.layout import background_bytes, code_bytes
from indexer.background_queries import BACKGROUND_QUERIES
from indexer.calibrate import CALIBRATION_QUERIES, CALIBRATION_SAMPLE
from indexer.fit.running_sums import MOST_TIME, QUICK
from indexer.fit.schedule import BLOCK_SEQUENCES
from indexer.pace.ahead import Ahead
from indexer.pace.pace import Pace

WRITING = 300e6  # bytes a second, assumed of the disk: to measure it, something would be written
READ_RECORD = 4e-5  # seconds, as LMDB took elsewhere: it needs a file
ADDING = 1e9  # bytes a second: a block's sums to the running ones, in float64


def stage_seconds(pace: Pace, ahead: Ahead, plan: Plan) -> dict[str, float]:
    """Seconds of each stage after the data are read and the model is loaded, in order."""
    fitted = min(plan.fit_sequences, ahead.count)
    block = min(plan.segment_size, BLOCK_SEQUENCES)
    fitting, blocks = ahead.work(fitted, block), -(-fitted // block)
    partitions, bits = len(ahead.partitions), ahead.code.length
    queries, sample, background = (min(most, ahead.count) for most in (
        CALIBRATION_QUERIES, CALIBRATION_SAMPLE, BACKGROUND_QUERIES))
    one = ahead.work(1, len(ahead.lengths))
    asking = (pace.one_pass + pace.queries) * one
    passes = pace.one_pass * fitting * partitions + \
        2 * READ_RECORD * fitted * partitions  # they are read again to be counted
    scored = (pace.one_pass + pace.scores) * ahead.work(sample, len(ahead.lengths))

    def files(size: float, digests: int) -> float:
        return size * (1 / WRITING + digests / pace.hashing)

    def summed(work: float, size: int) -> float:
        """Work on all blocks, adding them up, and commits: all of them, or as many as may be."""
        commit, added = files(size, 1), work + blocks * size / ADDING
        return added + (blocks * commit if commit < QUICK else
                        min(blocks * commit, commit + MOST_TIME * added))

    return {
        "covariance": summed(passes + pace.covariance * fitting, ahead.fit.squares),
        "eigenvectors": pace.decompositions + files(ahead.fit.squares, 1),
        "eigenvalues": summed(passes + pace.eigenvalues * fitting, ahead.fit.tables)
                       + 2 * ahead.fit.squares / pace.hashing  # read for the passes, and to be kept
                       + files(ahead.fit.curvature, 2),
        "pairs": queries * (asking + pace.precondition)
                 + -(-queries // ahead.together) * scored,
        "encode": pace.drawing
                  + (pace.one_pass + pace.codes) * ahead.work(ahead.count, plan.segment_size)
                  + ahead.count * (READ_RECORD + pace.sealing)
                  + files(ahead.count * code_bytes(bits), 2),
        "calibrate": queries * asking,
        "background": background * asking + ahead.count * pace.scan
                      + files(background_bytes(background, bits), 2),
    }
