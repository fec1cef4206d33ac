"""MiniMax-M2: query/key norms over all heads together, partial rotation, sigmoid router with a correction bias."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, QueryKeyNorm, RouterConfig, pick, read_common
from jaxmoe.models.family import BLOCK_SPARSE_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.models.readers import check_known, read_attention, read_heads, read_moe
from jaxmoe.rotary import rope_settings


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a minimax_m2 checkpoint.

    Raises:
        ValueError: a setting that the family's released models do not use.
    """
    # The released files carry these; transformers reads none of them and so writes none.
    check_known(config, scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer")
    if pick(config, "shared_intermediate_size", default=0):
        raise ValueError("minimax_m2 is known without shared experts; config.json gives shared_intermediate_size")
    if any(kind != 1 for kind in pick(config, "attn_type_list", default=[])):
        raise ValueError(
            "minimax_m2 is known with softmax attention alone (1); config.json gives attn_type_list with 0"
        )
    rope = rope_settings(config)
    head_dim = read_heads(config)["head_dim"]
    part, rotating = rope.get("partial_rotary_factor"), pick(config, "rotary_dim", default=None)
    if part is None:
        rope["partial_rotary_factor"] = (head_dim if rotating is None else pick(config, "rotary_dim")) / head_dim
    elif rotating is not None and isinstance(part, int | float) and rotating != part * head_dim:
        raise ValueError(
            f"config.json says one thing once; it has partial_rotary_factor={part} of heads of {head_dim} dims and "
            f"rotary_dim={rotating}, which differ; remove the one that is not meant"
        )
    layer = LayerConfig(
        attention=read_attention(config, default_theta=5e6, partial=True, rope=rope, qk_norm=QueryKeyNorm(over="full")),
        feed_forward=read_moe(
            config,
            "num_local_experts",
            "num_experts",
            width="intermediate_size",
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
    experts=BLOCK_SPARSE_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
