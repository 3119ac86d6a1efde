"""Text ↔ tokens, with the loss mask that training used.

Special tokens are the ones the tokenizer adds by itself. Spans are character offsets into the
document's text; a special token has an empty span.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradindex.errors import InputError


@dataclass
class Tokens:
    """A tokenised document: ids int32 [n], scored bool [n], spans int64 [n, 2] (characters).

    `scored[t]` says that the loss counted the prediction of token t.
    """

    ids: np.ndarray
    scored: np.ndarray
    spans: np.ndarray


def encode(tokenizer: Any, text: str) -> Tokens:
    """A plain document: every token is scored."""
    ids, spans = _tokenize(tokenizer, text, special=True)
    return Tokens(ids, np.ones(len(ids), dtype=bool), spans)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> Tokens:
    """Prompt and completion, tokenised as one text; the completion's tokens are scored.

    A token that reaches over the border belongs to the completion. An end token that the
    tokenizer adds behind the text isn't part of the completion and is left out.
    """
    ids, spans = _tokenize(tokenizer, prompt + completion, special=True)
    scored = spans[:, 1] > len(prompt)
    last = int(np.flatnonzero(spans[:, 1] > 0)[-1]) + 1 if (spans[:, 1] > 0).any() else len(ids)
    return Tokens(ids[:last], scored[:last], spans[:last])


def encode_messages(tokenizer: Any, messages: list[dict[str, Any]], last: bool = False) -> Tokens:
    """A chat, rendered by the tokenizer's own template; the assistant's tokens are scored.

    With `last`, only the last message's. Raises InputError where the template can't say which
    tokens are the assistant's.
    """
    text = render_messages(tokenizer, messages)
    ids, spans = _tokenize(tokenizer, text, special=False)
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)) and not last:
        marked = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Tokens(ids, np.array(marked["assistant_masks"], dtype=bool), spans)
    scored = np.zeros(len(ids), dtype=bool)
    for index, message in enumerate(messages):
        if message.get("role") != "assistant" or (last and index < len(messages) - 1):
            continue
        before = render_messages(tokenizer, messages[:index], answer=True)
        after = render_messages(tokenizer, messages[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise InputError(
                "the chat template rewrites earlier messages, so the assistant's tokens can't be "
                "told apart. Mark them in the template with {% generation %}, or give the records "
                "as prompt and completion (--prompt-field, --completion-field)."
            )
        scored |= (spans[:, 1] > len(before)) & (spans[:, 1] <= len(after))
    return Tokens(ids, scored, spans)


def render_messages(tokenizer: Any, messages: list[dict[str, Any]], answer: bool = False) -> str:
    """The chat as text; with `answer`, followed by what opens the assistant's turn."""
    if not messages:
        return ""
    return str(tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer
    ))


def encode_rendered(tokenizer: Any, rendered: str) -> list[int]:
    """Token ids of a rendered chat, which brings its special tokens itself."""
    return [int(token) for token in _tokenize(tokenizer, rendered, special=False)[0]]


def check_chat_template(tokenizer: Any, field: str) -> None:
    """Raise InputError where chat records meet a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the records hold messages (--messages-field {field}) but the tokenizer has no chat "
            "template. Use a tokenizer that has one, or give the records as text (--text-field) or "
            "as prompt and completion (--prompt-field, --completion-field)."
        )


def pieces(tokenizer: Any | None, ids: list[int]) -> list[str]:
    """The text of each token; joined, they are the decoded text.

    A character whose bytes are spread over several tokens is given to the last of them, the others
    are empty. Without a tokenizer, the ids themselves.
    """
    if tokenizer is None:
        return [f"⟨{token}⟩" for token in ids]
    texts: list[str] = []
    context = start = 0  # ids[context:start] is decoded already and kept for what depends on it
    for end in range(1, len(ids) + 1):
        known = _decode(tokenizer, ids[context:start])
        text = _decode(tokenizer, ids[context:end])
        if text.endswith("�") and end < len(ids) and end - start < 8:
            texts.append("")
            continue
        texts.append(text[len(known):])
        context, start = start, end
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _tokenize(tokenizer: Any, text: str, special: bool) -> tuple[np.ndarray, np.ndarray]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer "
            "(one with a tokenizer.json)."
        )
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
        return_token_type_ids=False, truncation=False, padding=False, verbose=False,
    )
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    return ids, np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
