"""What a query asks: its arguments, carried whole from whoever asks to the tokenizer."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gradindex.errors import InputError
from gradindex.modules import numbers_in


@dataclass(frozen=True)
class Question:
    """What is to be explained, in one of three forms, before anything is tokenised.

    Texts: `prompt` and `completion` are strings; without a completion the model's own greedy
    continuation is explained. Tokens: `token_ids` with `labels` of the same length, −100 where
    nothing is scored [all are]. A chat: `messages`, each with a role and a content, of which the
    last is explained; `tools` and `chat_template_kwargs` are what the template was told beside
    them in training. `versus` is another completion of the prompt, whose log p is taken off.
    `score_on` ("0-2", "5") names the tokens of the completion that are scored, from 0, both ends
    included [all]. `id` is what the user calls the question; it is handed back as `Query.id`.

    Of an index of another task. Classification: `text` (and `text_b`) with a `label`, by name or
    number [the model's own]; `versus_label` is another label, whose log p is taken off. Reward and
    preference: `prompt` with `chosen` and `rejected` (and `margin`), texts or messages; or with one
    `response`, whose reward is explained.
    """

    prompt: str | None = None
    completion: str | None = None
    token_ids: Sequence[int] | None = None
    labels: Sequence[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    versus: str | None = None
    score_on: str | None = None
    id: Any = None
    text: str | None = None
    text_b: str | None = None
    label: str | int | None = None
    versus_label: str | int | None = None
    chosen: Any = None
    rejected: Any = None
    response: Any = None
    margin: float | None = None

    def given(self) -> dict[str, Any]:
        """The arguments that were given, by name; the id is none of them."""
        everything = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in everything.items()
                if value is not None and name != "id"}

    @property
    def other(self) -> "Question":
        """The question that `versus` stands for: the same prompt with the other completion."""
        return Question(self.prompt, self.versus)

    def check(self) -> None:
        """Raise InputError for what can be told to be wrong without a tokenizer."""
        if self.versus is not None and (self.prompt is None or self.completion is None):
            raise InputError("--versus compares two completions of one prompt: give -p and -c.")
        # the difference of a text with itself is zero, and no code has anything to say of it
        if self.versus is not None and self.versus == self.completion:
            raise InputError("--versus is the completion itself: there is nothing to compare.")
        if self.score_on is not None and not numbers_in(self.score_on):
            raise InputError(f"--score-on {self.score_on!r}: expected tokens of the completion by "
                             "number, such as 0-2 or 5.")
        if self.labels is not None and self.token_ids is None:
            raise InputError("labels go with token_ids; of a text, --score-on chooses tokens.")
        if self.messages is None and (self.tools, self.chat_template_kwargs) != (None, None):
            raise InputError("tools and chat_template_kwargs go with messages.")
        self._check_form()
        if self.versus is not None:
            with as_versus():
                self.other._check_form()

    def _check_form(self) -> None:
        """Raise InputError unless it has exactly one of the three forms, in text that is text."""
        forms = [self.prompt is not None or self.completion is not None,
                 self.token_ids is not None, self.messages is not None]
        if sum(forms) != 1:
            raise InputError(
                "give one query: a prompt and a completion, or token_ids and labels, or messages."
            )
        # Lone surrogates come from a command line, or a file, that is not UTF-8. The tokenizer
        # would refuse them much later, and not say where they stand.
        messages = json.dumps([self.messages, self.tools, self.chat_template_kwargs],
                              ensure_ascii=False, default=str)
        for text in (self.prompt, self.completion, messages):
            try:
                (text or "").encode("utf-8")
            except UnicodeEncodeError as error:
                letter = error.object[error.start]
                raise InputError(
                    f"the query is not valid UTF-8 (character {error.start}: {letter!r}). Put it "
                    "in a UTF-8 file and give @FILE."
                ) from None
        # left out, it means the model's own continuation; empty, more likely a mistake
        if self.completion == "":
            raise InputError("the completion is empty; give the text to explain, or leave -c out "
                             "to explain the model's own continuation.")


@contextlib.contextmanager
def as_versus() -> Iterator[None]:
    """Say of an InputError that it is about the other completion."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--versus: {error}") from None
