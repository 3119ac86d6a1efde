"""The tasks that a model may have been trained for, by name."""

from dataclasses import dataclass

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
