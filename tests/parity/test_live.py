"""The same checks as the goldens, live against transformers, with other sizes and seeds."""

from typing import Any

import pytest

from tests.support import runs
from tests.support.families import EVERY_KIND, FAMILIES, NEW_TOKENS, ON_EVERY_MESH
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
pytest.importorskip("transformers", reason="live parity needs torch and transformers: scripts/test --parity")

import jaxmoe  # noqa: E402
from scripts.make_goldens import make_model, make_prompts, reference, save_forms  # noqa: E402
from tests.support.goldens import GOLDENS, check_greedy, check_logits, check_same_parameters  # noqa: E402

EXPERTS_KEYS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}


def with_experts(sizes: dict[str, Any], experts: int) -> dict[str, Any]:
    """The arguments of a config that give it so many experts; DBRX has them a level deeper.

    Experts in groups stay as many as they are: any other number might not divide.
    """
    if sizes.get("n_group", 1) > 1:
        return {}
    if "ffn_config" in sizes:
        return {"ffn_config": {**sizes["ffn_config"], **with_experts(sizes["ffn_config"], experts)}}
    (key,) = EXPERTS_KEYS & sizes.keys()
    return {key: experts}


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A saved model and what transformers computes with it."""
    family, experts = request.param
    directory = tmp_path_factory.mktemp(family)
    model = make_model(family, seed=experts, **with_experts(FAMILIES[family], experts))
    save_forms(model, directory)
    prompts = make_prompts(model.config.vocab_size, seed=experts)
    loose = reference(model, prompts, new_tokens=NEW_TOKENS if family in EVERY_KIND else 1)
    count = len(loose) // 3
    return (
        family,
        directory,
        {kind: [loose[f"{kind}_{i}"] for i in range(count)] for kind in ("prompt", "logits", "greedy")},
    )


# Each device has a number of experts of its own.
LAYOUTS = [
    ((2, 2, 2), "round_robin", "original"),
    ((2, 2, 2), "linear", "fused"),
    ((1, 2, 4), "linear", "original"),
    ((1, 2, 4), "round_robin", "fused"),
    ((1, 1, 8), "linear", "original"),
    ((1, 1, 8), "round_robin", "fused"),
]
# The stored results, which have 11 experts, cover the other meshes; of some transformers writes one form only.
CASES = [
    ((family, experts), *layout)
    for family in FAMILIES
    for experts, layouts in (((8, LAYOUTS), (11, LAYOUTS[:2])) if family in ON_EVERY_MESH else ((11, LAYOUTS[:2]),))
    for layout in layouts
    if layout[2] == "original" or (GOLDENS / family / "fused").is_dir()
]


@pytest.mark.covering
@pytest.mark.parametrize(("case", "mesh_shape", "placement", "form"), CASES, indirect=["case"], ids=str)
def test_logits_and_greedy_tokens(case, mesh_shape, placement, form):
    family, directory, expected = case
    layout = {"mesh": mesh_of(*mesh_shape), "placement": placement}
    model = jaxmoe.load(directory / form, **layout)
    if form != "original":  # whose logits other cases compare
        check_same_parameters(model, jaxmoe.load(directory / "original", **layout))
        return
    check_logits(model, expected)
    if family in EVERY_KIND:  # the others generate what is stored of transformers
        check_greedy(model, expected)


# Settings that do not hide one another share a model.
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "qwen3_moe",
            {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True, "mlp_only_layers": [0]}
            | {"hidden_act": "gelu_pytorch_tanh"},
        ),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 11, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 6}
            | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        ),
        ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "use_sliding_window": False}),
        ("olmoe", {"attention_bias": True, "norm_topk_prob": True, "clip_qkv": None}),
        ("granitemoe", {"attention_bias": True, "tie_word_embeddings": True}),
        ("ernie4_5_moe", {"use_bias": False, "tie_word_embeddings": True, "moe_layer_interval": 2}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 1}),
        ("minimax_m2", {"rotary_dim": None}),
        ("hunyuan_v1_moe", {"attention_bias": True, "moe_topk": 1, "rope_parameters": None}),
        (
            "deepseek_v3",
            {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "rope_parameters": None}
            | {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        ),
        ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": 20, "mlp_bias": True}),
        ("deepseek_v2", {"topk_group": 1, "num_experts_per_tok": 7, "first_k_dense_replace": 0}),
        (
            "glm4_moe_lite",
            {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "mlp_layer_types": None}
            | {"norm_topk_prob": False, "n_routed_experts": 12, "n_group": 3},
        ),
        (
            "solar_open",
            {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "attention_bias": False}
            | {"rope_parameters": None, "tie_word_embeddings": True},
        ),
        ("exaone_moe", {"layer_types": None, "mlp_layer_types": None, "sliding_window_pattern": 3}),
        ("exaone_moe", {"layer_types": ["full_attention"] * 3, "norm_topk_prob": False, "first_k_dense_replace": 2}),
        ("deepseek_v32", {"attention_bias": True, "rope_parameters": None, "index_topk": 1}),
        ("deepseek_v4", {"scoring_func": "sigmoid", "rope_parameters": None, "mlp_layer_types": ["moe"] * 4}),
        ("deepseek_v4", {"layer_types": None, "mlp_layer_types": None, "num_hash_layers": 2, "index_topk": 1}),
        ("glm_moe_dsa", {"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 1, "index_topk": 30}),
        (
            "afmoe",
            {"attention_bias": True, "mup_enabled": False, "layer_types": None, "global_attn_every_n_layers": 2}
            | {"tie_word_embeddings": True, "num_shared_experts": 2, "num_dense_layers": 0},
        ),
        ("flex_olmo", {"attention_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True}),
        ("hy_v3", {"attention_bias": True, "mlp_bias": False, "mlp_layer_types": ["sparse", "dense"]}),
        ("qwen3_next", {"attention_bias": True, "norm_topk_prob": False, "mlp_only_layers": []}),
        (
            "qwen4_exp_text",
            {"layer_types": None, "full_attention_interval": 2, "output_gate_type": None, "attention_bias": True}
            | {"norm_topk_prob": False, "hc_count": 2, "ple_layer_ids": None},
        ),
        (
            "qwen4_exp_text",
            {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "ngram_size": 4}
            | {"ple_layer_ids": [3, 1], "heads_per_ngram": 1}
            | {"ple_embed_dim": 15, "ple_conv_kernel_size": 2, "eos_token_id": [5, 2]},
        ),
        (
            "gemma4_text",
            {"attention_bias": True, "attention_k_eq_v": False, "final_logit_softcapping": None}
            | {"enable_moe_block": False, "tie_word_embeddings": False, "rope_parameters": None},
        ),
        (
            "mimo_v2_flash",
            {"attention_bias": False, "attention_value_scale": None, "sliding_window_size": 3}
            | {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "rope_parameters": None},
        ),
        ("minimax_m3_vl_text", {"index_topk_blocks": 2, "index_local_blocks": 2, "tie_word_embeddings": True}),
        (
            "minimax_m3_vl_text",
            {"index_local_blocks": 0, "index_block_size": 3, "rope_parameters": None, "index_head_dim": 8},
        ),
        (
            "lfm2_moe",
            {"conv_bias": False, "use_expert_bias": False, "norm_topk_prob": False, "tie_word_embeddings": False},
        ),
        (
            "kimi_linear",
            {"q_lora_rank": 20, "num_local_experts": 12, "n_group": 3, "topk_group": 2, "layer_types": None}
            | {"mlp_layer_types": None, "num_hidden_layers": 5, "norm_topk_prob": False},
        ),
        (
            "bailing_hybrid",
            {"kda_safe_gate": False, "q_lora_rank": None, "attention_bias": True, "kda_lower_bound": -1.0}
            | {"layer_types": None, "layer_group_size": 3, "n_group": 1, "topk_group": 1},
        ),
        ("longcat_flash", {"num_layers": 1, "zero_expert_num": 0, "tie_word_embeddings": True, "moe_topk": 11}),
        (
            "granitemoehybrid",
            {"position_embedding_type": None, "mamba_proj_bias": False, "mamba_conv_bias": False}
            | {"num_local_experts": 0, "mamba_n_groups": 1, "tie_word_embeddings": True},
        ),
        ("granitemoeshared", {"shared_intermediate_size": 0, "attention_bias": True}),
        ("jamba", {"mamba_proj_bias": False, "mamba_conv_bias": False, "mamba_dt_rank": "auto"}),
        (
            "nemotron_h",
            {"moe_latent_size": None, "use_bias": False, "mlp_bias": False, "use_conv_bias": False}
            | {"n_groups": 1, "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "norm_topk_prob": False},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings_of_a_config(family, changes, tmp_path):
    model = make_model(family, seed=3, **changes)
    model.save_pretrained(tmp_path)
    generates = runs.full and family in EVERY_KIND
    loose = reference(model, make_prompts(97, seed=3), new_tokens=16 if generates else 1)
    expected = {kind: [loose[f"{kind}_{i}"] for i in range(5)] for kind in ("prompt", "logits", "greedy")}
    loaded = jaxmoe.load(tmp_path, mesh=mesh_of(2, 2, 2))
    check_logits(loaded, expected)
    if generates:
        check_greedy(loaded, expected)
