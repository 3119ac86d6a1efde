"""Chats as people keep them, brought to the one form that chat templates read.

A message is a dictionary with a role and, mostly, a content. What loggers and tables add is taken
off here: fields without a value, lists side by side instead of messages, messages as JSON text,
content in parts. Turns of ShareGPT (`from` and `value`) become messages.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gradindex.errors import InputError

# the names under which APIs have a part that is text
TEXT_PARTS = {"text", "input_text", "output_text"}
# what a message says of whether it is learned: OpenAI's name, Axolotl's and ms-swift's
WEIGHTS = ("weight", "train", "loss")
# the names under which an answer's reasoning may stand beside its content
REASONING = ("reasoning_content", "reasoning", "thinking")
# what may stand in an answer that has no content
INSTEAD_OF_CONTENT = {"tool_calls", "function_call", *REASONING}
# arguments of `apply_chat_template` that are no template's: they would say what it gives back
OURS = {"add_generation_prompt", "conversation", "continue_final_message", "max_length", "padding",
        "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
        "tokenize", "tokenizer_kwargs", "tools", "truncation"}
# fields of a row that hold a chat, in the order in which they are looked for
CHAT_FIELDS = ("messages", "conversations", "conversation")
# fields that training reads beside a chat, and that stay as they are
BESIDE_MESSAGES = ("tools", "chat_template_kwargs")
# fields beside a chat that are a part of what the model was told, and have no place in it there
TOLD_BESIDE = ("system", "system_prompt", "system_message", "functions", "history")
# and beside a prompt
TOLD_BESIDE_PROMPTS = (*TOLD_BESIDE, "context", "choices", "options", "input")
ROLES = {  # of ShareGPT and what followed it: the role that templates know
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
}
NOTHING = ("", "[]", "{}", "null")  # texts that stand for no value


class MessagesError(InputError):
    """Messages that are no chat, with the reason."""


@dataclass(frozen=True)
class Chat:
    """Messages, and what else their template is told.

    `tools` are JSON schemas of functions; `options` the template's own variables, by name.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def until(self, count: int) -> "Chat":
        """The chat up to its first messages."""
        return replace(self, messages=self.messages[:count])

    def followed_by(self, messages: list[dict[str, Any]]) -> "Chat":
        """The chat with more messages behind it."""
        return replace(self, messages=[*self.messages, *messages])


def read_chat(
    messages: Any, tools: Any = None, options: Any = None, name: str = "messages"
) -> Chat:
    """A chat of what a row holds; tools and options may be JSON text. Raises MessagesError.

    >>> read_chat({"role": ["user"], "content": ["hi"]}).messages
    [{'role': 'user', 'content': 'hi'}]
    """
    return Chat(_messages(messages, name), _tools(tools), _options(options))


def is_messages(value: Any) -> bool:
    """Whether a field holds messages, not text."""
    return isinstance(value, (list, tuple, np.ndarray)) or (
        isinstance(value, dict) and bool({"role", "from"} & value.keys()))


def is_quoted(value: Any) -> bool:
    """Whether a text is messages, written down as JSON.

    >>> is_quoted('[{"role": "user", "content": "hi"}]'), is_quoted("[1] hi")
    (True, False)
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        return bool(_messages(value, ""))
    except MessagesError:
        return False


def has_value(value: Any) -> bool:
    """Whether a field says anything: neither empty nor what tables have for nothing.

    >>> has_value(float("nan")), has_value("[]"), has_value(0)
    (False, False, True)
    """
    if isinstance(value, str):
        return value.strip() not in NOTHING
    if isinstance(value, (list, tuple, dict, np.ndarray)):
        return len(value) > 0
    return value is not None and str(value) not in ("nan", "<NA>", "NaT")


def is_told(messages: list[dict[str, Any]], text: Any) -> bool:
    """Whether a text that stands beside messages is what their system says anyway."""
    return any(message["role"] == "system" and shown_content(message) == text
               for message in messages)


def led_by(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """Messages with the system's text in front that stood beside them. Raises MessagesError."""
    if not has_value(system):
        return messages
    if not isinstance(system, str):
        raise MessagesError(f"field 'system' is not text (a {type(system).__name__})")
    if is_told(messages, system):
        return messages
    if any(message["role"] == "system" for message in messages):
        raise MessagesError("field 'system' says something else than the system's message (leave "
                            "one of them)")
    return [{"role": "system", "content": system}, *messages]


def is_learned(message: dict[str, Any]) -> bool:
    """Whether training scores a message of a conversation: an assistant's that isn't left out."""
    return message["role"] == "assistant" and not is_left_out(message)


def is_left_out(message: dict[str, Any]) -> bool:
    """Whether a message says that it isn't learned: one of WEIGHTS is 0 or false."""
    return any(message.get(name) == 0 for name in WEIGHTS)


def shown_content(message: dict[str, Any]) -> str | None:
    """The content of a message as one text, its parts joined; None where it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content


def joined_parts(chat: Chat) -> Chat:
    """The chat with every content as one text."""
    return replace(chat, messages=[
        {**message, "content": shown_content(message)}
        if isinstance(message.get("content"), list) else message for message in chat.messages])


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Messages in one form. Raises MessagesError."""
    none = f"field {name!r} is not a list of messages with a role and a content"
    value = _plain(value)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            python = value.lstrip().startswith(("[{'", "{'"))
            raise MessagesError(f"{none} (text as Python shows it; write it with json.dumps)"
                                if python else f"{none} (text that is no JSON)") from None
    if isinstance(value, dict):
        value = _side_by_side(value, name)
    if not isinstance(value, list) or not value:
        raise MessagesError(f"{none} (" + (
            "an empty list)" if value == [] else f"a {type(value).__name__})"))
    for message in value:
        if not isinstance(message, dict):
            raise MessagesError(f"{none} (a {type(message).__name__} among them)")
        if not isinstance(message.get("role") or message.get("from"), str):
            found = ", ".join(map(str, message)) or "nothing"
            raise MessagesError(f"{none} (one has the fields {found[:100]})")
    messages = [_message(message) for message in value]
    # templates may show any field of a message, so all of it is looked at
    try:
        json.dumps(messages, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise MessagesError(f"invalid UTF-8 (a lone surrogate in {name!r})") from None
    return messages


def _side_by_side(value: dict[str, Any], name: str) -> Any:
    """A list of the messages that a dictionary holds: one, or a list for each field of many."""
    if isinstance(value.get("role") or value.get("from"), str):
        return [value]
    # datasets before 4 make one dictionary of lists out of Sequence({"role": …, "content": …})
    lists = {field: one for field, one in value.items() if one is not None}
    if not lists or not all(isinstance(one, list) for one in lists.values()):
        return value
    if len({len(one) for one in lists.values()}) > 1:
        raise MessagesError(f"field {name!r} has lists of different lengths")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message without the fields that have no value, its content a text or parts that are text.
    """
    # tables fill in the fields that only other messages have; trainers leave these out as well
    message = _with_role({name: value for name, value in message.items() if value is not None})
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_part(part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise MessagesError(f"content is neither text nor parts (a {type(content).__name__})")
    if "tool_calls" in message:
        calls = _tool_calls(message.pop("tool_calls"))
        message |= {} if calls is None else {"tool_calls": calls}
    if content is None and not any(message.get(name) for name in INSTEAD_OF_CONTENT):
        raise MessagesError("a message without content or tool calls")
    for name in WEIGHTS:
        weight = message.get(name, 1)
        if not isinstance(weight, (int, float)) or weight not in (0, 1):
            raise MessagesError(f"{name} is neither 0 nor 1 ({weight!r})")
    return message


def _tool_calls(value: Any) -> list[Any] | None:
    """The calls of a message, which tables may keep as JSON text. Raises MessagesError."""
    calls = _parsed(value, "tool_calls")
    if calls is None:  # as the text "" or "null"
        return None
    if not isinstance(calls, (list, tuple, np.ndarray)) or not all(
            isinstance(call, dict) and isinstance(call.get("function", call), dict)
            for call in calls):
        raise MessagesError("tool_calls are not a list of calls of functions")
    return list(calls)


def _with_role(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT (`from` and `value`, or one of them) as a message; a message as it is.

    Raises MessagesError for a speaker that isn't known.
    """
    if "role" in turn and ("content" in turn or not {"from", "value"} & turn.keys()):
        return turn
    speaker = turn.get("role", turn.get("from"))
    said = turn.get("content", turn.get("value"))
    # what else a turn says, such as its weight, stays
    rest = {name: value for name, value in turn.items()
            if name not in ("role", "content", "from", "value")}
    called = speaker.strip().lower() if isinstance(speaker, str) else ""
    if called == "function_call":
        return {**rest, "role": "assistant", **_calls(said)}
    if called not in ROLES:
        raise MessagesError(f"a turn from nobody known ({speaker!r}; known are "
                            f"{', '.join(ROLES)} and function_call)")
    return {**rest, "role": ROLES[called], **({} if said is None else {"content": said})}


def _calls(value: Any) -> dict[str, Any]:
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


def _part(part: Any) -> dict[str, Any]:
    """A part of a content, which has to be text. Raises MessagesError."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise MessagesError(f"a part of the content is not text ({kind})")
    return {"type": "text", "text": part["text"]}


def _tools(value: Any) -> list[Any] | None:
    """The tools of a chat. Raises MessagesError."""
    tools = _plain(_parsed(value, "tools"))
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise MessagesError(f"tools are not a list (a {type(tools).__name__})")
    tools = [_parsed(tool, "tools") for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise MessagesError("a tool is not a JSON schema")
    return tools


def _options(value: Any) -> dict[str, Any]:
    """What a template is told by name. Raises MessagesError."""
    options = _plain(_parsed(value, "chat_template_kwargs"))
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise MessagesError(f"chat_template_kwargs is not an object (a {type(options).__name__})")
    if taken := sorted(OURS & options.keys()):
        raise MessagesError(f"chat_template_kwargs holds what is no template's ({taken[0]})")
    return options


def _plain(value: Any) -> Any:
    """A value with lists for what pandas and others keep as arrays, all the way down."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _parsed(value: Any, name: str) -> Any:
    """A value that may be kept as JSON text. Raises MessagesError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise MessagesError(f"{name} is text that is no JSON") from None
