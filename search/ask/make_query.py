"""A prompt and a completion, a chat, or tokens → a Query, checked before anything is computed."""

import contextlib
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradindex.errors import InputError
from gradindex.model import tokenise
from gradindex.model.config import context_length, vocabulary_size
from gradindex.modules import numbers_in
from gradindex.results import UNSCORED, Query
from search.rank.snapshot import OpenIndex

CONTINUATION = 32  # tokens, where no completion is given


def make_query(
    index: OpenIndex, prompt: str | None = None, completion: str | None = None,
    token_ids: Sequence[int] | None = None, labels: Sequence[int] | None = None,
    messages: list[dict[str, Any]] | None = None, versus: str | None = None,
    score_on: str | None = None,
) -> Query:
    """The query, tokenised. Without a completion, the model's own greedy continuation.

    `versus` is another completion of the prompt, whose log p is taken off; `score_on` says which
    of the completion's tokens are scored ("0-2", "5"; from 0, both ends included).
    Raises InputError where it can't be scored: nothing predicted, too long (it is never cut),
    token ids outside the vocabulary.
    """
    if versus is not None and (prompt is None or completion is None):
        raise InputError("--versus compares two completions of one prompt: give -p and -c.")
    if versus is not None and versus == completion:
        raise InputError("--versus is the completion itself: there is nothing to compare.")
    if score_on is not None and not numbers_in(score_on):
        raise InputError(f"--score-on {score_on!r}: expected tokens of the completion by number, "
                         "such as 0-2 or 5.")
    if labels is not None and token_ids is None:
        raise InputError("labels go with token_ids; of a text, --score-on chooses tokens.")
    _check_given(prompt, completion, token_ids, messages)
    if versus is not None:
        with _as_versus():
            _check_given(prompt, versus, None, None)
    query = _one_text(index, prompt, completion, token_ids, labels, messages)
    if score_on is not None:
        query.labels = _kept_labels(query, score_on)
    if versus is not None:
        with _as_versus():
            query.others = [replace(_one_text(index, prompt, versus), weight=-1.0)]
        if score_on is not None:
            query.others[0].labels = _kept_labels(query.others[0], score_on)
    return query


@contextlib.contextmanager
def _as_versus() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"--versus: {error}") from None


def aggregate(queries: list[Query]) -> Query:
    """One query for the sum of log p of several. Raises InputError where there is none."""
    if not queries:
        raise InputError("there is no query to add up.")
    texts = [replace(text, others=[]) for query in queries for text in query.texts]
    return replace(texts[0], others=texts[1:], id=None)


def _kept_labels(query: Query, score_on: str) -> list[int]:
    """The labels with only the chosen of the scored tokens left."""
    places = [place for place, label in enumerate(query.labels) if place and label != UNSCORED]
    wanted = numbers_in(score_on) or set()
    if max(wanted) >= len(places):
        tokens = " ".join(f"{number}:{query.token_texts[place]!r}"
                          for number, place in enumerate(places))
        raise InputError(f"--score-on {score_on}: the completion has {len(places)} tokens to "
                         f"score: {tokens}.")
    kept = {places[number] for number in wanted}
    return [label if place in kept else UNSCORED for place, label in enumerate(query.labels)]


def _check_given(
    prompt: str | None, completion: str | None, token_ids: Sequence[int] | None,
    messages: list[dict[str, Any]] | None,
) -> None:
    """What can be said without a tokenizer. Raises InputError."""
    given = [prompt is not None or completion is not None, token_ids is not None,
             messages is not None]
    if sum(given) != 1:
        raise InputError(
            "give one query: a prompt and a completion, or token_ids and labels, or messages."
        )
    for part in (prompt, completion, json.dumps(messages, ensure_ascii=False, default=str)):
        try:
            (part or "").encode("utf-8")
        except UnicodeEncodeError as error:
            letter = error.object[error.start]
            raise InputError(
                f"the query is not valid UTF-8 (character {error.start}: {letter!r}). Put it in a "
                "UTF-8 file and give @FILE."
            ) from None
    if completion == "":
        raise InputError("the completion is empty; give the text to explain, or leave -c out "
                         "to explain the model's own continuation.")


def _one_text(
    index: OpenIndex, prompt: str | None = None, completion: str | None = None,
    token_ids: Sequence[int] | None = None, labels: Sequence[int] | None = None,
    messages: list[dict[str, Any]] | None = None,
) -> Query:
    if token_ids is not None:
        query = Query(_whole_numbers("token_ids", token_ids),
                      _whole_numbers("labels", token_ids if labels is None else labels))
    elif index.tokenizer is None:
        raise InputError(
            "the model has no tokenizer; give --tokenizer, or the query as token_ids and labels."
        )
    elif messages is not None:
        query = _chat_query(index, messages)
    elif completion is not None:
        tokens = tokenise.encode_pair(index.tokenizer, prompt or "", completion)
        query = _scored_query(tokens, prompt, completion)
    else:
        ids = tokenise.encode_pair(index.tokenizer, prompt or "", "").tokens.tolist()
        query = _continued_query(index, ids, prompt)
    _check(query, index.config)
    query.token_texts = tokenise.pieces(index.tokenizer, query.tokens)
    return query


def _whole_numbers(name: str, values: Sequence[int]) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise InputError(f"{name} must be a list of whole numbers; found {values!r:.80}.") from None


def _chat_query(index: OpenIndex, messages: list[dict[str, Any]]) -> Query:
    tokenise.check_chat_template(index.tokenizer, "messages")
    if not isinstance(messages, list) or not messages or not all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages
    ):
        raise InputError("messages must be a list of objects with a role and a content.")
    if messages[-1]["role"] == "assistant":
        tokens = tokenise.encode_messages(index.tokenizer, messages, last=True)
        return _scored_query(tokens, None, str(messages[-1]["content"]))
    prompt = tokenise.render_messages(index.tokenizer, messages, answer=True)
    ids = tokenise.encode_rendered(index.tokenizer, prompt)
    return _continued_query(index, ids, prompt)


def _scored_query(tokenised: tokenise.Tokenised, prompt: str | None, completion: str) -> Query:
    labels = np.where(tokenised.scored, tokenised.tokens, UNSCORED)
    query = Query(tokenised.tokens.tolist(), labels.tolist(), prompt, completion)
    border = len(prompt or "")
    across = np.flatnonzero(tokenised.scored & (tokenised.spans[:, 0] < border))
    if prompt is not None and len(across):
        start, end = tokenised.spans[across[0]]
        both = (prompt + completion)[start:end]
        query.notes.append(
            f"the tokenizer joins the end of the prompt and the start of the completion in one "
            f"token, {both!r}; it is scored as part of the completion"
        )
    return query


def _continued_query(index: OpenIndex, ids: list[int], prompt: str | None) -> Query:
    if not ids:
        raise InputError("the prompt is empty and there is no completion: nothing to explain.")
    longest = context_length(index.config) or len(ids) + CONTINUATION
    if len(ids) >= longest:
        raise InputError(
            f"the prompt has {len(ids)} tokens and the model's context is {longest}, so there is "
            "no room for a continuation. Shorten the prompt; it is never cut silently."
        )
    own = index.model.continuation(ids, min(CONTINUATION, longest - len(ids)))
    if not own:
        raise InputError("the model ends right after the prompt; give a completion with -c.")
    continuation = "".join(tokenise.pieces(index.tokenizer, own))
    return Query(ids + own, [UNSCORED] * len(ids) + own, prompt, continuation, generated=True)


def _check(query: Query, config: Any) -> None:
    n, vocabulary = len(query.tokens), vocabulary_size(config)
    if len(query.labels) != n or any(
        label not in (UNSCORED, token)
        for label, token in zip(query.labels, query.tokens, strict=False)
    ):
        raise InputError("labels must be as many as token_ids, each the token itself or −100.")
    if any(not 0 <= token < vocabulary for token in query.tokens):
        raise InputError(f"a token id lies outside the vocabulary, 0 to {vocabulary - 1}.")
    longest = context_length(config)
    if longest and n > longest:
        raise InputError(
            f"the query has {n} tokens, more than the model's context of {longest}. Shorten the "
            "prompt; it is never cut silently."
        )
    if not query.scored:
        raise InputError(
            f"no token of the query can be scored ({n} tokens; a first token is never predicted). "
            "Give a longer completion, or a prompt before it."
        )
