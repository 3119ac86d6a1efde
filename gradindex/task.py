"""The tasks that a model may have been trained for, by name."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# by name, what a row of data is for it
TASKS = {
    "causal": "a text, a prompt and completion, or a chat",
    "classification": "a text, or two, with a label",
    "reward": "a prompt with a chosen and a rejected answer",
    "preference": "a prompt with a chosen and a rejected answer",
}
BETA = 0.1  # of preference pairs, as trainers have it
# fields that a build can derive of pairs, by name, and what each is; lengths in tokens
LENGTH_DIFFERENCE, LONGER_CHOSEN = "length-difference", "longer-chosen"
DERIVED = {
    LENGTH_DIFFERENCE: "tokens of the chosen answer less those of the rejected",
    LONGER_CHOSEN: "whether the chosen answer has more tokens (of equal ones: no)",
}
# what data sets call a text, or two; and its label
TEXTS = (("text", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
         ("question1", "question2"), ("question", "sentence"), ("text",), ("sentence",),
         ("content",), ("review",))
LABELS = ("label", "labels", "class", "target")


@dataclass(frozen=True)
class Task:
    """What a model was trained for: one of TASKS. `beta` is β of preference pairs.

    >>> Task("classification").is_causal, Task("preference").of_pairs
    (False, True)
    """

    name: str = "causal"
    beta: float = BETA

    @property
    def model(self) -> str:
        """What a model of this task is called."""
        return {"classification": "a classifier of texts", "reward": "a reward model"}.get(
            self.name, "a causal language model")

    @property
    def is_causal(self) -> bool:
        """Whether the model is a causal language model, which says next tokens."""
        return self.name in ("causal", "preference")

    @property
    def of_pairs(self) -> bool:
        """Whether a row is a pair of texts of which one was preferred."""
        return self.name in ("reward", "preference")


CAUSAL = Task()


def text_fields(
    names: Collection[Any], first: str | None = None, second: str | None = None
) -> tuple[str, ...] | None:
    """Which fields of a row hold its text, or its two: as they were named, or are usually called.

    None where it has none.

    >>> text_fields(["idx", "premise", "hypothesis"]), text_fields(["note", "review"], None, "note")
    (('premise', 'hypothesis'), ('review', 'note'))
    """
    if first is None:
        known = [texts for texts in TEXTS if set(texts) <= set(names) and (
            second is None or len(texts) == 1)]
        texts = (*known[0], second) if known else ()
    else:
        texts = (first, second)
    found = tuple(name for name in texts if name is not None)
    return found if found and set(found) <= set(names) else None


def label_field(names: Collection[Any], named: str | None = None) -> str | None:
    """Which field of a row holds its label, None for none.

    >>> label_field(["text", "target"]), label_field(["text"], "stars")
    ('target', None)
    """
    return next((name for name in ((named,) if named else LABELS) if name in names), None)
