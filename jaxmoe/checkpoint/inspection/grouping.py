"""The purpose of a tensor, by its name alone: families differ in names, and less than one would think."""

import re

GROUPS = (
    "embedding",
    "attention",
    "routed experts",
    "shared experts",
    "router",
    "dense MLP",
    "norms",
    "hyper-connections",
    "head",
    "other",
    "ignored by rule",
)
"""In the order of a table."""

_NAMES = (
    # The first that is found counts: norms and shared experts stand inside other parts. jaxmoe's own names come first.
    ("routed experts", r"\bmoe\.[wb]_(gate_up|down)"),
    ("shared experts", r"\bmoe\.(shared\.|w_shared_gate)"),
    ("router", r"\bmoe\.([wb]_router|router_norm|correction_bias|expert_scale)|^layers\.\d+\.token_experts"),
    ("hyper-connections", r"\b(attention_|feed_forward_)?hyper(_head)?\.(?!norm)"),
    ("shared experts", r"\bshared?_(expert|mlp)"),
    (
        "router",
        r"router|e_score_correction_bias|\bexpert_bias|\bmoe_statics\b|(mlp|moe|mixer|feed_forward|ffn)\.gate\.",
    ),
    ("routed experts", r"\bexperts\.|moe\.(input_linear|output_linear)\b|\bmoe\.(gate|up|down)_proj\b"),
    ("hyper-connections", r"\bhc_(attn|ffn|head)_|\b(attn|ffn)_hc\.|\bhc_head\.|hyper_connection|_res_proj\."),
    ("embedding", r"\.ple\."),
    ("norms", r"norm(_?\d|\.\d|_f)?(\.(weight|bias|scale))?$|\bln_\w+\.|\blayer_scalar$"),
    ("embedding", r"\b(embed_tokens|embed|embeddings|word_embeddings|wte|tok_embeddings)\."),
    ("head", r"\b(lm_head|embed_out|output|head)\."),
    # Nemotron-H calls every layer's one half a mixer.
    ("dense MLP", r"\bmixer\.(up|down|fc[12]_latent)_proj\."),
    ("attention", r"(attn|attention|mamba|mixer|\bconv)\w*\."),
    # transformers writes Kimi Linear's dense MLPs under the name of the MoE block.
    ("dense MLP", r"(mlps?|feed_forward|ffn|block_sparse_moe)\."),
)

_SCALES = (
    r"weight_scale|weight_scale_inv|weight_scale_2|weight_global_scale|input_global_scale|input_scale|activation_scale"
    r"|weight_shape|weight_zero_point|weight_g_idx|qzeros|scales|scale|scale_inv|g_idx|SCB|weight_format|k_scale|v_scale"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)"
)
_PACKED = r"weight_packed|qweight|blocks"
_COMPANION = re.compile(rf"(.*?)[._](?:(?P<packed>{_PACKED})|(?:{_SCALES}))")
# Learned factors of a router and of hyper-connections are called scales as well.
_LEARNED_SCALE = re.compile(
    r".*\brouter\.(per_expert_)?scale|(.*\.)?(hc_(attn|ffn|head)_|(attn|ffn)_hc\.|hc_head\.hc_)scale"
)


def group_of(name: str) -> str:
    """The group of `GROUPS` that a tensor of this name belongs to; "ignored by rule" is never it.

    Example:
        >>> group_of("model.layers.0.self_attn.q_norm.weight")
        'norms'
    """
    return next((group for group, pattern in _NAMES if re.search(pattern, name)), "other")


def quantized_base(name: str) -> tuple[str, bool] | None:
    """The start of the name of a part of a quantized tensor, and whether that part is its packed values.

    Returns:
        None where the name is not of that kind. A plain weight of 8 bits keeps its name, so it is not either.

    Example:
        >>> quantized_base("model.layers.0.mlp.up_proj.weight_scale_inv")
        ('model.layers.0.mlp.up_proj', False)
    """
    match = None if _LEARNED_SCALE.fullmatch(name) else _COMPANION.fullmatch(name)
    return None if match is None else (match[1], match["packed"] is not None)
