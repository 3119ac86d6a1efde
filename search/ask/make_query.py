"""A Question → a Query: tokenised, and checked before anything is computed."""

import operator
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradindex.errors import InputError
from gradindex.influence.fitted_model import FittedModel
from gradindex.model import tokenise
from gradindex.model.chat import encode_chat, encode_question
from gradindex.model.chat_template import has_chat_template
from gradindex.model.config import context_length, vocabulary_size
from gradindex.model.messages import MessagesError, read_chat, shown_content
from gradindex.modules import numbers_in
from gradindex.results import UNSCORED, Query
from search.ask.question import Question, as_versus
from search.ask.task_query import check_task, task_query

CONTINUATION = 32  # tokens at most, where no completion is given


def make_query(fitted: FittedModel, question: Question) -> Query:
    """The query, tokenised. Without a completion, the model's own greedy continuation.

    Raises InputError where it can't be scored: nothing predicted, too long (it is never cut),
    token ids outside the vocabulary.
    """
    check_task(fitted.manifest.task.name, question)
    if fitted.manifest.task.name != "causal":
        query = task_query(fitted, question)
        query.id = question.id
        return query
    question.check()
    query = _one_text(fitted, question)
    query.id = question.id
    if question.score_on is not None:
        query.labels = _kept_labels(query, question.score_on)
    if question.versus is not None:
        with as_versus():
            query.others = [replace(_one_text(fitted, question.other), weight=-1.0)]
        if question.score_on is not None:
            query.others[0].labels = _kept_labels(query.others[0], question.score_on)
    return query


def aggregate(queries: list[Query]) -> Query:
    """One query for the sum of log p of several. Raises InputError where there is none to be had.
    """
    if not queries:
        raise InputError("there is no query to add up.")
    if len({query.unit for query in queries}) > 1:
        raise InputError("influence on some of these queries is in nats and on others in units of "
                         "reward, so it can't be added up. Give pairs of chosen and rejected, or "
                         "single responses.")
    # the texts of all stand side by side: a query that has a `versus` brings it with its weight
    texts = [replace(text, others=[]) for query in queries for text in query.texts]
    return replace(texts[0], others=texts[1:], id=None)


def _kept_labels(query: Query, score_on: str) -> list[int]:
    """The labels with only the chosen of the scored tokens left."""
    # a first token is never predicted, so it has no number
    scored = list(filter(query.is_scored, range(len(query.labels))))
    wanted = numbers_in(score_on) or set()
    if max(wanted) >= len(scored):
        tokens = " ".join(f"{number}:{query.token_texts[position]!r}"
                          for number, position in enumerate(scored))
        raise InputError(f"--score-on {score_on}: the completion has {len(scored)} tokens to "
                         f"score: {tokens}.")
    kept = {scored[number] for number in wanted}
    return [label if position in kept else UNSCORED for position, label in enumerate(query.labels)]


def _one_text(fitted: FittedModel, question: Question) -> Query:
    """A question's own text, without what it is compared with. Raises InputError."""
    if question.token_ids is not None:
        labels = question.token_ids if question.labels is None else question.labels
        query = Query(_whole_numbers("token_ids", question.token_ids),
                      _whole_numbers("labels", labels))
    elif fitted.tokenizer is None:
        raise InputError(
            "the model has no tokenizer; give --tokenizer, or the query as token_ids and labels."
        )
    elif question.messages is not None:
        query = _chat_query(fitted, question)
    elif question.completion is not None:
        pair = tokenise.encode_pair(fitted.tokenizer, question.prompt or "", question.completion)
        query = _scored_query(pair, question.prompt, question.completion)
    else:
        prompt = tokenise.encode_pair(fitted.tokenizer, question.prompt or "", "").tokens.tolist()
        query = _continued_query(fitted, prompt, question.prompt)
    # after a continuation, which the model may have made longer than it can read again
    _check(query, fitted.config)
    query.token_texts = tokenise.pieces(fitted.tokenizer, query.tokens)
    return query


def _whole_numbers(name: str, values: Sequence[int]) -> list[int]:
    """The values as Python's own integers. Raises InputError for what is no list of integers."""
    # operator.index takes NumPy's integers too, and no float that happens to be whole
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise InputError(f"{name} must be a list of whole numbers; found {values!r:.80}.") from None


def _chat_query(fitted: FittedModel, question: Question) -> Query:
    """The query of a chat, of which the last answer is scored: given, or the model's own."""
    if not has_chat_template(fitted.tokenizer):
        raise InputError(
            "the query holds messages, but the tokenizer has no chat template and the index was "
            "built without one. Build it with --chat-template FILE, or ask with a prompt and a "
            "completion in the form that training gave them.")
    try:
        chat = read_chat(question.messages, question.tools, question.chat_template_kwargs)
    except MessagesError as error:
        raise InputError(f"{error}. Expected a list of messages, each with a role and a content, "
                         "as in the training data.") from None
    # who spoke last is explained: the assistant by what it said, the user by what the model says
    if chat.messages[-1]["role"] == "assistant":
        tokenised = encode_chat(fitted.tokenizer, chat, last=True)
        answer = shown_content(chat.messages[-1])
        if not answer:  # calls of tools alone are shown as they were rendered
            scored = tokenised.tokens[tokenised.scored].tolist()
            answer = "".join(tokenise.pieces(fitted.tokenizer, scored))
        query, unshown = _scored_query(tokenised, None, answer), tokenised.unshown
    else:
        prompt, tokens, unshown = encode_question(fitted.tokenizer, chat)
        query = _continued_query(fitted, tokens, prompt)
    if unshown:
        query.notes.append(f"the chat template doesn't show {', '.join(unshown)}: the model is "
                           "asked without")
    return query


def _scored_query(tokenised: tokenise.Tokenised, prompt: str | None, completion: str) -> Query:
    """The query of a text of which a part is scored; it notes a token that lies over the border."""
    labels = np.where(tokenised.scored, tokenised.tokens, UNSCORED)
    query = Query(tokenised.tokens.tolist(), labels.tolist(), prompt, completion)
    # a token over the border can't be scored by halves, and which half is the user's to know
    border = len(prompt or "")
    across = np.flatnonzero(tokenised.scored & (tokenised.spans[:, 0] < border))
    if prompt is not None and len(across):
        start, end = tokenised.spans[across[0], 0], tokenised.spans[across[-1], 1]
        both = (prompt + completion)[start:end]
        query.notes.append(
            f"the tokenizer joins the end of the prompt and the start of the completion in one "
            f"token, {both!r}; it is scored as part of the completion"
        )
    return query


def _continued_query(fitted: FittedModel, tokens: list[int], prompt: str | None) -> Query:
    """A prompt's tokens with what the model itself says after them."""
    if not tokens:
        raise InputError("the prompt is empty and there is no completion: nothing to explain.")
    # a model that names no context length gets room for the continuation
    longest = context_length(fitted.config) or len(tokens) + CONTINUATION
    if len(tokens) >= longest:
        raise InputError(
            f"the prompt has {len(tokens)} tokens and the model's context is {longest}, so there "
            "is no room for a continuation. Shorten the prompt; it is never cut silently."
        )
    answer = fitted.model.continuation(tokens, min(CONTINUATION, longest - len(tokens)))
    if not answer:
        raise InputError("the model ends right after the prompt; give a completion with -c.")
    completion = "".join(tokenise.pieces(fitted.tokenizer, answer))
    return Query(tokens + answer, [UNSCORED] * len(tokens) + answer, prompt, completion,
                 generated=True)


def _check(query: Query, config: object) -> None:
    """Raise InputError for a query that the model can't score."""
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
