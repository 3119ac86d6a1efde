"""The forms in which people have their records, turned into the three that are read here.

Those are plain text, a prompt and completion, and chat messages. Nothing of a record is dropped
unsaid: a field that its form has no place for makes a row that can't be used.
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from gradindex.errors import InputError
from indexer.read.rows import BadRowError

# fields that training reads beside a chat, and that stay as they are
BESIDE_MESSAGES = ("tools", "chat_template_kwargs")
_LOST = ("system", "system_prompt", "history", "context", "choices", "options", "input")

LONGEST_NAME = 60  # characters of a field's name that is shown

Content = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of records: `task` is the standard form that `standard` turns one into.

    A record has all of the fields `needs`, and may have those of `takes`; where one of `lost` isn't
    empty, the form has no place for it. `said` is what people are told.
    """

    name: str
    task: str
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
        if lost := [name for name in self.lost if content.get(name)]:
            raise BadRowError(
                f"field {lost[0]!r} has no place in the form {self.name} (name the fields to leave "
                "it out, with --prompt-field and --completion-field, or give messages)")
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

ROLES = {  # of ShareGPT and what followed it: the role that templates know
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
}


def standard_messages(turns: Any) -> Any:
    """Turns of `from` and `value` as messages of role and content; anything else as it is.

    Raises BadRowError for a role that isn't known.

    >>> standard_messages([{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}])
    [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi'}]
    """
    if not isinstance(turns, list):
        return turns
    return [_message(turn) if isinstance(turn, dict) and {"from", "value"} <= set(turn) else turn
            for turn in turns]


def _message(turn: Content) -> Content:
    # what else a turn says, such as its weight, stays
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if turn["from"] == "function_call":
        return {**rest, "role": "assistant", **_calls(turn["value"])}
    role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise BadRowError(f"a turn from nobody known ({turn['from']!r}; known are "
                          f"{', '.join(ROLES)} and function_call)")
    return {**rest, "role": role, "content": turn["value"]}


def _calls(value: Any) -> Content:
    """The calls of tools that a turn holds as JSON; where it is none, its text."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return {"content": value}
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return {"content": value}
    return {"content": "", "tool_calls": [{"type": "function", "function": {
        "name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]}


def _chat(field: str) -> Callable[[Content], Content]:
    def standard(content: Content) -> Content:
        messages = standard_messages(content[field])
        if not isinstance(messages, list):
            raise BadRowError(f"field {field!r} is not a list of turns "
                              f"(a {type(messages).__name__})")
        system = content.get("system")
        # a column of its own, where trainers put it before the first turn
        if isinstance(system, str) and system and not any(
                isinstance(one, dict) and one.get("role") == "system" for one in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return {"messages": messages}
    return standard


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
        # lists are messages, which are looked at where chats are
        return {name: value if isinstance(value := content[field], list) else _text(content, field)
                for name, field in (("prompt", prompt), ("completion", completion))}
    said = "" if completion == "completion" else (
        "read as prompt and completion with nothing between them")
    lost = () if completion == "completion" else tuple(
        name for name in _LOST if name not in (prompt, completion))
    return Form(f"{prompt}-{completion}", "completion", (prompt, completion), said, standard,
                BESIDE_MESSAGES, lost)  # which may be lists of messages


FORMS = (
    Form("text", "text", ("text",), "", lambda content: {}),
    _pair("prompt", "completion"),
    Form("messages", "messages", ("messages",), "",
         lambda content: {"messages": standard_messages(content["messages"])}, BESIDE_MESSAGES),
    Form("sharegpt", "messages", ("conversations",), "read as chat messages",
         _chat("conversations"), ("system", *BESIDE_MESSAGES)),
    Form("conversation", "messages", ("conversation",), "read as chat messages",
         _chat("conversation"), ("system", *BESIDE_MESSAGES)),
    Form("alpaca", "completion", ("instruction", "output"),
         "read as Alpaca's prompt (### Instruction, ### Input, ### Response) and the completion",
         _alpaca("input", "output"), ("input",), ("system", "history")),
    Form("dolly", "completion", ("instruction", "response"),
         "read as Alpaca's prompt with the context as its input, and the completion",
         _alpaca("context", "response"), ("context",), ("system", "history")),
    _pair("prompt", "response"), _pair("question", "answer"), _pair("question", "response"),
    _pair("query", "response"), _pair("problem", "solution"), _pair("input", "output"),
    Form("content", "text", ("content",), "read as text",
         lambda content: {"text": _text(content, "content")}),
)


# ---- what is none of them


def refuse_preferences(name: str, content: Content) -> None:
    """Raise InputError for records of an answer that is better and one that is worse."""
    if {"chosen", "rejected"} <= set(content) and not {"text", "messages"} & set(content):
        alone = "--text-field" if isinstance(content["chosen"], str) else "--messages-field"
        flags = "--prompt-field prompt --completion-field chosen" if "prompt" in content else \
            f"{alone} chosen"
        raise InputError(
            f"{name} holds preferences (chosen, rejected), which are learned as pairs; expected "
            "texts whose every next token was learned. To index the chosen ones as if they had "
            f"been: {flags}.")
    if {"prompt", "completion"} <= set(content) and isinstance(content.get("label"), bool):
        raise InputError(
            f"{name} holds preferences (prompt, completion, and true or false as label): what is "
            "labelled false was not to be learned. Leave such rows out; to index all as they are: "
            "--rows prompt-completion.")


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
    if inner := [field for field in lists if field not in chats]:
        hints.append(f"If the records are what {inner[0]!r} holds, write these out: jq -c "
                     f"'.{inner[0]}[]' OLD.json > NEW.jsonl.")
    known = ", ".join(form.name for form in FORMS)
    return InputError(" ".join([
        f"the first record of {name} has the fields {_shown(content)}; expected text, prompt and "
        "completion, or messages. Name yours with --text-field, --prompt-field and "
        "--completion-field, or --messages-field.", *hints,
        f"Forms that are known (--rows): {known}."]))


def _shown(names: Iterable[Any]) -> str:
    return ", ".join(str(name)[:LONGEST_NAME] for name in names) or "none"
