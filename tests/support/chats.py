"""Chats of the kinds that people train on, and chat templates that TRL doesn't ship."""


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def call(arguments):
    return [{"type": "function", "id": "abcdefghi",
             "function": {"name": "multiply", "arguments": arguments}}]


SYSTEM = {"role": "system", "content": "be cold"}
RESULT = {"role": "tool", "name": "multiply", "tool_call_id": "abcdefghi", "content": "6"}
NUMBER = {"type": "integer", "description": "a number"}
TOOLS = [{"type": "function", "function": {
    "name": "multiply", "description": "Multiply two numbers.",
    "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER},
                   "required": ["a", "b"]}}}]
CALLED = call({"a": 2, "b": 3})
# name: messages, tools
CHATS = {
    "one answer": ([user("hello"), assistant("the world.")], None),
    "a system": ([SYSTEM, user("hello"), assistant("the world.")], None),
    "several answers": ([user("hello"), assistant("One  two "), user("more"), assistant("three"),
                         user("again\n"), assistant(" four")], None),
    "reasoning": ([user("hello"), assistant("One", reasoning_content="let me"), user("more"),
                   assistant("three", reasoning_content="see")], None),
    "reasoning in the text": ([
        user("hello"), assistant("<think>\nlet me\n</think>\n\nOne"), user("more"),
        assistant("<think>\nsee\n</think>\n\nthree")], None),
    "tools": ([user("hello"), assistant("", tool_calls=CALLED), RESULT, assistant("It is 6."),
               user("fire"), assistant("bye")], TOOLS),
    "no content": ([user("hello"), assistant(None, tool_calls=CALLED), RESULT,
                    assistant("It is 6.")], TOOLS),
    "tools and reasoning": ([
        SYSTEM, user("hello"),
        assistant("calling", reasoning_content="first", tool_calls=CALLED),
        RESULT, assistant("It is 6.", reasoning_content="then"), user("fire"), assistant("bye")],
        TOOLS),
    "arguments as text": ([user("hello"), assistant(None, tool_calls=call('{"a": 2}')), RESULT,
                           assistant("It is 6.")], TOOLS),
    "the user last": ([user("hello"), assistant("One"), user("more")], None),
    "an empty answer": ([user("hello"), assistant(""), user("more"), assistant("x")], None),
    "the same words": ([user("yes"), assistant("yes"), user("yes"), assistant("yes")], None),
}
TEMPLATES = {
    "mistral": "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 "
    "== 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "llama 2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% if "
    "loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "vicuna": "{{ bos_token }}A chat. {% for m in messages %}{% if m.role == 'user' %}USER: "
    "{{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}ASSISTANT:{% endif %}",
    "smollm 3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% if enable_thinking is defined and not enable_thinking %}<think>\n\n"
    "</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}",
}
