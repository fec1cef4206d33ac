"""K-EXAONE: DeepSeek-V3's router, and layers with a window and positions between layers with neither."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    QueryKeyNorm,
    pick,
    read_common,
)
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import (
    check_known,
    make_layers,
    read_attention,
    read_grouped_sigmoid_router,
    read_mlp,
    read_moe,
    rotate_in_windows,
    sparse_from,
)

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of an exaone_moe checkpoint.

    Raises:
        ValueError: a setting is missing, contradicts another, or asks for what the family does not have.
    """
    check_known(config, scoring_func="sigmoid", topk_method="noaux_tc")
    shared_width = pick(config, "moe_intermediate_size") * pick(config, "num_shared_experts", default=1)
    moe = read_moe(
        config,
        "num_experts",
        "num_local_experts",
        router=read_grouped_sigmoid_router(config, scale=2.5),
        shared=read_mlp(config, shared_width),
    )
    dense = read_mlp(config, pick(config, "intermediate_size"))
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=make_layers(_read_attention(config), _sparse_layers(config), moe, dense),
    )


def _sparse_layers(config: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has routed experts; ``is_moe_layer`` is what other engines read."""
    flags: list[Any] = pick(config, "is_moe_layer", default=[])
    listed = ["sparse" if flag else "dense" for flag in flags]
    kinds = pick(config, "mlp_layer_types", default=listed)
    if listed and kinds != listed:
        raise ValueError(
            "is_moe_layer and mlp_layer_types of exaone_moe say the same of every layer; config.json has "
            f"{flags!r:.80} and {kinds!r:.80}"
        )
    return sparse_from({**config, "mlp_layer_types": kinds}, first=1)


def _read_attention(config: Mapping[str, Any]) -> list[AttentionConfig]:
    """The attention of each layer."""
    if config.get("sliding_window", 4096) is None:
        raise ValueError(
            "exaone_moe has layers with a window, of sliding_window positions; config.json has null for it"
        )
    return rotate_in_windows(
        config,
        read_attention(config, default_theta=10000.0, qk_norm=QueryKeyNorm()),
        window=4096,
        usual=_usual_types(config, pick(config, "num_hidden_layers")),
    )


def _usual_types(config: Mapping[str, Any], count: int) -> list[str]:
    """The kinds of layers as ``sliding_window_pattern`` gives them: every n-th is full, or letters that repeat."""
    pattern = pick(config, "sliding_window_pattern", default=None)
    pattern = 4 if pattern is None else pattern
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        # The last layer is full whatever the letters say.
        letters = [pattern[i % len(pattern)] for i in range(count - 1)] + ["G"]
        return [_SLIDING if letter == "L" else _FULL for letter in letters]
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        raise ValueError(
            "sliding_window_pattern in config.json is an integer of at least 1, or letters L and G as in 'LLLG'; it is "
            f"{pattern!r:.80}"
        )
    return [_SLIDING if (i + 1) % pattern else _FULL for i in range(count)]


EXAONE_MOE = Family(
    model_type="exaone_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            # transformers 5 has it in the gate where it writes experts fused.
            "layers.{layer}.moe.correction_bias": (
                "model.layers.{layer}.mlp.e_score_correction_bias",
                "model.layers.{layer}.mlp.gate.e_score_correction_bias",
            ),
            **mlp_tensors("moe.shared", "mlp.shared_experts"),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, "multi-token prediction": r"mtp\..*"},
)
