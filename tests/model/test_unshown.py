"""What a chat says and its template doesn't show, which is said, or can't read: refused."""

import json

import pytest

from gradindex.model.chat import encode_answer, encode_chat, encode_question
from gradindex.model.messages import MessagesError, read_chat
from gradindex.model.rendering import ChatTemplateError
from support.tokenizers import ANSWER, CHAT, LOOP, MARKED_TEMPLATE, PLAIN_TEMPLATE, byte_tokenizer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
CALLS = {"role": "assistant", "content": "I call", "tool_calls": [CALL, CALL]}
SHOWN = "{{ tools | tojson(ensure_ascii=True) }}" + LOOP.replace(
    "BODY", "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function }}{% endfor %}"
) + ANSWER
CALLED = [CHAT[0], CALLS, {"role": "tool", "content": "6"}, CHAT[3]]
TOOLS = [{"name": "f"}, {"type": "function", "function": {"name": "g"}}]
IF_USED = "{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}"


@pytest.mark.parametrize(("template", "messages", "tools", "lost"), [
    (SHOWN, CALLED, TOOLS, None),  # as Python and JSON print what they escape
    (PLAIN_TEMPLATE, CALLED, None, "tool_calls (message 2)"),
    (PLAIN_TEMPLATE, CHAT, TOOLS, "the tools (f)"),
    (PLAIN_TEMPLATE, [*CALLED, *CALLED], TOOLS, ("tool_calls (message 2)", "the tools (f)")),
    ("{{ tools[0].name }}" + PLAIN_TEMPLATE, CHAT, TOOLS, "the tools (g)"),
    (SHOWN.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"), CALLED, None,
     "tool_calls (message 2)"),
    (SHOWN.replace("call.function }}", "call.function.name }}"), CALLED, None,
     "the arguments of tool_calls (message 2)"),
    (SHOWN.replace("{{ m.content }}", IF_USED), CALLED, None,
     "the content of role tool (message 3)"),
    (LOOP.replace("BODY", IF_USED), [{"role": "system", "content": "be cold"}, *CHAT], None,
     "the content of role system (message 1)"),
    (MARKED_TEMPLATE, [CHAT[0], {"role": "assistant", "content": None, "function_call": {
        "name": "f", "arguments": "{}"}}], None, "function_call (message 2)"),
    (PLAIN_TEMPLATE, [CHAT[0], {**CHAT[1], "thinking": "I think"}], None,
     "thinking (message 2)"),
    # what a later turn leaves out is no loss
    (LOOP.replace("BODY", "{{ m.reasoning if loop.last }}{{ m.content }}") + ANSWER,
     [CHAT[0], {**CHAT[1], "reasoning": "I think"}, *CHAT[2:]], None, None),
])
def test_what_a_template_leaves_out_is_never_left_out_silently(template, messages, tools, lost):
    tokenizer, chat = byte_tokenizer(template=template), read_chat(messages, tools)
    for unshown in (encode_chat(tokenizer, chat).unshown, encode_question(tokenizer, chat)[2],
                    encode_answer(tokenizer, chat.until(1), chat.messages[1:]).unshown):
        assert unshown == (() if lost is None else lost if isinstance(lost, tuple) else (lost,))


@pytest.mark.parametrize(("arguments", "advice"), [
    ('{"a": 1}', "the arguments of tool calls as objects, not as JSON text"),
    ("a = 1", "messages in the form that the template reads"), ([], "messages in the form"),
])
def test_arguments_that_are_text_are_the_reason_where_the_template_takes_objects(
    arguments, advice
):
    tokenizer = byte_tokenizer(template=LOOP.replace(
        "BODY", "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% for name, value in "
        "call.function.arguments.items() %}{{ name }}{% endfor %}{% endfor %}{{ m.content }}"))
    called = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": arguments}}]}]
    with pytest.raises(ChatTemplateError, match=rf"refuses the messages \(.*\)\. Give {advice}"):
        encode_chat(tokenizer, read_chat(called))


@pytest.mark.parametrize(("options", "lost"), [
    ({"documents": [{"text": "cold"}]}, True), ({"facts": {"a": 1}}, True),
    ({"shown": [1]}, False), ({"documents": [], "enable_thinking": False}, False),
])
def test_documents_that_a_template_is_told_are_shown(options, lost):
    tokenizer = byte_tokenizer(template="{{ shown }}" + PLAIN_TEMPLATE)
    chat = read_chat(CHAT, None, options)
    assert encode_chat(tokenizer, chat).unshown == (
        (f"what chat_template_kwargs holds ({next(iter(options))})",) if lost else ())


def test_calls_may_be_kept_as_json_text():
    calls = [CALL, {"name": "g", "arguments": {}}]
    for given in (json.dumps(calls), calls, tuple(calls)):
        [message] = read_chat([{"role": "assistant", "tool_calls": given}]).messages
        assert message["tool_calls"] == calls


@pytest.mark.parametrize(("message", "reason"), [
    ({"content": "", "tool_calls": CALL}, "tool_calls are not a list of calls"),
    ({"content": "", "tool_calls": ["f"]}, "tool_calls are not a list of calls"),
    ({"content": "", "tool_calls": [{"function": "f"}]}, "tool_calls are not a list of calls"),
    ({"content": "", "tool_calls": "f(1)"}, "tool_calls is text that is no JSON"),
    ({"tool_calls": [], "thinking": ""}, "a message without content or tool calls"),
])
def test_what_are_no_calls_is_said(message, reason):
    with pytest.raises(MessagesError, match=reason):
        read_chat([{"role": "assistant", **message}])
