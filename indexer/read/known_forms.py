"""The forms in which people have their records, turned into the three that are read here.

Those are plain text, a prompt and completion, and chat messages. Nothing of a record is dropped
unsaid: a field that its form has no place for makes a row that can't be used.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from gradindex.errors import BadRowError, InputError
from gradindex.model.messages import (
    BESIDE_MESSAGES,
    CHAT_FIELDS,
    TOLD_BESIDE,
    TOLD_BESIDE_PROMPTS,
    MessagesError,
    has_value,
    is_messages,
    is_quoted,
    is_told,
    led_by,
    read_chat,
)

# fields that hold the prompt of a preference
ASKED = ("prompt", "question", "instruction", "query", "problem", *CHAT_FIELDS, "input")
# fields that say of an answer whether it was to be learned (of TRL and of LLaMA-Factory)
PREFERENCE_LABELS = ("label", "kto_tag")

LONGEST_NAME = 60  # characters of a field's name that is shown

Content = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of records: `kind` is the standard form that `standard` turns one into.

    A record has all of the fields `needs`, and may have those of `takes`; where one of `lost` isn't
    empty, the form has no place for it. `said` is what people are told.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    said: str
    standard: Callable[[Content], Content]
    takes: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def read(self, content: Content) -> Content:
        """A record in the standard form, with all its other fields. Raises BadRowError."""
        for name in self.needs:
            if name not in content:
                other = form_of(content)
                raise BadRowError(f"missing field {name!r}" + (
                    f" (a record of the form {other.name})" if other else ""))
        lost = [name for name in self.lost if has_value(content.get(name))]
        if lost and not (self.kind == "messages" and all(
                _is_told(content[self.needs[0]], content[name]) for name in lost)):
            remedy = {
                "messages": f"put it into the messages; --messages-field {self.needs[0]} leaves it "
                            "out",
                "pairs": f"put it into the prompt; --keep-fields {lost[0]} keeps it beside the pair"
            }.get(self.kind, "name the fields to leave it out, with --prompt-field and "
                             "--completion-field, or give messages")
            raise BadRowError(
                f"field {lost[0]!r} has no place in the form {self.name} ({remedy})")
        return {**content, **self.standard(content)}


def form_of(names: Collection[Any]) -> Form | None:
    """The first known form of a record with fields of these names, or None."""
    return next((form for form in FORMS if set(form.needs) <= set(names)), None)


def other_forms(form: Form, names: Collection[Any]) -> list[str]:
    """The names of further forms that a record with fields of these names has as well."""
    return [other.name for other in FORMS if other is not form
            and set(other.needs) <= set(names) and not set(other.needs) & set(form.needs)]


def named_form(name: str) -> Form:
    """The form of that name. Raises InputError."""
    for form in FORMS:
        if form.name == name:
            return form
    raise InputError(f"--rows {name}: expected one of {', '.join(form.name for form in FORMS)}.")


# ---- chats


def _is_told(messages: Any, text: Any) -> bool:
    try:
        return is_told(read_chat(messages).messages, text)
    except MessagesError:  # which is said where the messages are read
        return False


def _chat(field: str) -> Form:
    def standard(content: Content) -> Content:
        try:
            return {"messages": led_by(read_chat(content[field], name=field).messages,
                                       content.get("system"))}
        except MessagesError as error:
            raise BadRowError(str(error)) from None
    return Form("sharegpt" if field == "conversations" else field, "messages", (field,),
                "read as chat messages", standard, ("system", *BESIDE_MESSAGES),
                tuple(name for name in TOLD_BESIDE if name != "system"))


# ---- prompts and completions

# the words of Stanford's Alpaca, with the line end behind the last that later trainers have
_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."
ALPACA = f"{_TASK}. {_ANSWER}\n\n### Instruction:\n{{0}}\n\n### Response:\n"
ALPACA_WITH_INPUT = (f"{_TASK}, paired with an input that provides further context. {_ANSWER}\n\n"
                     "### Instruction:\n{0}\n\n### Input:\n{1}\n\n### Response:\n")


def _alpaca(further: str, answer: str) -> Callable[[Content], Content]:
    def standard(content: Content) -> Content:
        context = "" if content.get(further) is None else _text(content, further)
        template = ALPACA_WITH_INPUT if context.strip() else ALPACA
        return {"prompt": template.format(_text(content, "instruction"), context),
                "completion": _text(content, answer)}
    return standard


def _text(content: Content, name: str) -> str:
    value = content[name]
    if not isinstance(value, str):
        raise BadRowError(f"field {name!r} is not text (a {type(value).__name__})")
    return value


def _pair(prompt: str, completion: str) -> Form:
    def standard(content: Content) -> Content:
        # messages are looked at where chats are
        read = {name: value if is_messages(value := content[field]) else _text(content, field)
                for name, field in (("prompt", prompt), ("completion", completion))}
        if isinstance(read["prompt"], str):
            for name in BESIDE_MESSAGES:
                if has_value(content.get(name)):
                    raise BadRowError(f"field {name!r} has no place beside texts (put it into the "
                                      "prompt, or give messages; --prompt-field and "
                                      "--completion-field leave it out)")
        return read
    said = "" if completion == "completion" else (
        "read as prompt and completion with nothing between them")
    return Form(f"{prompt}-{completion}", "completion", (prompt, completion), said, standard,
                BESIDE_MESSAGES, _lost(prompt, completion))  # which may be lists of messages


def _lost(*read: str) -> tuple[str, ...]:
    """What has no place in a form of prompts that has these fields."""
    return tuple(name for name in TOLD_BESIDE_PROMPTS if name not in read)


FORMS = (
    Form("text", "text", ("text",), "", lambda content: {}),
    _pair("prompt", "completion"),
    Form("messages", "messages", ("messages",), "", lambda content: {}, BESIDE_MESSAGES,
         TOLD_BESIDE),
    _chat("conversations"), _chat("conversation"),
    Form("alpaca", "completion", ("instruction", "output"),
         "read as Alpaca's prompt (### Instruction, ### Input, ### Response) and the completion",
         _alpaca("input", "output"), ("input",), _lost("input")),
    Form("dolly", "completion", ("instruction", "response"),
         "read as Alpaca's prompt with the context as its input, and the completion",
         _alpaca("context", "response"), ("context",), _lost("context")),
    _pair("prompt", "response"), _pair("question", "answer"), _pair("question", "response"),
    _pair("query", "response"), _pair("problem", "solution"), _pair("input", "output"),
    Form("content", "text", ("content",), "read as text",
         lambda content: {"text": _text(content, "content")}),
)


# ---- what is none of them


def refuse_preferences(name: str, content: Content, form: Form | None) -> None:
    """Raise InputError for records of an answer that is better and one that is worse."""
    if {"chosen", "rejected"} <= set(content) and "text" not in content \
            and not _ends_with_answer(content.get("messages")):
        raise InputError(
            f"{name} holds preferences (chosen, rejected), which are learned as pairs; expected "
            "texts whose every next token was learned. Of a policy that learned pairs (DPO): "
            "--task preference, with --reference MODEL where the data don't say what that gives "
            f"the answers. To index the chosen ones as if learned: {_of_the_chosen(content)}.")
    if form is None or form.kind == "text":
        return
    for label in PREFERENCE_LABELS:
        if _is_yes_or_no(content.get(label)):
            raise InputError(
                f"{name} holds preferences ({', '.join(form.needs)}, and true or false as "
                f"{label}: {content[label]!r}): what is labelled false was not to be learned. "
                f"Leave such rows out; to index all as they are: --rows {form.name}.")


def refuse_unlearned(content: Content) -> None:
    """Raise BadRowError for an answer that is labelled true or false, where the first wasn't."""
    for label in PREFERENCE_LABELS:
        # a 0 or 1 among other numbers is a class, and so is a yes among other words
        if str(content.get(label)).strip().lower() in ("true", "false"):
            raise BadRowError(f"a preference, true or false as {label!r} (what is labelled false "
                              "was not to be learned; --rows FORM reads all as they are)")


def _is_yes_or_no(value: Any) -> bool:
    """Whether a label is one of two, in the words that JSON, CSV and people have for them."""
    return str(value).strip().lower() in (
        "true", "false", "0", "1", "0.0", "1.0", "yes", "no", "chosen", "rejected", "desirable",
        "undesirable")


def _ends_with_answer(messages: Any) -> bool:
    try:
        return bool(read_chat(messages).messages[-1]["role"] == "assistant")
    except MessagesError:
        return False


def _of_the_chosen(content: Content) -> str:
    """The flags by which the better answer of a preference is read, and what they leave out."""
    asked = next((name for name in ASKED if has_value(content.get(name))), None)
    try:
        told = any(message["role"] == "user" for message in read_chat(content["chosen"]).messages)
    except MessagesError:
        told = False
    if told:  # the whole chat
        return "--messages-field chosen"
    if asked is None:
        return "--text-field chosen"
    kinds = [_kind_of(content[name]) for name in (asked, "chosen")]
    if kinds not in (["text"] * 2, ["messages"] * 2):
        return (f"write {asked} and chosen both as text, or both as messages ({asked} is "
                f"{kinds[0]}, chosen is {kinds[1]})")
    beside = [name for name in _lost(asked) if has_value(content.get(name))]
    left = f" (which leave {' and '.join(beside)} out; or write prompts that hold it)" if beside \
        else ""
    return f"--prompt-field {asked} --completion-field chosen{left}"


def _kind_of(value: Any) -> str:
    if is_messages(value):
        return "messages"
    if isinstance(value, str):
        return "messages as JSON text" if is_quoted(value) else "text"
    return f"a {type(value).__name__}"


def lacking(name: str, form: Form, names: Iterable[Any]) -> InputError:
    """What to say of records that aren't of the form that was named."""
    return InputError(
        f"--rows {form.name} needs the fields {' and '.join(form.needs)}; the first record of "
        f"{name} has {_shown(names)}. Name another form, or the fields.")


def unknown_fields(name: str, content: Content, table: bool) -> InputError:
    """What to say of a record whose fields tell no form, with what may be meant."""
    # a table without a header has a row of text where names are expected
    short = {field: value for field, value in content.items() if len(str(field)) <= LONGEST_NAME}
    lists = [field for field, value in short.items() if isinstance(value, list) and value
             and all(isinstance(one, dict) for one in value)]
    chats = [field for field in lists if {"role", "from"} & set(short[field][0])]
    texts = sorted((field for field, value in short.items() if isinstance(value, str)),
                   key=lambda field: -len(short[field]))
    likely = [f"--messages-field {field}" for field in chats] or \
        [f"--text-field {field}" for field in texts[:2]]
    hints = []
    if table:
        hints.append("If the table has no header, name its columns: --columns text,label.")
    if likely:
        hints.append(f"Perhaps {' or '.join(likely)}.")
    if isinstance(content.get("input_ids"), list):
        hints.append("Token ids are read from .npy files: save input_ids with numpy.save, one "
                     "sequence a row.")
    hints += _layout_hints(content)
    if inner := [field for field in lists if field not in chats]:
        hints.append(f"If the records are what {inner[0]!r} holds, write these out: jq -c "
                     f"'.{inner[0]}[]' OLD.json > NEW.jsonl.")
    known = ", ".join(form.name for form in FORMS)
    return InputError(" ".join([
        f"the first record of {name} has the fields {_shown(content)}; expected text, prompt and "
        "completion, or messages. Name yours with --text-field, --prompt-field and "
        "--completion-field, or --messages-field.", *hints,
        f"Forms that are known (--rows): {known}."]))


# as pandas writes a table as JSON, where nothing else is asked of it
_BY_PANDAS = ("python -c \"import pandas; pandas.read_json('OLD.json').to_json('NEW.jsonl', "
              "orient='records', lines=True)\".")


def holds_columns(content: Content, form: Form) -> bool:
    """Whether what should be a record has the values of many in each field that it needs."""
    return all(_is_column(content[field], form.kind == "messages") for field in form.needs)


def columns_for_records(name: str, form: Form) -> InputError:
    """What to say of a file of one object, that holds columns."""
    return InputError(f"{name} holds columns ({form.needs[0]!r} has the values of many records); "
                      f"expected an object for each record. Turn them: {_BY_PANDAS}")


def _is_column(value: Any, of_messages: bool) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(str(key).isdecimal() for key in value)
    return isinstance(value, list) and bool(value) and all(
        isinstance(one, list) and all(isinstance(message, dict) for message in one)
        if of_messages else isinstance(one, str) for one in value)


def _layout_hints(content: Content) -> list[str]:
    """What to do where an object holds records or columns rather than fields."""
    values = list(content.values())
    if any(_is_column(value, chats) for value in values for chats in (True, False)):
        return [f"If these are columns of many records, turn them: {_BY_PANDAS}"]
    if len(values) > 1 and all(isinstance(value, dict) for value in values):
        return ["If the records are its values: jq -c '.[]' OLD.json > NEW.jsonl."]
    return []


def _shown(names: Iterable[Any]) -> str:
    return ", ".join(str(name)[:LONGEST_NAME] for name in names) or "none"
