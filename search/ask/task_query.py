"""A Question about a classifier, a reward model or a policy of preferences → a Query."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradindex.errors import BadRowError, InputError
from gradindex.influence.fitted_model import FittedModel
from gradindex.model import tokenise
from gradindex.model.class_labels import label_number
from gradindex.model.config import context_length
from gradindex.model.messages import is_quoted
from gradindex.model.row_values import text_of
from gradindex.model.task_rows import (
    REFERENCE,
    encode_answered,
    encode_preferred,
    encode_whole,
)
from gradindex.model.tokenise import Tokenised
from gradindex.objective.batch import Text
from gradindex.results import UNSCORED, Query
from gradindex.storage.records import Record
from search.ask.question import Question

UNBOUNDED = 1 << 30  # tokens: how long a query may be is seen afterwards
# by task, the fields of a question
ASKED = {
    "causal": {"prompt", "completion", "token_ids", "labels", "messages", "tools",
               "chat_template_kwargs", "versus", "score_on"},
    "classification": {"text", "text_b", "label", "versus_label"},
    "reward": {"prompt", "chosen", "rejected", "response", "margin"},
    "preference": {"prompt", "chosen", "rejected", "response"},
}
EXAMPLES = {
    "causal": "a prompt and a completion (-p, -c)",
    "classification": "a text and a label (--text, --label)",
    "reward": "a prompt with --chosen and --rejected, or with one --response",
    "preference": "a prompt with --chosen and --rejected, or with one --response",
}


def check_task(task: str, question: Question) -> None:
    """Raise InputError for a question that another task's indexes answer."""
    foreign = [name for name in question.given() if name not in ASKED[task]]
    if foreign:
        raise InputError(f"--{foreign[0].replace('_', '-')} has no use with an index of the task "
                         f"{task}. Ask with {EXAMPLES[task]}.", foreign[0])
    if not question.given() and task != "causal":
        raise InputError(f"give a query: {EXAMPLES[task]}.")


def task_query(fitted: FittedModel, question: Question) -> Query:
    """The query of a question, for every task but next tokens. Raises InputError."""
    if fitted.tokenizer is None:
        raise InputError("the model has no tokenizer; give --tokenizer.")
    try:
        if fitted.manifest.task.name == "classification":
            return _labelled(fitted, question)
        return _preferred(fitted, question)
    except BadRowError as error:
        raise InputError(f"the query can't be read: {error}.") from None


def query_of_row(fitted: FittedModel, record: Record) -> Query:
    """A sequence of an index as a query, for every task."""
    asked = fitted.objective.as_query(record)
    tokens = asked.tokens.tolist()
    names = fitted.manifest.plan.labels
    return Query(
        tokens, np.where(asked.scored, asked.tokens, UNSCORED).tolist(), id=record.id,
        token_texts=tokenise.pieces(fitted.tokenizer, tokens), border=record.border,
        label=record.label, label_name=None if record.label is None else names[record.label],
        offset=record.offset)


def _labelled(fitted: FittedModel, question: Question) -> Query:
    names = fitted.manifest.plan.labels
    if question.text is None:
        raise InputError("--text is missing, the text that a label is given to. Ask with "
                         f"{EXAMPLES['classification']}.")
    texts = [text_of(text, name) for name, text in (
        ("text", question.text), ("text_b", question.text_b)) if text is not None]
    query = _query(fitted, encode_whole(fitted.tokenizer, *texts))
    query.prompt = "\n".join(texts)
    query.generated = question.label is None
    query.label = _predicted(fitted, query) if question.label is None else \
        label_number(question.label, names)
    query.label_name = query.completion = names[query.label]
    if question.versus_label is not None:
        other = label_number(question.versus_label, names)
        if other == query.label:  # the difference of a label with itself is zero
            raise InputError(
                f"--versus-label {question.versus_label} is the label itself: there is nothing to "
                "compare." if not query.generated else
                f"--versus-label {question.versus_label} is the model's own label, which is asked "
                "about where --label names none: there is nothing to compare. Give another one.")
        query.others = [_labelled(fitted, Question(
            text=question.text, text_b=question.text_b, label=names[other]))]
        query.others[0].weight = -1.0
    return query


def _predicted(fitted: FittedModel, query: Query) -> int:
    """The class that the model itself gives a text."""
    model = fitted.model
    row = Text(np.array(query.tokens, np.int32), np.ones(len(query.tokens), bool), query.border, 0)
    with model.one_at_a_time, torch.no_grad():
        logits = model.objective.outputs(model.network, model.batch([row]))
    return int(logits[0].argmax())


def _preferred(fitted: FittedModel, question: Question) -> Query:
    # on a command line and in a form, messages are text
    question = replace(question, **{
        name: json.loads(text) for name in ("prompt", "chosen", "rejected", "response")
        if is_quoted(text := getattr(question, name))})
    task, both = fitted.manifest.task, (question.chosen, question.rejected)
    if question.response is not None:
        if both != (None, None):
            raise InputError("--response asks about one answer, --chosen and --rejected about two; "
                             "give one kind.")
        if question.margin is not None:
            raise InputError("--margin goes with --chosen and --rejected, of which it is taken "
                             "off the difference. Leave it out.")
        return _answer(fitted, question.prompt, question.response)
    if None in both:
        missing = "--rejected" if question.chosen is not None else "--chosen"
        raise InputError(f"{missing} is missing. Ask with {EXAMPLES[task.name]}.")
    if question.chosen == question.rejected:
        raise InputError("--rejected is --chosen itself: there is nothing to compare.")
    content = {"prompt": question.prompt, "chosen": question.chosen,
               "rejected": question.rejected, "margin": question.margin,
               # of a query the reference isn't asked: it would add a constant
               **dict.fromkeys(REFERENCE, 0.0)}
    pair = encode_preferred(fitted.tokenizer, content, task, UNBOUNDED)
    if task.name == "reward":
        query = _query(fitted, pair)
        query.prompt, query.completion = _shown(question.prompt), _shown(question.chosen)
        return query
    # read as a pair, for where answers begin is decided by both
    query, other = (_scored_alone(fitted, tokenised, question.prompt, answer) for tokenised, answer
                    in zip(_texts(pair), both, strict=True))
    query.others = [replace(other, weight=-1.0)]
    return query


def _texts(pair: Tokenised) -> tuple[Tokenised, Tokenised]:
    """Both texts of a pair, each by itself."""
    first, second = (Tokenised(*(getattr(pair, name)[part] for name in (
        "tokens", "scored", "spans"))) for part in (slice(pair.border), slice(pair.border, None)))
    return first, second


def _answer(fitted: FittedModel, prompt: Any, response: Any) -> Query:
    """The query about the reward of one answer."""
    return _scored_alone(fitted, encode_answered(
        fitted.tokenizer, prompt, response, fitted.manifest.task), prompt, response)


def _scored_alone(
    fitted: FittedModel, tokenised: Tokenised, prompt: Any, response: Any
) -> Query:
    """The query about what one text is worth, in units of reward."""
    query = _query(fitted, tokenised)
    query.prompt, query.completion, query.unit = _shown(prompt), _shown(response), "reward"
    return query


def _shown(text: Any) -> str | None:
    return text if text is None or isinstance(text, str) else "\n".join(
        str(message.get("content")) for message in text)


def _query(fitted: FittedModel, tokenised: Tokenised) -> Query:
    """The query of a row's tokens. Raises InputError where the model can't take them."""
    tokens, longest = tokenised.tokens.tolist(), context_length(fitted.config)
    border = tokenised.border if fitted.manifest.task.of_pairs else None
    length = len(tokens) if border is None else max(border, len(tokens) - border)
    if longest and length > longest:
        raise InputError(f"the query has {length} tokens, more than the model's context of "
                         f"{longest}. Shorten it; it is never cut silently.")
    if not tokenised.scored.any():
        raise InputError("the query is empty. Give a text.")
    return Query(tokens, np.where(tokenised.scored, tokenised.tokens, UNSCORED).tolist(),
                 token_texts=tokenise.pieces(fitted.tokenizer, tokens), border=tokenised.border,
                 offset=tokenised.offset)
