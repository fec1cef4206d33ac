"""Kimi Linear: Kimi delta attention, latent attention without positions now and then, and DeepSeek's MoE.

The text part of Kimi K3 calls itself the same. What it has besides are settings of their own: gates behind latent attention,
full-rank gates and bounded decays, residual streams of blocks of layers, narrower experts, and the activation "situ".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    BlockResidualsConfig,
    DecoderConfig,
    KDAConfig,
    LayerConfig,
    MoEConfig,
    TokenMixerConfig,
    check_equal,
    pick,
    pick_layer_types,
)
from jaxmoe.models.deepseek import DEEPSEEK_TENSORS, check_setting, read_deepseek, read_mla
from jaxmoe.models.family import BLOCK_SPARSE_EXPERTS, MTP_LAYERS, ROTARY_BUFFERS, Family, mlp_tensors
from jaxmoe.models.readers import check_known, read_grouped_sigmoid_router
from jaxmoe.numerics import SITU_UP_LIMIT

_LINEAR, _FULL = "linear_attention", "full_attention"

# DeepSeek's name of a setting -> that of this family.
_NAMES = {
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "n_group": "num_expert_group",
    "norm_topk_prob": "moe_renormalize",
    "max_position_embeddings": "model_max_length",
}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a kimi_linear checkpoint.

    Raises:
        ValueError: a setting is missing, contradicts another, or asks for what the family does not have.
    """
    config = as_deepseek(config)
    check_setting(config, "moe_router_activation_func", "sigmoid")
    check_known(config, mla_use_nope=True, rope_scaling=None)
    full = dataclasses.replace(
        read_mla({"q_lora_rank": None, **config}, rotates=False),
        output_gate=pick(config, "mla_use_output_gate", default=False),
    )
    kinds: dict[str, TokenMixerConfig] = {_LINEAR: _read_kda(config), _FULL: full}
    decoder = read_deepseek(
        config,
        attention=[kinds[kind] for kind in _read_kinds(config)],
        router=read_grouped_sigmoid_router(config, scale=2.446),
        shared_experts=1,
        first_sparse=1,
        norm_eps=1e-5,
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=0),
    )
    layers = [_with_own_feed_forward(config, layer, decoder.norm_eps) for layer in decoder.layers]
    block = config.get("attn_res_block_size")
    if block is None:
        return dataclasses.replace(decoder, layers=tuple(layers))
    block = pick(config, "attn_res_block_size")
    layers = [dataclasses.replace(layer, starts_block=i % block == 0) for i, layer in enumerate(layers)]
    return dataclasses.replace(decoder, layers=tuple(layers), streams=BlockResidualsConfig())


def _with_own_feed_forward(config: Mapping[str, Any], layer: LayerConfig, norm_eps: float) -> LayerConfig:
    """The layer with bounds of the activation "situ", and with experts that work on a latent.

    Raises:
        ValueError: the settings of either contradict each other, or the bound of the half without a gate is another one.
    """
    ffn = layer.feed_forward
    assert ffn is not None
    if ffn.activation == "situ":
        limit, up_limit = (config.get(f"activation_situ_{name}") for name in ("beta", "linear_beta"))
        if limit is None or up_limit != SITU_UP_LIMIT:
            raise ValueError(
                f"{config['model_type']} is known with hidden_act='situ' beside an activation_situ_beta and "
                f"activation_situ_linear_beta={SITU_UP_LIMIT}; config.json gives {limit!r} and {up_limit!r}"
            )
        ffn = dataclasses.replace(ffn, activation_limit=limit)
        if isinstance(ffn, MoEConfig) and ffn.shared is not None:
            ffn = dataclasses.replace(ffn, shared=dataclasses.replace(ffn.shared, activation_limit=limit))
    latent = config.get("routed_expert_hidden_size")
    normed = pick(config, "latent_moe_use_norm", default=False)
    if latent is None and normed:
        raise ValueError(
            "latent_moe_use_norm is of experts that work on a latent; config.json gives no routed_expert_hidden_size"
        )
    if isinstance(ffn, MoEConfig) and latent is not None:
        size = pick(config, "routed_expert_hidden_size")
        ffn = dataclasses.replace(ffn, latent_size=size, latent_norm_eps=norm_eps if normed else None)
    return dataclasses.replace(layer, feed_forward=ffn)


def as_deepseek(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the settings under the names that DeepSeek has for them too.

    Raises:
        ValueError: a setting is there under both names, with two values.
    """
    found = {name: pick(config, name, other, default=None) for name, other in _NAMES.items()}
    return {**config, **{name: value for name, value in found.items() if value is not None}}


def _read_kda(config: Mapping[str, Any]) -> KDAConfig:
    inner = {"model_type": config["model_type"], **pick(config, "linear_attn_config", default={})}
    full_rank = pick(inner, "use_full_rank_gate", default=False)
    bound = None if inner.get("gate_lower_bound") is None else float(pick(inner, "gate_lower_bound", default=-5.0))
    if full_rank != (bound is not None):
        raise ValueError(
            f"{config['model_type']} is known with use_full_rank_gate and gate_lower_bound together, as Kimi K3 has them, "
            f"or without both; linear_attn_config gives use_full_rank_gate={full_rank} and gate_lower_bound={bound}"
        )
    kda = read_kda(config, num_heads=32, least_log_decay=bound, wide_rates=not full_rank)
    if not full_rank:
        return kda
    # The released A_log has as many entries as a head is wide, zeros behind those of the heads.
    return dataclasses.replace(kda, gate_rank=None, spare_rates=max(0, kda.head_dim - kda.num_heads))


def read_kda(config: Mapping[str, Any], *, num_heads: int, **fields: Any) -> KDAConfig:
    """Read Kimi delta attention, whose sizes stand in config.json or in its ``linear_attn_config``.

    Args:
        config: dictionary of config.json.
        num_heads: number of heads of the family, where config.json gives none.
        fields: fields of the `KDAConfig` that are read elsewhere.

    Raises:
        ValueError: a size is there twice, with two values.
    """
    inner = pick(config, "linear_attn_config", default={})

    def size(name: str, inner_name: str, default: int) -> int:
        check_equal([(name, config.get(name)), (f"linear_attn_config.{inner_name}", inner.get(inner_name))])
        return int(pick(config, name, default=pick(inner, inner_name, default=default)))

    head_dim, activation = size("linear_head_dim", "head_dim", 128), pick(config, "hidden_act", default="silu")
    return KDAConfig(
        num_heads=size("linear_num_heads", "num_heads", num_heads),
        head_dim=head_dim,
        conv_kernel_size=size("linear_conv_kernel_dim", "short_conv_kernel_size", 4),
        # "situ" is a function of two halves, and a convolution has one.
        activation="silu" if activation == "situ" else activation,
        decay_rank=head_dim,
        gate_rank=head_dim,
        **fields,
    )


def _read_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of each layer: by name, as transformers writes it, or by two lists of layers counted from 1."""
    count = pick(config, "num_hidden_layers")
    usual = [_FULL if i and i % 4 == 0 else _LINEAR for i in range(count)]
    named = pick_layer_types(config, usual, _FULL, _LINEAR)
    inner = pick(config, "linear_attn_config", default={})
    lists: dict[str, list[Any]] = {
        kind: pick(inner, name, default=[]) for kind, name in ((_FULL, "full_attn_layers"), (_LINEAR, "kda_layers"))
    }
    numbers = [*lists[_FULL], *lists[_LINEAR]]
    if not numbers:
        return named
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(1, count + 1)):
        raise ValueError(
            f"full_attn_layers and kda_layers of linear_attn_config have each of the {count} layers once, counted from 1; "
            f"they are {lists[_FULL]!r:.80} and {lists[_LINEAR]!r:.80}"
        )
    listed = [_FULL if i + 1 in lists[_FULL] else _LINEAR for i in range(count)]
    if config.get("layer_types") is not None:
        check_equal([("layer_types", named), ("layer_types by linear_attn_config", listed)])
    return listed


_ATTENTION = "model.layers.{layer}.self_attn"
_MOE = "model.layers.{layer}.block_sparse_moe"


_LATENT = {
    "w_latent_in": "routed_expert_down_proj",
    "latent_norm": "routed_expert_norm",
    "w_latent_out": "routed_expert_up_proj",
}
_RESIDUALS = {
    "layers.{layer}.attention_hyper": "model.layers.{layer}.self_attention_res",
    "layers.{layer}.feed_forward_hyper": "model.layers.{layer}.mlp_res",
    "hyper_head": "model.output_attn_res",
}


def gate_tensors(*parts: str) -> dict[str, str]:
    """Names of the parameters that decays are made from, in the module of attention; transformers has a module of them."""
    return {"a_log": "A_log", "dt_bias": "dt_bias", **{f"w_{part}": f"{part}_proj.weight" for part in parts}}


def _spelled(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the MoE block and of what is in it: as released, and beside fused experts."""
    return tuple([name.replace(".mlp.", ".block_sparse_moe.") for name in names]) + names


KIMI_LINEAR = Family(
    model_type="kimi_linear",
    read_config=read_config,
    tensors={
        **{path: _spelled(names) if ".moe." in path else names for path, names in DEEPSEEK_TENSORS.items()},
        # transformers writes dense MLPs under the name of the MoE block, beside experts one by one.
        **{
            path: (name, name.replace(".mlp.", ".block_sparse_moe."), name)
            for path, (name,) in mlp_tensors("mlp", "mlp").items()
        },
        **{
            f"layers.{{layer}}.attention.conv_{part}": (
                f"{_ATTENTION}.{part}_conv1d.weight",
                f"{_ATTENTION}.conv1d.weight",
            )
            for part in "qkv"
        },
        **{
            f"layers.{{layer}}.attention.{path}": (f"{_ATTENTION}.{name}", f"{_ATTENTION}.forget_gate.{name}")
            for path, name in gate_tensors("f_a", "f_b").items()
        },
        # The same tensor as a_log, which is before it here: its rows come behind.
        "layers.{layer}.attention.a_log_spare": (f"{_ATTENTION}.A_log", f"{_ATTENTION}.forget_gate.A_log"),
        "layers.{layer}.attention.w_b": (f"{_ATTENTION}.b_proj.weight",),
        "layers.{layer}.attention.w_g_a": (f"{_ATTENTION}.g_a_proj.weight",),
        "layers.{layer}.attention.w_g_b": (f"{_ATTENTION}.g_b_proj.weight",),
        # A layer has one of the two.
        "layers.{layer}.attention.w_g": (f"{_ATTENTION}.g_proj.weight",),
        "layers.{layer}.attention.w_gate": (f"{_ATTENTION}.g_proj.weight",),
        "layers.{layer}.attention.out_norm": (f"{_ATTENTION}.o_norm.weight",),
        "layers.{layer}.attention.w_out": (f"{_ATTENTION}.o_proj.weight",),
        **{f"layers.{{layer}}.moe.{path}": (f"{_MOE}.{name}.weight",) for path, name in _LATENT.items()},
        **{
            f"{path}.{ours}": (f"{module}_{theirs}.weight",)
            for path, module in _RESIDUALS.items()
            for ours, theirs in (("norm", "norm"), ("w", "proj"))
        },
    },
    experts=BLOCK_SPARSE_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
)
