"""The demo's model: a small Qwen3-MoE, and the files that stand beside its weights."""

import json
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxmoe.models import Decoder, Origin, read_model_config
from scripts._train.corpus import END_OF_TEXT

# 6.7 million parameters, of which a token uses 1.5. No two sizes are equal or twice one another where a transposed
# weight could then pass for a right one.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "dtype": "float32",
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 448,
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 112,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.01,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 2048,
}


def write_side_files(directory: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write what a checkpoint has beside its weights; `jaxmoe.save` copies it from there."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    contents = {
        "config.json": config,
        "generation_config.json": {
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": config["pad_token_id"],
            "transformers_version": config["transformers_version"],
        },
        "tokenizer_config.json": {
            "backend": "tokenizers",
            "bos_token": None,
            "eos_token": END_OF_TEXT,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "TokenizersBackend",
        },
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_model(directory: Path, mesh: Mesh, *, seed: int, expert_axes: tuple[str, ...], dispatch: str) -> Decoder:
    """A float32 model with random weights on the mesh, of the config.json in `directory`."""
    _, config = read_model_config(directory)
    return Decoder(
        config,
        mesh=mesh,
        expert_axes=expert_axes,
        dispatch=dispatch,
        rngs=nnx.Rngs(seed),
        origin=Origin(directory),
    )
