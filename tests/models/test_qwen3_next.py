"""Config.json of Qwen3-Next and Qwen3.5: released spellings, what is refused by name, and layers that are not loaded."""

import json
import re

import pytest

from jaxmoe.config import AttentionConfig, GatedDeltaNetConfig, MLPConfig, MoEConfig
from jaxmoe.models import get_family
from jaxmoe.models.checks import check_tp
from tests.support.goldens import GOLDENS

pytestmark = pytest.mark.covering

SAVED = {
    name: json.loads((GOLDENS / name / "original" / "config.json").read_text())
    for name in ("qwen3_next", "qwen3_5_moe_text")
}


@pytest.mark.parametrize("name", SAVED)
def test_every_fourth_layer_is_attention_unless_config_says_otherwise(name):
    usual = {key: value for key, value in SAVED[name].items() if key not in ("layer_types", "full_attention_interval")}
    usual |= {"num_hidden_layers": 8, "rope_parameters": None, "mlp_only_layers": [], "intermediate_size": 40}
    layers = get_family(name).read_config(usual).layers
    kinds = [type(layer.attention) for layer in layers]
    assert kinds == [*[GatedDeltaNetConfig] * 3, AttentionConfig] * 2
    assert all(isinstance(layer.feed_forward, MoEConfig) for layer in layers)
    assert layers[0].attention.fused_projections == (name == "qwen3_next")
    # A quarter of each head's dims rotates.
    assert layers[3].attention.rope.rotary_dim == SAVED[name]["head_dim"] // 4
    every_other = get_family(name).read_config(usual | {"full_attention_interval": 2}).layers
    assert [type(layer.attention) for layer in every_other] == [GatedDeltaNetConfig, AttentionConfig] * 4


def test_dense_layers_and_weights_that_do_not_add_up_are_settings_of_qwen3_next_alone():
    settings = {"mlp_only_layers": [0], "decoder_sparse_step": 2, "norm_topk_prob": False, "intermediate_size": 40}
    layers = get_family("qwen3_next").read_config(SAVED["qwen3_next"] | settings).layers
    assert [type(layer.feed_forward) for layer in layers] == [MLPConfig, MoEConfig, MLPConfig]
    assert layers[1].feed_forward.router.choice.normalization is None
    layers = get_family("qwen3_5_moe_text").read_config(SAVED["qwen3_5_moe_text"] | settings).layers
    assert all(layer.feed_forward.router.choice.normalization is not None for layer in layers)


@pytest.mark.parametrize("name", SAVED)
def test_refusals(name):
    read_config = get_family(name).read_config
    with pytest.raises(
        ValueError, match="layer_types of .* are full_attention and linear_attention; .* has 'sliding_attention'"
    ):
        read_config(SAVED[name] | {"layer_types": ["sliding_attention"] * SAVED[name]["num_hidden_layers"]})
    config = read_config(SAVED[name] | {"linear_num_key_heads": 2})
    with pytest.raises(ValueError, match=r"tp=4 does not divide linear_num_key_heads=2; tp can be 1, 2$"):
        check_tp(config, 4, ("ep",))


@pytest.mark.parametrize("name", SAVED)
def test_multi_token_prediction_is_ignored_by_a_named_rule(name):
    family = get_family(name)
    rules = family.ignored_in(family.read_config(SAVED[name]))
    pattern = rules["multi-token prediction"]
    for tensor in ("mtp.fc.weight", "mtp.layers.0.mlp.experts.3.up_proj.weight"):
        assert re.fullmatch(pattern, tensor)
    assert not re.fullmatch(pattern, "model.layers.0.mtp.weight")
