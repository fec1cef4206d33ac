"""Jamba: Mamba layers with an attention layer now and then, and routed experts in every other layer."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MambaConfig,
    MoEConfig,
    RouterConfig,
    pick,
    read_common,
)
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import read_heads, read_mlp


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a jamba checkpoint."""
    activation = pick(config, "hidden_act", default="silu")
    # Mamba layers tell positions apart: attention has no position embedding.
    attention = AttentionConfig(**read_heads(config), rope=None)
    mamba = _read_mamba(config, activation)
    width, experts = pick(config, "intermediate_size"), pick(config, "num_experts", "num_local_experts", default=16)
    dense = read_mlp(config, width)
    moe = MoEConfig(
        num_experts=experts,
        # The other setting's default is not looked at where there is nothing to choose.
        num_experts_per_tok=pick(config, "num_experts_per_tok", default=2) if experts > 1 else 1,
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=width,
        activation=activation,
        router=RouterConfig(score="softmax", renormalize=False),
    )

    def once_in(period: str, offset: str, defaults: tuple[int, int], layer: int) -> bool:
        every, first = pick(config, period, default=defaults[0]), pick(config, offset, default=defaults[1])
        return bool(layer % every == first)

    def one_layer(i: int) -> LayerConfig:
        # A single expert is a dense MLP, without a router.
        sparse = experts > 1 and once_in("expert_layer_period", "expert_layer_offset", (2, 1), i)
        attends = once_in("attn_layer_period", "attn_layer_offset", (8, 4), i)
        return LayerConfig(attention=attention if attends else mamba, feed_forward=moe if sparse else dense)

    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        layers=tuple(one_layer(i) for i in range(pick(config, "num_hidden_layers"))),
    )


def _read_mamba(config: Mapping[str, Any], activation: str) -> MambaConfig:
    hidden, dt_rank = pick(config, "hidden_size"), config.get("mamba_dt_rank", "auto")
    return MambaConfig(
        num_channels=pick(config, "mamba_expand", default=2) * hidden,
        state_size=pick(config, "mamba_d_state", default=16),
        dt_rank=-(-hidden // 16) if dt_rank == "auto" else dt_rank,
        conv_kernel_size=pick(config, "mamba_d_conv", default=4),
        activation=activation,
        conv_bias=pick(config, "mamba_conv_bias", default=True),
        bias=pick(config, "mamba_proj_bias", default=False),
    )


_LAYER = "model.layers.{layer}"
_MAMBA = f"{_LAYER}.mamba"

# The projection in is one tensor, x before z.
_MAMBA_TENSORS = {
    "w_in_x": "in_proj.weight",
    "w_in_z": "in_proj.weight",
    "b_in_x": "in_proj.bias",
    "b_in_z": "in_proj.bias",
    "conv": "conv1d.weight",
    "b_conv": "conv1d.bias",
    "w_dt_b_c": "x_proj.weight",
    "dt_norm": "dt_layernorm.weight",
    "b_norm": "b_layernorm.weight",
    "c_norm": "c_layernorm.weight",
    "w_dt": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "a_log": "A_log",
    "skip": "D",
    "w_out": "out_proj.weight",
    "b_out": "out_proj.bias",
}

JAMBA = Family(
    model_type="jamba",
    read_config=read_config,
    tensors={
        **llama_tensors(
            {
                "layers.{layer}.moe.w_router": (f"{_LAYER}.feed_forward.router.weight",),
                **mlp_tensors("mlp", "feed_forward"),
            }
        ),
        **{f"layers.{{layer}}.attention.{path}": (f"{_MAMBA}.{name}",) for path, name in _MAMBA_TENSORS.items()},
        "layers.{layer}.feed_forward_norm.weight": (f"{_LAYER}.pre_ff_layernorm.weight",),
        "norm.weight": ("model.final_layernorm.weight",),
    },
    experts=ExpertTensors(
        gate=f"{_LAYER}.feed_forward.experts.{{expert}}.gate_proj.weight",
        up=f"{_LAYER}.feed_forward.experts.{{expert}}.up_proj.weight",
        down=f"{_LAYER}.feed_forward.experts.{{expert}}.down_proj.weight",
        fused_gate_up=f"{_LAYER}.feed_forward.experts.gate_up_proj",
        fused_down=f"{_LAYER}.feed_forward.experts.down_proj",
    ),
    ignored=ROTARY_BUFFERS,
)
