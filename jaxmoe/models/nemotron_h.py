"""Nemotron-H: every layer is one of Mamba-2, attention, a dense MLP or routed experts, none of them gated.

NVIDIA 2025 (arXiv:2504.03624); with routed experts since Nemotron 3, which may work on a narrower latent.
"""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    pick,
    read_common,
)
from jaxmoe.models.family import MAMBA2_NAMES, ROTARY_BUFFERS, ExpertTensors, Family
from jaxmoe.models.readers import read_grouped_sigmoid_router

# Kinds of layers in the three spellings that config.json has had for them.
_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a nemotron_h checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for a kind of layer that is not known here.
    """
    heads = pick(config, "num_attention_heads")
    # transformers reads settings of biases and windows of attention, and uses neither. Mamba layers tell positions apart.
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=pick(config, "num_key_value_heads", default=heads),
        head_dim=pick(config, "head_dim", "attention_head_dim", default=128),
        rope=None,
    )
    halves: dict[str, dict[str, Any]] = {
        "linear_attention": {"attention": _read_mamba2(config), "feed_forward": None},
        "full_attention": {"attention": attention, "feed_forward": None},
    }
    kinds = _layer_kinds(config)
    if "mlp" in kinds:
        halves["mlp"] = {"attention": None, "feed_forward": _mlp(config, pick(config, "intermediate_size"))}
    if "moe" in kinds:
        halves["moe"] = {"attention": None, "feed_forward": _read_moe(config)}
    common = read_common(config, norm_eps=1e-5)
    # The output projection is a tensor of its own whatever config.json says.
    changes = {"norm_eps": pick(config, "layer_norm_epsilon", default=1e-5), "tie_word_embeddings": False}
    return DecoderConfig(
        **{**common, **changes}, norm="rms_float32", layers=tuple(LayerConfig(**halves[kind]) for kind in kinds)
    )


def _layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """Read the kind of every layer, a value of `_KINDS`.

    Raises:
        ValueError: there is another kind.
    """
    named = pick(config, "layers_block_type", "layer_types", default=[])
    letters = [] if named else list(pick(config, "hybrid_override_pattern", default=""))
    if not (named or letters):
        raise ValueError("config.json needs layers_block_type or hybrid_override_pattern; neither is there")
    kinds = [_KINDS.get(letter, letter) for letter in letters] or [
        _OLD_KINDS.get(str(name), str(name)) for name in named
    ]
    if unknown := set(kinds) - set(_KINDS.values()):
        raise ValueError(
            f"layers of nemotron_h are {', '.join(f'{kind} ({letter})' for letter, kind in _KINDS.items())}; "
            f"config.json has {', '.join(sorted(unknown))}"
        )
    return kinds


def _read_mamba2(config: Mapping[str, Any]) -> Mamba2Config:
    return Mamba2Config(
        num_heads=pick(config, "mamba_num_heads"),
        head_dim=pick(config, "mamba_head_dim"),
        num_groups=pick(config, "mamba_n_groups", "n_groups"),
        state_size=pick(config, "ssm_state_size"),
        conv_kernel_size=pick(config, "mamba_d_conv", "conv_kernel", default=4),
        activation=pick(config, "mamba_hidden_act", default="silu"),
        conv_bias=pick(config, "mamba_conv_bias", "use_conv_bias", default=True),
        bias=pick(config, "use_bias", default=False),
        # time_step_limit is not what transformers clamps by.
        min_step=pick(config, "mamba_dt_min", "time_step_min", default=0.001),
    )


def _mlp(config: Mapping[str, Any], width: int) -> MLPConfig:
    return MLPConfig(
        hidden_size=pick(config, "hidden_size"),
        intermediate_size=width,
        activation=pick(config, "mlp_hidden_act", default="relu2"),
        bias=pick(config, "mlp_bias", default=False),
        gated=False,
    )


def _read_moe(config: Mapping[str, Any]) -> MoEConfig:
    latent = pick(config, "moe_latent_size", default=None)
    return MoEConfig(
        num_experts=pick(config, "n_routed_experts", "num_local_experts"),
        num_experts_per_tok=pick(config, "num_experts_per_tok"),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=pick(config, "moe_intermediate_size"),
        activation=pick(config, "mlp_hidden_act", default="relu2"),
        gated=False,
        router=read_grouped_sigmoid_router(config),
        shared=_mlp(config, pick(config, "moe_shared_expert_intermediate_size")),
        latent_size=latent,
        latent_bias=latent is not None and pick(config, "mlp_bias", default=False),
    )


_MIXER_TENSORS = {
    **{f"attention.{path}": name for path, name in MAMBA2_NAMES.items()},
    **{f"attention.w_{part}": f"{part}_proj.weight" for part in "qkvo"},
    "moe.w_router": "gate.weight",
    "moe.correction_bias": "gate.e_score_correction_bias",
    "moe.w_latent_in": "fc1_latent_proj.weight",
    "moe.b_latent_in": "fc1_latent_proj.bias",
    "moe.w_latent_out": "fc2_latent_proj.weight",
    "moe.b_latent_out": "fc2_latent_proj.bias",
    **{
        f"{path}.{kind}_{part}": f"{module}{part}_proj.{name}"
        for path, module in (("mlp", ""), ("moe.shared", "shared_experts."))
        for part in ("up", "down")
        for kind, name in (("w", "weight"), ("b", "bias"))
    },
}


def _both(name: str) -> tuple[str, str]:
    """The model is called backbone in released checkpoints, and model where experts are fused."""
    return f"backbone.{name}", f"model.{name}"


NEMOTRON_H = Family(
    model_type="nemotron_h",
    read_config=read_config,
    tensors={
        "embed.weight": _both("embeddings.weight"),
        # A layer has one of the two.
        "layers.{layer}.attention_norm.weight": _both("layers.{layer}.norm.weight"),
        "layers.{layer}.feed_forward_norm.weight": _both("layers.{layer}.norm.weight"),
        **{
            f"layers.{{layer}}.{path}": _both(f"layers.{{layer}}.mixer.{name}") for path, name in _MIXER_TENSORS.items()
        },
        "norm.weight": _both("norm_f.weight"),
        "lm_head.weight": ("lm_head.weight",),
    },
    experts=ExpertTensors(
        up="backbone.layers.{layer}.mixer.experts.{expert}.up_proj.weight",
        down="backbone.layers.{layer}.mixer.experts.{expert}.down_proj.weight",
        fused_up="model.layers.{layer}.mixer.experts.up_proj",
        fused_down="model.layers.{layer}.mixer.experts.down_proj",
        fused_layout="stacked",
    ),
    ignored={**ROTARY_BUFFERS, "multi-token prediction": r"mtp\..*"},
)
