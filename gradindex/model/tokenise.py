"""Text to tokens and back, with the loss mask that training used.

Special tokens are those that the tokenizer adds by itself. Spans are offsets, in characters, into
the document's text (for messages, into the rendered chat); a special token has an empty span.
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
    """A tokenised document.

    `tokens` int32 [n] are token ids, `scored` bool [n] says for which of them training counted the
    prediction, `spans` int64 [n, 2] are their first character and the one behind their last.
    """

    tokens: np.ndarray
    scored: np.ndarray
    spans: np.ndarray


def encode(tokenizer: Any, text: str) -> Tokenised:
    """A plain document, every token of which is scored. Raises InputError for a slow tokenizer.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"ice": 0, "melts": 1, "?": 2}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> document = encode(PreTrainedTokenizerFast(tokenizer_object=words), "ice melts")
    >>> document.tokens.tolist(), document.spans.tolist()
    ([0, 1], [[0, 3], [3, 9]])
    """
    tokens, spans, _ = _tokenize(tokenizer, text, special=True)
    return Tokenised(tokens, np.ones(len(tokens), dtype=bool), spans)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> Tokenised:
    """Prompt and completion, tokenised as one text; the completion's tokens are scored.

    A token that reaches over the border belongs to the completion. An end token that the tokenizer
    adds behind the text isn't part of the completion and is left out. Raises InputError for a slow
    tokenizer.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"ice": 0, "melts": 1, "?": 2}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> encode_pair(tokenizer, "ice", " melts").scored.tolist()
    [False, True]
    """
    text = prompt + completion
    # Only around some text can be told which special tokens stand before it and which behind.
    tokens, spans, added = _tokenize(tokenizer, text or "a", special=True)
    ordinary = np.flatnonzero(~added)
    end = 0 if not len(ordinary) else ordinary[-1] + 1 if text else ordinary[0]
    scored = ~added & (spans[:, 1] > len(prompt))
    return Tokenised(tokens[:end], scored[:end], spans[:end])


def encode_messages(
    tokenizer: Any, messages: list[dict[str, Any]], last: bool = False
) -> Tokenised:
    """A chat, rendered by the tokenizer's own template; the assistant's tokens are scored.

    With `last`, only those of the last message are. Raises InputError where the template can't say
    which tokens are the assistant's, ChatTemplateError where it refuses the messages.
    """
    text = render_messages(tokenizer, messages)
    tokens, spans, _ = _tokenize(tokenizer, text, special=False)
    scored = np.zeros(len(tokens), dtype=bool)
    # A template that marks the assistant's words itself is believed: training that masks by
    # transformers goes by its marks.
    marked = _marked_stretches(tokenizer, messages, text)
    if marked is not None:
        before = messages[:-1] if last else []
        earlier = _marked_stretches(tokenizer, before, render_messages(tokenizer, before))
        for start, end in marked[len(earlier or []):]:
            scored |= (spans[:, 1] > start) & (spans[:, 0] < end)
        return Tokenised(tokens, scored, spans)
    for number, message in enumerate(messages):
        if message.get("role") != "assistant" or (last and number < len(messages) - 1):
            continue
        opened = render_messages(tokenizer, messages[:number], answer=True) if number else _before(
            tokenizer, messages[:1], text)
        closed = render_messages(tokenizer, messages[: number + 1])
        # What a turn adds to the chat before it is the assistant's, unless the template takes
        # earlier words back (some drop the reasoning of all turns but the last).
        if not (closed.startswith(opened) and text.startswith(closed)):
            raise InputError(
                "the chat template rewrites earlier messages, so the assistant's tokens can't be "
                "told apart. Mark them in the template with {% generation %}, or give the records "
                "as prompt and completion (--prompt-field, --completion-field)."
            )
        scored |= (spans[:, 1] > len(opened)) & (spans[:, 1] <= len(closed))
    return Tokenised(tokens, scored, spans)


def render_messages(tokenizer: Any, messages: list[dict[str, Any]], answer: bool = False) -> str:
    """The chat as text. With `answer`, the words that open an assistant's turn follow it.

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
    """The part of `text` before the content of its `first` message, which is the assistant's."""
    # A generation prompt can't be asked for with no message before it, so it is taken from behind.
    alone = render_messages(tokenizer, first)
    opening = render_messages(tokenizer, first, answer=True).removeprefix(alone)
    return text[: text.find(opening) + len(opening)] if opening in text else ""


def _marked_stretches(
    tokenizer: Any, messages: list[dict[str, Any]], text: str
) -> list[tuple[int, int]] | None:
    """The stretches of `text` inside {% generation %}, as (first character, the one behind).

    None where the template marks none.
    """
    template = tokenizer.get_chat_template()
    # The mask that transformers offers goes wrong where a mark falls on a space that the tokenizer
    # leaves out of its offsets. So the blocks are rendered as filters that put a sign before and
    # behind them: two code points that Unicode never assigns, and that the text doesn't hold.
    noncharacters = map(chr, range(0xFDD0, 0xFDF0))
    opening, closing = [sign for sign in noncharacters if sign not in text][:2]
    signs = f'filter replace("","{opening}",1)|reverse|replace("","{closing}",1)|reverse'
    signed, count = re.subn(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", rf"\1{signs}\2", template)
    signed = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endfilter", signed)
    rendered = _render(tokenizer, messages, chat_template=signed) if count else ""
    # A template that renders something else with the signs in it can't be marked in this way.
    if not count or rendered.replace(opening, "").replace(closing, "") != text:
        return None
    outside, *rest = rendered.split(opening)
    start, stretches = len(outside), []
    for part in rest:
        inside, outside = part.split(closing)
        stretches.append((start, start + len(inside)))
        start += len(inside) + len(outside)
    return stretches


def encode_rendered(tokenizer: Any, rendered: str) -> list[int]:
    """The token ids of a rendered chat."""
    # without special tokens of the tokenizer's: a chat template brings them itself
    return [int(token) for token in _tokenize(tokenizer, rendered, special=False)[0]]


def check_chat_template(tokenizer: Any, field: str) -> None:
    """Raise InputError where chat records meet a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the records hold messages (--messages-field {field}) but the tokenizer has no chat "
            "template. Use a tokenizer that has one, or give the records as text (--text-field) or "
            "as prompt and completion (--prompt-field, --completion-field)."
        )


def pieces(tokenizer: Any | None, tokens: list[int]) -> list[str]:
    """The text of each token. Joined, they are the decoded text.

    A character whose bytes are spread over several tokens is given to the last of them, the others
    are empty. Without a tokenizer, the token ids themselves.

    >>> pieces(None, [5, 7])
    ['⟨5⟩', '⟨7⟩']
    """
    if tokenizer is None:
        return [f"⟨{token}⟩" for token in tokens]
    texts: list[str] = []
    # Decoding all tokens for each of them would take quadratic time. tokens[context:start] has its
    # texts already, and is decoded again because those of the next ones depend on it.
    context = start = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or not _decode(tokenizer, tokens[context:end]).endswith(UNDECODED):
            texts += _shares(tokenizer, tokens[context:end], start - context)
            context, start = start, end
    # Some decoders judge a whole run of bytes at once, so one token of context isn't enough.
    whole = _decode(tokenizer, tokens)
    return texts if "".join(texts) == whole else _shares(tokenizer, tokens, 0)


def _shares(tokenizer: Any, tokens: list[int], known: int) -> list[str]:
    """What each of tokens[known:] adds to the text of all of them."""
    text = _decode(tokenizer, tokens)
    done = len(_decode(tokenizer, tokens[:known]))
    shares = []
    for end in range(known + 1, len(tokens)):
        # The text so far, up to where later tokens change it: half a character decodes to a sign.
        prefix = _decode(tokenizer, tokens[:end])
        same = next((number for number, (letter, other) in enumerate(
            zip(prefix, text, strict=False)) if letter != other), min(len(prefix), len(text)))
        shares.append(text[done:same])
        done = max(done, same)
    return [*shares, text[done:]]


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    """The text of some tokens, as the tokenizer has it, special tokens and all spaces in it."""
    return str(
        tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _tokenize(
    tokenizer: Any, text: str, special: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids int32 [n], their spans int64 [n, 2], and which of them are special, bool [n].

    Raises InputError for a tokenizer that can't say where in a text its tokens stand.
    """
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
    tokens = np.array(encoded["input_ids"], dtype=np.int32)
    spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    added = np.array(encoded["special_tokens_mask"], dtype=bool)
    # Some tokenizers trim spaces off their offsets; what lies between two tokens is the second's.
    spans[~added, 1] = np.maximum(spans[~added, 1], 1)
    spans[:, 1] = np.maximum.accumulate(spans[:, 1])
    reached = np.concatenate([[0], spans[:-1, 1]])
    spans[:, 0] = np.where(added, spans[:, 1], np.minimum(spans[:, 0], reached))
    return tokens, spans, added
