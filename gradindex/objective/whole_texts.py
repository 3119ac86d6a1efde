"""How a network reads whole texts, of which it says something: classifiers, reward models."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradindex.objective.batch import Batch, Row, padded
from gradindex.transfers import to_device


@dataclass
class WholeTexts:
    """How a network reads whole texts: by what padding, with which of its inputs.

    `padding` is the token id that the network knows for padding. With `types` it is told which of
    two sentences each token is of. With `caching` it would keep keys and values of every pass.
    """

    padding: int = 0
    types: bool = False
    caching: bool = False

    @classmethod
    def of(cls, network: Any, tokenizer: Any | None = None) -> "WholeTexts":
        """As a network takes them; its configuration names the token for padding.

        It is told which of two sentences a token is of where it asks, and its tokenizer, which fed
        it in training, says it.
        """
        text = network.config.get_text_config()
        asked = inspect.signature(network.forward).parameters
        return cls(
            0 if text.pad_token_id is None else int(text.pad_token_id),
            "token_type_ids" in asked and getattr(network.config, "type_vocab_size", 0) > 1
            and (tokenizer is None or "token_type_ids" in tokenizer.model_input_names),
            "use_cache" in asked)

    def batch(
        self, rows: Sequence[Row], targets: np.ndarray, device: torch.device, texts: int = 1
    ) -> Batch:
        """Rows with their targets [b] as one batch, padded on the right."""
        tokens, real = padded(rows, texts, self.padding)
        batch = Batch.of(tokens, targets, real, device, texts)
        # without padding there is none, or another attention kernel would run
        if not real.all():
            batch.mask = to_device(real.astype(np.int64), device)
        if self.types and texts == 1 and any(row.border is not None for row in rows):
            types = np.zeros(tokens.shape, np.int64)
            for number, row in enumerate(rows):
                types[number, row.border or len(row.tokens) : len(row.tokens)] = 1
            batch.types = to_device(types, device)
        return batch

    def outputs(self, network: Any, batch: Batch) -> Tensor:
        """What the network says of each text: [b · texts, outputs]."""
        told: dict[str, Any] = {"use_cache": False} if self.caching else {}
        if batch.mask is not None:
            told["attention_mask"] = batch.by_text(batch.mask)
        if batch.types is not None:
            told["token_type_ids"] = batch.types
        logits: Tensor = network(input_ids=batch.by_text(batch.tokens), **told).logits
        return logits
