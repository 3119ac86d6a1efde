"""A chat → tokens and the loss mask that training used, by the tokenizer's own chat template.

A template that marks the assistant's words ({% generation %}) is believed: what it marks is scored,
as in transformers' `return_assistant_tokens_mask` and TRL's `assistant_only_loss`. Without marks
they are found turn by turn (`turns.py`). Of a prompt and a completion made of messages all of the
completion is scored, as by TRL's `completion_only_loss`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gradindex.model.marks import stretches_of
from gradindex.model.messages import Chat, is_learned, is_left_out
from gradindex.model.rendering import Renderer
from gradindex.model.tokenise import Tokenised, common_tokens
from gradindex.model.turns import turns


def encode_chat(tokenizer: Any, chat: Chat, last: bool = False) -> Tokenised:
    """A chat, of which the assistant's tokens are scored; those of messages left out aren't.

    With `last`, only those of the last message are, whatever its weight. Raises ChatTemplateError
    where the template refuses the messages, or can't tell which words are the assistant's.
    """
    renderer = Renderer(tokenizer, chat)
    messages = renderer.chat.messages
    tokens, spans = renderer.tokens(renderer.text)
    scored = np.zeros(len(tokens), dtype=bool)

    def chosen(counts: Callable[[dict[str, Any]], bool]) -> list[bool]:
        return [number == len(messages) - 1 if last else counts(message)
                for number, message in enumerate(messages)]

    marked = renderer.marked()
    if marked is not None:  # whoever's words they are
        learned = chosen(lambda message: not is_left_out(message))
        for start, end in stretches_of(renderer, marked, learned):
            scored |= (spans[:, 1] > start) & (spans[:, 0] < end)
        return Tokenised(tokens, scored, spans, renderer.unshown)
    for start, end in turns(renderer, chosen(is_learned)):
        scored |= (spans[:, 1] > start) & (spans[:, 1] <= end)
    return Tokenised(tokens, scored, spans, renderer.unshown)


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
    return Tokenised(tokens, scored, spans, renderer.unshown)


def encode_question(tokenizer: Any, chat: Chat) -> tuple[str, list[int], tuple[str, ...]]:
    """A chat that waits for an answer: its text with the words that open one, and its token ids.

    Beside them what its template doesn't show of it. Raises ChatTemplateError.
    """
    renderer = Renderer(tokenizer, chat)
    text = renderer.render(renderer.chat.messages, answer=True)
    return text, [int(token) for token in renderer.tokens(text)[0]], renderer.unshown
