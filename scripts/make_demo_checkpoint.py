"""Writes the checkpoint that scripts/demo loads: a small Qwen3-MoE with random weights, and a tokenizer for it.

The layout is the one ``transformers`` writes: config.json in the spelling of version 5, one file of safetensors, one
tensor per expert and projection. The tokenizer is a byte-level BPE trained on the source text of the Python standard
library. The same seed and the same Python give the same bytes.

    python scripts/make_demo_checkpoint.py            # writes demo/
    python scripts/make_demo_checkpoint.py --out /tmp/other --seed 1
"""

import argparse
import json
import os
import sysconfig
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, _, END_OF_MESSAGE = range(3)

# No two of these sizes are equal or twice one another where a transposed weight could then pass for a right one.
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": END_OF_TEXT,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": END_OF_TEXT,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 2048,
}

GENERATION_CONFIG = {
    "eos_token_id": [END_OF_TEXT, END_OF_MESSAGE],
    "pad_token_id": END_OF_TEXT,
    "transformers_version": "5.23.0",
}

TOKENIZER_CONFIG = {
    "backend": "tokenizers",
    "bos_token": None,
    "eos_token": SPECIAL_TOKENS[END_OF_TEXT],
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
    "tokenizer_class": "TokenizersBackend",
}

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def main() -> None:
    """Writes every file of the checkpoint and prints their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="the folder to write (default: demo/)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(CONFIG["vocab_size"]).save(str(args.out / "tokenizer.json"), pretty=False)
    save_file(make_weights(CONFIG, args.seed), args.out / "model.safetensors", metadata={"format": "pt"})
    for name, content in [
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ]:
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n")
    (args.out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:>9,d}  {path.name}")


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` tokens from the standard library's source text."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one order of counting, so one result
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(standard_library_sources(), trainer)
    return tokenizer


def standard_library_sources() -> list[str]:
    """The text of every module at the top of the standard library, in the order of their names."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    # _sysconfigdata_*.py is written where Python is built and holds that machine's paths.
    return [path.read_text(encoding="utf-8") for path in paths if not path.name.startswith("_sysconfigdata")]


def make_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random bfloat16 weights under the names, and in the (out, in) orientation, of a torch Qwen3-MoE checkpoint."""
    rng = np.random.default_rng(seed)
    width, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    experts, expert_width = config["num_local_experts"], config["moe_intermediate_size"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(ml_dtypes.bfloat16)

    def scale(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(ml_dtypes.bfloat16)

    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], width),
        "model.norm.weight": scale(width),
        "lm_head.weight": matrix(config["vocab_size"], width),
    }
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": scale(width),
            "self_attn.q_proj": matrix(queries, width),
            "self_attn.k_proj": matrix(keys, width),
            "self_attn.v_proj": matrix(keys, width),
            "self_attn.o_proj": matrix(width, queries),
            "self_attn.q_norm": scale(head),
            "self_attn.k_norm": scale(head),
            "post_attention_layernorm": scale(width),
            "mlp.gate": matrix(experts, width),
        }
        for expert in range(experts):
            parts[f"mlp.experts.{expert}.gate_proj"] = matrix(expert_width, width)
            parts[f"mlp.experts.{expert}.up_proj"] = matrix(expert_width, width)
            parts[f"mlp.experts.{expert}.down_proj"] = matrix(width, expert_width)
        weights |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    return weights


if __name__ == "__main__":
    main()
