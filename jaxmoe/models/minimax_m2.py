"""MiniMax-M2: query/key norms over all heads together, partial rotation, sigmoid router with a correction bias."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig, RouterConfig, pick, read_common
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.rotary import read_rope, rope_settings


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a minimax_m2 checkpoint.

    Raises:
        ValueError: a setting that the family's released models do not use.
    """
    # The released files carry these; transformers reads none of them and so writes none.
    for name, only in (("scoring_func", "sigmoid"), ("use_qk_norm", True), ("qk_norm_type", "per_layer")):
        if pick(config, name, default=only) != only:
            raise ValueError(f"minimax_m2 is known with {name}={only!r} alone; config.json gives {config[name]!r}")
    if pick(config, "shared_intermediate_size", default=0):
        raise ValueError("minimax_m2 is known without shared experts; config.json gives shared_intermediate_size")
    if any(kind != 1 for kind in pick(config, "attn_type_list", default=[])):
        raise ValueError(
            "minimax_m2 is known with softmax attention alone (1); config.json gives attn_type_list with 0"
        )
    hidden = pick(config, "hidden_size")
    heads = pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=hidden // heads)
    rope = rope_settings(config)
    if rope.get("partial_rotary_factor") is None:
        rope["partial_rotary_factor"] = pick(config, "rotary_dim", default=head_dim) / head_dim
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=pick(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            rope=read_rope(config, head_dim=head_dim, default_theta=5e6, partial=True, rope=rope),
            qk_norm="full",
        ),
        feed_forward=MoEConfig(
            num_experts=pick(config, "num_local_experts", "num_experts"),
            num_experts_per_tok=pick(config, "num_experts_per_tok"),
            hidden_size=hidden,
            moe_intermediate_size=pick(config, "intermediate_size"),
            activation=pick(config, "hidden_act", default="silu"),
            router=RouterConfig(
                score="sigmoid", correction_bias=pick(config, "use_routing_bias", default=True), renormalize=True
            ),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        layers=(layer,) * pick(config, "num_hidden_layers"),
    )


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    read_config=read_config,
    # transformers 5 names the block "mlp" where it writes the experts fused.
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": (
                "model.layers.{layer}.block_sparse_moe.gate.weight",
                "model.layers.{layer}.mlp.gate.weight",
            ),
            "layers.{layer}.moe.correction_bias": (
                "model.layers.{layer}.block_sparse_moe.e_score_correction_bias",
                "model.layers.{layer}.mlp.e_score_correction_bias",
            ),
        }
    ),
    experts=ExpertTensors(
        gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        fused_down="model.layers.{layer}.mlp.experts.down_proj",
    ),
    ignored=ROTARY_BUFFERS,
    spellings=((".mlp.", ".block_sparse_moe."),),
)
