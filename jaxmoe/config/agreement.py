"""Two settings of one thing in a config.json: they say the same, or the config is refused with both.

Which of two that differ was meant nobody can know: an engine that reads the one runs another model than an engine that
reads the other, and neither says so.
"""

from collections.abc import Iterable, Mapping
from typing import Any

SPELLINGS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "experts": (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_routed_experts",
    ),
    "experts per token": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_k",
        "moe_topk",
        "top_k_experts",
        "moe_top_k",
        "num_selected_experts",
    ),
    "shared experts": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "model width": ("hidden_size", "d_model", "n_embd"),
    "expert width": ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    "dense width": ("intermediate_size", "ffn_hidden_size"),
    "query heads": ("num_attention_heads", "n_heads", "n_head"),
    "key and value heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "head width": ("head_dim", "attention_head_dim"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "max_seq_len", "n_positions"),
    "epsilon of norms": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "activation": ("hidden_act", "hidden_activation"),
    "tied embeddings": ("tie_word_embeddings", "tie_embeddings"),
    "dtype": ("dtype", "torch_dtype"),
    "expert groups": ("n_group", "num_expert_group"),
    "sliding window": ("sliding_window",),
}
"""Thing -> names that config.json may have for it, in whatever family."""

# Of these `Wrapper.text_config` says which level counts.
_LEVELED = ("dtype", "tied embeddings")


def check_agreement(config: Mapping[str, Any], text: Mapping[str, Any] | None = None) -> None:
    """Refuse settings of one thing that differ, under several names or on two levels.

    Args:
        config: dictionary of config.json.
        text: its part for the text model, where it has one.

    Raises:
        ValueError: two differ; both are named with their values.

    Example:
        >>> check_agreement({"num_experts": 8, "n_routed_experts": 16})
        Traceback (most recent call last):
        ...
        ValueError: config.json says one thing once; it has num_experts=8 and n_routed_experts=16, which differ; remove \
the one that is not meant
    """
    levels = {"": config} if text is None else {"": config, "text_config.": text}
    for thing, names in SPELLINGS.items():
        together = [levels] if thing not in _LEVELED else [{prefix: level} for prefix, level in levels.items()]
        for each in together:
            check_equal((f"{prefix}{name}", level.get(name)) for prefix, level in each.items() for name in names)


def check_equal(settings: Iterable[tuple[str, Any]]) -> None:
    """Refuse two settings whose values differ; null counts as absent, and equal values for all layers as one of them.

    Args:
        settings: pairs of a name and a value.

    Raises:
        ValueError: two differ.
    """
    there = [(name, value) for name, value in settings if value is not None]
    for name, value in there[1:]:
        first, known = there[0]
        if _plain(value) != _plain(known):
            raise ValueError(
                f"config.json says one thing once; it has {first}={known!r:.60} and {name}={value!r:.60}, which differ; "
                "remove the one that is not meant"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value.removeprefix("torch.") if isinstance(value, str) else value
