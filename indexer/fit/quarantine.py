"""Sequences whose gradient is not finite: kept out, listed and counted, and few of them at most."""

from gradindex.errors import GradindexError

ALWAYS_FORGIVEN = 10  # sequences, however small the data


def check_quarantine(reasons: dict[int, str], total: int, share: float, where: str) -> None:
    """Raise GradindexError where more of `total` sequences than a `share` are quarantined.

    Ten are forgiven in any case, unless they are half of all; all of them never are. `reasons` says
    of ids why.
    """
    # a share of small data would be none at all, and one bad record shouldn't end a build
    allowed = min(max(min(ALWAYS_FORGIVEN, (total - 1) // 2), int(share * total)), total - 1)
    if len(reasons) > allowed:
        example = min(reasons)
        raise GradindexError(
            f"{len(reasons)} of {total:,} sequences {where} have a gradient that is not finite "
            f"(sequence {example}: {reasons[example]}); at most {allowed} are left out. Try "
            "--dtype float32, take such records out of the data, or allow more with --max-bad."
        )
