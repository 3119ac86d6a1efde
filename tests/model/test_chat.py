"""Chats → tokens and loss masks, by templates with and without marks."""

import json

import numpy as np
import pytest

from gradindex.errors import InputError
from gradindex.model.chat import encode_answer, encode_chat, encode_question
from gradindex.model.chat_template import (
    check_chat_template,
    read_chat_template,
    with_chat_template,
)
from gradindex.model.messages import Chat, MessagesError, read_chat
from gradindex.model.rendering import ChatTemplateError
from support.tokenizers import (
    ANSWER,
    CHAT,
    LOOP,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    REWRITING,
    byte_tokenizer,
    plain_ids,
)


def scored_text(tokenizer, tokenised):
    return tokenizer.decode(tokenised.tokens[tokenised.scored].tolist())


# ---- what is scored


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(("template", "last", "scored"), [
    (PLAIN_TEMPLATE, False, " yes <|end|>\nno<|end|>\n"),
    (PLAIN_TEMPLATE, True, "no<|end|>\n"),
    (MARKED_TEMPLATE, False, " yes <|end|>no<|end|>"),
    (MARKED_TEMPLATE, True, "no<|end|>"),
    (MARKED_TEMPLATE.replace("<|end|>{% endgen", "{% endgen"), False, " yes <|no"),  # token " <|"
    (MARKED_TEMPLATE.replace("{% generation %}", "  {%- generation -%} \n").replace(
        "{% endgeneration %}", " {%- endgeneration -%} "), False, " yes <|end|>no<|end|>"),
])
def test_only_the_assistants_tokens_are_scored(template, last, scored, trim):
    tokenizer = byte_tokenizer("<b> $A <e>", trim, template)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    tokenised = encode_chat(tokenizer, Chat(CHAT), last=last)
    assert tokenised.tokens.tolist() == plain_ids(tokenizer, rendered)
    assert scored_text(tokenizer, tokenised) == scored
    pieces = [rendered[start:end] for start, end in tokenised.spans]
    assert pieces == [tokenizer.decode([token]) for token in tokenised.tokens]


@pytest.mark.parametrize("template", [
    MARKED_TEMPLATE,
    MARKED_TEMPLATE.replace("<|end|>{% endgen", "{% endgen"),
    MARKED_TEMPLATE.replace("{% generation %}", "{%- generation -%}\n"),
])
def test_marks_mean_what_they_mean_to_transformers(template):
    tokenizer = byte_tokenizer(template=template)
    marked = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    tokenised = encode_chat(tokenizer, Chat(CHAT))
    assert tokenised.scored.astype(int).tolist() == marked["assistant_masks"]
    assert tokenised.tokens.tolist() == marked["input_ids"]


@pytest.mark.parametrize(("template", "scored"), [
    (PLAIN_TEMPLATE.removesuffix(ANSWER), " yes <|end|>\nno<|end|>\n"),
    ("{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %} "
     "{{ m.content | trim }}<e>{% endif %}{% endfor %}", " yes<e> no<e>"),  # nothing opens answers
    (LOOP.replace("BODY", "{% if m.role == 'assistant' %}<think></think>{% endif %}"
                          "{{ m.content }}<|end|>"),
     "<think></think> yes <|end|>\n<think></think>no<|end|>\n"),
])
def test_what_opens_an_answer_is_not_scored_where_the_template_can_not_ask_for_one(
    template, scored
):
    tokenizer = byte_tokenizer(template=template)
    assert scored_text(tokenizer, encode_chat(tokenizer, Chat(CHAT))) == scored


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, "cold " + PLAIN_TEMPLATE])
def test_an_assistant_that_speaks_first(template):
    tokenizer = byte_tokenizer(template=template)
    chat = [{"role": "assistant", "content": "yes"}, CHAT[0]]
    tokenised = encode_chat(tokenizer, Chat(chat))
    assert scored_text(tokenizer, tokenised) == "yes<|end|>\n"


def test_a_template_that_hides_the_assistants_words_is_refused():
    tokenizer = byte_tokenizer(template=REWRITING)
    hidden = r"no \{% generation %\} marks, hides .* \(message 4\)\. .* --chat-template"
    with pytest.raises(ChatTemplateError, match=hidden.replace(" .* --", ".*--")):
        encode_chat(tokenizer, Chat(CHAT))


def test_marks_make_a_rewriting_template_usable():
    told = "{% generation %}{{ m.content }}{% endgeneration %}"
    tokenizer = byte_tokenizer(template=REWRITING.replace("{{ m.content }}", told).replace(
        "{{ m.content if loop.last }}", "{% if loop.last %}" + told + "{% endif %}"))
    chat = [CHAT[3], {"role": "assistant", "content": "cold"}]
    assert scored_text(tokenizer, encode_chat(tokenizer, Chat(chat))) == "coldno"
    assert scored_text(tokenizer, encode_chat(tokenizer, Chat(chat), last=True)) == "cold"


def test_messages_that_the_template_refuses():
    tokenizer = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    refused = r"refuses the messages \(roles must alternate\)\. Give messages in the form that"
    with pytest.raises(ChatTemplateError, match=refused):
        encode_chat(tokenizer, Chat(CHAT))


def test_a_chat_that_waits_for_an_answer():
    tokenizer = byte_tokenizer("<b> $A <e>", template=PLAIN_TEMPLATE)
    text, tokens, _ = encode_question(tokenizer, Chat(CHAT[:1]))
    assert text == "<|user|>is water cold<|end|>\n<|assistant|>"
    assert tokens == plain_ids(tokenizer, text)


THINKING = LOOP.replace(  # of the last answer alone, which the words that open one begin
    "BODY", "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}"
    "</think>{% endif %}{{ m.content | trim }}<|end|>") + ANSWER.replace("tant|>", "tant|><think>")
CLOSED_IN_TWO_WAYS = LOOP.replace(  # as of gpt-oss
    "BODY", "{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt and "
    "m.role == 'assistant' else '<|end|>' }}").replace("\n{%", "{%") + ANSWER
CLOSED_CHAT = PLAIN_TEMPLATE.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")  # Phi-3


@pytest.mark.parametrize(("template", "scored"), [
    (THINKING, ["yes<|end|>\n", "<think></think>no<|end|>\n"]),
    (CLOSED_IN_TWO_WAYS, [" yes <|end|>", "no<|return|>"]),
    (CLOSED_CHAT, [" yes <|end|>\n", "no<|end|>\n<e>"]),
])
def test_templates_that_treat_the_last_turn_differently(template, scored):
    tokenizer = byte_tokenizer(template=template)
    assert scored_text(tokenizer, encode_chat(tokenizer, Chat(CHAT))) == "".join(scored)
    assert scored_text(tokenizer, encode_chat(tokenizer, Chat(CHAT), last=True)) == scored[-1]


def test_a_turn_is_found_where_the_same_words_stand_elsewhere():
    chat = [{"role": role, "content": "<|end|>\nyes"} for role in ("user", "assistant") * 2]
    tokenizer = byte_tokenizer(template=THINKING)
    tokenised = encode_chat(tokenizer, Chat(chat))
    [first] = np.flatnonzero(np.diff(np.flatnonzero(tokenised.scored)) > 1)
    ids = tokenised.tokens[tokenised.scored].tolist()
    assert tokenizer.decode(ids[: first + 1]) == "<|end|>\nyes<|end|>\n"
    assert tokenizer.decode(ids[first + 1:]) == "<think></think><|end|>\nyes<|end|>\n"


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE, THINKING])
@pytest.mark.parametrize("name, weights", [
    *(("weight", both) for both in [(0, 1), (1, 0), (False, 1.0), (None, 0), (0, 0)]),
    ("train", (False, True)), ("loss", (True, False)), ("loss", (None, False))])
def test_an_answer_of_weight_0_is_read_and_not_scored(template, name, weights):
    tokenizer = byte_tokenizer(template=template)
    weighed = [dict(message) for message in CHAT]
    weighed[1][name], weighed[3][name] = weights
    unweighed = encode_chat(tokenizer, Chat(CHAT))
    tokenised = encode_chat(tokenizer, read_chat(weighed))
    assert tokenised.tokens.tolist() == unweighed.tokens.tolist()
    parts = [encode_chat(tokenizer, Chat(CHAT), last=True).scored]
    parts.insert(0, unweighed.scored & ~parts[0])
    expected = [part for part, weight in zip(parts, weights, strict=True) if weight != 0]
    assert tokenised.scored.tolist() == np.any([0 * parts[0], *expected], 0).tolist()
    assert any(parts[0]) and any(parts[1])


def test_what_the_template_is_told_beside_the_messages():
    template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}{{ style }}" + \
        PLAIN_TEMPLATE
    tokenizer = byte_tokenizer(template=template)
    tools = [{"name": "hello"}]
    for given in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        chat = read_chat(CHAT[:2], given, {"style": "water"})
        tokenised = encode_chat(tokenizer, chat)
        assert tokenizer.decode(tokenised.tokens.tolist()).startswith("[hello]water<|user|>")
        assert scored_text(tokenizer, tokenised) == " yes <|end|>\n"
    other = read_chat(CHAT[:2], None, json.dumps({
        "chat_template": "{{ messages[0].content }}!{% if messages[1:] %}{{ messages[1].content }}"
                         "{% endif %}"}))
    tokens = encode_answer(tokenizer, other.until(1), CHAT[1:2]).tokens
    assert tokenizer.decode(tokens.tolist()) == "is water cold! yes "


# ---- prompts and completions that are messages


@pytest.mark.parametrize(("template", "scored"), [
    (PLAIN_TEMPLATE, " yes <|end|>\n<|user|>and fire<|end|>\n<|assistant|>no<|end|>\n"),
    (MARKED_TEMPLATE, " yes <|end|><|user|>and fire<|end|><|assistant|>no<|end|>"),
    (THINKING, "yes<|end|>\n<|user|>and fire<|end|>\n<|assistant|><think></think>no<|end|>\n"),
])
def test_all_that_follows_the_prompt_is_scored(template, scored):
    tokenizer = byte_tokenizer(template=template)
    tokenised = encode_answer(tokenizer, Chat(CHAT[:1]), CHAT[1:])
    assert scored_text(tokenizer, tokenised) == scored
    [first, *_] = np.flatnonzero(tokenised.scored)
    assert tokenised.scored[first:].all()


@pytest.mark.parametrize("weight", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_completion_may_have_answers_of_weight_0(weight):
    tokenizer = byte_tokenizer(template=PLAIN_TEMPLATE)
    completion = read_chat([{**CHAT[1], **weight}, *CHAT[2:]]).messages
    tokenised = encode_answer(tokenizer, Chat(CHAT[:1]), completion)
    assert scored_text(tokenizer, tokenised) == \
        "<|user|>and fire<|end|>\n<|assistant|>no<|end|>\n"


# ---- messages as people keep them


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}


@pytest.mark.parametrize(("given", "read"), [
    ({"role": ["user", "assistant"], "content": ["a", "b"], "name": [None, None]},
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ([{"role": "assistant", "content": None, "tool_calls": [CALL]}],
     [{"role": "assistant", "tool_calls": [CALL]}]),
    ([{"role": "user", "content": "a", "tool_calls": None, "name": None}],
     [{"role": "user", "content": "a"}]),
    ([{"role": "user", "content": ["a", {"type": "input_text", "text": "b", "image_url": None}]}],
     [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    (np.array([{"role": "user", "content": "a"}], object), [{"role": "user", "content": "a"}]),
    (({"role": "user", "content": "a"},), [{"role": "user", "content": "a"}]),
    ({"role": "user", "content": "a"}, [{"role": "user", "content": "a"}]),
    ('{"role": "user", "content": "a"}', [{"role": "user", "content": "a"}]),
    ('[{"from": "Human", "value": "a"}]', [{"role": "user", "content": "a"}]),
    ({"from": np.array(["human", "GPT"]), "value": ("a", "b"), "weight": np.array([0, 1])},
     [{"role": "user", "content": "a", "weight": 0},
      {"role": "assistant", "content": "b", "weight": 1}]),
    ([{"from": "human", "content": "a"}, {"role": "gpt", "value": "b", "from": None}],
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    # a role is what the template shows, and stays as training had it
    ([{"role": "Human", "content": "a", "from": "b"}],
     [{"role": "Human", "content": "a", "from": "b"}]),
    ([{"role": "assistant", "tool_calls": np.array([{"function": {"arguments": np.array([1])}}])}],
     [{"role": "assistant", "tool_calls": [{"function": {"arguments": [1]}}]}]),
])
def test_messages_are_brought_to_one_form(given, read):
    assert read_chat(given).messages == read


@pytest.mark.parametrize(("arguments", "reason"), [
    (("a",), r"is not a list of messages with .* \(text that is no JSON\)"),
    ((["a"],), r"is not a list of messages with .* \(a str among them\)"),
    (([{"content": "a", "b": 1}],), r"is not a list .* \(one has the fields content, b\)"),
    (("[{'role': 'user'}]",), r"\(text as Python shows it; write it with json\.dumps\)"),
    (("5",), r"is not a list .* \(a int\)"), (("[]",), r"is not a list .* \(an empty list\)"),
    (([{"from": "oracle", "value": "a"}],), r"a turn from nobody known \('oracle'; known are hum"),
    (({"role": ["user"], "content": []},), "lists of different lengths"),
    (([{"role": "user", "content": {"text": "a"}}],), r"neither text nor parts \(a dict\)"),
    (([{"role": "user", "content": [{"type": "image"}]}],), r"is not text \(image\)"),
    (([{"role": "user", "content": [5]}],), r"is not text \(int\)"),
    ((CHAT, "[{"), "tools is text that is no JSON"), ((CHAT, {"a": 1}), "tools are not a list"),
    ((CHAT, [5]), "a tool is not a JSON schema"), ((CHAT, None, [1]), "kwargs is not an object"),
    ((CHAT, None, {"tokenize": True}), r"what is no template's \(tokenize\)"),
])
def test_what_is_no_chat_is_said(arguments, reason):
    with pytest.raises(MessagesError, match=reason):
        read_chat(*arguments)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "is "}, {"type": "text",
                                                                       "text": "cold"}]}, CHAT[1]]
READS_PARTS = LOOP.replace(
    "BODY", "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text }}{% if not loop.last %}/{% endif %}{% endfor %}{% endif %}<|end|>") + ANSWER


@pytest.mark.parametrize(("template", "found"), [
    (READS_PARTS, "is /cold"),  # as the template joins them
    (PLAIN_TEMPLATE, "is cold"),  # would print the list
    (PLAIN_TEMPLATE.replace("m.content }}", "'' + m.content }}"), "is cold"),  # refuses a list
    (PLAIN_TEMPLATE.replace("m.content", "m.content if m.content is string else ''"), "is cold"),
])
def test_parts_are_joined_where_the_template_reads_only_text(template, found):
    tokenizer = byte_tokenizer(template=template)
    tokenised = encode_chat(tokenizer, read_chat(PARTS))
    assert tokenizer.decode(tokenised.tokens.tolist()) == \
        f"<|user|>{found}<|end|>\n<|assistant|> yes <|end|>\n"
    assert scored_text(tokenizer, tokenised) == " yes <|end|>\n"


# ---- the template


def test_a_missing_chat_template_names_the_flags():
    check_chat_template(byte_tokenizer(template=PLAIN_TEMPLATE), "chat")
    with pytest.raises(InputError, match=r"field chat.*no chat template.*--chat-template FILE"):
        check_chat_template(byte_tokenizer(), "chat")


def test_a_template_is_given_as_text_or_by_its_file(tmp_path):
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + PLAIN_TEMPLATE.encode())
    for given in (file, str(file), PLAIN_TEMPLATE):
        assert read_chat_template(given) == PLAIN_TEMPLATE
    own = byte_tokenizer(template=MARKED_TEMPLATE)
    other = with_chat_template(own, PLAIN_TEMPLATE)
    assert (own.chat_template, other.chat_template) == (MARKED_TEMPLATE, PLAIN_TEMPLATE)
    assert with_chat_template(own, None) is own


@pytest.mark.parametrize(("content", "message"), [
    (b"hello", "holds no template; expected Jinja"), (b"\xff{{", "not UTF-8"),
    (json.dumps({"chat_template": PLAIN_TEMPLATE}).encode(), "holds no template; expected Jinja"),
    (None, "No such file"),
])
def test_what_is_no_template_is_refused(content, message, tmp_path):
    file = tmp_path / "x.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"--chat-template .*x.jinja.*{message}"):
        read_chat_template(file)


def test_a_template_with_a_mistake_is_refused():
    with pytest.raises(InputError, match=r"--chat-template is no valid Jinja: .*\(line 2\)"):
        with_chat_template(byte_tokenizer(), "{{ bos_token }}\n{% for %}")


def test_a_tokenizer_may_have_several_templates_by_name():
    tokenizer = with_chat_template(byte_tokenizer(template=None), {
        "default": PLAIN_TEMPLATE, "tool_use": "[{{ tools[0].name }}]" + MARKED_TEMPLATE})
    plain = encode_chat(tokenizer, Chat(CHAT[:2]))
    assert scored_text(tokenizer, plain) == " yes <|end|>\n"
    told = encode_chat(tokenizer, Chat(CHAT[:2], [{"name": "hello"}]))
    assert tokenizer.decode(told.tokens.tolist()).startswith("[hello]<|user|>")
    assert scored_text(tokenizer, told) == " yes <|end|>"
