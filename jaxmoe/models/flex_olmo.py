"""FlexOlmo: OLMoE's experts, with norms behind each part of a layer and none before it."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, QueryKeyNorm, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.models.readers import read_attention, read_biases, read_moe


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a flex_olmo checkpoint."""
    layer = LayerConfig(
        attention=read_attention(
            config, default_theta=500000.0, qk_norm=QueryKeyNorm(over="full"), biases=read_biases(config)
        ),
        feed_forward=read_moe(
            {"num_experts_per_tok": 5, **config},
            "num_experts",
            "num_local_experts",
            width="intermediate_size",
            router=RouterConfig(score="softmax", renormalize=pick(config, "norm_topk_prob", default=False)),
        ),
        pre_norms=False,
        post_norms=True,
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        norm="rms_float32",
        layers=(layer,) * pick(config, "num_hidden_layers"),
    )


_LAYER = "model.layers.{layer}"

FLEX_OLMO = Family(
    model_type="flex_olmo",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.attention_post_norm.weight": (f"{_LAYER}.post_attention_layernorm.weight",),
            "layers.{layer}.feed_forward_post_norm.weight": (f"{_LAYER}.post_feedforward_layernorm.weight",),
            "layers.{layer}.moe.w_router": (f"{_LAYER}.mlp.gate.weight",),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
