"""What is said of an audit, the same on a terminal, on a page and in data."""

from gradindex.meaning import SAID
from search.study.audited import MEANINGS, OTHERWISE, Audit
from search.study.truth import INSPECTED, Detection


def sentences(audit: Audit) -> list[str]:
    """What an audit is and how its sequences are ranked, a sentence or two each."""
    said = [ranking(audit), scored(audit)]
    if audit.summed and audit.summed < len(audit):
        said.append(f"What others say is the mean over {audit.summed:,} sequences, drawn at "
                    f"random{' from each class alike' * (len(audit.rows.classes) > 1)}.")
    if audit.trusted_inside:
        said.append(f"{audit.trusted_inside:,} of the {audit.trusted:,} trusted queries are "
                    "sequences of this index, each of which helps itself: its harm says little.")
    if audit.snapshot.manifest.quarantined:
        said.append(f"{audit.snapshot.manifest.quarantined:,} quarantined sequences have no "
                    "gradient and are left out.")
    if not audit.snapshot.coverage.whole:
        said.append(f"{audit.snapshot.coverage}.")
    return said + measured(audit)


def ranking(audit: Audit) -> str:
    """What sequences are ranked by."""
    queries = "query" if audit.trusted == 1 else "queries"
    trusted = f" of {audit.trusted:,} {queries}" if audit.harm is not None else ""
    return (f"{len(audit):,} sequences, most suspect first, by {audit.ranked_by}: "
            f"{MEANINGS[audit.ranked_by]}{trusted}.")


def scored(audit: Audit) -> str:
    """How many were scored exactly, and which."""
    count, total = len(audit.places), len(audit)
    if count == total:
        return ("All were scored exactly, for this index's EK-FAC curvature" + (
            "; in cosines the others' sizes are as their codes know them."
            if audit.ranked_by == OTHERWISE else "."))
    chosen = "that their codes find most harmful" if audit.harm is not None else \
        "with the largest stored norms"
    ended = "interrupted: " if audit.interrupted else ""
    return (f"{ended}{count:,} of {total:,} were scored exactly, those {chosen}; the others come "
            "after them, in the order of what their codes say (`exact` is false).")


def measured(audit: Audit) -> list[str]:
    """How the truth was read, and of how many sequences it is known."""
    truth = audit.rows.truth
    if truth is None:
        return []
    known, total = len(audit.corrupted), len(audit.places)
    found = int(audit.corrupted.sum())
    said = [f"Truth: {truth.field}, read {truth.how}; {found:,} of {known:,} "
            f"sequences that were scored exactly are corrupted."]
    if known < total:
        said.append(f"{total - known:,} have no {truth.field} and are left out of that.")
    if not audit.detections:
        said.append("There is nothing to tell apart among these.")
    return said


def units(audit: Audit) -> str:
    """What the numbers mean."""
    row = SAID[audit.snapshot.manifest.task.name][1]
    return (f"Influence is ∇{row}ᵀ (G+λI)⁻¹ ∇{row} of two sequences, and self-influence that of "
            "one on itself: what one more copy adds to its own log p, times N_train, to first "
            "order. Losses are sums of −log p in nats, gradient norms those of the tracked maps.")


def percent(share: float) -> str:
    """A share of what is inspected or found: 82%."""
    return f"{100 * share:.0f}%"


def detection_lines(detections: list[Detection], width: int = 160) -> list[str]:
    """How well each signal finds the corrupted, as a table; in a narrow `width`, in fewer words."""
    if not detections:
        return []
    wide = max(len(one.signal) for one in detections) + 2
    cell, said, name = 15, "found in ", "signal"
    if wide + 19 + cell * len(INSPECTED) > width:
        cell, said, name = 8, "in ", "signal, share found"
    heads = "".join(f"{said + percent(share):>{cell}}" for share in INSPECTED)
    return [f"{name:<{wide}}{'AUROC':>7}{'avg. prec.':>12}{heads}", *(
        f"{one.signal:<{wide}}{one.auroc:>7.3f}{one.average_precision:>12.3f}"
        + "".join(f"{percent(share):>{cell}}" for share in one.found) for one in detections)]
