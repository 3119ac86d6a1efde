"""Documents cut into windows, or packed into full ones: what the model sees at once.

Without packing, a document longer than the sequence length becomes consecutive windows, and a
shorter one stays alone. With packing, documents are joined by the end token and cut into windows
that are full. Truncated, a document is what stands before the sequence length, as trainers cut it.
All are made of tokens, which of them are scored, and the parts of documents in them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from gradindex.model.tokenise import Tokenised
from gradindex.storage.records import Part

Document = tuple[Part, Tokenised]  # a part that isn't cut yet, and its tokens
Window = tuple[np.ndarray, np.ndarray, list[Part]]  # tokens int32 [t], scored bool [t], parts


def windows(documents: Iterable[Document], length: int) -> Iterator[Window]:
    """A document at a time, in consecutive windows of at most `length` tokens.

    >>> tokens = np.arange(5, dtype=np.int32)
    >>> spans = np.stack([tokens, tokens + 1], 1)  # a character each
    >>> whole = Part(0, "a.txt", 1, -1, -1, 0, None, {})
    >>> for cut, _, [part] in windows([(whole, Tokenised(tokens, tokens > 0, spans))], 3):
    ...     print(cut.tolist(), part.start, part.end)
    [0, 1, 2] 0 3
    [3, 4] 3 5
    """
    for document, tokenised in documents:
        for start in range(0, len(tokenised.tokens), length):
            cut = slice(start, start + length)
            part = spanned(document, tokenised.spans[cut], token=0)
            yield tokenised.tokens[cut], tokenised.scored[cut], [part]


def truncated(documents: Iterable[Document], length: int) -> Iterator[Window]:
    """A document at a time, its first `length` tokens."""
    for document, tokenised in documents:
        cut = slice(length)
        part = spanned(document, tokenised.spans[cut], token=0)
        yield tokenised.tokens[cut], tokenised.scored[cut], [part]


def packed(documents: Iterable[Document], length: int, end_token: int) -> Iterator[Window]:
    """Documents joined by the end token, cut into windows that are full but for the last."""
    tokens: list[int] = []
    scored: list[bool] = []
    parts: list[Part] = []
    for document, tokenised in documents:
        if tokenised.tokens[-1] != end_token:  # some tokenizers add it by themselves
            tokenised = Tokenised(
                np.append(tokenised.tokens, np.int32(end_token)),
                np.append(tokenised.scored, tokenised.scored[-1]),
                np.vstack([tokenised.spans, tokenised.spans[-1:, [1, 1]]]),
            )
        done = 0
        while done < len(tokenised.tokens):
            cut = slice(done, done + length - len(tokens))
            # a window remembers of which part of a document each of its tokens is
            parts.append(spanned(document, tokenised.spans[cut], token=len(tokens)))
            tokens.extend(tokenised.tokens[cut].tolist())
            scored.extend(tokenised.scored[cut].tolist())
            done = cut.stop
            if len(tokens) == length:
                yield np.array(tokens, np.int32), np.array(scored), parts
                tokens, scored, parts = [], [], []
    if tokens:
        yield np.array(tokens, np.int32), np.array(scored), parts


def spanned(part: Part, spans: np.ndarray, token: int = 0) -> Part:
    """The part of a document that some of its tokens cover; special tokens cover nothing."""
    covering = spans[spans[:, 1] > spans[:, 0]]
    spans = covering if len(covering) else spans
    return replace(part, start=int(spans[:, 0].min()), end=int(spans[:, 1].max()), token=token)
