"""Gemma 4's config.json: the spelling of released files, and what is refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmoe.config import AttentionConfig, LayerConfig, MLPConfig
from jaxmoe.models import get_family
from jaxmoe.models.checks import check_tp
from tests.support.goldens import GOLDENS

pytestmark = pytest.mark.covering

SAVED = json.loads((GOLDENS / "gemma4_text" / "original" / "config.json").read_text())
read_config = get_family("gemma4_text").read_config


def test_heads_by_kind_of_layer_as_released_and_layer_by_layer_as_saved():
    assert SAVED["per_layer_config"] == {str(i): {"head_dim": 16, "num_key_value_heads": 1} for i in (1, 2)}
    released = {key: value for key, value in SAVED.items() if key != "per_layer_config"}
    released |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
    assert read_config(released) == read_config(SAVED)
    # Key/value heads of their own belong to layers whose keys are their values.
    apart = read_config(released | {"attention_k_eq_v": False}).layers[1].attention
    assert isinstance(apart, AttentionConfig)
    assert (apart.num_kv_heads, apart.head_dim, apart.values_are_keys) == (SAVED["num_key_value_heads"], 16, False)


def test_every_sixth_layer_and_the_last_one_see_everything():
    usual = {key: value for key, value in SAVED.items() if key not in ("layer_types", "rope_parameters")}
    layers = read_config(usual | {"num_hidden_layers": 8, "per_layer_config": {}}).layers
    windows = [layer.attention.mask and layer.attention.mask.size for layer in layers]
    assert windows == [6, 6, 6, 6, 6, None, 6, None]
    ropes = [layer.attention.rope.frequencies for layer in layers]
    # Heads of 8 dims: four pairs that turn within a window, one of four where everything is seen.
    np.testing.assert_allclose(ropes[0], 10000.0 ** (-np.arange(0, 8, 2) / 8), rtol=1e-6)
    np.testing.assert_allclose(ropes[5], [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size_per_layer_input": 4}, "hidden_size_per_layer_input=4"),
        ({"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input='absent'"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers=1"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "per_layer_config has sliding_window too"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_here_is_refused_by_name(changes, message):
    config = {key: value for key, value in (SAVED | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        read_config(config)


@pytest.mark.parametrize("changes", [{"hidden_size_per_layer_input": None}, {"use_bidirectional_attention": "vision"}])
def test_what_changes_nothing_for_text_is_accepted(changes):
    assert read_config(SAVED | changes) == read_config(SAVED)


def test_a_dense_mlp_stands_beside_routed_experts_and_is_split_over_tp():
    config = read_config(SAVED)
    mlp = MLPConfig(hidden_size=32, intermediate_size=42)
    with pytest.raises(ValueError, match="a parallel MLP stands beside routed experts; the layer has none"):
        LayerConfig(attention=None, feed_forward=mlp, parallel_mlp=mlp)
    with pytest.raises(ValueError, match="a parallel MLP has a norm before it; got pre_norms=False"):
        dataclasses.replace(config.layers[0], pre_norms=False)
    layer = dataclasses.replace(config.layers[0], parallel_mlp=mlp)
    with pytest.raises(ValueError, match="tp=4 does not divide intermediate_size=42"):
        check_tp(dataclasses.replace(config, layers=(layer,)), 4, ("ep",))
