"""Hy3 (Tencent): a norm of each head's queries and keys, a sigmoid router with a bias for the choice, a shared expert."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, QueryKeyNorm, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, MTP_LAYERS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import (
    check_known,
    make_layers,
    read_attention,
    read_biases,
    read_mlp,
    read_moe,
    sparse_from,
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a hy_v3 checkpoint.

    Raises:
        ValueError: a setting that the family's released models do not use.
    """
    # The released files carry these; transformers reads none of them.
    check_known(config, qk_norm=True, route_norm=True, moe_router_use_sigmoid=True, moe_router_enable_expert_bias=True)
    bias = pick(config, "mlp_bias", default=False)
    shared_width = pick(config, "moe_intermediate_size") * pick(config, "num_shared_experts", default=1)
    moe = read_moe(
        config,
        "num_experts",
        "num_local_experts",
        router=RouterConfig(
            score="sigmoid",
            correction_bias=True,
            sum_epsilon=1e-20,
            scale=float(pick(config, "router_scaling_factor", default=2.826)),
        ),
        shared=read_mlp(config, shared_width, bias=bias),
    )
    attention = read_attention(
        {"head_dim": 128, **config},
        default_theta=11158840.0,
        qk_norm=QueryKeyNorm(),
        biases=read_biases(config),
    )
    dense = read_mlp(config, pick(config, "intermediate_size"), bias=bias)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=make_layers(attention, sparse_from(config, first=1), moe, dense),
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=1),
    )


_MLP = "model.layers.{layer}.mlp"
_SHARED, _SHARED_FUSED = (mlp_tensors("moe.shared", f"mlp.{module}") for module in ("shared_mlp", "shared_experts"))

HY_V3 = Family(
    model_type="hy_v3",
    read_config=read_config,
    # transformers 5 has names of its own for the router and the shared expert where it writes experts fused.
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": (f"{_MLP}.router.gate.weight", f"{_MLP}.gate.weight"),
            "layers.{layer}.moe.correction_bias": (f"{_MLP}.expert_bias", f"{_MLP}.e_score_correction_bias"),
            **{path: names + _SHARED_FUSED[path] for path, names in _SHARED.items()},
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
)
