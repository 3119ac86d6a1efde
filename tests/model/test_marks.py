"""Which {% generation %} marks count where not all of a chat is learned."""

import pytest

from gradindex.model.chat import encode_chat
from gradindex.model.messages import Chat, read_chat
from gradindex.model.rendering import ChatTemplateError
from support.tokenizers import ANSWER, CHAT, LOOP, MARKED_TEMPLATE, PLAIN_TEMPLATE, byte_tokenizer


def scored_text(tokenizer, tokenised):
    return tokenizer.decode(tokenised.tokens[tokenised.scored].tolist())


MARKED_TURNS = LOOP.replace(
    "BODY\n", "{% generation %}{{ m.content }}<|end|>{% endgeneration %}") + ANSWER
MARKED_IN_TWO = MARKED_TEMPLATE.replace(
    "<|end|>{% endgen", "{% endgeneration %}/{% generation %}<|end|>{% endgen")


@pytest.mark.parametrize(("template", "weights", "scored"), [
    (MARKED_TURNS, [None] * 4, "is water cold<|end|> yes <|end|>and fire<|end|>no<|end|>"),
    (MARKED_TURNS, [None, 0, None, None], "is water cold<|end|>and fire<|end|>no<|end|>"),
    (MARKED_TURNS, [0, 1, 0, 0], " yes <|end|>"),
    (MARKED_IN_TWO, [None, 0, None, None], "no<|end|>"),
    (MARKED_IN_TWO, [0, None, 0, 0], " yes <|end|>"),
])
def test_a_weight_takes_away_no_marks_but_its_own_message_s(template, weights, scored):
    tokenizer = byte_tokenizer(template=template)
    chat = read_chat([{**one, "weight": weight}
                      for one, weight in zip(CHAT, weights, strict=True)])
    assert scored_text(tokenizer, encode_chat(tokenizer, chat)) == scored
    last = encode_chat(tokenizer, chat, last=True)
    assert scored_text(tokenizer, last) == "no<|end|>"


def test_a_mark_around_messages_of_different_weights_is_refused():
    tokenizer = byte_tokenizer(template="{% generation %}" + PLAIN_TEMPLATE + "{% endgeneration %}")
    assert encode_chat(tokenizer, Chat(CHAT)).scored.all()
    with pytest.raises(ChatTemplateError, match="marks hold messages that are learned and others"):
        encode_chat(tokenizer, read_chat([*CHAT[:3], {**CHAT[3], "weight": 0}]))
