"""Text ↔ tokens, with the loss mask that training used.

Special tokens are the ones the tokenizer adds by itself. Spans are character offsets into the
document's text (a rendered chat's, for messages); a special token has an empty span.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradindex.errors import InputError

UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode half a character to


class ChatTemplateError(InputError):
    """The chat template refuses the messages."""


@dataclass
class Tokenised:
    """A tokenised document: tokens int32 [n], scored bool [n], spans int64 [n, 2] (characters).

    `scored[t]` says that the loss counted the prediction of token t.
    """

    tokens: np.ndarray
    scored: np.ndarray
    spans: np.ndarray


def encode(tokenizer: Any, text: str) -> Tokenised:
    """A plain document: every token is scored."""
    ids, spans, _ = _tokenize(tokenizer, text, special=True)
    return Tokenised(ids, np.ones(len(ids), dtype=bool), spans)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> Tokenised:
    """Prompt and completion, tokenised as one text; the completion's tokens are scored.

    A token that reaches over the border belongs to the completion. An end token that the
    tokenizer adds behind the text isn't part of the completion and is left out.
    """
    text = prompt + completion
    # Only around some text can be told which special tokens stand before it and which behind.
    ids, spans, added = _tokenize(tokenizer, text or "a", special=True)
    own = np.flatnonzero(~added)
    end = 0 if not len(own) else own[-1] + 1 if text else own[0]
    scored = ~added & (spans[:, 1] > len(prompt))
    return Tokenised(ids[:end], scored[:end], spans[:end])


def encode_messages(
    tokenizer: Any, messages: list[dict[str, Any]], last: bool = False
) -> Tokenised:
    """A chat, rendered by the tokenizer's own template; the assistant's tokens are scored.

    With `last`, only the last message's. Raises InputError where the template can't say which
    tokens are the assistant's, ChatTemplateError where it refuses the messages.
    """
    text = render_messages(tokenizer, messages)
    ids, spans, _ = _tokenize(tokenizer, text, special=False)
    scored = np.zeros(len(ids), dtype=bool)
    marked = _marked_stretches(tokenizer, messages, text)
    if marked is not None:
        before = messages[:-1] if last else []
        earlier = _marked_stretches(tokenizer, before, render_messages(tokenizer, before))
        for start, end in marked[len(earlier or []):]:
            scored |= (spans[:, 1] > start) & (spans[:, 0] < end)
        return Tokenised(ids, scored, spans)
    for index, message in enumerate(messages):
        if message.get("role") != "assistant" or (last and index < len(messages) - 1):
            continue
        opened = render_messages(tokenizer, messages[:index], answer=True) if index else _before(
            tokenizer, messages[:1], text)
        closed = render_messages(tokenizer, messages[: index + 1])
        if not (closed.startswith(opened) and text.startswith(closed)):
            raise InputError(
                "the chat template rewrites earlier messages, so the assistant's tokens can't be "
                "told apart. Mark them in the template with {% generation %}, or give the records "
                "as prompt and completion (--prompt-field, --completion-field)."
            )
        scored |= (spans[:, 1] > len(opened)) & (spans[:, 1] <= len(closed))
    return Tokenised(ids, scored, spans)


def render_messages(tokenizer: Any, messages: list[dict[str, Any]], answer: bool = False) -> str:
    """The chat as text; with `answer`, followed by what opens the assistant's turn.

    Raises ChatTemplateError where the template refuses the messages.
    """
    return _render(tokenizer, messages, add_generation_prompt=answer)


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template can fail in any way, `raise_exception` being the usual
        raise ChatTemplateError(
            f"the chat template refuses the messages ({error}). Give roles in the order that the "
            "template expects."
        ) from error


def _before(tokenizer: Any, first: list[dict[str, Any]], text: str) -> str:
    """What stands before the content of an assistant message that opens the chat."""
    alone = render_messages(tokenizer, first)
    opening = render_messages(tokenizer, first, answer=True).removeprefix(alone)
    return text[: text.find(opening) + len(opening)] if opening in text else ""


def _marked_stretches(
    tokenizer: Any, messages: list[dict[str, Any]], text: str
) -> list[tuple[int, int]] | None:
    """Characters of `text` inside {% generation %}, or None where the template marks none.

    The mask that transformers offers goes wrong where a mark falls on a space that the tokenizer
    leaves out of its offsets. So the blocks are rendered as filters that put a sign around them.
    """
    template = tokenizer.get_chat_template()
    noncharacters = map(chr, range(0xFDD0, 0xFDF0))
    opening, closing = [sign for sign in noncharacters if sign not in text][:2]
    signs = f'filter replace("","{opening}",1)|reverse|replace("","{closing}",1)|reverse'
    signed, count = re.subn(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", rf"\1{signs}\2", template)
    signed = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endfilter", signed)
    rendered = _render(tokenizer, messages, chat_template=signed) if count else ""
    if not count or rendered.replace(opening, "").replace(closing, "") != text:
        return None
    outside, *rest = rendered.split(opening)
    place, stretches = len(outside), []
    for piece in rest:
        inside, outside = piece.split(closing)
        stretches.append((place, place + len(inside)))
        place += len(inside) + len(outside)
    return stretches


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
    context = start = 0  # ids[context:start] has its texts already; the next ones depend on it
    for end in range(1, len(ids) + 1):
        if end == len(ids) or not _decode(tokenizer, ids[context:end]).endswith(UNDECODED):
            texts += _shares(tokenizer, ids[context:end], start - context)
            context, start = start, end
    # Some decoders judge a whole run of bytes at once, so one token of context isn't enough.
    whole = _decode(tokenizer, ids)
    return texts if "".join(texts) == whole else _shares(tokenizer, ids, 0)


def _shares(tokenizer: Any, ids: list[int], known: int) -> list[str]:
    """What each of ids[known:] adds to the text of them all."""
    text = _decode(tokenizer, ids)
    done = len(_decode(tokenizer, ids[:known]))
    shares = []
    for end in range(known + 1, len(ids)):
        sofar = _decode(tokenizer, ids[:end])
        settled = next((place for place, (one, other) in enumerate(zip(sofar, text, strict=False))
                        if one != other), min(len(sofar), len(text)))
        shares.append(text[done:settled])
        done = max(done, settled)
    return [*shares, text[done:]]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _tokenize(
    tokenizer: Any, text: str, special: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, their spans, and which of them the tokenizer added by itself."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer "
            "(one with a tokenizer.json)."
        )
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
        return_token_type_ids=False, return_special_tokens_mask=True, truncation=False,
        padding=False, verbose=False,
    )
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    added = np.array(encoded["special_tokens_mask"], dtype=bool)
    # Some tokenizers trim spaces off their offsets; what lies between two tokens is the second's.
    spans[~added, 1] = np.maximum(spans[~added, 1], 1)
    spans[:, 1] = np.maximum.accumulate(spans[:, 1])
    reached = np.concatenate([[0], spans[:-1, 1]])
    spans[:, 0] = np.where(added, spans[:, 1], np.minimum(spans[:, 0], reached))
    return ids, spans, added
