"""A few questions to begin with, made of an index's own sequences, in its task's form."""

from typing import Any

import numpy as np

from gradindex.model import tokenise
from gradindex.objective.batch import halves
from gradindex.storage.records import Record
from search.engine import Searcher
from search.serve.request import SearchRequest

EXAMPLES = 3
LONGEST = 48  # tokens of a text that is given whole


def examples(searcher: Searcher) -> list[SearchRequest]:
    """Some of the training text as questions; none where nothing of it serves."""
    snapshot = searcher.snapshot
    if snapshot.tokenizer is None:
        return []
    task, labels = snapshot.manifest.task.name, snapshot.manifest.plan.labels
    found = []
    for record in snapshot.records(snapshot.random_sample()[:12]):
        if task == "causal":
            asked = _continuation(snapshot.tokenizer, record)
        elif task == "classification":
            asked = _labelled(snapshot.tokenizer, record, labels)
        else:
            asked = _pair(snapshot.tokenizer, record, task)
        # half a character would come back from the form as another one
        if asked and all(text.strip() and tokenise.UNDECODED not in text
                         for text in asked.values()):
            found.append(SearchRequest.model_validate(asked))
    return found[:EXAMPLES]


def _continuation(tokenizer: Any, record: Record) -> dict[str, str]:
    """Some tokens of the middle of a sequence, and what follows them."""
    pieces = tokenise.pieces(tokenizer, record.tokens.tolist())
    middle = len(pieces) // 2
    return {"prompt": "".join(pieces[max(0, middle - 16) : middle]),
            "completion": "".join(pieces[middle : middle + 6])}


def _labelled(tokenizer: Any, record: Record, labels: tuple[str, ...]) -> dict[str, str]:
    """A text, or the beginning of a long one, with its label."""
    texts = [(record.tokens, record.scored)] if record.border is None else list(zip(
        halves(record.tokens, record.border), halves(record.scored, record.border), strict=True))
    said = {name: _text(tokenizer, tokens[scored][:LONGEST])
            for name, (tokens, scored) in zip(("text", "text_b"), texts, strict=False)}
    return {} if record.label is None else {**said, "label": labels[record.label]}


def _pair(tokenizer: Any, record: Record, task: str) -> dict[str, str]:
    """The two answers of a pair that isn't long, and the prompt of both."""
    sides, masks = halves(record.tokens, record.border), halves(record.scored, record.border)
    if max(map(len, sides)) > 2 * LONGEST:
        return {}
    end = tokenizer.eos_token or ""
    texts = [_text(tokenizer, tokens[scored]).removesuffix(end)
             for tokens, scored in zip(sides, masks, strict=True)]
    if task == "preference":  # whose answers alone are scored
        begin = int(np.flatnonzero(masks[0])[0])
        return {"prompt": _text(tokenizer, sides[0][:begin]), "chosen": texts[0],
                "rejected": texts[1]}
    # of a reward model's, whole texts alone are kept: the prompt is what both begin with
    alike = tokenise.common_tokens(*sides)
    prompt = _text(tokenizer, sides[0][:alike][masks[0][:alike]])
    return {"prompt": prompt, "chosen": texts[0].removeprefix(prompt),
            "rejected": texts[1].removeprefix(prompt)}


def _text(tokenizer: Any, tokens: np.ndarray) -> str:
    return "".join(tokenise.pieces(tokenizer, tokens.tolist()))
