"""AFMoE (Arcee Trinity): gated attention, norms around each part, a sigmoid router with a bias for the choice.

Layers with a window have positions, and every fourth or so sees everything without any.
"""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import AttentionConfig, DecoderConfig, LayerConfig, QueryKeyNorm, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import check_known, read_attention, read_biases, read_mlp, read_moe, rotate_in_windows


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of an afmoe checkpoint.

    Raises:
        ValueError: a setting that the family's released models do not use.
    """
    # The released files carry these; transformers reads none of them.
    check_known(
        config,
        score_func="sigmoid",
        route_norm=True,
        n_group=1,
        topk_group=1,
        num_expert_groups=1,
        num_limited_groups=1,
    )
    shared_width = pick(config, "moe_intermediate_size") * pick(config, "num_shared_experts", default=2)
    moe = read_moe(
        config,
        "num_experts",
        "num_local_experts",
        router=RouterConfig(
            score="sigmoid",
            correction_bias=True,
            sum_epsilon=1e-20,
            scale=float(pick(config, "route_scale", default=1.0)),
        ),
        shared=read_mlp(config, shared_width),
    )
    dense = read_mlp(config, pick(config, "intermediate_size"))
    first_sparse = pick(config, "num_dense_layers", default=1)
    common = read_common(config, norm_eps=1e-5)
    return DecoderConfig(
        **common,
        norm="rms_float32",
        embedding_multiplier=common["hidden_size"] ** 0.5 if pick(config, "mup_enabled", default=False) else 1.0,
        layers=tuple(
            LayerConfig(attention=attention, feed_forward=moe if i >= first_sparse else dense, post_norms=True)
            for i, attention in enumerate(_read_attention(config, pick(config, "num_hidden_layers")))
        ),
    )


def _read_attention(config: Mapping[str, Any], count: int) -> list[AttentionConfig]:
    """The attention of each layer."""
    every = pick(config, "global_attn_every_n_layers", default=4)
    return rotate_in_windows(
        config,
        read_attention(
            {"head_dim": 128, **config},
            default_theta=10000.0,
            qk_norm=QueryKeyNorm(),
            biases=read_biases(config),
            output_gate=True,
            gate_projection=True,
        ),
        window=1024,
        usual=["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)],
    )


_LAYER = "model.layers.{layer}"

AFMOE = Family(
    model_type="afmoe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.attention.w_gate": (f"{_LAYER}.self_attn.gate_proj.weight",),
            "layers.{layer}.attention_post_norm.weight": (f"{_LAYER}.post_attention_layernorm.weight",),
            "layers.{layer}.feed_forward_norm.weight": (f"{_LAYER}.pre_mlp_layernorm.weight",),
            "layers.{layer}.feed_forward_post_norm.weight": (f"{_LAYER}.post_mlp_layernorm.weight",),
            "layers.{layer}.moe.w_router": (f"{_LAYER}.mlp.router.gate.weight",),
            "layers.{layer}.moe.correction_bias": (f"{_LAYER}.mlp.expert_bias",),
            **mlp_tensors("moe.shared", "mlp.shared_experts"),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
