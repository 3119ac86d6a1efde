"""A labelled text, or a pair of answers → its tokens, as trainers make them.

A classifier's texts are cut at the sequence length as transformers' examples for GLUE cut them, the
longer of two first. Of pairs the words are TRL's: an answer that is no chat ends with the end
token; a reward model's pairs that are longer are left out; of policies the answers begin where the
tokens of both part from the prompt's, and what is behind the sequence length is cut off.
"""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from gradindex.errors import BadRowError, InputError
from gradindex.model.chat import encode_answer
from gradindex.model.chat_template import check_chat_template
from gradindex.model.messages import MessagesError, is_messages, is_quoted, read_chat
from gradindex.model.rendering import ChatTemplateError
from gradindex.model.tokenise import Tokenised, encode_pair, tokenize
from gradindex.objective.batch import halves
from gradindex.task import Task

UNLABELLED = -1
LARGEST = float(np.finfo(np.float32).max)  # of a number in a row: it has to stay one in float32
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls what a reference says


_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_NUMBERED = re.compile(r"LABEL_\d+")  # what transformers calls classes without names


def label_number(value: Any, labels: Sequence[str]) -> int:
    """The number of a class, given by number or name.

    Raises BadRowError for one that isn't there, InputError where the classes have no names.

    >>> label_number("good", ["bad", "good"]), label_number(1.0, ["bad", "good"])
    (1, 1)
    """
    value = _plain(value)
    if value is None:
        raise BadRowError("no label")
    if isinstance(value, str):
        # a class may be called "1", and then it is meant, not the second one
        named = _named(value, labels)
        if named is not None:
            return named
        value = float(value)
    if not isinstance(value, (bool, int, float)) or value % 1 != 0:  # of infinity it is NaN
        raise BadRowError(f"a label that is no class ({_kind(value)})")
    if value == UNLABELLED:
        raise BadRowError("unlabelled (−1)")
    if not 0 <= value < len(labels):
        raise BadRowError(f"a label outside the model's classes (found {_shown(value)}, expected "
                          f"0 to {len(labels) - 1})")
    return int(value)


def _plain(value: Any) -> Any:
    """A value as Python has it; None where it says nothing, as NaN and empty cells of tables do."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        value = None if value.is_nan() else float(value)
    empty = isinstance(value, str) and not value.strip()
    return None if empty or _is_nan(value) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _kind(value: Any) -> str:
    several = ": several labels" if isinstance(value, (list, tuple, np.ndarray)) else ""
    return f"{value:g}" if isinstance(value, float) else f"a {type(value).__name__}{several}"


def _shown(value: Any) -> str:
    # Python refuses to write integers of thousands of digits down
    return "a huge number" if isinstance(value, int) and abs(value) > LARGEST else f"{value!r:.60}"


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
    raise BadRowError(f"a label outside the model's classes (found {name!r:.60}, expected "
                      f"{', '.join(labels)[:200]})")


def encode_labelled(
    tokenizer: Any, content: dict[str, Any], labels: Sequence[str], length: int
) -> Tokenised:
    """The tokens of the `texts`, one or two, with their `label`; at most `length` of them.

    Raises BadRowError.
    """
    label = label_number(content["label"], labels)
    texts = [text_of(text, name) for text, name in
             zip(content["texts"], ("text", "text_b"), strict=False)]
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
    """The tokens of a pair, chosen and rejected one behind the other. Raises BadRowError."""
    (chosen, rejected), longer = _answers(tokenizer, content, task), False
    if task.name == "reward" and max(len(chosen.tokens), len(rejected.tokens)) > length:
        raise BadRowError(f"a pair longer than {length} tokens (found "
                          f"{max(len(chosen.tokens), len(rejected.tokens))}, left out as in "
                          "training; --seq-len)")
    # cut before they are compared: training saw no more of them
    parts = []
    for side in (chosen, rejected):
        longer |= len(side.tokens) > length
        if not side.scored[:length].any():
            raise BadRowError("a text without a token of its own" if task.name == "reward" else
                           f"a prompt that fills the {length} tokens of a text")
        parts.append(Tokenised(side.tokens[:length], side.scored[:length], side.spans[:length]))
    # a text's first token is predicted by nothing
    if task.name == "preference" and not any(part.scored[1:].any() for part in parts):
        raise BadRowError("answers of one token without a prompt, which no token before predicts")
    if np.array_equal(parts[0].tokens, parts[1].tokens):
        same = str(content["chosen"]) == str(content["rejected"])
        raise BadRowError(
            f"chosen and rejected differ only beyond {length} tokens" if longer and not same else
            "chosen and rejected are the same" + ("" if same else " (as tokens)"))
    tokens, scored, spans = (np.concatenate([getattr(part, name) for part in parts])
                             for name in ("tokens", "scored", "spans"))
    return Tokenised(
        tokens, scored, spans, tuple(dict.fromkeys((*chosen.unshown, *rejected.unshown))),
        border=len(parts[0].tokens), longer=longer,
        offset=number_in(content, "margin", 0.0) if task.name == "reward" else
        _sum_of_log_p(content, REFERENCE[0]) - _sum_of_log_p(content, REFERENCE[1]))


def encode_answered(tokenizer: Any, prompt: Any, response: Any, task: Task) -> Tokenised:
    """The tokens of one answer to a prompt, as one of a pair has them. Raises BadRowError."""
    if is_messages(response):
        check_chat_template(tokenizer, "response")
        try:
            return encode_answer(tokenizer, read_chat(prompt, name="prompt"),
                                 read_chat(response, name="response").messages)
        except (MessagesError, ChatTemplateError) as error:
            raise BadRowError(getattr(error, "reason", str(error))) from None
    text = _ended(tokenizer, text_of(response, "response"))
    prompt = "" if prompt is None else text_of(prompt, "prompt", empty=True)
    return encode_whole(tokenizer, prompt + text) if task.name == "reward" else \
        encode_pair(tokenizer, prompt, text)


def number_in(content: dict[str, Any], name: str, missing: float | None = None) -> float:
    """The number in a field of a pair, `missing` where it has none. Raises BadRowError."""
    value = _plain(content.get(name))
    if value is None:
        if missing is None:
            raise BadRowError(f"missing field {name!r} (what the reference says of the answer)")
        return missing
    if isinstance(value, str) and _NUMBER.fullmatch(value):  # in tables every value is text
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > LARGEST:
        raise BadRowError(f"field {name!r} is no number ({_shown(value)})")
    return float(value)


def _sum_of_log_p(content: dict[str, Any], name: str) -> float:
    """What a reference says of an answer. Raises BadRowError."""
    found = number_in(content, name)
    if found > 0:  # a loss, most likely
        raise BadRowError(f"field {name!r} is no sum of log p (found {found:g}, expected 0 or "
                          "less)")
    return found


def _answers(
    tokenizer: Any, content: dict[str, Any], task: Task
) -> tuple[Tokenised, Tokenised]:
    """Chosen and rejected with their prompt, each whole; of a policy, answers are scored."""
    prompt, sides = content["prompt"], [content["chosen"], content["rejected"]]
    if _is_nan(prompt):  # as tables have it for none
        prompt = None
    chats = [is_messages(side) for side in sides]
    if prompt is not None:
        chats.append(is_messages(prompt))
    if any(chats) != all(chats):
        raise BadRowError("of prompt, chosen and rejected some are texts and some messages")
    if all(chats):
        return _chats(tokenizer, content, prompt, sides)
    for name in ("prompt", "chosen", "rejected"):
        if is_quoted(content[name]):  # which would be read with its brackets
            raise BadRowError(f"{name} is messages as JSON text (write them as a list)")
    texts = [text_of(content[name], name) for name in ("chosen", "rejected")]
    if prompt is None:
        prompt, texts = without_common(texts)
    else:
        prompt = text_of(prompt, "prompt", empty=True)
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
    check_chat_template(tokenizer, "chosen")  # which is the tokenizer's fault, and no row's
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
            raise BadRowError("chosen and rejected have no message in common to begin with")
        return _same_prompt([encode_answer(tokenizer, asked, answer) for answer in answers])
    except MessagesError as error:
        raise BadRowError(str(error)) from None
    except ChatTemplateError as error:
        raise BadRowError(error.reason) from None


def _same_prompt(pairs: list[Tokenised]) -> tuple[Tokenised, Tokenised]:
    """Both answers, scored from where the first of them is: the prompt is that of both."""
    begin = min(int(np.flatnonzero(pair.scored)[0]) if pair.scored.any() else len(pair.tokens)
                for pair in pairs)
    for pair in pairs:
        pair.scored[begin:] = True
    return pairs[0], pairs[1]


def text_of(value: Any, name: str, empty: bool = False) -> str:
    """A field of that name, if it's text, which may be `empty`. Raises BadRowError."""
    if value is None or _is_nan(value):
        raise BadRowError(f"no {name}")
    if not isinstance(value, str):
        raise BadRowError(f"{name} is not text (a {type(value).__name__})")
    if not value.strip() and not empty:
        raise BadRowError(f"empty {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"invalid UTF-8 (a lone surrogate in {name})") from None
    return value
