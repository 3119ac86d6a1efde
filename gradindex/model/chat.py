"""A chat → tokens and the loss mask that training used, by the tokenizer's own chat template.

A template that marks the assistant's words ({% generation %}) is believed: what it marks is scored,
as in transformers' `return_assistant_tokens_mask` and TRL's `assistant_only_loss`. Without marks
they are found turn by turn (`turns.py`). Of a prompt and a completion made of messages all of the
completion is scored, as by TRL's `completion_only_loss`.
"""

from typing import Any

import numpy as np

from gradindex.model.messages import Chat, is_learned, is_left_out
from gradindex.model.rendering import Renderer, Stretch
from gradindex.model.tokenise import Tokenised, common_tokens
from gradindex.model.turns import end_of_message, turns


def encode_chat(tokenizer: Any, chat: Chat, last: bool = False) -> Tokenised:
    """A chat, of which the assistant's tokens are scored; those of messages left out aren't.

    With `last`, only those of the last message are, whatever its weight. Raises ChatTemplateError
    where the template refuses the messages, or can't tell which words are the assistant's.
    """
    renderer = Renderer(tokenizer, chat)
    chat = renderer.chat
    chosen = [number == len(chat.messages) - 1 if last else is_learned(message)
              for number, message in enumerate(chat.messages)]
    tokens, spans = renderer.tokens(renderer.text)
    scored = np.zeros(len(tokens), dtype=bool)
    marked = renderer.marked()
    if marked is not None:
        for start, end in _of_messages(renderer, marked, chosen):
            scored |= (spans[:, 1] > start) & (spans[:, 0] < end)
        return Tokenised(tokens, scored, spans)
    for start, end in turns(renderer, chosen):
        scored |= (spans[:, 1] > start) & (spans[:, 1] <= end)
    return Tokenised(tokens, scored, spans)


def encode_answer(tokenizer: Any, prompt: Chat, completion: list[dict[str, Any]]) -> Tokenised:
    """Prompt and completion that are messages; all that follows the prompt is scored.

    The completion begins at the first token that the prompt alone, with the words that open an
    answer, doesn't have. Raises ChatTemplateError.
    """
    renderer = Renderer(tokenizer, prompt.followed_by(completion))
    messages = renderer.chat.messages
    before = renderer.render(messages[: len(prompt.messages)], answer=True)
    tokens, spans = renderer.tokens(renderer.text)
    scored = np.arange(len(tokens)) >= common_tokens(renderer.tokens(before)[0], tokens)
    left_out = [is_left_out(message) for message in messages]
    if any(left_out[len(prompt.messages):]):
        for start, end in turns(renderer, left_out):
            scored &= ~((spans[:, 1] > start) & (spans[:, 1] <= end))
    return Tokenised(tokens, scored, spans)


def encode_question(tokenizer: Any, chat: Chat) -> tuple[str, list[int]]:
    """A chat that waits for an answer: its text with the words that open one, and its token ids.

    Raises ChatTemplateError.
    """
    renderer = Renderer(tokenizer, chat)
    text = renderer.render(renderer.chat.messages, answer=True)
    return text, [int(token) for token in renderer.tokens(text)[0]]


def _of_messages(
    renderer: Renderer, marked: list[Stretch], chosen: list[bool]
) -> list[Stretch]:
    """Those of the marked stretches that belong to the chosen messages."""
    messages = renderer.chat.messages
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marked) == len(answers):
        return [stretch for stretch, number in zip(marked, answers, strict=True) if chosen[number]]
    if all(chosen[number] for number in answers):
        return marked
    ends = [end_of_message(renderer, messages, number, renderer.text)
            for number in range(len(messages))]
    kept = []
    for start, end in marked:
        # The message whose end comes next holds the stretch. Where that is a user's, the stretch
        # stands between the two and belongs to the answer before.
        owner = next((number for number, place in enumerate(ends) if place is not None and (
            place > start or (place == start and number in answers))), len(messages) - 1)
        if chosen[max((number for number in answers if number <= owner), default=owner)]:
            kept.append((start, end))
    return kept
