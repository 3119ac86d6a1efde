"""The demo's small classifier: its tokenizer, its training, and how well it tells texts apart.

A BERT of two layers that has read nothing else. It sees each text as `gradindex build` will: whole,
between [CLS] and [SEP].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from gradindex import draws
from gradindex.demo.labelled_documents import FAMILIES, LabelledDocument
from gradindex.demo.small_model import CPU, batches_of, padded, run_training, trained_bytes
from gradindex.progress import Progress

SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]
LABELS = list(FAMILIES)


@dataclass(frozen=True)
class ClassifierSettings:
    """What is trained; lengths in tokens. Less than a minute of training on two cores."""

    texts: int = 1920
    planted: float = 0.08  # of the labels, made wrong
    length: int = 96
    vocabulary: int = 4096
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    steps: int = 480
    batch: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


def train_tokenizer_of_texts(texts: list[str], settings: ClassifierSettings) -> Any:
    """A byte-level BPE tokenizer that puts a text between [CLS] and [SEP]."""
    tokenizer = trained_bytes(texts, settings.vocabulary, SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, SPECIAL.index(name)) for name in SPECIAL[1:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=settings.length)


def new_classifier(settings: ClassifierSettings) -> Any:
    """An untrained model, whose classes have the families' names."""
    with draws.always_alike(CPU, settings.seed):
        return BertForSequenceClassification(BertConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.hidden,
            intermediate_size=4 * settings.hidden, num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads, max_position_embeddings=settings.length,
            # without dropout training is the same for every number of threads
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            pad_token_id=SPECIAL.index("[PAD]"), num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={name: number for number, name in enumerate(LABELS)}))


def train_classifier(
    model: Any, tokenizer: Any, documents: Sequence[LabelledDocument],
    settings: ClassifierSettings, progress: Progress,
) -> float:
    """Train in place on the documents' labels, wrong ones too; the last pass's mean loss."""
    rows = [(tokenizer(one["text"]).input_ids, LABELS.index(one["label"])) for one in documents]
    batches = ({**_inputs([ids for ids, _ in group]),
                "labels": torch.tensor([label for _, label in group])}
               for group in batches_of(rows, settings.batch, settings.seed,
                                       lambda row: len(row[0])))
    return run_training(model, batches, len(rows), settings, progress, "nats a text")


def _inputs(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"input_ids": padded(texts, 0),
            "attention_mask": padded([[1] * len(ids) for ids in texts], 0)}


@torch.no_grad()
def own_labels(model: Any, tokenizer: Any, texts: list[str], batch: int = 32) -> list[str]:
    """The labels that the model itself gives some texts."""
    found: list[str] = []
    for start in range(0, len(texts), batch):
        ids = [tokenizer(text).input_ids for text in texts[start : start + batch]]
        found += [LABELS[number] for number in model(**_inputs(ids)).logits.argmax(-1).tolist()]
    return found
