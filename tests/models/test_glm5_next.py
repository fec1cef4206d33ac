"""GLM-5.3-Flash beside what the goldens compare: its configs, and how many parameters it has."""

import json

import pytest

import jaxmoe
from jaxmoe.config import KDAConfig, MLAConfig
from jaxmoe.models import FAMILIES, WRAPPERS, find_family
from tests.support.goldens import GOLDENS
from tests.support.published import GLM_5_3_FLASH
from tests.support.saved import assert_equal_tensors, read_all

RAW = json.loads((GOLDENS / "glm5_next" / "original" / "config.json").read_text())
SAVED = RAW["text_config"]


def read(config):
    return FAMILIES["glm5_next_text"].read_config(config)


def test_one_layer_in_four_attends_and_the_first_three_are_dense():
    config = read(GLM_5_3_FLASH)
    kinds = [type(layer.attention) for layer in config.layers]
    assert kinds == ([KDAConfig] * 3 + [MLAConfig]) * 11 + [KDAConfig]
    assert [i for i in range(45) if i not in config.moe_layers] == [0, 1, 2]
    linear, full = config.layers[0].attention, config.layers[3].attention
    assert (linear.num_heads, linear.head_dim, linear.least_log_decay) == (64, 128, -5.0)
    assert (full.rope_head_dim, full.scale, full.latent_norm_eps) == (0, 1 / 16, 1e-5)
    assert (full.indexer.topk, full.indexer.pool_size, full.indexer.reuses) == (2048, 16, False)
    assert config.num_mtp_layers == 1


def test_released_spellings_are_the_same():
    kinds = ["full_attention" if kind == "indexed_attention" else kind for kind in SAVED["layer_types"]]
    assert read(SAVED | {"layer_types": kinds}) == read(SAVED)
    assert read(SAVED | {"indexer_types": None, "index_topk_pattern": "FFSF"}) == read(SAVED)
    names = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
    names |= {"short_conv_kernel_size": "linear_conv_kernel_dim", "gate_lower_bound": "linear_lower_bound"}
    inner = {theirs: SAVED[ours] for theirs, ours in names.items()}
    without = {key: value for key, value in SAVED.items() if key not in names.values()}
    assert read(without | {"linear_attn_config": inner}) == read(SAVED)
    flat = {**SAVED, "model_type": "glm5_next", "vision_config": RAW["vision_config"]}
    family, config = find_family(flat)
    assert family.read_config(config) == read(SAVED)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, -0.7),
        ({"linear_lower_bound": None}, None),
        ({"linear_lower_bound": None, "linear_attn_config": {"gate_lower_bound": None}}, -5.0),
        ({"linear_lower_bound": None, "linear_attn_config": {"gate_lower_bound": None, "safe_gate": False}}, None),
        ({"linear_lower_bound": None, "linear_attn_config": {"gate_lower_bound": -2.0}}, -2.0),
        ({"linear_attn_config": {"head_dim": 5}}, -0.7),
    ],
)
def test_decays_have_a_bound_or_none(changes, bound):
    assert read(SAVED | changes).layers[0].attention.least_log_decay == bound


def test_parameters_are_as_many_as_in_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GLM_5_3_FLASH))
    plan = jaxmoe.plan(tmp_path, ep=8, device="h200", max_length=4096)
    assert plan.parameters == 313_326_828_862


@pytest.mark.parametrize(("form", "theirs"), [("per_expert", "original"), ("fused", "fused")])
def test_the_text_part_is_saved_with_the_names_of_transformers(form, theirs, tmp_path):
    jaxmoe.convert(GOLDENS / "glm5_next" / "original", tmp_path / "out", form=form)
    text_name, saved = WRAPPERS["glm5_next"].text_name, read_all(GOLDENS / "glm5_next" / theirs)
    expected = {text_name(name): tensor for name, tensor in saved.items() if ".visual." not in name}
    assert_equal_tensors(read_all(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 4}, "known with qk_rope_head_dim=0 alone; config.json gives 4"),
        ({"num_key_value_heads": 4}, "known with num_key_value_heads=8 alone"),
        ({"hidden_act": "gelu"}, "known with hidden_act='silu' alone"),
        ({"index_kpool_always_select_tail": False}, "known with index_kpool_always_select_tail=True alone"),
        ({"index_topk": 7}, r"\(index_topk\) fill pools of pool_size=3 \(index_kpool\); got topk=7"),
        ({"index_kpool": 0}, "pool_size"),
        ({"indexer_types": ["full", "shared", "full", "full"]}, "the first layer with an indexer has one of its own"),
        ({"indexer_types": ["full"]}, "has full or shared for each of the 4 layers"),
        ({"layer_types": ["mamba"] * 4}, "layer_types of glm5_next_text are .* has 'mamba'"),
        ({"q_lora_rank": None}, r"q_rank \(q_lora_rank\) is None"),
        ({"linear_lower_bound": 1.0}, "its logarithm is below 0"),
        ({"linear_lower_bound": "low"}, "linear_lower_bound in config.json is a number"),
        ({"linear_attn_config": {"head_dim": 6}}, "linear_head_dim"),
        ({"linear_attn_config": {"gate_lower_bound": -1.0}}, "linear_lower_bound"),
        ({"swiglu_limit": 0.0}, "activation_limit"),
        ({"hc_mult": 0}, "streams"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_config_is_refused_for(changes, message):
    with pytest.raises(ValueError, match=message):
        read(SAVED | changes)
