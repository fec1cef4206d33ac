"""GLM-4.5: sigmoid router with a correction bias, shared experts, rotation of half of each head, dense first layers."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
    RouterConfig,
    pick,
    read_common,
)
from jaxmoe.models.family import MLP_EXPERTS, MTP_LAYERS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.rotary import read_rope, rope_settings


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a glm4_moe checkpoint."""
    hidden, heads = pick(config, "hidden_size"), pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=hidden // heads)
    activation = pick(config, "hidden_act", default="silu")
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=pick(config, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        rope=read_rope(
            config,
            head_dim=head_dim,
            default_theta=10000.0,
            partial=True,
            rope={"partial_rotary_factor": 0.5, **rope_settings(config)},
        ),
        qk_norm="head" if pick(config, "use_qk_norm", default=False) else None,
        bias=pick(config, "attention_bias", default=False),
    )
    width, shared = pick(config, "moe_intermediate_size"), pick(config, "n_shared_experts", default=1)
    moe = MoEConfig(
        num_experts=pick(config, "n_routed_experts", "num_experts", "num_local_experts"),
        num_experts_per_tok=pick(config, "num_experts_per_tok"),
        hidden_size=hidden,
        moe_intermediate_size=width,
        activation=activation,
        router=RouterConfig(
            score="sigmoid",
            correction_bias=True,
            num_groups=pick(config, "n_group", default=1),
            topk_groups=pick(config, "topk_group", default=1),
            group_score="top2_sum",
            renormalize=pick(config, "norm_topk_prob", default=True),
            sum_epsilon=1e-20,
            scale=float(pick(config, "routed_scaling_factor", default=1.0)),
        ),
        shared=MLPConfig(hidden_size=hidden, intermediate_size=width * shared, activation=activation),
    )
    dense = MLPConfig(hidden_size=hidden, intermediate_size=pick(config, "intermediate_size"), activation=activation)
    first_sparse = pick(config, "first_k_dense_replace", default=1)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=tuple(
            LayerConfig(attention=attention, feed_forward=moe if i >= first_sparse else dense)
            for i in range(pick(config, "num_hidden_layers"))
        ),
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=1),
    )


GLM4_MOE = Family(
    model_type="glm4_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            "layers.{layer}.moe.correction_bias": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            **mlp_tensors("moe.shared", "mlp.shared_experts"),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
)
