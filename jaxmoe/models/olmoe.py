"""OLMoE: query/key norms over all heads together, clipped projections, every layer sparse."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, QueryKeyNorm, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.models.readers import read_attention, read_biases, read_moe


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of an olmoe checkpoint."""
    layer = LayerConfig(
        attention=read_attention(
            config,
            default_theta=10000.0,
            qk_norm=QueryKeyNorm(over="full"),
            biases=read_biases(config),
            clip=pick(config, "clip_qkv", default=None),
        ),
        feed_forward=read_moe(
            config,
            "num_experts",
            "num_local_experts",
            width="intermediate_size",
            router=RouterConfig(score="softmax", renormalize=pick(config, "norm_topk_prob", default=False)),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=(layer,) * pick(config, "num_hidden_layers"),
    )


OLMOE = Family(
    model_type="olmoe",
    read_config=read_config,
    tensors=llama_tensors({"layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",)}),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
