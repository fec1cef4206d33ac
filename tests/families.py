"""A tiny model of every family, as arguments of its transformers config.

Sizes are chosen to catch mistakes: 11 experts (10 sorts after 9, and nothing divides), widths
that tell layouts apart, fewer key/value heads than the widest tp.
"""

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **SMALL,
        "head_dim": 8,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "mixtral": {
        **SMALL,
        "intermediate_size": 24,
        "num_local_experts": 11,
        "num_experts_per_tok": 2,
    },
    "glm4_moe": {
        **SMALL,
        "head_dim": 8,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "qwen2_moe": {
        **SMALL,
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 56,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "olmoe": {
        **SMALL,
        "intermediate_size": 24,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "clip_qkv": 1.5,
    },
    "granitemoe": {
        **SMALL,
        "intermediate_size": 24,
        "num_local_experts": 11,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
    },
    "ernie4_5_moe": {
        **SMALL,
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "moe_num_experts": 11,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "use_bias": True,
    },
    "minimax_m2": {
        **SMALL,
        "head_dim": 8,
        "rotary_dim": 4,
        "intermediate_size": 24,
        "num_local_experts": 11,
        "num_experts_per_tok": 3,
    },
    "hunyuan_v1_moe": {
        **SMALL,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_experts": 11,
        "moe_topk": [3, 2],
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
    },
    "gpt_oss": {
        **SMALL,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 11,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
        "swiglu_limit": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "dbrx": {
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 8,
        "max_seq_len": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 500000.0},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 11,
            "moe_top_k": 3,
            "moe_normalize_expert_weights": 2.0,
        },
    },
    "llama4_text": {
        **SMALL,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_local_experts": 11,
        "num_experts_per_tok": 2,
        "moe_layers": [0, 2],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "attn_scale": 0.5,
    },
    "phimoe": {
        **SMALL,
        "intermediate_size": 24,
        "num_local_experts": 11,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.2,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.25],
            "long_factor": [1.5, 8.0],
            "short_mscale": 1.2,
            "long_mscale": 1.4,
            "original_max_position_embeddings": 96,
        },
    },
}

PROMPT_LENGTHS = (21, 3, 17, 1, 9)
NEW_TOKENS = 64
EOS = 2

# Tested on every mesh; the others on enough of them to cover each axis and placement.
ON_EVERY_MESH = ("qwen3_moe", "mixtral")
