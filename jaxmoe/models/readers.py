"""Readers of the parts that families share: attention as in Llama, routed experts, MLPs, and which layers are sparse.

Each takes the dictionary of config.json. A family's own file has what it does besides, or differently.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxmoe.config import (
    AttentionConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
    RouterConfig,
    SlidingWindow,
    TokenMixerConfig,
    pick,
    pick_layer_flags,
    pick_layer_types,
)
from jaxmoe.rotary import read_rope

_SWIGLU_ALPHA = 1.702


def check_known(config: Mapping[str, Any], **known: Any) -> None:
    """Refuse settings with other values than the only ones that the family is known with.

    Args:
        config: dictionary of config.json.
        known: values by the settings' names; a setting that config.json does not give has it.

    Raises:
        ValueError: a setting has another value.
    """
    for name, only in known.items():
        if pick(config, name, default=only) != only:
            raise ValueError(
                f"{config['model_type']} is known with {name}={only!r} alone; config.json gives {config[name]!r}"
            )


def read_heads(config: Mapping[str, Any], *head_dim_names: str) -> dict[str, Any]:
    """Read the number of heads and their width, as fields of an `AttentionConfig`.

    Without settings, each query head has keys and values of its own, and heads share hidden_size evenly.

    Args:
        config: dictionary of config.json.
        head_dim_names: spellings of a head's width, "head_dim" where none are given.
    """
    heads = pick(config, "num_attention_heads")
    names = head_dim_names or ("head_dim",)
    width = pick(config, *names, default=pick(config, "hidden_size") // heads)
    if width < 1:
        raise ValueError(
            f"the width of a head ({' or '.join(names)}, or hidden_size / heads) is at least 1; it is {width}"
        )
    return {"num_heads": heads, "num_kv_heads": pick(config, "num_key_value_heads", default=heads), "head_dim": width}


def read_attention(
    config: Mapping[str, Any],
    *,
    default_theta: float,
    head_dim_names: Sequence[str] = (),
    interleaved: bool = False,
    partial: bool = False,
    rope: Mapping[str, Any] | None = None,
    **own: Any,
) -> AttentionConfig:
    """Read attention as in Llama, with the family's own fields.

    Args:
        config: dictionary of config.json.
        head_dim_names: spellings of a head's width; see `read_heads`.
        default_theta, interleaved, partial, rope: arguments of `read_rope`.
        own: further fields of the `AttentionConfig`, by name.
    """
    heads = read_heads(config, *head_dim_names)
    rotary = read_rope(
        config,
        head_dim=heads["head_dim"],
        default_theta=default_theta,
        interleaved=interleaved,
        partial=partial,
        rope=rope,
    )
    return AttentionConfig(**heads, rope=rotary, **own)


def rope_of_kind(config: Mapping[str, Any], kind: str, *kinds: str) -> dict[str, Any]:
    """Read the rotary settings of one kind of layer, where a family has them for each; they are empty where none are given.

    Raises:
        ValueError: there are settings for something that is none of `kinds`.
    """
    settings = {
        name: value
        for part in ("rope_scaling", "rope_parameters")
        for name, value in pick(config, part, default={}).items()
    }
    if unknown := settings.keys() - set(kinds):
        raise ValueError(
            f"rope settings of {config['model_type']} are given for each of {' and '.join(kinds)}; config.json has "
            f"{', '.join(sorted(unknown))} beside them"
        )
    return dict(pick(settings, kind, default={}))


def read_biases(config: Mapping[str, Any], *, default: bool = False) -> Literal["all"] | None:
    """Read ``attention_bias`` where it is of all four projections."""
    return "all" if pick(config, "attention_bias", default=default) else None


def read_window(config: Mapping[str, Any], *, default: int | None) -> SlidingWindow | None:
    """Read ``sliding_window``: absent is the family's `default`, and null is no window."""
    return window_of(pick(config, "sliding_window", default=default if "sliding_window" not in config else None))


def need_window(config: Mapping[str, Any], *, default: int) -> SlidingWindow:
    """Read ``sliding_window`` of a layer whose kind has one.

    Raises:
        ValueError: it is null, which no kind of layer says.
    """
    window = read_window(config, default=default)
    if window is None:
        raise ValueError(
            "layers of sliding_attention need a sliding_window; config.json gives null; give its size, or make the layers "
            "full_attention in layer_types"
        )
    return window


def rotate_in_windows(
    config: Mapping[str, Any], attention: AttentionConfig, *, window: int, usual: list[str]
) -> list[AttentionConfig]:
    """Make the attention of each layer where those with a window have positions, and full ones have none.

    Args:
        config: dictionary of config.json.
        attention: attention of all layers, with the positions of those that have a window.
        window: size of the windows where ``sliding_window`` is not given.
        usual: kinds of the layers where ``layer_types`` is not given.
    """
    types = pick_layer_types(config, usual, "sliding_attention", "full_attention")
    kinds = {"full_attention": dataclasses.replace(attention, rope=None)}
    if "sliding_attention" in types:
        kinds["sliding_attention"] = dataclasses.replace(attention, mask=need_window(config, default=window))
    return [kinds[kind] for kind in types]


def window_of(size: int | None) -> SlidingWindow | None:
    """Make a sliding window of a size that may be None, for none."""
    return None if size is None else SlidingWindow(size=size)


def read_mlp(config: Mapping[str, Any], width: int, *, bias: bool = False) -> MLPConfig:
    """Read a dense MLP of this width."""
    return MLPConfig(
        hidden_size=pick(config, "hidden_size"),
        intermediate_size=width,
        activation=pick(config, "hidden_act", default="silu"),
        bias=bias,
    )


def read_swiglu_limit(config: Mapping[str, Any]) -> float:
    """Read the limit of a clamped activation, as gpt-oss has it.

    Raises:
        ValueError: the factor in its sigmoid, which is part of the activation here, is another than that of released models.
    """
    alpha = pick(config, "swiglu_alpha", default=_SWIGLU_ALPHA)
    if alpha != _SWIGLU_ALPHA:
        raise ValueError(
            f"the experts of {config['model_type']} have the factor {_SWIGLU_ALPHA} in their sigmoid; swiglu_alpha={alpha}"
        )
    return float(pick(config, "swiglu_limit", default=7.0))


def read_limits(config: Mapping[str, Any], name: str) -> list[float | None]:
    """Read each layer's limit of a clamped activation from the list `name`; 0 and null are none.

    Raises:
        ValueError: it has another number of layers, or anything else in it.
    """
    count = pick(config, "num_hidden_layers")
    limits: list[Any] = pick(config, name, default=[None] * count)
    if len(limits) != count or any(limit is not None and type(limit) not in (int, float) for limit in limits):
        raise ValueError(f"{name} in config.json has a number for each of the {count} layers; it is {limits!r:.80}")
    return [float(limit) if limit else None for limit in limits]


def read_moe(
    config: Mapping[str, Any],
    *experts: str,
    router: RouterConfig,
    width: str = "moe_intermediate_size",
    shared: MLPConfig | None = None,
    shared_gate: bool = False,
) -> MoEConfig:
    """Read a layer of routed experts.

    Args:
        config: dictionary of config.json.
        experts: spellings of the number of experts.
        width: name of an expert's width.
        router, shared, shared_gate: fields of the `MoEConfig`.
    """
    return MoEConfig(
        num_experts=pick(config, *experts),
        num_experts_per_tok=pick(config, "num_experts_per_tok"),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=pick(config, width),
        activation=pick(config, "hidden_act", default="silu"),
        router=router,
        shared=shared,
        shared_gate=shared_gate,
    )


def read_moe_with_gated_expert(config: Mapping[str, Any], *, renormalize: bool) -> MoEConfig:
    """Read Qwen's routed experts, by a softmax, and beside them one for every token, behind a gate of its own."""
    return read_moe(
        config,
        "num_experts",
        "num_local_experts",
        router=RouterConfig(score="softmax", renormalize=renormalize),
        shared=read_mlp(config, pick(config, "shared_expert_intermediate_size")),
        shared_gate=True,
    )


def read_grouped_sigmoid_router(
    config: Mapping[str, Any], *, num_groups: int = 1, topk_groups: int = 1, scale: float = 1.0
) -> RouterConfig:
    """Read DeepSeek-V3's router: sigmoid scores, a correction bias, and groups that count by their two best experts.

    Args:
        config: dictionary of config.json.
        num_groups, topk_groups, scale: values of the family, where config.json gives none.
    """
    return RouterConfig(
        score="sigmoid",
        correction_bias=True,
        num_groups=pick(config, "n_group", default=num_groups),
        topk_groups=pick(config, "topk_group", default=topk_groups),
        group_score="top2_sum",
        renormalize=pick(config, "norm_topk_prob", default=True),
        sum_epsilon=1e-20,
        scale=float(pick(config, "routed_scaling_factor", default=scale)),
    )


def sparse_from(config: Mapping[str, Any], *, first: int, step: int = 1) -> list[bool]:
    """Tell for each layer whether it has routed experts, where the first ones are dense.

    ``mlp_layer_types``, which transformers 5 writes, wins over ``first_k_dense_replace``, of which it then writes the
    family's usual value.

    Args:
        config: dictionary of config.json.
        first: first sparse layer of the family, where config.json gives neither.
        step: number that divides the indices of sparse layers.

    Raises:
        ValueError: ``mlp_layer_types`` has another number of layers, or another kind than "dense" and "sparse".
    """
    count = pick(config, "num_hidden_layers")
    kinds: list[Any] = pick(config, "mlp_layer_types", default=[])
    if not kinds:
        first = pick(config, "first_k_dense_replace", default=first)
        return [i >= first and i % step == 0 for i in range(count)]
    if len(kinds) != count or any(kind not in ("dense", "sparse") for kind in kinds):
        raise ValueError(
            f"mlp_layer_types of {config['model_type']} has dense or sparse for each of the {count} layers; config.json "
            f"has {kinds!r:.80}"
        )
    return [kind == "sparse" for kind in kinds]


def sparse_by_step(config: Mapping[str, Any]) -> list[bool]:
    """Tell for each layer whether it has routed experts: each ``decoder_sparse_step``-th, but for ``mlp_only_layers``."""
    dense = pick(config, "mlp_only_layers", default=[])
    step = pick(config, "decoder_sparse_step", default=1)
    return [i not in dense and (i + 1) % step == 0 for i in range(pick(config, "num_hidden_layers"))]


def sparse_by_list(config: Mapping[str, Any], usual: Sequence[bool]) -> list[bool]:
    """Tell for each layer whether it has routed experts, by its name in ``mlp_layer_types`` or its 1 in ``moe_layer_freq``.

    Args:
        config: dictionary of config.json.
        usual: flags of the family, where config.json has neither list.
    """
    flags = pick_layer_flags(config, "moe_layer_freq", list(usual))
    named = ["sparse" if flag else "dense" for flag in flags]
    return [kind == "sparse" for kind in pick_layer_types(config, named, "sparse", "dense", name="mlp_layer_types")]


def make_layers(
    attention: TokenMixerConfig | Sequence[TokenMixerConfig],
    sparse: Sequence[bool],
    moe: MoEConfig,
    dense: MLPConfig | None,
) -> tuple[LayerConfig, ...]:
    """Make layers with routed experts where `sparse` says so, and a dense MLP in the others.

    Args:
        attention: token mixer of all layers, or of each.
        sparse: flags of the layers with routed experts.
        moe: routed experts.
        dense: dense MLP; None where all layers are sparse.
    """
    mixers = [attention] * len(sparse) if isinstance(attention, TokenMixerConfig) else attention
    return tuple(
        LayerConfig(attention=mixer, feed_forward=moe if routed else dense)
        for mixer, routed in zip(mixers, sparse, strict=True)
    )
