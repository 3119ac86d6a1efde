"""Messages as people keep them, brought to one form."""

import json

import numpy as np
import pytest

from gradindex.model.messages import MessagesError, read_chat
from support.tokenizers import CHAT

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}


@pytest.mark.parametrize(("given", "read"), [
    ({"role": ["user", "assistant"], "content": ["a", "b"], "name": [None, None]},
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ([{"role": "assistant", "content": None, "tool_calls": [CALL]}],
     [{"role": "assistant", "tool_calls": [CALL]}]),
    ([{"role": "assistant", "content": "a", "tool_calls": json.dumps([CALL])}],
     [{"role": "assistant", "content": "a", "tool_calls": [CALL]}]),
    ([{"role": "user", "content": "a", "tool_calls": None, "name": None}],
     [{"role": "user", "content": "a"}]),
    ([{"role": "user", "content": ["a", {"type": "input_text", "text": "b", "image_url": None}]}],
     [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    (np.array([{"role": "user", "content": "a"}], object), [{"role": "user", "content": "a"}]),
    (({"role": "user", "content": "a"},), [{"role": "user", "content": "a"}]),
    ({"role": "user", "content": "a"}, [{"role": "user", "content": "a"}]),
])
def test_messages_are_brought_to_one_form(given, read):
    assert read_chat(given).messages == read


@pytest.mark.parametrize(("arguments", "reason"), [
    (("a",), "is not a list of messages"), ((["a"],), "is not a list of messages"),
    (([{"content": "a"}],), "is not a list of messages"),
    (({"role": ["user"], "content": []},), "lists of different lengths"),
    (([{"role": "user", "content": {"text": "a"}}],), r"neither text nor parts \(a dict\)"),
    (([{"role": "user", "content": [{"type": "image"}]}],), r"is not text \(image\)"),
    (([{"role": "user", "content": [5]}],), r"is not text \(int\)"),
    (([{"role": "assistant", "content": "", "tool_calls": CALL}],), "not a list of calls"),
    (([{"role": "assistant", "content": "", "tool_calls": ["f"]}],), "not a list of calls"),
    (([{"role": "assistant", "tool_calls": [], "thinking": ""}],), "a message without content"),
    ((CHAT, "[{"), "tools is text that is no JSON"), ((CHAT, {"a": 1}), "tools are not a list"),
    ((CHAT, [5]), "a tool is not a JSON schema"), ((CHAT, None, [1]), "kwargs is not an object"),
    ((CHAT, None, {"tokenize": True}), r"what is no template's \(tokenize\)"),
])
def test_what_is_no_chat_is_said(arguments, reason):
    with pytest.raises(MessagesError, match=reason):
        read_chat(*arguments)
