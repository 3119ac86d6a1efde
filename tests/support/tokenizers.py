"""Tokenizers of the usual kinds, and chat templates."""

import copy
import functools
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = ["hello world, the water is cold", "the world is composed of water and fire",
             "yes and no <|user|> <|assistant|> <|end|>", "naïve 😀 中文"]
LOOP = "{% for m in messages %}<|{{ m.role }}|>BODY\n{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN_TEMPLATE = LOOP.replace("BODY", "{{ m.content }}<|end|>") + ANSWER
MARKED_TEMPLATE = LOOP.replace(
    "BODY", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}") + ANSWER
# tells earlier messages behind the last one
REWRITING = LOOP.replace("BODY", "{{ m.content if loop.last }}") + \
    "{% for m in messages[:-1] %}{{ m.content }}\n{% endfor %}" + ANSWER
CHAT = [
    {"role": "user", "content": "is water cold"}, {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "and fire"}, {"role": "assistant", "content": "no"},
]


@functools.cache
def byte_tokenizer(frame="$A", trim=False, template=None):
    """Byte-level BPE, as of GPT-2; `frame` places the special tokens <b> and <e>."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<e>", "<b>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=trim),
        processors.TemplateProcessing(single=frame, special_tokens=[("<e>", 0), ("<b>", 1)]),
    ])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<b>", eos_token="<e>")
    wrapped.chat_template = template
    return wrapped


@functools.cache
def unigram_tokenizer():
    """SentencePiece-style: a space is put before the text, and taken away when decoding."""
    words = ["▁the", "▁world", "▁is", "▁co", "ld"]
    made = Tokenizer(models.Unigram(
        [("<unk>", 0.0), ("<e>", 0.0), *((word, -2.0) for word in words),
         *((letter, -9.0) for letter in "▁acdehlnorstw中�")], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="<unk>")


@functools.cache
def fallback_tokenizer():
    """As of Llama 2: characters without a token become bytes."""
    tokens = ["<unk>", "<e>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrd", "�"]
    made = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)},
                                merges=[], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="<unk>")


def plain_ids(tokenizer, string):
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def chat_tokenizer(template):
    """A byte tokenizer in which the signs of a chat template are tokens, as in a model's own."""
    signs = re.findall(r"<[|｜][^<>{}'\"\s]*>|</?(?:think|tool_call|s)>|<(?:start|end)_of_turn>|"
                       r"\[/?INST\]|\[gMASK\]|<sop>", template)
    tokenizer = copy.deepcopy(byte_tokenizer("<b> $A"))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(signs))})
    tokenizer.chat_template = template
    return tokenizer
