"""Hunyuan MoE V1: query/key norms after the rotation, shared experts, some settings one value for each layer."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, MoEConfig, QueryKeyNorm, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import read_attention, read_biases, read_mlp


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a hunyuan_v1_moe checkpoint.

    Raises:
        ValueError: keys and values shared across layers, or dense layers before the sparse ones.
    """
    if config.get("use_cla") and pick(config, "cla_share_factor", default=1) > 1:
        raise ValueError(
            f"every layer has keys and values of its own; config.json shares those of a layer with the next ones "
            f"(use_cla with cla_share_factor={config['cla_share_factor']})"
        )
    if pick(config, "moe_layer_num_skipped", default=0):
        raise ValueError(
            f"every layer is sparse; config.json makes the first ones dense "
            f"(moe_layer_num_skipped={config['moe_layer_num_skipped']})"
        )
    attention = read_attention(
        config,
        default_theta=10000.0,
        head_dim_names=("head_dim", "attention_head_dim"),
        qk_norm=QueryKeyNorm(after_rope=True) if pick(config, "use_qk_norm", default=True) else None,
        biases=read_biases(config),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=tuple(
            LayerConfig(attention=attention, feed_forward=_read_moe(config, layer))
            for layer in range(pick(config, "num_hidden_layers"))
        ),
    )


def _read_moe(config: Mapping[str, Any], layer: int) -> MoEConfig:
    width = pick(config, "intermediate_size")

    def of_layer(*names: str, **default: int) -> int:
        lists = {name: config[name] for name in names if isinstance(config.get(name), list)}
        if any(len(values) <= layer for values in lists.values()):
            raise ValueError(f"a list in config.json has a value for each layer; got {lists}")
        size: int = pick({**config, **{name: values[layer] for name, values in lists.items()}}, *names, **default)
        return size

    shared = of_layer("num_shared_expert", default=1) if pick(config, "use_mixed_mlp_moe", default=True) else 0
    return MoEConfig(
        num_experts=of_layer("num_experts", "num_local_experts"),
        num_experts_per_tok=of_layer("moe_topk", "num_experts_per_tok"),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=of_layer("moe_intermediate_size", default=width),
        activation=pick(config, "hidden_act", default="silu"),
        router=RouterConfig(score="softmax", renormalize=True),
        shared=read_mlp(config, width * shared) if shared else None,
    )


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.attention.q_norm": ("model.layers.{layer}.self_attn.query_layernorm.weight",),
            "layers.{layer}.attention.k_norm": ("model.layers.{layer}.self_attn.key_layernorm.weight",),
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.wg.weight",),
            **mlp_tensors("moe.shared", "mlp.shared_mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
