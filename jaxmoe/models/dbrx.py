"""DBRX: queries, keys and values in one clipped projection, norms of mean and variance, weights by a p-norm."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig, RouterConfig, pick, read_dtype
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family
from jaxmoe.rotary import read_rope, rope_settings

# torch's default, which the config cannot change.
_NORM_EPS = 1e-5


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a dbrx checkpoint."""
    hidden = pick(config, "d_model", "hidden_size", default=2048)
    heads = pick(config, "n_heads", "num_attention_heads", default=16)
    attention: Mapping[str, Any] = pick(config, "attn_config", default={})
    feed_forward: Mapping[str, Any] = pick(config, "ffn_config", default={})
    # Older files have theta beside the other settings of the attention.
    rope = {"rope_theta": attention.get("rope_theta"), **rope_settings(config)}
    # null turns the division off, which a missing setting does not.
    p_norm = feed_forward.get("moe_normalize_expert_weights", 1.0)
    activation: Mapping[str, Any] = pick(feed_forward, "ffn_act_fn", default={})
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=pick(attention, "kv_n_heads", default=1),
            head_dim=hidden // heads,
            rope=read_rope(config, head_dim=hidden // heads, default_theta=10000.0, rope=rope),
            clip=pick(attention, "clip_qkv", default=None),
        ),
        feed_forward=MoEConfig(
            num_experts=pick(feed_forward, "moe_num_experts", default=4),
            num_experts_per_tok=pick(feed_forward, "moe_top_k", default=1),
            hidden_size=hidden,
            moe_intermediate_size=pick(feed_forward, "ffn_hidden_size", default=3584),
            activation=pick(activation, "name", default="silu"),
            router=RouterConfig(score="softmax", renormalize=False, p_norm=p_norm),
        ),
    )
    return DecoderConfig(
        model_type=config["model_type"],
        vocab_size=pick(config, "vocab_size"),
        hidden_size=hidden,
        layers=(layer,) * pick(config, "n_layers", "num_hidden_layers", default=24),
        norm="layer_without_bias",
        norm_eps=_NORM_EPS,
        tie_word_embeddings=pick(config, "tie_word_embeddings", default=False),
        max_position_embeddings=pick(config, "max_seq_len", "max_position_embeddings", default=2048),
        dtype=read_dtype(config),
    )


_BLOCK = "transformer.blocks.{layer}"
_ATTENTION = f"{_BLOCK}.norm_attn_norm"
_EXPERTS = f"{_BLOCK}.ffn.experts.mlp"

DBRX = Family(
    model_type="dbrx",
    read_config=read_config,
    tensors={
        "embed.weight": ("transformer.wte.weight",),
        "layers.{layer}.attention_norm.weight": (f"{_ATTENTION}.norm_1.weight",),
        "layers.{layer}.attention.w_q": (f"{_ATTENTION}.attn.Wqkv.weight",),
        "layers.{layer}.attention.w_k": (f"{_ATTENTION}.attn.Wqkv.weight",),
        "layers.{layer}.attention.w_v": (f"{_ATTENTION}.attn.Wqkv.weight",),
        "layers.{layer}.attention.w_o": (f"{_ATTENTION}.attn.out_proj.weight",),
        "layers.{layer}.feed_forward_norm.weight": (f"{_ATTENTION}.norm_2.weight",),
        "layers.{layer}.moe.w_router": (f"{_BLOCK}.ffn.router.layer.weight",),
        "norm.weight": ("transformer.norm_f.weight",),
        "lm_head.weight": ("lm_head.weight",),
    },
    experts=ExpertTensors(
        fused_gate=f"{_EXPERTS}.w1",
        fused_up=f"{_EXPERTS}.v1",
        fused_down=f"{_EXPERTS}.w2",
        fused_layout="stacked_rows",
    ),
    ignored=ROTARY_BUFFERS,
)
