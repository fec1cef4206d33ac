"""Qwen3-Next: gated delta nets with a gated attention layer now and then, a shared expert behind a gate of its own."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    GatedDeltaNetConfig,
    LayerConfig,
    QueryKeyNorm,
    TokenMixerConfig,
    pick,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import (
    MLP_EXPERTS,
    MTP_RULE,
    ROTARY_BUFFERS,
    Family,
    MTPTensors,
    llama_tensors,
    mlp_tensors,
)
from jaxmoe.models.readers import (
    check_known,
    make_layers,
    read_biases,
    read_mlp,
    read_moe_with_gated_expert,
    sparse_by_step,
)
from jaxmoe.rotary import read_rope, rope_settings


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a qwen3_next checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for a kind of layer that is not known here.
    """
    moe = read_moe_with_gated_expert(config, renormalize=pick(config, "norm_topk_prob", default=True))
    sparse = sparse_by_step(config)
    # Released models have no dense layer, and no width for one either.
    dense = None if all(sparse) else read_mlp(config, pick(config, "intermediate_size"))
    mixers = read_token_mixers(config, fused_projections=True)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6), norm="rms_zero_centered", layers=make_layers(mixers, sparse, moe, dense)
    )


def read_token_mixers(config: Mapping[str, Any], *, fused_projections: bool) -> list[TokenMixerConfig]:
    """Every layer's attention or gated delta net; see `GatedDeltaNetConfig` for `fused_projections`.

    Raises:
        ValueError: ``layer_types`` names another kind.
    """
    kinds: dict[str, TokenMixerConfig] = {
        "full_attention": read_gated_attention(config, rotary_part=0.25),
        "linear_attention": read_delta_net(config, fused_projections=fused_projections),
    }
    interval, count = pick(config, "full_attention_interval", default=4), pick(config, "num_hidden_layers")
    usual = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    return [kinds[name] for name in pick_layer_types(config, usual, *kinds)]


def read_gated_attention(config: Mapping[str, Any], *, rotary_part: float) -> AttentionConfig:
    """Read attention with a gate for each head, which rotates `rotary_part` of a head where config.json says nothing."""
    head_dim = pick(config, "head_dim", default=256)
    return AttentionConfig(
        num_heads=pick(config, "num_attention_heads"),
        num_kv_heads=pick(config, "num_key_value_heads"),
        head_dim=head_dim,
        # Settings of three-dimensional positions are about images: all three of a text token are the same.
        rope=read_rope(
            config,
            head_dim=head_dim,
            default_theta=10000.0,
            partial=True,
            rope={"partial_rotary_factor": rotary_part, **rope_settings(config)},
        ),
        qk_norm=QueryKeyNorm(weight="zero_centered"),
        biases=read_biases(config),
        output_gate=True,
    )


def read_delta_net(config: Mapping[str, Any], *, fused_projections: bool) -> GatedDeltaNetConfig:
    """Read a gated delta net; see `GatedDeltaNetConfig` for `fused_projections`."""
    return GatedDeltaNetConfig(
        num_key_heads=pick(config, "linear_num_key_heads"),
        num_value_heads=pick(config, "linear_num_value_heads"),
        key_head_dim=pick(config, "linear_key_head_dim"),
        value_head_dim=pick(config, "linear_value_head_dim"),
        conv_kernel_size=pick(config, "linear_conv_kernel_dim", default=4),
        activation=pick(config, "hidden_act", default="silu"),
        fused_projections=fused_projections,
    )


_DELTA_NET = "model.layers.{layer}.linear_attn"

# What the gated delta nets of this family and of those that follow it have in common.
DELTA_NET_TENSORS = {
    # The convolution's channels are the queries', the keys' and the values', in one tensor.
    **{f"layers.{{layer}}.attention.conv_{part}": (f"{_DELTA_NET}.conv1d.weight",) for part in "qkv"},
    "layers.{layer}.attention.a_log": (f"{_DELTA_NET}.A_log",),
    "layers.{layer}.attention.dt_bias": (f"{_DELTA_NET}.dt_bias",),
    "layers.{layer}.attention.out_norm": (f"{_DELTA_NET}.norm.weight",),
    "layers.{layer}.attention.w_out": (f"{_DELTA_NET}.out_proj.weight",),
}

MOE_TENSORS = {
    "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
    "layers.{layer}.moe.w_shared_gate": ("model.layers.{layer}.mlp.shared_expert_gate.weight",),
    **mlp_tensors("moe.shared", "mlp.shared_expert"),
}

IGNORED = {**ROTARY_BUFFERS, MTP_RULE: r"mtp\..*"}


def make_prediction_tensors(*, renormalize: bool | None = None) -> MTPTensors:
    """Make the part for multi-token prediction: a layer with full attention and routed experts, whatever the model has.

    Args:
        renormalize: whether the weights of a token's experts add up to one; None for what config.json says.
    """

    def layers(config: Mapping[str, Any], decoder: DecoderConfig) -> list[LayerConfig]:
        check_known(config, mtp_use_dedicated_embeddings=False)
        count = pick(config, "mtp_num_hidden_layers", "num_nextn_predict_layers", default=1)
        if count not in (0, 1):
            raise ValueError(f"released models have one layer for multi-token prediction; config.json asks for {count}")
        one = {**config, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
        [attention] = read_token_mixers(one, fused_projections=True)
        weights_add_up = pick(config, "norm_topk_prob", default=True) if renormalize is None else renormalize
        moe = read_moe_with_gated_expert(config, renormalize=weights_add_up)
        return [LayerConfig(attention=attention, feed_forward=moe)] * count

    return MTPTensors(
        layers=layers,
        layer="mtp.layers.{mtp}",
        tensors={
            "layers.{layer}.prediction.embed_norm.weight": ("mtp.pre_fc_norm_embedding.weight",),
            "layers.{layer}.prediction.hidden_norm.weight": ("mtp.pre_fc_norm_hidden.weight",),
            "layers.{layer}.prediction.w_in": ("mtp.fc.weight",),
            "layers.{layer}.prediction.out_norm.weight": ("mtp.norm.weight",),
        },
        passes="normed",
    )


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.attention.w_in_qkvz": (f"{_DELTA_NET}.in_proj_qkvz.weight",),
            "layers.{layer}.attention.w_in_ba": (f"{_DELTA_NET}.in_proj_ba.weight",),
            **DELTA_NET_TENSORS,
            **MOE_TENSORS,
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=IGNORED,
    mtp=make_prediction_tensors(),
)
