"""Small models of four families, in float64, and a helper to compare with."""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gradindex.model import LanguageModel, ModelSource

SIZES = {
    "gpt_neox": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=20),
    "gpt2": dict(n_embd=12, n_layer=2, n_head=2, n_positions=64, n_inner=20),
    "llama": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, intermediate_size=20),
    "qwen3": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, intermediate_size=20, head_dim=6),
}
VOCABULARY = 37


def random_network(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A small random model whose every parameter matters."""
    settings = {**SIZES[family], "vocab_size": VOCABULARY, "max_position_embeddings": 64,
                "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
                "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    if family == "gpt2":
        del settings["max_position_embeddings"], settings["attention_dropout"]
    config = AutoConfig.for_model(family, **{**settings, **changes})
    torch.manual_seed(7)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture(params=list(SIZES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., LanguageModel]:
    def make(family: str = "gpt_neox", **changes: Any) -> LanguageModel:
        network = random_network(family, **changes)
        return LanguageModel(network.requires_grad_(False), None, ModelSource(network))
    return make


@pytest.fixture
def sequences() -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, scored): plain text, masked prompts, different lengths."""
    random = np.random.default_rng(3)
    made = []
    for length, prompt in ((11, 0), (7, 3), (9, 0), (5, 2), (11, 6), (2, 0)):
        ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        scored = np.arange(length) >= prompt
        made.append((ids, scored))
    return made


def labels_of(ids: np.ndarray, scored: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(scored, ids, -100).astype(np.int64))
