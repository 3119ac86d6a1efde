"""Text to tokens and back, with the loss mask that training used.

Special tokens are those that the tokenizer adds by itself. Spans are offsets, in characters, into
the document's text (for messages, into the rendered chat); a special token has an empty span.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gradindex.errors import InputError

UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode half a character to


@dataclass
class Tokenised:
    """A tokenised document.

    `tokens` int32 [n] are token ids, `scored` bool [n] says for which of them training counted the
    prediction, `spans` int64 [n, 2] are their first character and the one behind their last.
    `unshown` is what a chat says and its template doesn't write, in words, one a kind; `border`,
    `label` and `offset` are what a task has besides (`objective/batch.py`), and `longer` says that
    the text was cut.
    """

    tokens: np.ndarray
    scored: np.ndarray
    spans: np.ndarray
    unshown: tuple[str, ...] = ()
    border: int | None = None
    label: int | None = None
    offset: float = 0.0
    longer: bool = False


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
    tokens, spans, _ = tokenize(tokenizer, text, special=True)
    return Tokenised(tokens, np.ones(len(tokens), dtype=bool), spans)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> Tokenised:
    """Prompt and completion, tokenised as one text; the completion's tokens are scored.

    The completion begins at the first token that the prompt alone doesn't have, as in TRL: a token
    that reaches over the border is the completion's. An end token that the tokenizer adds behind
    the text isn't part of the completion and is left out. Raises InputError for a slow tokenizer.

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
    tokens, spans, added = tokenize(tokenizer, text or "a", special=True)
    ordinary = np.flatnonzero(~added)
    end = 0 if not len(ordinary) else ordinary[-1] + 1 if text else ordinary[0]
    begun = common_tokens(tokenize(tokenizer, prompt, special=True)[0], tokens)
    scored = ~added & (np.arange(len(tokens)) >= begun)
    return Tokenised(tokens[:end], scored[:end], spans[:end])


def common_tokens(tokens: np.ndarray, others: np.ndarray) -> int:
    """How many token ids two texts begin with in common."""
    length = min(len(tokens), len(others))
    differing = np.flatnonzero(tokens[:length] != others[:length])
    return int(differing[0]) if len(differing) else length


def common_characters(text: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((number for number, (one, two) in enumerate(zip(text, other, strict=False))
                 if one != two), min(len(text), len(other)))


def two_texts(texts: list[str], border: int) -> tuple[str, str]:
    """A row's two texts from those of its tokens, of which `border` are of the first.

    Decoding puts a space between the two, which is in neither.

    >>> two_texts(["Is", " it?", " Yes", "."], border=2)
    ('Is it?', 'Yes.')
    """
    return "".join(texts[:border]), "".join(texts[border:]).removeprefix(" ")


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
        same = common_characters(_decode(tokenizer, tokens[:end]), text)
        shares.append(text[done:same])
        done = max(done, same)
    return [*shares, text[done:]]


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    """The text of some tokens, as the tokenizer has it, special tokens and all spaces in it."""
    return str(
        tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def tokenize(
    tokenizer: Any, text: str, special: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids int32 [n], their spans int64 [n, 2], and which of them are special, bool [n].

    With `special` the tokenizer adds its own special tokens, except those that the text begins or
    ends with already: it was written with them then, and training never saw them twice. Raises
    InputError for a tokenizer that can't say where in a text its tokens stand.
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
    kept = slice(*_once(tokens, added))
    return tokens[kept], spans[kept], added[kept]


def _once(tokens: np.ndarray, added: np.ndarray) -> tuple[int, int]:
    """Where tokens begin and end without the added ones that stand in the text as well."""
    ordinary = np.flatnonzero(~added)
    if not len(ordinary):
        return 0, len(tokens)
    start, end = int(ordinary[0]), int(ordinary[-1]) + 1
    behind = len(tokens) - end
    own = tokens[start:end].tolist()
    begins = own[:start] == tokens[:start].tolist()
    ends = len(own) >= behind and own[len(own) - behind:] == tokens[end:].tolist()
    return start if begins else 0, end if ends else len(tokens)
