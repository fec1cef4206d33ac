"""Mixtral: softmax router that always renormalizes, every layer sparse."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, RouterConfig, pick, read_common
from jaxmoe.models.family import BLOCK_SPARSE_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.models.readers import read_attention, read_moe, read_window


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a mixtral checkpoint."""
    layer = LayerConfig(
        attention=read_attention(config, default_theta=1e6, mask=read_window(config, default=None)),
        feed_forward=read_moe(
            config,
            "num_local_experts",
            "num_experts",
            width="intermediate_size",
            router=RouterConfig(score="softmax", renormalize=True),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=(layer,) * pick(config, "num_hidden_layers"),
    )


MIXTRAL = Family(
    model_type="mixtral",
    read_config=read_config,
    # transformers 5 names the block "mlp" where it writes the experts fused.
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": (
                "model.layers.{layer}.block_sparse_moe.gate.weight",
                "model.layers.{layer}.mlp.gate.weight",
            ),
        }
    ),
    experts=BLOCK_SPARSE_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
