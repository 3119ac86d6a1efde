"""Tokens and loss masks of chats are those of TRL and transformers, for every template TRL has."""

import functools
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gradindex.model.chat import encode_answer, encode_chat
from gradindex.model.messages import read_chat
from gradindex.model.rendering import ChatTemplateError
from gradindex.storage.build_plan import CorpusSettings
from indexer.read.corpus import Corpus
from support.chats import CHATS, TEMPLATES, call
from support.needed import library
from support.tokenizers import chat_tokenizer

trl = library("trl")
data_utils = library("trl.data_utils")

FOLDER = Path(trl.__file__).parent / "chat_templates"
SHIPPED = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}
ALL = {**SHIPPED, **TEMPLATES}
MARKED = {name: text for name, text in ALL.items() if "endgeneration" in text}
OWN = {name: text for name, text in ALL.items() if name not in MARKED}  # as models have them
# TRL's marks begin with words that the template writes to ask for an answer, end with the next
# message's first word (GLM) or before the space behind an answer (LLaVA).
OTHER_MARKS = {"deepseek_r1_distill", "deepseekv3", "diffusion_gemma", "glm4moe", "gptoss",
               "llava_next", "muse_glimmer", "qwen2_5"}
# which put the content of a message that calls tools behind what the tools gave
PARTING = {"diffusion_gemma", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"}
# which read contents in parts alone
PARTS = {f"{name}{kind}" for name in ("llava_next", "idefics3", "smolvlm")
         for kind in ("", "_training")}


# of which a change is seen soon; the others are slow together
SOON = {"qwen3", "qwen3_training", "qwen3_5_think", "deepseek_r1_distill", "deepseekv3_training",
        "glm4moe_training", "gptoss", "nemotron_3_nano", "llama3", "gemma3_training", "gemma4",
        "llava_next", "phi3", "cohere2_training", *TEMPLATES}


def each(templates):
    return [name if name in SOON else pytest.param(name, marks=pytest.mark.slow)
            for name in templates]


@functools.cache
def tokenizer_of(name):
    return chat_tokenizer(ALL[name])


def chats(name):
    """Messages and tools of every kind, as a template can read them."""
    for messages, tools in CHATS.values():
        if name in PARTS:
            messages = [{**one, "content": [{"type": "text", "text": one["content"] or ""}]}
                        for one in messages]
        yield messages, tools


def rendered(tokenizer, messages, tools, **options):
    """The token ids and mask that TRL would train on; None where the template refuses the chat."""
    try:
        return data_utils._tokenize(tokenizer, messages, tools=tools, **options)
    except Exception:
        return None


def loses(tokenizer, messages, tools, **options):
    """Whether a template renders the same where a chat says something else."""
    def alike(number, until, **fields):
        other = [*messages[:number], {**messages[number], **fields}, *messages[number + 1:]]
        one, two = (rendered(tokenizer, said[:until], tools, **options)
                    for said in (messages, other))
        return one is not None and one == two

    whole = rendered(tokenizer, messages, tools, **options)
    found = [bool(tools) and whole == rendered(tokenizer, messages, None, **options)]
    thoughts = [number for number, one in enumerate(messages) if "reasoning_content" in one]
    found += [alike(number, number + 1, reasoning_content="other") for number in thoughts[-1:]]
    for number, one in enumerate(messages):
        if one["content"] and one["content"] != [{"type": "text", "text": ""}]:
            other = "other" if isinstance(one["content"], str) else \
                [{"type": "text", "text": "other"}]
            found.append(alike(number, None, content=other))
        if "tool_calls" in one:
            found.append(alike(number, None, tool_calls=call({"other": 1})))
    return any(found)


@pytest.mark.parametrize("name", each(MARKED))
def test_marked_answers_are_scored(name):
    """As with TRL's assistant_only_loss, which is transformers' return_assistant_tokens_mask."""
    tokenizer, done = tokenizer_of(name), 0
    for messages, tools in chats(name):
        expected = rendered(tokenizer, messages, tools, return_assistant_tokens_mask=True)
        if expected is None:
            with pytest.raises(ChatTemplateError, match="refuses the messages"):
                encode_chat(tokenizer, read_chat(messages, tools))
            continue
        tokenised = encode_chat(tokenizer, read_chat(messages, tools))
        assert bool(tokenised.unshown) == loses(tokenizer, messages, tools)
        assert tokenised.tokens.tolist() == expected["input_ids"]
        assert tokenised.scored.astype(int).tolist() == expected["assistant_masks"]
        done += 1
    assert done >= 5


@pytest.mark.parametrize("name", each(ALL))
def test_completions_of_messages_are_scored(name):
    """As with TRL's completion_only_loss, for every answer of a chat as the first message."""
    tokenizer, done = tokenizer_of(name), 0
    for messages, tools in chats(name):
        for border in range(1, len(messages)):
            prompt, completion = messages[:border], messages[border:]
            before = rendered(tokenizer, prompt, tools, add_generation_prompt=True)
            whole = rendered(tokenizer, messages, tools)
            if completion[0]["role"] != "assistant" or before is None or whole is None:
                continue
            tokenised = encode_answer(
                tokenizer, read_chat(prompt, tools), read_chat(completion).messages)
            begin = data_utils.common_prefix_length(before["input_ids"], whole["input_ids"])
            assert tokenised.tokens.tolist() == whole["input_ids"]
            assert np.flatnonzero(tokenised.scored).tolist() == \
                list(range(begin, len(whole["input_ids"])))
            done += 1
    assert done >= 5


@pytest.mark.parametrize("name", each(OWN))
def test_without_marks_the_last_answer_is_scored_as_the_completion_it_would_be(name):
    tokenizer, done = tokenizer_of(name), 0
    for messages, tools in chats(name):
        try:
            answer = encode_answer(
                tokenizer, read_chat(messages[:-1], tools), read_chat(messages[-1:]).messages)
        except ChatTemplateError:
            continue
        if messages[-1]["role"] != "assistant":
            continue
        tokenised = encode_chat(tokenizer, read_chat(messages, tools), last=True)
        [start, *_] = np.flatnonzero(tokenised.scored)
        begin = np.flatnonzero(answer.scored)[0]
        between = tokenizer.decode(tokenised.tokens[min(start, begin) : max(start, begin)])
        # a thought that asking for an answer opens is the prompt's there and the answer's here
        assert start == begin or (start < begin and between.startswith("<think>")) or (
            # where reasoning of earlier answers goes, a prompt alone is rendered another way
            start > begin and tools), (messages, between)
        assert tokenised.scored[start:].all()
        done += 1
    assert done >= 4


@pytest.mark.parametrize("name", each(OWN))
def test_without_marks_every_answer_is_scored(name):
    """As by TRL's marks, where the template that it trains by renders the same."""
    tokenizer, training = tokenizer_of(name), SHIPPED.get(f"{name}_training")
    for messages, tools in chats(name):
        whole = rendered(tokenizer, messages, tools)
        if whole is None:
            continue
        chat = read_chat(messages, tools)
        if name in PARTING and any(one.get("content") == "calling" for one in messages):
            with pytest.raises(ChatTemplateError, match=r"hides which words .* \(message 3\)"):
                encode_chat(tokenizer, chat)
            continue
        tokenised = encode_chat(tokenizer, chat)
        assert tokenised.tokens.tolist() == whole["input_ids"]
        stretches = np.flatnonzero(np.diff([0, *tokenised.scored.astype(int), 0]) == 1)
        assert 1 <= len(stretches) <= sum(one["role"] == "assistant" for one in messages)
        expected = training and rendered(
            tokenizer, messages, tools, return_assistant_tokens_mask=True, chat_template=training)
        if expected and expected["input_ids"] == whole["input_ids"] and name not in OTHER_MARKS:
            assert tokenised.scored.astype(int).tolist() == expected["assistant_masks"]


# ---- the trainer itself

ROWS = [{"messages": messages, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
        for messages, tools in CHATS.values()]
EXCHANGES = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:],
              "tools": row["tools"], "chat_template_kwargs": {}} for row in ROWS
             if row["messages"][-1]["role"] == "assistant"]
SPOKEN = [{"prompt": f"{one['messages'][0]['content']} ", "completion": "the world<e>"}
          for one in ROWS]
FAMILIES = ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "deepseekv3", "glm4moe", "gptoss",
            "nemotron_3_nano", "llama3", "gemma3", "phi3_5", "cohere2", "smollm 3"]


def trained_on(tokenizer, rows, folder, **settings):
    """The token ids and labels that TRL's trainer makes of rows."""
    network = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_embd=4, n_layer=1, n_head=1, n_positions=8, bos_token_id=0,
        eos_token_id=0))
    config = trl.SFTConfig(folder, max_length=None, use_cpu=True, bf16=False, report_to="none",
                           gradient_checkpointing=False, shuffle_dataset=False, **settings)
    trainer = trl.SFTTrainer(
        network, config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows, on_mixed_types="use_json"))
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def indexed(tokenizer, rows, template=None):
    """The token ids and labels that an index has of them."""
    settings = CorpusSettings(4096, chat_template=template)
    corpus = Corpus([rows], tokenizer, settings, len(tokenizer), 0)
    found = [(one.tokens.tolist(), torch.where(
        torch.from_numpy(one.scored), torch.from_numpy(one.tokens), -100).tolist())
        for one in corpus.sequences()]
    assert not corpus.facts.skipped
    return found


def takes(tokenizer, row, template):
    """Whether the template takes a row and its prompt alone, and shows all of it."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return True
    told = {"chat_template": template, **row["chat_template_kwargs"]}
    whole = row["messages"] if prompt is None else prompt + row["completion"]
    return not loses(tokenizer, whole, row["tools"], **told) and all(
        rendered(tokenizer, messages, row["tools"], **told)
        for messages in (whole, prompt or whole))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_an_index_has_what_the_trainer_trains_on(name, tmp_path):
    tokenizer = chat_tokenizer(ALL[name])
    tokenizer.pad_token = tokenizer.eos_token
    training = None if name in MARKED else SHIPPED[f"{name}_training"]
    for rows, settings, template in [
        (ROWS, {"assistant_only_loss": True}, training), (EXCHANGES, {}, None), (SPOKEN, {}, None),
    ]:
        readable = [row for row in rows if takes(tokenizer, row, template)]
        assert len(readable) >= 3
        found = indexed(tokenizer, readable, template)
        assert found == trained_on(tokenizer, readable, str(tmp_path), **settings)
