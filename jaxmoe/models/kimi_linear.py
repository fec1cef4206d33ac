"""Kimi Linear: Kimi delta attention, latent attention without positions now and then, and DeepSeek's MoE."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    DecoderConfig,
    KDAConfig,
    TokenMixerConfig,
    check_equal,
    pick,
    pick_layer_types,
)
from jaxmoe.models.deepseek import DEEPSEEK_TENSORS, check_setting, read_deepseek, read_mla
from jaxmoe.models.family import BLOCK_SPARSE_EXPERTS, MTP_LAYERS, ROTARY_BUFFERS, Family, mlp_tensors
from jaxmoe.models.readers import check_known, read_grouped_sigmoid_router

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
    # What Kimi K3 has besides: gated latent attention, residuals of several layers, and narrower experts.
    check_known(
        config,
        mla_use_nope=True,
        rope_scaling=None,
        mla_use_output_gate=False,
        attn_res_block_size=None,
        routed_expert_hidden_size=None,
        latent_moe_use_norm=False,
    )
    inner = pick(config, "linear_attn_config", default={})
    check_known({"model_type": config["model_type"], **inner}, gate_lower_bound=None, use_full_rank_gate=False)
    full = read_mla({"q_lora_rank": None, **config}, rotates=False)
    kinds: dict[str, TokenMixerConfig] = {_LINEAR: read_kda(config, num_heads=32, wide_rates=True), _FULL: full}
    return read_deepseek(
        config,
        attention=[kinds[kind] for kind in _read_kinds(config)],
        router=read_grouped_sigmoid_router(config, scale=2.446),
        shared_experts=1,
        first_sparse=1,
        norm_eps=1e-5,
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=0),
    )


def as_deepseek(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the settings under the names that DeepSeek has for them too.

    Raises:
        ValueError: a setting is there under both names, with two values.
    """
    found = {name: pick(config, name, other, default=None) for name, other in _NAMES.items()}
    return {**config, **{name: value for name, value in found.items() if value is not None}}


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

    head_dim = size("linear_head_dim", "head_dim", 128)
    return KDAConfig(
        num_heads=size("linear_num_heads", "num_heads", num_heads),
        head_dim=head_dim,
        conv_kernel_size=size("linear_conv_kernel_dim", "short_conv_kernel_size", 4),
        activation=pick(config, "hidden_act", default="silu"),
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
        "layers.{layer}.attention.w_b": (f"{_ATTENTION}.b_proj.weight",),
        "layers.{layer}.attention.w_g_a": (f"{_ATTENTION}.g_a_proj.weight",),
        "layers.{layer}.attention.w_g_b": (f"{_ATTENTION}.g_b_proj.weight",),
        "layers.{layer}.attention.out_norm": (f"{_ATTENTION}.o_norm.weight",),
        "layers.{layer}.attention.w_out": (f"{_ATTENTION}.o_proj.weight",),
    },
    experts=BLOCK_SPARSE_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
)
