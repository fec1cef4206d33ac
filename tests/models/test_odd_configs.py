"""A config.json that says something else than a model's: refused with its setting's name, or read."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from jaxmoe.config import SlidingWindow
from jaxmoe.models import FAMILIES, WRAPPERS, find_family, read_model_config
from tests.support.goldens import GOLDENS

pytestmark = pytest.mark.covering

CONFIGS = {
    path.parent.parent.name: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*/original/config.json"))
}
ODD: list[Any] = ["x", ["x"], [1], {"a": 1}, [], {}, 0, -1, 1.5, float("inf"), None]


def places(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where in a config there is a setting."""
    for name, value in config.items():
        if (*path, name) != ("model_type",):
            yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(config)
    inner = result
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return result


@pytest.mark.covering(most=12)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_no_value_of_a_setting_is_a_crash(name):
    """Nothing but a ValueError comes out, whatever kind of value a setting has."""
    refused = 0
    for path in places(CONFIGS[name]):
        for value in ODD:
            config = changed(CONFIGS[name], path, value)
            try:
                family, config = find_family(config)
                family.read_config(config)
            except ValueError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"hidden_size": "32"}, "hidden_size in config.json is an integer; it is '32'"),
        (
            "mixtral",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers .* at least 1 and at most 10000; it is 1000000000",
        ),
        ("mixtral", {"num_local_experts": 10**9}, "at most 1000000 experts together; config.json: 2000000000"),
        ("mixtral", {"num_attention_heads": 0}, "num_attention_heads in config.json is at least 1; it is 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step in config.json is at least 1; it is 0"),
        ("qwen3_moe", {"norm_topk_prob": "no"}, "norm_topk_prob in config.json is true or false; it is 'no'"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers in config.json is a list; it is 3"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "a kind for each of the 3 layers; it has 1"),
        ("qwen2_moe", {"layer_types": ["mamba"] * 3}, "layer_types of qwen2_moe are .*; config.json has 'mamba'"),
        (
            "gpt_oss",
            {"layer_types": ["chunked_attention"] * 2},
            "layer_types of gpt_oss are .* has 'chunked_attention'",
        ),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["sparse"]},
            "has dense or sparse for each of the 2 layers; config.json has",
        ),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "moe"]}, r"config.json has \['sparse', 'moe'\]"),
        ("glm4_moe_lite", {"topk_method": "greedy"}, "topk_method of glm4_moe_lite can be noaux_tc; .*'greedy'"),
        (
            "solar_open",
            {"first_k_dense_replace": 1},
            "solar_open is known with first_k_dense_replace=0 alone; .* gives 1",
        ),
        (
            "minimax_m2",
            {"use_qk_norm": False},
            "minimax_m2 is known with use_qk_norm=True alone; config.json gives False",
        ),
        (
            "exaone_moe",
            {"is_moe_layer": [False, True, True]},
            r"say the same of every layer; .* has \[False, True, True\] and \['sparse', 'dense', 'dense'\]",
        ),
        (
            "exaone_moe",
            {"layer_types": None, "sliding_window_pattern": "LXG"},
            "integer of at least 1, or letters L and G as in 'LLLG'; it is 'LXG'",
        ),
        ("exaone_moe", {"sliding_window": None}, "has layers with a window, of sliding_window positions; .* has null"),
        ("afmoe", {"route_norm": False}, "afmoe is known with route_norm=True alone; config.json gives False"),
        (
            "afmoe",
            {"global_attn_every_n_layers": 0},
            "global_attn_every_n_layers in config.json is at least 1; it is 0",
        ),
        ("hy_v3", {"qk_norm": False}, "hy_v3 is known with qk_norm=True alone; config.json gives False"),
        ("llama4_text", {"no_rope_layers": [1]}, "no_rope_layers has a number for each of the 3 layers; it has 1"),
        ("hunyuan_v1_moe", {"moe_topk": [3]}, "has a value for each layer; got {'moe_topk': ..*"),
        ("mixtral", {"rope_parameters": "yarn"}, "rope_scaling and rope_parameters in config.json are objects"),
        ("mixtral", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta of the rope settings is a number above 0"),
        (
            "gpt_oss",
            {"sliding_window": None},
            "layers of sliding_attention need a sliding_window; config.json gives null",
        ),
        ("mixtral", {"head_dim": 0}, "width of a head .*head_dim.* is at least 1; it is 0"),
        ("mixtral", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}}, "a rope_theta above 1"),
        ("minimax_m2", {"rotary_dim": 2}, "partial_rotary_factor=0.5 of .* and rotary_dim=2, which differ"),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' needs 'factor' in config.json's rope"),
        ("phimoe", {"lm_head_bias": True, "tie_word_embeddings": True}, "a tied output projection has no bias"),
        ("ernie4_5_moe", {"use_bias": True, "tie_word_embeddings": True}, "a tied output projection has no bias"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_messages_name_the_setting(name, changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("", "download it again"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("Access to model a/b is restricted.", "a server's answer and not the file"),
        ('{"error":"Access to model a/b is restricted."}', "a server's answer and not the file"),
        ('{"vocab_size": 8}', "take the config.json that transformers wrote"),
    ],
)
def test_what_was_downloaded_in_place_of_a_config_is_told(text, way_out, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json .*{way_out}"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": ' + "1" * 10_000 + "}", "\udcff"])
def test_what_is_no_json_is_told_so(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is not readable as JSON"):
        read_model_config(tmp_path)


def test_a_single_expert_needs_no_number_of_experts_per_token():
    config = {**CONFIGS["jamba"], "num_experts": 1}
    del config["num_experts_per_tok"]
    assert FAMILIES["jamba"].read_config(config).moe_layers == ()


def test_a_window_without_a_size_has_the_usual_one_and_null_is_no_window():
    config = {**CONFIGS["qwen3_moe"], "use_sliding_window": True}
    config.pop("sliding_window", None)
    read = FAMILIES["qwen3_moe"].read_config
    assert read(config).layers[0].attention.mask == SlidingWindow(size=4096)
    assert read({**config, "sliding_window": None}).layers[0].attention.mask is None


def test_every_family_with_a_golden_is_tried():
    assert CONFIGS.keys() <= {*FAMILIES, *WRAPPERS}
