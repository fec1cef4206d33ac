"""Configs of published models: what their layers are, and that both spellings of a config say the same."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxmoe.config import BlockSparseAttentionConfig, DecoderConfig, KDAConfig, MLAConfig, MoEConfig
from jaxmoe.models import find_family
from jaxmoe.planning.memory import count_parameters
from tests.support.published import (
    ERNIE_4_5_VL_28B,
    ERNIE_4_5_VL_424B,
    KIMI_LINEAR_48B,
    LING_3_FLASH,
    LONGCAT_FLASH_CHAT,
    MIMO_V2_FLASH,
    MINIMAX_M3,
    STEP_3_7_FLASH,
)


def read(raw: dict[str, Any]) -> DecoderConfig:
    family, config = find_family(raw)
    return family.read_config(config)


def test_layers_of_mimo_have_sizes_by_their_kind():
    layers = read(MIMO_V2_FLASH).layers
    full = [i for i, layer in enumerate(layers) if layer.attention.mask is None]
    assert full == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    assert [i for i, layer in enumerate(layers) if not isinstance(layer.feed_forward, MoEConfig)] == [0]
    for i, layer in enumerate(layers):
        attention = layer.attention
        assert (attention.num_heads, attention.head_dim, attention.value_width) == (64, 192, 128)
        assert attention.rope.rotary_dim == 64
        assert (attention.num_kv_heads, attention.sinks) == ((4, False) if i in full else (8, True))
        # A token and the 128 before it.
        assert i in full or attention.mask.size == 129


def test_mimo_is_the_same_in_the_spelling_of_transformers():
    kinds = ["sliding_attention" if window else "full_attention" for window in MIMO_V2_FLASH["hybrid_layer_pattern"]]
    theirs = {
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in MIMO_V2_FLASH["moe_layer_freq"]],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334},
        },
        "sliding_window": 129,
        "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-5,
    }
    of_their_own = (
        "hybrid_layer_pattern",
        "moe_layer_freq",
        "rope_theta",
        "partial_rotary_factor",
        "layernorm_epsilon",
    )
    rest = {
        name: value
        for name, value in MIMO_V2_FLASH.items()
        if name not in of_their_own and not name.startswith(("swa_", "add_", "sliding_window"))
    }
    assert read({**rest, **theirs}) == read(MIMO_V2_FLASH)


def test_layers_of_minimax_m3_choose_blocks_of_keys_behind_the_first_three():
    layers = read(MINIMAX_M3).layers
    for i, layer in enumerate(layers):
        assert (
            isinstance(layer.feed_forward, MoEConfig)
            == isinstance(layer.attention, BlockSparseAttentionConfig)
            == (i > 2)
        )
    indexer = layers[3].attention
    assert (indexer.index_head_dim, indexer.block_size, indexer.top_blocks, indexer.local_blocks) == (128, 128, 16, 1)
    assert indexer.rope.rotary_dim == 64
    assert layers[0].feed_forward.activation_limit == layers[3].feed_forward.shared.activation_limit == 7.0


def test_minimax_m3_is_the_same_in_the_spelling_of_transformers():
    kinds = ["minimax_m3_sparse" if i > 2 else "full_attention" for i in range(60)]
    theirs = {
        "model_type": "minimax_m3_vl_text",
        "hidden_act": "silu",
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if i > 2 else "dense" for i in range(60)],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_block_size": 128,
        "index_topk_blocks": 16,
        "index_local_blocks": 1,
    }
    of_their_own = ("moe_layer_freq", "sparse_attention_config", "rope_theta", "partial_rotary_factor", "scoring_func")
    rest = {name: value for name, value in MINIMAX_M3.items() if name not in of_their_own}
    assert dataclasses.replace(read({**rest, **theirs}), model_type="minimax_m3") == read(MINIMAX_M3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_output_gate": True}, "known with attention_output_gate=False alone"),
        ({"sparse_attention_config": {"sparse_num_index_heads": 8, "sparse_attention_freq": [1] * 60}}, "gives it 8"),
        (
            {"sparse_attention_config": {"sparse_disable_index_value": [0] * 60, "sparse_attention_freq": [1] * 60}},
            "has no values",
        ),
        ({"sparse_attention_config": {"sparse_score_type": "mean"}}, "known with sparse_score_type='max' alone"),
        ({"sparse_attention_config": {"sparse_attention_freq": [2] * 60}}, "has 0 or 1 for each of the 60 layers"),
        ({"swiglu_alpha": 1.0}, "have the factor 1.702 in their sigmoid"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_minimax_m3_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**MINIMAX_M3, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 64}, "are of one window; they are 128 and 64"),
        ({"n_shared_experts": 1}, "is known with n_shared_experts=0 alone"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "are given for each of .* config.json has rope_type beside them"),
        ({"hybrid_layer_pattern": [0]}, "hybrid_layer_pattern in config.json has 0 or 1 for each of the 48 layers"),
        ({"mlp_layer_types": ["moe"] * 48}, "mlp_layer_types of mimo_v2_flash are sparse and dense"),
    ],
)
def test_what_mimo_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**MIMO_V2_FLASH, **changes})


def test_layers_of_step_have_heads_rotations_and_limits_of_their_own():
    config = read(STEP_3_7_FLASH)
    assert (len(config.layers), config.num_mtp_layers) == (45, 3)
    for i, layer in enumerate(config.layers):
        attention, moe = layer.attention, layer.feed_forward
        assert (attention.num_heads, attention.num_kv_heads) == ((96, 8) if i % 4 else (64, 8))
        assert (attention.mask is not None) == bool(i % 4)
        assert attention.rope.rotary_dim == (128 if i % 4 else 64)
        assert isinstance(moe, MoEConfig) == (i > 2)
        if i > 2:
            assert (moe.activation_limit, moe.shared.activation_limit) == ((7.0, 16.0) if i > 42 else (None, None))
    # The scaling is of full layers: theirs are slower by half at the end.
    slowest = [layer.attention.rope.frequencies[-1] for layer in config.layers[:2]]
    np.testing.assert_allclose(slowest, [5e6 ** -(62 / 64) / 2, 1e4 ** -(126 / 128)], rtol=1e-6)


def test_step_is_the_same_in_the_spelling_of_transformers():
    released = STEP_3_7_FLASH["text_config"]
    scaling = released["rope_scaling"]
    same = (
        "vocab_size hidden_size num_hidden_layers num_nextn_predict_layers num_attention_heads head_dim dtype "
        "sliding_window intermediate_size moe_intermediate_size moe_router_scaling_factor max_position_embeddings"
    ).split()
    theirs = {
        "model_type": "step3p5",
        "layer_types": released["layer_types"][:45],
        "mlp_layer_types": ["sparse" if i > 2 else "dense" for i in range(45)],
        "num_sliding_attention_heads": 96,
        "per_layer_config": {str(i): {"num_attention_heads": 96} for i in range(45) if i % 4},
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 128,
        "rope_parameters": {
            "full_attention": {"rope_theta": 5e6, "partial_rotary_factor": 0.5, **scaling},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "share_expert_dim": 1280,
        "swiglu_limits": released["swiglu_limits"][:45],
        "swiglu_limits_shared": released["swiglu_limits_shared"][:45],
    }
    assert read({**{name: released[name] for name in same}, **theirs}) == read(STEP_3_7_FLASH)
    # A config.json of the whole model may have the text part's settings on top.
    flat = {**released, "model_type": "step3p7", "vision_config": {"width": 1}}
    assert read(flat) == read(STEP_3_7_FLASH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_centered": False}, "known with zero_centered=True alone"),
        ({"moe_layers_enum": "3,x"}, "has the indices of layers; it is '3,x'"),
        ({"rope_theta": [1.0]}, "rope_theta has a number for each of the 45 layers; it has 1"),
        ({"swiglu_limits": [1.0]}, "swiglu_limits in config.json has a number for each of the 45 layers"),
        ({"hidden_act": "gelu"}, "limits of step3p5 are of silu"),
        ({"attention_other_setting": {"head_dim": 64}}, "differ in num_attention_heads alone; .* another head_dim"),
        ({"per_layer_config": {"45": {"num_attention_heads": 64}}}, "is by the index of a layer"),
    ],
)
def test_what_step_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**STEP_3_7_FLASH["text_config"], **changes})


def test_layers_of_kimi_linear_are_by_two_lists_from_one_and_have_no_positions():
    config = read(KIMI_LINEAR_48B)
    full = [i for i, layer in enumerate(config.layers) if isinstance(layer.attention, MLAConfig)]
    assert full == [3, 7, 11, 15, 19, 23, 26]
    assert (config.layers[3].attention.rope, config.layers[3].attention.rope_head_dim) == (None, 64)
    recurrent = KDAConfig(
        num_heads=32, head_dim=128, conv_kernel_size=4, decay_rank=128, gate_rank=128, wide_rates=True
    )
    assert {layer.attention for i, layer in enumerate(config.layers) if i not in full} == {recurrent}
    assert [isinstance(layer.feed_forward, MoEConfig) for layer in config.layers] == [False] + [True] * 26
    assert config.max_position_embeddings == 1048576
    # 48B-A3B, as its name says.
    assert [round(count / 1e9) for count in count_parameters(config)] == [49, 3]


def test_kimi_linear_is_the_same_in_the_spelling_of_transformers():
    theirs = {
        "layer_types": ["full_attention" if i in (3, 7, 11, 15, 19, 23, 26) else "linear_attention" for i in range(27)],
        "mlp_layer_types": ["dense"] + ["sparse"] * 26,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
    }
    of_their_own = ("linear_attn_config", "first_k_dense_replace", "rope_theta", "rope_scaling", "mla_use_nope")
    rest = {name: value for name, value in KIMI_LINEAR_48B.items() if name not in of_their_own}
    assert read({**rest, **theirs}) == read({**KIMI_LINEAR_48B, **theirs}) == read(KIMI_LINEAR_48B)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func of kimi_linear can be sigmoid"),
        ({"mla_use_nope": False}, "known with mla_use_nope=True alone"),
        ({"n_shared_experts": 2}, "num_shared_experts=1"),
        ({"moe_renormalize": True, "norm_topk_prob": False}, "norm_topk_prob=False and moe_renormalize=True"),
        ({"layer_types": ["linear_attention"] * 27}, "layer_types by linear_attn_config"),
        ({"linear_head_dim": 64}, "linear_head_dim=64 and linear_attn_config.head_dim=128"),
        (
            {"linear_attn_config": {"full_attn_layers": [1], "kda_layers": [0]}},
            "each of the 27 layers once, counted from",
        ),
        # A text part of Kimi K3 calls itself kimi_linear; what it has is known together alone.
        ({"linear_attn_config": {"use_full_rank_gate": True}}, "use_full_rank_gate=True and gate_lower_bound=None"),
    ],
)
def test_what_kimi_linear_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**KIMI_LINEAR_48B, **changes})


def test_layers_of_ling_3_come_in_groups_and_the_last_ones_have_limits():
    config = read(LING_3_FLASH)
    for i, layer in enumerate(config.layers):
        attention, moe = layer.attention, layer.feed_forward
        if i % 6 == 5:
            assert (attention.head_gates, attention.rope.rotary_dim, attention.q_rank) == (True, 64, None)
        else:
            assert attention == KDAConfig(num_heads=32, head_dim=128, conv_kernel_size=4, least_log_decay=-5.0)
        assert isinstance(moe, MoEConfig) == (i > 1)
        if i > 1:
            limits = (4.0 if i > 34 else None, 7.0 if i > 39 else 5.0 if i > 33 else None)
            assert (moe.activation_limit, moe.shared.activation_limit) == limits
            assert (moe.activation, moe.shared.activation) == tuple("capped_swiglu" if x else "silu" for x in limits)
    assert config.num_mtp_layers == 1
    # 5.1B of a token's parameters beside its row of the embedding, as published.
    active = count_parameters(config)[1] - config.vocab_size * config.hidden_size
    assert round(active / 1e9, 1) == 5.1


def test_ling_3_is_the_same_in_the_spelling_of_transformers():
    theirs = {
        "architectures": ["BailingHybridForCausalLM"],
        "head_dim": 64,  # of what rotates
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention" if i % 6 < 5 else "full_attention" for i in range(42)],
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 40,
        "rope_parameters": {"rope_type": "default", "rope_theta": 6e6},
    }
    renamed = {"num_experts_per_tok": "num_experts_per_token", "n_group": "num_expert_group"}
    rest = {renamed.get(name, name): value for name, value in LING_3_FLASH.items() if name != "partial_rotary_factor"}
    assert read({**rest, **theirs}) == read(LING_3_FLASH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BailingMoeV2_5ForCausalLM"]}, "whose layers have lightning attention"),
        ({"no_kda_lora": False}, "known with no_kda_lora=True alone"),
        ({"score_function": "softmax"}, "score_function of bailing_hybrid can be sigmoid"),
        ({"layer_group_size": 5}, "num_hidden_layers=42 and layer_group_size=5"),
        ({"moe_shared_expert_intermediate_size": 512}, "moe_shared_expert_intermediate_size=512"),
        ({"partial_rotary_factor": 0.25}, "rotate as a whole"),
        ({"expert_swiglu_limit_list": [1.0] * 42}, "gives one to a dense layer"),
        ({"expert_swiglu_limit_list": [0.0]}, "has a number for each of the 42 layers"),
        ({"kda_lower_bound": 0.0}, "its logarithm is below 0"),
    ],
)
def test_what_ling_3_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**LING_3_FLASH, **changes})


@pytest.mark.parametrize(
    ("released", "dense", "experts"), [(ERNIE_4_5_VL_28B, 1, (6, 1536, 3072)), (ERNIE_4_5_VL_424B, 3, (8, 3584, None))]
)
def test_layers_of_ernie_vl_have_the_experts_of_text(released, dense, experts):
    config = read(released)
    routed = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, MoEConfig)]
    assert config.moe_layers == tuple(range(dense, released["num_hidden_layers"]))
    shared = routed[0].shared and routed[0].shared.intermediate_size
    assert (routed[0].num_experts_per_tok, routed[0].moe_intermediate_size, shared) == experts
    assert {moe.num_experts for moe in routed} == {64}
    # For text alone the three parts of the rotary positions are one.
    rope = config.layers[0].attention.rope
    assert rope.interleaved
    np.testing.assert_allclose(rope.frequencies, 5e5 ** (-np.arange(0, 128, 2) / 128), rtol=1e-6)


def test_ernie_vl_is_the_same_in_the_spelling_of_transformers():
    of_their_own = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "model_type", "vision_config")
    text = {name: value for name, value in ERNIE_4_5_VL_28B.items() if name not in of_their_own}
    text |= {"moe_num_experts": 64, "mlp_layer_types": ["dense"] + ["sparse"] * 27}
    assert read({"model_type": "ernie4_5_vl_moe", "text_config": text}) == read(ERNIE_4_5_VL_28B)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_num_experts": [64, 32]}, r"moe_num_experts .* is the same for text and vision, .* it is \[64, 32\]"),
        ({"moe_layer_start_index": [1, 2]}, "moe_layer_start_index of ernie4_5_vl_moe is the same for text and vision"),
        ({"moe_layer_end_index": [27, 20]}, "moe_layer_end_index of ernie4_5_vl_moe is the same for text and vision"),
        ({"moe_intermediate_size": [1536]}, "is an integer for text and one for vision; it is \\[1536\\]"),
        ({"mlp_layer_types": ["dense", "sparse"] * 14}, "follow one another; mlp_layer_types has 'sparse' for .1, 3"),
        ({"mlp_layer_types": ["dense"] * 28}, "follow one another; mlp_layer_types has 'sparse' for none"),
    ],
)
def test_what_ernie_vl_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**ERNIE_4_5_VL_28B, **changes})


def test_layers_of_longcat_are_pairs_with_experts_beside_the_second():
    config = read(LONGCAT_FLASH_CHAT)
    assert (len(config.layers), config.moe_layers) == (56, tuple(range(0, 56, 2)))
    first, second = config.layers[:2]
    assert first.shortcut_mlp == second.feed_forward
    assert (first.feed_forward.num_choices, first.feed_forward.num_experts) == (768, 512)
    assert first.attention.scale == pytest.approx(192**-0.5 * 2)
    assert first.attention.latent_scale == pytest.approx(12**0.5)
    np.testing.assert_allclose(first.attention.rope.frequencies[-1], 1e7 ** (-62 / 64), rtol=1e-6)
    # Published as 560B with 18.6B to 31.3B, 27B on average, without the embedding.
    total, active = count_parameters(config)
    expert, embedding = 28 * 3 * 6144 * 2048, 131072 * 6144
    assert total // 10**9 == 560
    assert [(active - embedding + more * expert) // 10**8 for more in (-8, 0, 4)] == [186, 271, 313]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mla_scale_q_lora": False}, "longcat_flash is known with mla_scale_q_lora=True alone"),
        ({"zero_expert_type": "zero"}, "longcat_flash is known with zero_expert_type='identity' alone"),
        ({"q_lora_rank": None}, "queries of longcat_flash are made from a latent; config.json has q_lora_rank=null"),
        (
            {"num_hidden_layers": 30},
            "num_hidden_layers of longcat_flash is num_layers, or twice that; they are 30 and 28",
        ),
        ({"num_layers": None, "num_hidden_layers": 3}, "counts two for each layer; it is 3"),
    ],
)
def test_what_longcat_does_not_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**LONGCAT_FLASH_CHAT, **changes})
    halves = {"num_layers": None, "num_hidden_layers": 56}
    assert read({**LONGCAT_FLASH_CHAT, **halves}) == read(LONGCAT_FLASH_CHAT)
