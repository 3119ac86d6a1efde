"""A labelled text, or a pair of answers → its tokens, as trainers make them.

A classifier's texts are cut at the sequence length as transformers' examples for GLUE cut them, the
longer of two first. Of pairs the words are TRL's: an answer that is no chat ends with the end
token; a reward model's pairs that are longer are left out; of policies the answers begin where the
tokens of both part from the prompt's, and what is behind the sequence length is cut off.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradindex.errors import BadRowError
from gradindex.model.chat import encode_answer
from gradindex.model.chat_template import check_chat_template
from gradindex.model.class_labels import label_number
from gradindex.model.messages import (
    BESIDE_MESSAGES,
    Chat,
    MessagesError,
    has_value,
    is_messages,
    is_quoted,
    read_chat,
    shown_content,
)
from gradindex.model.rendering import ChatTemplateError
from gradindex.model.row_values import is_nan, number_of, text_of
from gradindex.model.tokenise import Tokenised, encode_pair, tokenize
from gradindex.objective.batch import halves
from gradindex.task import Task

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls what a reference says
AS_TEXT = "the prompts and both answers as text"  # what may be given instead of chats


def encode_labelled(
    tokenizer: Any, content: dict[str, Any], labels: Sequence[str], length: int
) -> Tokenised:
    """The tokens of the `texts`, one or two, with their `label`; at most `length` of them.

    `called` are the texts' fields, `by_place` says that a number is no name of a class. Raises
    BadRowError.
    """
    label = label_number(content["label"], labels, content["by_place"])
    texts = [text_of(text, name) for text, name in
             zip(content["texts"], content["called"], strict=True)]
    tokenised = encode_whole(tokenizer, *texts, length=length)
    own = halves(tokenised.scored, tokenised.border or len(tokenised.tokens))
    # tokenizers leave a text whole that they can't cut short enough
    if len(tokenised.tokens) > length or not all(part.any() for part in own[: len(texts)]):
        raise BadRowError("a text without a token of its own" + (
            f" (of {length}; --seq-len)" if tokenised.longer else ""))
    tokenised.label = label
    return tokenised


def missing_tokens(tokenizer: Any, task: Task, two_texts: bool) -> list[str]:
    """What is to be said of special tokens that training may have used, and a tokenizer lacks."""
    lines = []
    if task.of_pairs and not tokenizer.eos_token:
        lines.append("answers: the tokenizer has no end token, so answers that are plain text end "
                     "without one; where training put one behind them, set its eos_token")
    if two_texts and tokenizer.num_special_tokens_to_add(pair=True) <= \
            tokenizer.num_special_tokens_to_add(pair=False):
        lines.append("texts: the tokenizer puts no token between two texts, so the second follows "
                     "the first at once; where training put one there, give the tokenizer that did")
    return lines


def encode_whole(
    tokenizer: Any, text: str, text_b: str | None = None, *, length: int | None = None
) -> Tokenised:
    """A text, or two, with the tokenizer's special tokens, cut at `length` tokens [nowhere].

    Only the texts' own tokens are marked as scored; `longer` says that something was cut off.
    """
    if not getattr(tokenizer, "is_fast", False):
        tokenize(tokenizer, text, special=True)  # which says so
    told = {"return_offsets_mapping": True, "return_special_tokens_mask": True,
            "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    whole = tokenizer(text, text_b, **told)
    longer = length is not None and len(whole["input_ids"]) > length
    encoded = tokenizer(text, text_b, truncation=True, max_length=length, **told) if longer \
        else whole
    tokens = np.array(encoded["input_ids"], dtype=np.int32)
    special = np.array(encoded["special_tokens_mask"], dtype=bool)
    spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    border = None
    if text_b is not None:
        second = np.array([number == 1 for number in encoded.sequence_ids(0)])
        border = int(np.flatnonzero(second)[0]) if second.any() else None
        spans[second] = spans[~second].max(initial=0)  # characters are those of the first text
    return Tokenised(tokens, ~special, spans, border=border, longer=longer)


def encode_preferred(
    tokenizer: Any, content: dict[str, Any], task: Task, length: int
) -> Tokenised:
    """The tokens of a pair, chosen and rejected one behind the other.

    `called` are its fields by their names here, where they have others. Raises BadRowError.
    """
    called = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "margin": "margin",
              **content.get("called", {})}
    (chosen, rejected), longer = _answers(tokenizer, content, task, called), False
    if task.name == "reward" and max(len(chosen.tokens), len(rejected.tokens)) > length:
        raise BadRowError(f"a pair longer than {length} tokens (found "
                          f"{max(len(chosen.tokens), len(rejected.tokens))}, left out as in "
                          "training; --seq-len)")
    # cut before they are compared: training saw no more of them
    parts = []
    for side in (chosen, rejected):
        longer |= len(side.tokens) > length
        if not side.scored[:length].any():
            name = called["chosen" if side is chosen else "rejected"]
            raise BadRowError(f"{name} without a token of its own" if task.name == "reward" or
                              not side.scored.any() else
                           f"a prompt that fills the {length} tokens of a text")
        parts.append(Tokenised(side.tokens[:length], side.scored[:length], side.spans[:length]))
    # a text's first token is predicted by nothing
    if task.name == "preference" and not any(part.scored[1:].any() for part in parts):
        raise BadRowError("answers of one token without a prompt, which no token before predicts")
    if np.array_equal(parts[0].tokens, parts[1].tokens):
        same = str(content["chosen"]) == str(content["rejected"])
        both = f"{called['chosen']} and {called['rejected']}"
        raise BadRowError(
            f"{both} differ only beyond {length} tokens" if longer and not same else
            f"{both} are the same" + ("" if same else " (as tokens)"))
    tokens, scored, spans = (np.concatenate([getattr(part, name) for part in parts])
                             for name in ("tokens", "scored", "spans"))
    if task.name == "reward":
        offset = number_of(content.get("margin"), called["margin"]) or 0.0
    else:
        offset = _sum_of_log_p(content, REFERENCE[0]) - _sum_of_log_p(content, REFERENCE[1])
    return Tokenised(
        tokens, scored, spans, tuple(dict.fromkeys((*chosen.unshown, *rejected.unshown))),
        border=len(parts[0].tokens), longer=longer, offset=offset)


def encode_answered(tokenizer: Any, prompt: Any, response: Any, task: Task) -> Tokenised:
    """The tokens of one answer to a prompt, as one of a pair has them. Raises BadRowError."""
    if is_messages(response):
        asked, answer = _read_chat(prompt, "prompt"), _read_chat(response, "response")
        check_chat_template(tokenizer, "response", AS_TEXT)
        try:
            return encode_answer(tokenizer, asked, answer.messages)
        except ChatTemplateError as error:
            raise BadRowError(error.reason) from None
    text = _ended(tokenizer, text_of(response, "response"))
    prompt = "" if prompt is None else text_of(prompt, "prompt", empty=True)
    return encode_whole(tokenizer, prompt + text) if task.name == "reward" else \
        encode_pair(tokenizer, prompt, text)


def _sum_of_log_p(content: dict[str, Any], name: str) -> float:
    """What a reference says of an answer. Raises BadRowError."""
    found = number_of(content.get(name), name)
    if found is None:
        raise BadRowError(f"missing field {name!r} (what the reference says of the answer)")
    if found > 0:  # a loss, most likely
        raise BadRowError(f"field {name!r} is no sum of log p (found {found:g}, expected 0 or "
                          "less)")
    return found


def _answers(
    tokenizer: Any, content: dict[str, Any], task: Task, called: dict[str, str]
) -> tuple[Tokenised, Tokenised]:
    """Chosen and rejected with their prompt, each whole; of a policy, answers are scored."""
    prompt, sides = content["prompt"], [content["chosen"], content["rejected"]]
    chats = [is_messages(side) for side in sides]
    if is_nan(prompt) or (all(chats) and _is_said(prompt, sides)):  # tables have NaN for none
        prompt = None
    if prompt is not None:
        chats.append(is_messages(prompt))
    if any(chats) != all(chats):
        for name in ("chosen", "rejected", "prompt"):  # a list may hold something else
            if is_messages(content[name]):
                _read_chat(content[name], called[name])
        raise BadRowError("of {prompt}, {chosen} and {rejected} some are texts and some messages"
                          .format(**called))
    if all(chats):
        return _chats(tokenizer, content, prompt, sides, called)
    for name in ("prompt", "chosen", "rejected"):
        if is_quoted(content[name]):  # which would be read with its brackets
            raise BadRowError(f"{called[name]} is messages as JSON text (write them as a list)")
    for name in BESIDE_MESSAGES:
        if has_value(content.get(name)):
            raise BadRowError(f"field {name!r} has no place beside texts (put it into the prompt, "
                              "give messages, or take it out)")
    texts = [text_of(content[name], called[name]) for name in ("chosen", "rejected")]
    if prompt is None:
        prompt, texts = without_common(texts)
    else:
        prompt = text_of(prompt, called["prompt"], empty=True)
    texts = [_ended(tokenizer, text) for text in texts]
    if task.name == "reward":
        one, other = (encode_whole(tokenizer, prompt + text) for text in texts)
        return one, other
    return _same_prompt([encode_pair(tokenizer, prompt, text) for text in texts])


def _is_said(prompt: Any, sides: list[Any]) -> bool:
    """Whether a prompt that is text is what whole chats, chosen and rejected, begin with anyway."""
    try:
        asked = [next((message for message in read_chat(side).messages
                       if message["role"] == "user"), {}) for side in sides]
    except MessagesError:  # which is said where they are read
        return False
    return isinstance(prompt, str) and all(shown_content(one) == prompt for one in asked)


def _ended(tokenizer: Any, text: str) -> str:
    """A text with the end token behind it, if the tokenizer has one."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def without_common(texts: list[str]) -> tuple[str, list[str]]:
    """What whole dialogues begin with in common, up to the last turn's opening, and their answers.

    >>> one, other = "\\n\\nHuman: Hi\\n\\nAssistant: Yes", "\\n\\nHuman: Hi\\n\\nAssistant: No"
    >>> without_common([one, other])
    ('\\n\\nHuman: Hi\\n\\nAssistant:', [' Yes', ' No'])
    """
    same = 0
    for one, other in zip(*texts, strict=False):
        if one != other:
            break
        same += 1
    opening = "Assistant:"
    at = texts[0].rfind(opening, 0, same)
    end = at + len(opening) if at >= 0 else 0
    return texts[0][:end], [text[end:] for text in texts]


def _chats(
    tokenizer: Any, content: dict[str, Any], prompt: Any, sides: list[Any], called: dict[str, str]
) -> tuple[Tokenised, Tokenised]:
    tools, options = content.get("tools"), content.get("chat_template_kwargs")
    whole = [_read_chat(side, called[name], tools, options)
             for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
    try:
        check_chat_template(tokenizer, called["chosen"], AS_TEXT)  # which is no row's fault
        if prompt is None:
            # what both begin with is the prompt
            one, other = (chat.messages for chat in whole)
            count = 0
            while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
                count += 1
            asked = whole[0].until(count)
            answers = [chat.messages[count:] for chat in whole]
        else:
            asked = _read_chat(prompt, called["prompt"], tools, options)
            answers = [chat.messages for chat in whole]
        if not asked.messages:
            raise BadRowError("{chosen} and {rejected} have no message in common to begin with"
                              .format(**called))
        return _same_prompt([encode_answer(tokenizer, asked, answer) for answer in answers])
    except ChatTemplateError as error:
        raise BadRowError(error.reason) from None


def _read_chat(value: Any, name: str, tools: Any = None, options: Any = None) -> Chat:
    """The chat in a field of that name. Raises BadRowError."""
    try:
        return read_chat(value, tools, options, name)
    except MessagesError as error:
        raise BadRowError(str(error)) from None


def _same_prompt(pairs: list[Tokenised]) -> tuple[Tokenised, Tokenised]:
    """Both answers, scored from where the first of them is: the prompt is that of both."""
    begin = min(int(np.flatnonzero(pair.scored)[0]) if pair.scored.any() else len(pair.tokens)
                for pair in pairs)
    for pair in pairs:
        pair.scored[begin:] = True
    return pairs[0], pairs[1]
