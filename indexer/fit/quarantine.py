"""Sequences whose gradient is not finite: kept out, listed and counted, and few of them at most."""

from gradindex.errors import GradindexError

ALWAYS = 10  # so many are forgiven however small the data


def check_quarantine(found: dict[int, str], total: int, share: float, where: str) -> None:
    """Raise GradindexError where more of `total` sequences than a `share` are quarantined.

    Ten are forgiven in any case, unless they are half of all; all of them never are. `found` says
    of ids why.
    """
    allowed = min(max(min(ALWAYS, (total - 1) // 2), int(share * total)), total - 1)
    if len(found) > allowed:
        example = min(found)
        raise GradindexError(
            f"{len(found)} of {total:,} sequences {where} have a gradient that is not finite "
            f"(sequence {example}: {found[example]}); at most {allowed} are left out. Try --dtype "
            "float32, take such records out of the data, or allow more with --max-bad."
        )
