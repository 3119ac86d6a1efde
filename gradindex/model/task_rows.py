"""A labelled text, or a pair of answers → its tokens, as trainers make them.

A classifier's texts are cut at the sequence length as transformers' examples for GLUE cut them, the
longer of two first. Of pairs the words are TRL's: an answer that is no chat ends with the end
token; a reward model's pairs that are longer are left out; of policies the answers begin where the
tokens of both part from the prompt's, and what is behind the sequence length is cut off.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradindex.errors import InputError
from gradindex.model.chat import encode_answer
from gradindex.model.messages import MessagesError, is_messages, read_chat
from gradindex.model.rendering import ChatTemplateError
from gradindex.model.tokenise import Tokenised, encode_pair, tokenize
from gradindex.task import Task

UNLABELLED = -1
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls what a reference says


class RowError(InputError):
    """A row that can't be used, with the reason."""


_NUMBERED = re.compile(r"LABEL_\d+")  # what transformers calls classes without names


def label_number(value: Any, labels: Sequence[str]) -> int:
    """The number of a class, given by number or name.

    Raises RowError for one that isn't there, InputError where the classes have no names.

    >>> label_number("good", ["bad", "good"]), label_number(1.0, ["bad", "good"])
    (1, 1)
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError("no label")
    if isinstance(value, str):
        # a class may be called "1", and then it is meant, not the second one
        named = _named(value, labels)
        if named is not None:
            return named
        value = float(value)
    if not isinstance(value, (bool, int, float)) or not float(value).is_integer():
        several = ": several labels" if isinstance(value, (list, np.ndarray)) else ""
        raise RowError(f"a label that is no class (a {type(value).__name__}{several})")
    number = int(value)
    if number == UNLABELLED:
        raise RowError("unlabelled (−1)")
    if not 0 <= number < len(labels):
        raise RowError(f"a label outside the model's classes (found {number}, expected 0 to "
                       f"{len(labels) - 1})")
    return number


def _named(name: str, labels: Sequence[str]) -> int | None:
    """The number of a class of this name, None for a number in words. Raises as label_number."""
    alike = [number for number, label in enumerate(labels) if label == name] or [
        number for number, label in enumerate(labels)
        if label.casefold() == name.strip().casefold()]
    if len(alike) == 1:
        return alike[0]
    if re.fullmatch(r"\s*-?\d+(\.0*)?\s*", name):
        return None
    if all(map(_NUMBERED.fullmatch, labels)):
        names = ",".join(f"NAME{number}" for number in range(min(3, len(labels))))
        raise InputError(
            f"a row is labelled {name!r:.60}, and the model's config.json names none of its "
            f"{len(labels)} classes. Name them in its order: --labels "
            f"{names}{',…' * (len(labels) > 3)}.")
    raise RowError(f"a label outside the model's classes (found {name!r:.60}, expected "
                   f"{', '.join(labels)[:200]})")


def encode_labelled(
    tokenizer: Any, content: dict[str, Any], labels: Sequence[str], length: int
) -> Tokenised:
    """The tokens of a labelled text, or of two, at most `length` of them. Raises RowError."""
    label = label_number(content["label"], labels)
    texts = [_text(content, name) for name in ("text", "text_b") if content[name] is not None]
    tokenised = encode_whole(tokenizer, *texts, length=length)
    tokenised.label = label
    return tokenised


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
    """The tokens of a pair, chosen and rejected one behind the other. Raises RowError."""
    (chosen, rejected), longer = _answers(tokenizer, content, task), False
    if task.name == "reward" and max(len(chosen.tokens), len(rejected.tokens)) > length:
        raise RowError(f"a pair longer than {length} tokens (found "
                          f"{max(len(chosen.tokens), len(rejected.tokens))}, left out as in "
                          "training; --seq-len)")
    # cut before they are compared: training saw no more of them
    parts = []
    for side in (chosen, rejected):
        longer |= len(side.tokens) > length
        if not side.scored[:length].any():
            raise RowError(f"a prompt that fills the {length} tokens of a text")
        parts.append(Tokenised(side.tokens[:length], side.scored[:length], side.spans[:length]))
    if np.array_equal(parts[0].tokens, parts[1].tokens):
        raise RowError("chosen and rejected are the same" if not longer else
                          f"chosen and rejected differ only beyond {length} tokens")
    tokens, scored, spans = (np.concatenate([getattr(part, name) for part in parts])
                             for name in ("tokens", "scored", "spans"))
    return Tokenised(
        tokens, scored, spans, tuple(dict.fromkeys((*chosen.unshown, *rejected.unshown))),
        border=len(parts[0].tokens), longer=longer,
        offset=number_in(content, "margin", 0.0) if task.name == "reward" else
        number_in(content, REFERENCE[0]) - number_in(content, REFERENCE[1]))


def encode_answered(tokenizer: Any, prompt: Any, response: Any, task: Task) -> Tokenised:
    """The tokens of one answer to a prompt, as one of a pair has them. Raises RowError."""
    if is_messages(response):
        try:
            return encode_answer(tokenizer, read_chat(prompt, name="prompt"),
                                 read_chat(response, name="response").messages)
        except (MessagesError, ChatTemplateError) as error:
            raise RowError(getattr(error, "reason", str(error))) from None
    text = _ended(tokenizer, _text({"response": response}, "response"))
    prompt = "" if prompt is None else _text({"prompt": prompt}, "prompt")
    return encode_whole(tokenizer, prompt + text) if task.name == "reward" else \
        encode_pair(tokenizer, prompt, text)


def number_in(content: dict[str, Any], name: str, missing: float | None = None) -> float:
    """The number in a field of a pair, `missing` where it has none. Raises RowError."""
    value = content.get(name)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        if missing is None:
            raise RowError(f"missing field {name!r} (what the reference says of the answer)")
        return missing
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RowError(f"field {name!r} is no number ({value!r:.60})")
    return float(value)


def _answers(
    tokenizer: Any, content: dict[str, Any], task: Task
) -> tuple[Tokenised, Tokenised]:
    """Chosen and rejected with their prompt, each whole; of a policy, answers are scored."""
    prompt, sides = content["prompt"], [content["chosen"], content["rejected"]]
    chats = [is_messages(side) for side in sides]
    if prompt is not None:
        chats.append(is_messages(prompt))
    if any(chats) != all(chats):
        raise RowError("of prompt, chosen and rejected some are texts and some messages")
    if all(chats):
        return _chats(tokenizer, content, prompt, sides)
    texts = [_text(content, name) for name in ("chosen", "rejected")]
    prompt = "" if prompt is None else _text(content, "prompt")
    if not prompt:
        prompt, texts = without_common(texts)
    texts = [_ended(tokenizer, text) for text in texts]
    if task.name == "reward":
        one, other = (encode_whole(tokenizer, prompt + text) for text in texts)
        return one, other
    return _same_prompt([encode_pair(tokenizer, prompt, text) for text in texts])


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
    tokenizer: Any, content: dict[str, Any], prompt: Any, sides: list[Any]
) -> tuple[Tokenised, Tokenised]:
    tools, options = content.get("tools"), content.get("chat_template_kwargs")
    try:
        whole = [read_chat(side, tools, options, name)
                 for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
        if prompt is None:
            # what both begin with is the prompt
            one, other = (chat.messages for chat in whole)
            count = 0
            while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
                count += 1
            asked = whole[0].until(count)
            answers = [chat.messages[count:] for chat in whole]
        else:
            asked = read_chat(prompt, tools, options, "prompt")
            answers = [chat.messages for chat in whole]
        if not asked.messages:
            raise RowError("chosen and rejected have no message in common to begin with")
        return _same_prompt([encode_answer(tokenizer, asked, answer) for answer in answers])
    except MessagesError as error:
        raise RowError(str(error)) from None
    except ChatTemplateError as error:
        raise RowError(error.reason) from None


def _same_prompt(pairs: list[Tokenised]) -> tuple[Tokenised, Tokenised]:
    """Both answers, scored from where the first of them is: the prompt is that of both."""
    begin = min(int(np.flatnonzero(pair.scored)[0]) if pair.scored.any() else len(pair.tokens)
                for pair in pairs)
    for pair in pairs:
        pair.scored[begin:] = True
    return pairs[0], pairs[1]


def _text(content: dict[str, Any], name: str) -> str:
    value = content[name]
    if not isinstance(value, str):
        raise RowError(f"{name} is not text (a {type(value).__name__})")
    if not value.strip():
        raise RowError(f"empty {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"invalid UTF-8 (a lone surrogate in {name})") from None
    return value
