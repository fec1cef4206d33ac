"""Whole published models: how many parameters they have, and what their layers are."""

from typing import Any

import pytest

from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.models import find_family
from jaxmoe.planning.memory import plan_config
from tests.support.published import MIMO_V2_FLASH

# Config, and parameters in billions as its publisher gives them.
MODELS = {"mimo-v2-flash": (MIMO_V2_FLASH, 309)}


def read(raw: dict[str, Any]) -> DecoderConfig:
    family, config = find_family(raw)
    return family.read_config(config)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_published(name):
    raw, billions = MODELS[name]
    report = plan_config(read(raw), dtype="bfloat16")
    assert round(report.parameters / 1e9) == billions


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
