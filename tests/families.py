"""Tiny random models of many architectures: 4 layers, width 32, vocabulary 99."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 98,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 48, "n_ctx": 128}
_NO_KV = {"num_key_value_heads": 4}

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": _MOE,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _MOE,
    "qwen3_next": {
        **_MOE,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    },
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi": _NO_KV,
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "cohere2": {"sliding_window": 6},
    "glm4": {},
    "granite": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "smollm3": {"use_sliding_window": False},
    "gpt_oss": {**_MOE, "sliding_window": 6},
    "deepseek_v3": {
        **_MOE,
        **_NO_KV,
        "n_routed_experts": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 4,
    },
    "gpt2": _GPT,
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gpt_neox": {},
    "gptj": {**_GPT, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128, "expansion_ratio": 2},
    "mamba": {"state_size": 4, "intermediate_size": 64},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "jamba": {
        **_MOE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "bamba": {
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "rwkv": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "w_init_variance_scale": 0.01},
    "lfm2": {"full_attn_idxs": [1, 3], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
}

# Recurrent states read pads on the left as tokens, or cannot be padded: their rows are compared one by one.
RECURRENT = {"mamba", "rwkv", "mamba2", "jamba", "bamba", "recurrent_gemma", "lfm2", "qwen3_next"}


# Their masks become NaN in fp64 once a row is padded.
FP32 = {"gemma2", "bloom", "mpt"}


def tiny(name: str) -> PreTrainedModel:
    """A random causal model of the family without dropout, in fp64 if it can, so that equal means equal to 1e-5
    (many families compute their norms in fp32 whatever the dtype)."""
    dtype = torch.float32 if name in FP32 else torch.float64
    torch.manual_seed(0)
    settings = {**_SIZES, **CAUSAL[name]}
    if name == "falcon":
        del settings["head_dim"]
    config = CONFIG_MAPPING[name](**settings)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    # torch's grouped matmul has no fp64
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    torch.manual_seed(1)
    with torch.no_grad():  # the usual initialisation leaves the tokens nearly indistinguishable
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()
