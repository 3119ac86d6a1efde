"""The chat template that takes the place of a tokenizer's own: a file or its text, checked."""

import copy
import json
from pathlib import Path
from typing import Any

from gradindex.errors import InputError

JINJA = ("{{", "{%")  # what any template holds, and hardly any path


def read_chat_template(given: str | Path | None) -> str | None:
    """The text of a template that is given by its path or as text. Raises InputError."""
    if given is None:
        return None
    if isinstance(given, str) and any(sign in given for sign in JINJA):
        return given
    try:
        text = Path(given).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--chat-template {given}: {error.strerror}. Give a file with a Jinja "
                         "template.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {given}: not UTF-8 (byte {error.start}). Convert it, "
                         "with iconv say.") from None
    # tokenizer_config.json holds a template, but would be rendered as the text that it is
    if not any(sign in text for sign in JINJA) or _is_json(text):
        raise InputError(f"--chat-template {given} holds no template; expected Jinja text, such as "
                         "chat_template.jinja beside a model.")
    return text


def with_chat_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with another template, if one is given; the tokenizer itself stays as it is.

    Raises InputError for what is no Jinja.
    """
    if template is None or tokenizer is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except Exception as error:
        # a template may well refuse this chat; only its own grammar is looked at here
        if type(error).__name__ == "TemplateSyntaxError":
            raise InputError(f"--chat-template is no valid Jinja: {error} (line "
                             f"{getattr(error, 'lineno', '?')}).") from None
    return tokenizer


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer can render a chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_chat_template(
    tokenizer: Any, field: str,
    as_text: str = "the records as text (--text-field) or as a prompt and a completion that are "
                   "text",
) -> None:
    """Raise InputError where chat records meet a tokenizer without a chat template.

    `as_text` is what may be given instead.
    """
    if not has_chat_template(tokenizer):
        raise InputError(
            f"the records hold messages (field {field}) but the tokenizer has no chat template. "
            f"Give the one that training used with --chat-template FILE, or {as_text}."
        )


def marks_answers(tokenizer: Any) -> bool:
    """Whether the tokenizer's template marks the assistant's words with {% generation %}."""
    template = tokenizer.chat_template
    return "endgeneration" in (template if isinstance(template, str) else json.dumps(template))


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False
