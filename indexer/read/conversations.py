"""A row → its chat: messages, or a prompt and a completion that are messages."""

from typing import Any

from gradindex.errors import BadRowError
from gradindex.model.chat import encode_answer, encode_chat
from gradindex.model.messages import (
    Chat,
    MessagesError,
    is_learned,
    is_messages,
    is_quoted,
    read_chat,
)
from gradindex.model.rendering import ChatTemplateError
from gradindex.model.tokenise import Tokenised


def holds_messages(row: dict[str, Any], prompt: str, completion: str) -> bool:
    """Whether the prompt and the completion of a row are messages. Raises BadRowError."""
    kinds = [is_messages(row.get(name)) for name in (prompt, completion)]
    for name in (prompt, completion):
        if is_quoted(row.get(name)):  # which would be learned with its brackets
            raise BadRowError(f"field {name!r} is messages as JSON text (write them as a list)")
    if kinds[0] != kinds[1] and all(row.get(name) is not None for name in (prompt, completion)):
        raise BadRowError(f"of {prompt!r} and {completion!r} one is text and one messages")
    return all(kinds)


def encode_conversation(tokenizer: Any, row: dict[str, Any], name: str) -> Tokenised:
    """The tokens of a row of messages. Raises BadRowError for what isn't one to learn from."""
    chat = _chat(row, name)
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    if not answers:
        found = ", ".join(sorted({message["role"] for message in chat.messages}))
        raise BadRowError(f"no assistant message (the roles are {found[:100]})")
    if not any(map(is_learned, answers)):
        raise BadRowError("every assistant message has weight 0")
    try:
        return encode_chat(tokenizer, chat)
    except ChatTemplateError as error:
        raise BadRowError(error.reason) from None


def encode_exchange(
    tokenizer: Any, row: dict[str, Any], prompt: str, completion: str
) -> Tokenised:
    """The tokens of a row whose prompt and completion are messages. Raises BadRowError."""
    try:
        return encode_answer(
            tokenizer, _chat(row, prompt), read_chat(row[completion], name=completion).messages)
    except MessagesError as error:
        raise BadRowError(str(error)) from None
    except ChatTemplateError as error:
        raise BadRowError(error.reason) from None


def _chat(row: dict[str, Any], name: str) -> Chat:
    """The chat in a field of a row, with what stands beside it. Raises BadRowError."""
    if name not in row:
        raise BadRowError(f"missing field {name!r}")
    try:
        return read_chat(row[name], row.get("tools"), row.get("chat_template_kwargs"), name)
    except MessagesError as error:
        raise BadRowError(str(error)) from None
