"""Tiny models of other tasks than the next token, with random weights, and data for them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.task import Task

VOCABULARY = 40
SMALL = {"bits": 512, "fit_sequences": 24, "batch_tokens": 64, "segment_size": 10, "seq_len": 16}
NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2,
           "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
           "pad_token_id": 0, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
DECODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24,
           "max_position_embeddings": 32, "pad_token_id": 0, "tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", ENCODER),
    "roberta": ("Roberta", {**ENCODER, "pad_token_id": 1, "max_position_embeddings": 34}),
    "distilbert": ("DistilBert", {
        "vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
        "max_position_embeddings": 32, "pad_token_id": 0}),
    "deberta": ("DebertaV2", {
        **ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
        "position_biased_input": False, "pooler_hidden_size": 16}),
    "modernbert": ("ModernBert", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
        "pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 8,
        "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "llama": ("Llama", DECODER),
    "gpt2": ("GPT2", {
        "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
        "pad_token_id": 0}),
}


def network_of_texts(
    family: str, outputs: int, dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    """A network that says something of whole texts, with random weights."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{**settings, "num_labels": outputs, **changes})
    network = getattr(transformers, f"{name}ForSequenceClassification")(config)
    with torch.no_grad():  # else pooled texts are all alike
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return network.to(dtype).eval().requires_grad_(False)


def policy(dtype: torch.dtype = torch.float64) -> Any:
    """A small causal language model with random weights."""
    torch.manual_seed(0)
    # whose norms are in float64, too, where Llama's are in float32
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**FAMILIES["gpt2"][1]))
    return network.to(dtype).eval().requires_grad_(False)


def model_of(network: Any, task: str) -> LanguageModel:
    """The network as a model of a task, without a tokenizer."""
    source = ModelSource(network, task=Task(task, 0.3))
    return LanguageModel(network, None, source)


WORDS = [
    "good", "bad", "great", "awful", "film", "plot", "story", "actor", "music", "end", "the",
    "a", "of", "and", "was", "is", "very", "not", "so", "it", "why", "yes", "no", "because",
    "sure", "never"]


def tokenizer_of_texts() -> Any:
    """A tokenizer of words that begins texts with [CLS] and ends each with [SEP], as BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel(
        {word: number for number, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=32)


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a text and its label, which one of its words tells."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        label = number % 2
        told = ["bad", "awful"] if label == 0 else ["good", "great"]
        plain = [WORDS[int(pick)] for pick in torch.randint(4, 20, (3 + number % 4,),
                                                            generator=random)]
        rows.append({"sentence": " ".join([*plain, told[number // 2 % 2]]),
                     "label": ["negative", "positive"][label], "number": number})
    return rows


def answers(count: int) -> list[dict[str, Any]]:
    """Rows of a prompt and two answers, the first preferred."""
    rows = sentences(2 * count, seed=1)
    return [{"prompt": "why was it", "chosen": f" {rows[2 * n + 1]['sentence']}",
             "rejected": f" {rows[2 * n]['sentence']}", "margin": 0.1 * (n % 3),
             "ref_chosen_logps": -5.0 - n % 4, "ref_rejected_logps": -6.0}
            for n in range(count)]


def save(folder: Any, network: Any, tokenizer: Any) -> str:
    """A model and its tokenizer in a folder."""
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(path: Path, rows: list[Any]) -> Path:
    """Rows in a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
