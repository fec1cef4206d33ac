"""Qwen3-MoE: per-head query/key norms, softmax router, dense layers where the config says so."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, QueryKeyNorm, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import (
    make_layers,
    read_attention,
    read_biases,
    read_mlp,
    read_moe,
    read_window,
    sparse_by_step,
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a qwen3_moe checkpoint."""
    attention = read_attention(
        config,
        default_theta=10000.0,
        qk_norm=QueryKeyNorm(),
        biases=read_biases(config),
        mask=read_window(config, default=4096) if config.get("use_sliding_window") else None,
    )
    moe = read_moe(
        config,
        "num_experts",
        "num_local_experts",
        router=RouterConfig(score="softmax", renormalize=pick(config, "norm_topk_prob", default=False)),
    )
    dense = read_mlp(config, pick(config, "intermediate_size"))
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6), layers=make_layers(attention, sparse_by_step(config), moe, dense)
    )


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
