"""Small random models of four families, in float64 unless said otherwise."""

import copy
import functools
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "gpt_neox": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=20),
    "gpt2": dict(n_embd=12, n_layer=2, n_head=2, n_positions=64, n_inner=20),
    "llama": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, intermediate_size=20),
    "qwen3": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, intermediate_size=20, head_dim=6),
}
LLAMA = SIZES["llama"]
MIXTURES = {  # of experts; a test that uses one puts it among SIZES
    "mixtral": dict(LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(LLAMA, moe_intermediate_size=8, num_experts=5, num_experts_per_tok=2,
                      head_dim=6, decoder_sparse_step=1),
    "olmoe": dict(LLAMA, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=6,
                    layer_types=["full_attention"] * 2, rope_parameters={
                        "rope_type": "default", "rope_theta": 10000.0}),
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


@functools.cache
def other_model(network: Any) -> Any:
    """A model of the same shape with other weights."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return other


def tiny_network() -> Any:
    """One layer, float32."""
    return random_network("gpt_neox", torch.float32, num_hidden_layers=1)


def labels_of(ids: np.ndarray, scored: np.ndarray) -> torch.Tensor:
    """Labels as transformers takes them: −100 where a token isn't scored."""
    return torch.from_numpy(np.where(scored, ids, -100).astype(np.int64))
