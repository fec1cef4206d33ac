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
}

PROMPT_LENGTHS = (21, 3, 17, 1, 9)
NEW_TOKENS = 64
EOS = 2
