"""A chat template at work: messages → text, and what of it is marked as the assistant's."""

import contextlib
import json
import re
from typing import Any

import numpy as np

from gradindex.errors import InputError
from gradindex.model.messages import Chat, joined_parts
from gradindex.model.signs import signs_for
from gradindex.model.tokenise import tokenize
from gradindex.model.unshown import unshown

GENERATION = re.compile(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})")

Stretch = tuple[int, int]  # of a text: its first character and the one behind its last


class ChatTemplateError(InputError):
    """The chat template refuses the messages, or hides which words are the assistant's.

    `reason` is it without advice; what differs from chat to chat stands in brackets at its end.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason or message


class Renderer:
    """A tokenizer's chat template, applied to the messages of one chat.

    `unshown` is what they say and the template doesn't write, in words: a model that was trained by
    it never saw that. Raises ChatTemplateError where the template refuses them.
    """

    def __init__(self, tokenizer: Any, chat: Chat):
        self._tokenizer = tokenizer
        self.chat = self._readable(chat)
        self.text = self.render(self.chat.messages)
        self.unshown = unshown(self.chat, self.text, self._text)

    def render(self, messages: list[dict[str, Any]], answer: bool = False, **options: Any) -> str:
        """Messages as text. With `answer`, the words that open an assistant's turn follow them."""
        if not messages:
            return ""
        try:
            return str(self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer,
                **{**self.chat.options, "tools": self.chat.tools, **options}))
        except Exception as error:  # a template can fail in any way, most by `raise_exception`
            reason = f"the chat template refuses the messages ({' '.join(str(error).split())})"
            read = "the arguments of tool calls as objects, not as JSON text" \
                if self._reads_objects(messages, answer, options) else \
                "messages in the form that the template reads, or another --chat-template"
            raise ChatTemplateError(f"{reason}. Give {read}.", reason) from error

    def _reads_objects(
        self, messages: list[dict[str, Any]], answer: bool, options: dict[str, Any]
    ) -> bool:
        """Whether the template takes the messages once arguments that are text are objects."""
        objects = _with_objects(messages)
        if objects == messages:
            return False
        with contextlib.suppress(ChatTemplateError):
            self.render(objects, answer, **options)
            return True
        return False

    def _text(self, chat: Chat) -> str | None:
        """The text of a chat that differs from this one; None where the template refuses it."""
        try:
            return self.render(chat.messages, **{**chat.options, "tools": chat.tools})
        except ChatTemplateError:
            return None

    def tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [n] of a rendered text, and their spans int64 [n, 2]."""
        # without special tokens of the tokenizer's: a chat template brings them itself
        tokens, spans, _ = tokenize(self._tokenizer, text, special=False)
        return tokens, spans

    def marked(self) -> list[Stretch] | None:
        """The stretches of the text inside {% generation %}; None where the template marks none."""
        template = self._tokenizer.get_chat_template(
            self.chat.options.get("chat_template"), self.chat.tools)
        # The mask that transformers offers goes wrong where a mark falls on a space that the
        # tokenizer leaves out of its offsets. So the blocks are rendered as filters that put a sign
        # before and behind them: code points that Unicode never assigns, and the text doesn't hold.
        opening, closing = signs_for(self.text)
        signs = f'filter replace("","{opening}",1)|reverse|replace("","{closing}",1)|reverse'
        signed, count = GENERATION.subn(rf"\1{signs}\2", template)
        signed = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endfilter", signed)
        if not count:
            return None
        rendered = self.render(self.chat.messages, chat_template=signed)
        if rendered.replace(opening, "").replace(closing, "") != self.text:
            reason = "the chat template changes what is inside its {% generation %} marks"
            raise ChatTemplateError(f"{reason}, so they can't be followed. Give one that doesn't "
                                    "(--chat-template).", reason)
        outside, *rest = rendered.split(opening)
        start, stretches = len(outside), []
        for part in rest:
            inside, outside = part.split(closing)
            stretches.append((start, start + len(inside)))
            start += len(inside) + len(outside)
        return stretches or None  # the marks may stand in a comment alone

    def _readable(self, chat: Chat) -> Chat:
        """The chat with contents as its template reads them: in parts, or each as one text."""
        self.chat = chat
        parts = sum(len(message["content"]) for message in chat.messages
                    if isinstance(message.get("content"), list))
        if not parts:
            return chat
        # Templates made for text alone refuse parts, leave them out or print them as Python does.
        # So each part gets a sign behind it: where all signs come out, the parts are read.
        [sign, _] = signs_for(repr(chat.messages))
        signed = [{**message, "content": [
            {**part, "text": part["text"] + sign} for part in message["content"]]}
            if isinstance(message.get("content"), list) else message for message in chat.messages]
        try:
            read = self.render(signed).count(sign) == parts
        except ChatTemplateError:
            read = False
        return chat if read else joined_parts(chat)


def _with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of their calls as objects where these are JSON text."""
    def read(call: Any) -> Any:
        if isinstance(call, dict) and "function" in call:
            return {**call, "function": read(call["function"])}
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):
                return {**call, "arguments": json.loads(call["arguments"])}
        return call

    calls = {"tool_calls": lambda given: [read(call) for call in given], "function_call": read}
    return [{name: calls[name](value) if name in calls else value
             for name, value in message.items()} for message in messages]
