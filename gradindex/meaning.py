"""What influence means, with its sign and units: a sentence for each task and kind of query."""

from collections.abc import Sequence
from typing import Protocol


class AskedText(Protocol):
    """What of a query decides its units: its own text and the others, each with its weight."""

    weight: float
    label_name: str | None
    unit: str

    @property
    def texts(self) -> "Sequence[AskedText]": ...


UNITS = (
    "Influence is I = ∇{asked}ᵀ (G+λI)⁻¹ ∇{row}, {how} for this index's EK-FAC curvature: positive "
    "means that one more copy of the sequence would make {effect}, by I / N_train {unit} to first "
    "order."
)
# by task: what is asked about, what of a sequence, and what a copy of that does
SAID = {
    "causal": ("log p(completion | prompt)", "log p(sequence)", "the completion more likely"),
    "classification": ("log p(label | text)", "log p(its label)", "the label more likely"),
    "reward": ("log σ(r(chosen) − r(rejected) − margin)", "log σ(its pair)",
               "the chosen answer more preferred"),
    "preference": ("log σ(β [log π/π_ref(chosen) − log π/π_ref(rejected)])", "log σ(its pair)",
                   "the chosen answer more preferred"),
}


def units_of(task: str, exact: bool, query: AskedText | None = None) -> str:
    """What influence on a query means, with its sign, in one sentence.

    Without one, the query is a row of the task's data.

    >>> units_of("classification", exact=True)[:60]
    'Influence is I = ∇log p(label | text)ᵀ (G+λI)⁻¹ ∇log p(its l'
    """
    asked, row, effect = SAID[task]
    unit = "nats"
    if query is not None:
        asked, effect = _of_query(query, asked, effect)
        unit = "nats" if query.unit == "nats" else "units of reward"
    return UNITS.format(asked=asked, row=row, effect=effect, unit=unit,
                        how="exact" if exact else "estimated by code")


def _of_query(query: AskedText, asked: str, effect: str) -> tuple[str, str]:
    """What a query asks about and what a copy does: of one text, a difference, a sum of several."""
    added = [text for text in query.texts if text.weight > 0]
    taken = [text for text in query.texts if text.weight < 0]
    if query.unit != "nats":
        asked, effect = ("[r(chosen) − r(rejected)]", effect) if taken else \
            ("r(answer)", "the answer's reward larger")
    elif taken:
        one, other, given = "completion", "versus", "prompt"
        if taken[0].label_name is not None:
            one, other, given = "label", "other label", "text"
            if len(added) == len(taken) == 1:
                one, other = str(added[0].label_name), str(taken[0].label_name)
        asked = f"[log p({one} | {given}) − log p({other} | {given})]"
        effect = f"log p({one}) rise against log p({other})"
    if len(added) > 1:
        asked, effect = f"Σ {asked}", f"{effect}, summed over {len(added):,} queries"
    return asked, effect
