"""How rope settings of a config.json become frequencies, where their spellings and places differ."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jaxmoe.models import Decoder, find_family
from jaxmoe.models.checks import check_length
from jaxmoe.rotary import RopeConfig, read_rope
from tests.support.families import FAMILIES
from tests.support.meshes import mesh_of

SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(16)],
        "long_factor": [1.5 + pair for pair in range(16)],
    },
}


def read(rope: dict[str, Any], **config: Any) -> RopeConfig:
    beside = {"model_type": "mixtral", "max_position_embeddings": 4096, **config, "rope_parameters": rope}
    return read_rope(beside, head_dim=32, default_theta=10000.0)


@pytest.mark.parametrize("kind", SCALED)
def test_original_context_beside_the_rope_settings_counts_first(kind):
    wanted = read({**SCALED[kind], "original_max_position_embeddings": 64})
    assert read(SCALED[kind], original_max_position_embeddings=64) == wanted
    both = {**SCALED[kind], "original_max_position_embeddings": 512}
    assert read(both, original_max_position_embeddings=64) == wanted != read(both)


@pytest.mark.parametrize("kind", SCALED)
def test_original_context_is_the_whole_one_where_none_is_named(kind):
    assert read(SCALED[kind]) == read({**SCALED[kind], "original_max_position_embeddings": 4096})
    with pytest.raises(ValueError, match=f"{kind}' needs 'original_max_position_embeddings'"):
        read(SCALED[kind], max_position_embeddings=None)


def test_proportional_turns_whole_pairs():
    rope = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    frequencies = read_rope({"rope_parameters": rope}, head_dim=10, default_theta=1.0).frequencies
    assert [frequency > 0 for frequency in frequencies] == [True, True, False, False, False]


PARTIAL = {"glm4_moe", "minimax_m2", "minimax_m3_vl_text", "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text"}
BY_KIND_OF_LAYER = {"gemma4_text", "mimo_v2_flash"}
NO_POSITIONS = {"nemotron_h", "jamba", "kimi_linear"}
TRAILING_DIMS = {"deepseek_v4"}  # a part at the end of a head, with tests of its own
WHOLE = sorted(FAMILIES.keys() - PARTIAL - BY_KIND_OF_LAYER - NO_POSITIONS - TRAILING_DIMS)


@pytest.mark.parametrize("model_type", sorted(PARTIAL))
def test_a_part_of_a_head_rotates_in_some_families(model_type):
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}
    family, config = find_family(
        {"model_type": model_type, **FAMILIES[model_type], "rope_parameters": rope, "rotary_dim": None}
    )
    layers = family.read_config(config).layers
    assert {layer.attention.rope.rotary_dim for layer in layers if hasattr(layer.attention, "rope")} == {2}


@pytest.mark.parametrize("model_type", WHOLE)
@pytest.mark.parametrize("place", ["rope_parameters", "config.json"])
def test_a_part_of_a_head_is_refused_where_heads_rotate_as_a_whole(model_type, place):
    config = {"model_type": model_type, **FAMILIES[model_type]}
    if place == "config.json":
        config["partial_rotary_factor"] = 0.5
    else:
        config["rope_parameters"] = {**config.get("rope_parameters", {}), "partial_rotary_factor": 0.5}
    family, config = find_family(config)
    with pytest.raises(ValueError, match=f"heads of {model_type} rotate as a whole; .* partial_rotary_factor=0.5"):
        family.read_config(config)


def test_llama3_with_equal_factors_keeps_or_divides_and_blends_nothing():
    """As Llama 4 Scout has them; a division by zero would be a warning, and so an error here."""
    equal = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    plain = read({"rope_type": "default"})
    found = read({**equal, "original_max_position_embeddings": 64})
    kept = [2 * math.pi / frequency <= 64 for frequency in plain.frequencies]
    assert 0 < sum(kept) < len(kept)
    wanted = [whole if keep else whole / 16 for whole, keep in zip(plain.frequencies, kept, strict=True)]
    assert found.frequencies == pytest.approx(wanted)


def test_dynamic_scaling_by_a_factor_changes_nothing_up_to_the_trained_length_and_is_refused_beyond():
    found = read({"type": "dynamic", "factor": 2.0})
    assert found == dataclasses.replace(read({"rope_type": "default"}), up_to=4096)
    family, config = find_family(
        {**FAMILIES["mixtral"], "model_type": "mixtral", "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    )
    model = Decoder(family.read_config(config), mesh=mesh_of(1, 1, 1), rngs=nnx.Rngs(0))
    check_length(model.config, 512)
    for length in (513, 1000):
        with pytest.raises(ValueError, match=rf"beyond the 512 tokens .*; got {length} tokens; .* such as yarn"):
            model(np.zeros((1, length), np.int32))
