"""Readers that the DeepSeek families share: latent attention, experts that serve every token, dense layers first."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.config import DecoderConfig, MLAConfig, RouterConfig, TokenMixerConfig, pick, read_common
from jaxmoe.models.family import llama_tensors, mlp_tensors
from jaxmoe.models.readers import make_layers, read_mlp, read_moe, sparse_from
from jaxmoe.rotary import read_rope, rope_settings, yarn_mscale


def read_mla(
    config: Mapping[str, Any], *, interleaved: bool = False, rotates: bool = True, default_theta: float = 10000.0
) -> MLAConfig:
    """Read the settings of multi-head latent attention; `interleaved` and `default_theta` as for `read_rope`.

    Without `rotates` the dims that have positions elsewhere are dims of heads and of their one key like the others.
    """
    nope = pick(config, "qk_nope_head_dim")
    turning = 0 if not rotates and config.get("qk_rope_head_dim") == 0 else pick(config, "qk_rope_head_dim")
    rotary, scale = None, (nope + turning) ** -0.5
    if rotates:
        rotary = read_rope(config, head_dim=turning, default_theta=default_theta, interleaved=interleaved)
        scale *= _temperature(config)
    return MLAConfig(
        num_heads=pick(config, "num_attention_heads"),
        kv_rank=pick(config, "kv_lora_rank"),
        # null means queries without a latent, which a missing setting does not.
        q_rank=config.get("q_lora_rank", 1536),
        nope_head_dim=nope,
        v_head_dim=pick(config, "v_head_dim"),
        rope=rotary,
        shared_key_dim=None if rotates else turning,
        scale=scale,
        bias=pick(config, "attention_bias", default=False),
    )


def _temperature(config: Mapping[str, Any]) -> float:
    """YaRN's correction of the softmax temperature, which belongs to all dims of a head, not only to those that rotate.

    ``mscale_all_dim`` is what the scores are multiplied by, twice as queries and keys both have it.
    """
    rope = rope_settings(config)
    kind, mscale_all_dim = rope.get("rope_type") or rope.get("type") or "default", rope.get("mscale_all_dim")
    if kind == "default" or not mscale_all_dim:
        return 1.0
    if rope.get("factor") is None:
        raise ValueError(f"rope scaling {kind!r} with mscale_all_dim needs 'factor' in config.json's rope settings")
    return yarn_mscale(rope["factor"], mscale_all_dim) ** 2


def read_deepseek(
    config: Mapping[str, Any],
    *,
    attention: MLAConfig | Sequence[TokenMixerConfig],
    router: RouterConfig,
    shared_experts: int,
    first_sparse: int,
    norm_eps: float = 1e-6,
    mlp_bias: bool = False,
    num_mtp_layers: int = 0,
) -> DecoderConfig:
    """Read the settings that every DeepSeek config.json has.

    Args:
        config: dictionary of config.json.
        attention: attention of every layer, or of each.
        router: router of every layer with routed experts.
        shared_experts: number of shared experts where config.json gives none.
        first_sparse: first layer with routed experts, likewise.
        norm_eps: epsilon of the norms, likewise.
        mlp_bias: whether dense layers and shared experts have biases.
        num_mtp_layers: number of layers for multi-token prediction; see `DecoderConfig`.
    """
    shared = pick(config, "n_shared_experts", default=0 if "n_shared_experts" in config else shared_experts)
    shared_width = pick(config, "moe_intermediate_size") * shared
    moe = read_moe(
        config,
        "n_routed_experts",
        "num_experts",
        "num_local_experts",
        router=router,
        shared=read_mlp(config, shared_width, bias=mlp_bias) if shared else None,
    )
    dense = read_mlp(config, pick(config, "intermediate_size"), bias=mlp_bias)
    sparse = sparse_from(config, first=first_sparse, step=pick(config, "moe_layer_freq", default=1))
    return DecoderConfig(
        **read_common(config, norm_eps=norm_eps),
        layers=make_layers(attention, sparse, moe, dense),
        num_mtp_layers=num_mtp_layers,
    )


def check_setting(config: Mapping[str, Any], name: str, *known: str) -> Any:
    """Read a setting that names a formula, the first of `known` where config.json gives none.

    Raises:
        ValueError: it is none of `known`.
    """
    value = pick(config, name, default=known[0])
    if value not in known:
        raise ValueError(
            f"{name} of {config['model_type']} can be {' or '.join(known)}; config.json asks for {value!r}"
        )
    return str(value)


_ATTENTION = "model.layers.{layer}.self_attn"

DEEPSEEK_TENSORS = {
    **llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            "layers.{layer}.moe.correction_bias": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            **mlp_tensors("moe.shared", "mlp.shared_experts"),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    "layers.{layer}.attention.w_q_a": (f"{_ATTENTION}.q_a_proj.weight",),
    "layers.{layer}.attention.b_q_a": (f"{_ATTENTION}.q_a_proj.bias",),
    "layers.{layer}.attention.q_a_norm": (f"{_ATTENTION}.q_a_layernorm.weight",),
    "layers.{layer}.attention.w_q_b": (f"{_ATTENTION}.q_b_proj.weight",),
    "layers.{layer}.attention.w_kv_a": (f"{_ATTENTION}.kv_a_proj_with_mqa.weight",),
    "layers.{layer}.attention.b_kv_a": (f"{_ATTENTION}.kv_a_proj_with_mqa.bias",),
    "layers.{layer}.attention.kv_a_norm": (f"{_ATTENTION}.kv_a_layernorm.weight",),
    "layers.{layer}.attention.w_kv_b": (f"{_ATTENTION}.kv_b_proj.weight",),
}
