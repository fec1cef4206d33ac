"""Settings of a config.json that no other one may stand for, and those that say what a layer is."""

from typing import Any

import pytest

from jaxmoe.config import DecoderConfig, MoEConfig, SlidingWindow
from jaxmoe.models import find_family
from tests.support.families import FAMILIES


def read(model_type: str, **changes: Any) -> DecoderConfig:
    family, config = find_family({"model_type": model_type, **FAMILIES[model_type], **changes})
    return family.read_config(config)


def test_granite_has_four_multipliers():
    config = read(
        "granitemoe", embedding_multiplier=2.0, residual_multiplier=3.0, logits_scaling=5.0, attention_multiplier=7.0
    )
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling) == (2.0, 3.0, 5.0)
    assert {layer.attention.scale for layer in config.layers} == {7.0}


@pytest.mark.parametrize(
    "model_type", ["nemotron_h", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "solar_open", "exaone_moe"]
)
def test_routed_experts_are_scaled(model_type):
    moes = [layer.feed_forward for layer in read(model_type, routed_scaling_factor=2.5).layers]
    assert {moe.router.choice.scale for moe in moes if isinstance(moe, MoEConfig)} == {2.5}


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({"first_k_dense_replace": 2}, (2, 3)),
        ({}, (1, 2, 3)),
        ({"first_k_dense_replace": 2, "mlp_layer_types": ["sparse", "dense", "dense", "sparse"]}, (0, 3)),
    ],
    ids=["counted", "usual", "listed"],
)
def test_layers_have_routed_experts_as_listed_or_from_the_first_on(changes, sparse):
    usual = {"num_hidden_layers": 4, "mlp_layer_types": None}
    assert read("glm4_moe_lite", **{**usual, **changes}).moe_layers == sparse


def test_every_fourth_layer_of_llama4_has_no_rotation():
    changes = {"num_hidden_layers": 9, "no_rope_layers": None, "layer_types": None, "no_rope_layer_interval": 4}
    layers = read("llama4_text", **changes).layers
    assert [i for i, layer in enumerate(layers) if layer.attention.rope is None] == [3, 7]
    assert [i for i, layer in enumerate(layers) if layer.attention.mask is None] == [3, 7]
    assert [i for i, layer in enumerate(layers) if layer.attention.temperature is not None] == [3, 7]


def test_layers_of_gpt_oss_have_a_window_by_turns():
    layers = read("gpt_oss", num_hidden_layers=5, layer_types=None, sliding_window=3).layers
    window = SlidingWindow(size=3)
    assert [layer.attention.mask for layer in layers] == [window, None, window, None, window]


@pytest.mark.parametrize(("pattern", "full"), [(3, [2, 5]), ("LLG", [2, 5]), ("GLL", [0, 3, 6]), (None, [3])], ids=str)
def test_windows_of_exaone_moe_follow_a_pattern(pattern, full):
    changes = {"num_hidden_layers": 7, "layer_types": None, "mlp_layer_types": None, "sliding_window_pattern": pattern}
    layers = read("exaone_moe", **changes).layers
    last = [6] if isinstance(pattern, str) else []
    assert [i for i, layer in enumerate(layers) if layer.attention.mask is None] == sorted({*full, *last})
    assert [i for i, layer in enumerate(layers) if layer.attention.rope is None] == sorted({*full, *last})


def test_layers_of_exaone_moe_are_sparse_as_other_engines_read_it():
    changes = {"num_hidden_layers": 3, "mlp_layer_types": None, "is_moe_layer": [True, False, True]}
    assert read("exaone_moe", **changes).moe_layers == (0, 2)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_is_read_in_every_spelling(name, value):
    assert read("mixtral", **{name: value}).dtype == "bfloat16"


@pytest.mark.parametrize("model_type", ["mixtral", "minimax_m2"])
def test_w1_is_the_gate_and_w3_is_up(model_type):
    family, _ = find_family({"model_type": model_type, **FAMILIES[model_type]})
    last_words = [name.split(".")[-2] for name in family.experts.per_expert(0)]
    assert last_words == ["w1", "w3", "w2"]  # in the order gate, up, down
