"""Every causal-LM family of the installed transformers, small: its configuration, by rules.

`small_config` makes the default configuration of a family small: sizes by their names, one layer of
each kind that the default has, further changes by family from `CHANGES`. What can't be had that way
stands in `NOT_MADE`, what the product refuses in `REFUSED`, each with the reason.
"""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 48
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers",
          "encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth",
          "num_layers_per_stack", "conf_num_hidden_layers")
MOST = {  # a size in a configuration, by its name: what it is at most
    3: (*LAYERS, "time_step_rank", "mamba_dt_rank"),
    16: ("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "word_embed_proj_dim",
         "embedding_size", "lru_width", "attention_hidden_size", "embed_dim", "dim_model_base",
         "input_embedding_size", "output_embedding_size", "hidden_dim", "backbone_hidden_size",
         "hidden_size_global", "adapter_in_dim", "adapter_out_dim", "adapter_input_size",
         "downsample_hidden_size", "out_hidden_size"),
    20: ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim",
         "ffn_hidden_size", "dff", "dim_ff", "d_inner", "feed_forward_size", "mlp_dim",
         "dense_intermediate_size", "intermediate_size_mlp"),
    10: ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    8: ("head_dim", "d_head", "dim_head", "attention_head_size", "qk_nope_head_dim", "v_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim",
        "mamba_headdim", "d_kv", "attention_head_dim", "qk_rope_head_dim", "swa_head_dim",
        "swa_v_head_dim", "global_head_dim", "index_head_dim", "mamba_chunk_size", "chunk_size",
        "linear_head_dim"),
    4: ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "state_size",
        "mamba_d_state", "ssm_state_size", "zero_expert_num"),
    2: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
        "linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads",
        "n_mamba_heads", "num_key_value_heads", "num_kv_heads", "kv_n_heads", "attention_heads",
        "swa_num_attention_heads", "swa_num_key_value_heads", "num_query_groups",
        "num_global_key_value_heads", "index_n_heads", "conf_num_attention_heads",
        "indexer_num_heads", "linear_num_heads", "num_experts_per_tok", "moe_topk", "moe_k",
        "moe_top_k", "top_k_experts"),
    1: ("n_group", "topk_group", "mamba_n_groups", "n_groups", "mamba_ngroups", "n_shared_experts",
        "num_shared_experts", "first_k_dense_replace"),
    6: ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "sliding_window",
        "attention_window_size", "local_attention", "hidden_size_per_layer_input"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions",
         "max_source_positions", "context_length"),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"),
}
SIZES = {name: size for size, names in MOST.items() for name in names}
SPECIAL_TOKENS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 1, "cls_token_id": 2,
    "unk_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    "image_token_id": 44, "image_token_index": 45, "video_token_id": 46, "audio_token_id": 47}
KINDS_OF_LAYERS = 4  # at most, of lists with an entry for each layer

_GROUPS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
          "indexer_compress_ratio": 2, "ngram_vocab_size_base": 20,
          "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 1}
_DOTS3 = {
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 6,
    "swa_kv_lora_rank": 6, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    "shared_experts_intermediate_size": 10, "head_dim": 16, "qk_rope_head_dim": 8}
_ALTERNATE = ["linear_attention", "hybrid"] * 2 + ["linear_attention"]
CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 8, "n_group": 2, "topk_group": 2},
    "bamba": {"mamba_n_heads": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 3, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "deepseek_v2": {"topk_method": "greedy", "first_k_dense_replace": 1, **_GROUPS},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8}},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "intermediate_size": 20, "altup_num_inputs": 2,
        "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.5, 0.0], "laurel_rank": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "kimi_linear": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4},
    "mimo_v2_flash": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, 8),
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4,
                 "attn_layers": ("local", "lsh", "local"), "num_hidden_layers": 3},
    "roc_bert": {"shape_vocab_size": 40, "pronunciation_vocab_size": 40, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "attention_head_dim": 16, "attention_hidden_size": 32,
              "layers_block_type": _ALTERNATE},
    "zamba2": {"n_mamba_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 32},
}
NOT_MADE = {  # whose configuration can't be made, or makes no model: what transformers says
    "gemma3n": "requires the timm library",  # for its vision tower; gemma3n_text is made
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",  # as its own default isn't
    "gemma4_unified_assistant": "layer types producing a cache is different",
    "musicgen": "'MusicgenConfig' object has no attribute",  # wants that of its decoder
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute",
}
_READS_AHEAD = "isn't causal: what it says of a token depends on later tokens"
REFUSED = {  # what the product says of a family
    "cpmant": _READS_AHEAD,
    "prophetnet": _READS_AHEAD,  # its predicting stream: a longer text has other logits
    "reformer": "fails in a small pass in float64, backward: AssertionError: If you want to train",
    "xlnet": _READS_AHEAD,
}
FLOAT32 = ("inkling2_text", "xglm", "xlnet")  # whose code takes no float64


def small_config(family: str) -> PretrainedConfig:
    """The configuration of a family, small."""
    kind = CONFIG_MAPPING[family]
    return kind(**_small(kind(), CHANGES.get(family, {})))


def small_network(family: str, dtype: torch.dtype | None = None) -> Any:
    """A small random model of a family whose every parameter matters, in float64 if it can.

    Experts run as transformers runs them, one by one.
    """
    dtype = dtype or (torch.float32 if family in FLOAT32 else torch.float64)
    torch.manual_seed(7)
    network = AutoModelForCausalLM.from_config(
        small_config(family), dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def _small(default: PretrainedConfig, further: dict[str, Any]) -> dict[str, Any]:
    """What to change of a default configuration, those inside it too."""
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            changes[name] = {**_small(value, further.get(name, {})),
                             **({"model_type": value.model_type} if value.model_type else {})}
        elif isinstance(value, int) and not isinstance(value, bool) and name in SIZES:
            changes[name] = min(value, SIZES[name])
        elif name in SPECIAL_TOKENS and value is not None:
            changes[name] = SPECIAL_TOKENS[name]
        elif "drop" in name and isinstance(value, float):
            changes[name] = 0.0
        elif name == "is_decoder" and not values.get("is_encoder_decoder"):
            changes[name] = True  # or it reads both ways
    changes |= _kinds_of_layers(values)
    return changes | {name: value for name, value in further.items()
                      if not isinstance(values.get(name), PretrainedConfig)}


def _kinds_of_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut to one layer of each kind."""
    numbers = [name for name in LAYERS[:3] if isinstance(values.get(name), int)]
    lists = {name: value for name, value in values.items()
             if numbers and isinstance(value, (list, tuple)) and value
             and len(value) == values[numbers[0]]}
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))[:KINDS_OF_LAYERS]
    count = max(SIZES["num_hidden_layers"], len(kinds))
    layers = (kinds * count)[:count]
    return {**{name: [layer[place] for layer in layers] for place, name in enumerate(lists)},
            **dict.fromkeys(numbers, count)}


def parameters_of(network: nn.Module) -> int:
    """How many parameters a network has; shared ones count once."""
    return sum(parameter.numel() for parameter in network.parameters())
