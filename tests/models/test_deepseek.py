"""DeepSeek's configs and checkpoints beside what the goldens compare: defaults, refusals, and the released sizes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe.checkpoint.inspection.summary import summarize
from jaxmoe.checkpoint.mapping.abstract import abstract_specs
from jaxmoe.checkpoint.mapping.names import model_blocks, wanted_names
from jaxmoe.config import MLAConfig, MoEConfig
from jaxmoe.models import FAMILIES
from jaxmoe.quant import QuantizationError
from jaxmoe.rotary import yarn_mscale
from tests.support.goldens import GOLDENS, check_logits, read_expected
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering

V3 = GOLDENS / "deepseek_v3" / "original"
TINY = {
    family: json.loads((GOLDENS / family / "original" / "config.json").read_text())
    for family in FAMILIES
    if ("deepseek" in family or "dsa" in family) and (GOLDENS / family).is_dir()
}

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
MLA = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
# config.json as released, without what says nothing of the model.
RELEASED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {
        **MLA,
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-V2-Lite": {
        **MLA,
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "torch_dtype": "bfloat16",
    },
}
# Kimi-K2's differences from DeepSeek-V3.
RELEASED["Kimi-K2"] = {
    **RELEASED["DeepSeek-V3"],
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
RELEASED["DeepSeek-V3.2"] = {
    **RELEASED["DeepSeek-V3"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
RELEASED["GLM-5.2"] = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "indexer_rope_interleave": True,
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "dtype": "bfloat16",
}


def read(config: dict[str, Any]):
    return FAMILIES[config["model_type"]].read_config(config)


def attention_of(config: dict[str, Any]) -> MLAConfig:
    attention = read(config).layers[-1].attention
    assert isinstance(attention, MLAConfig)
    return attention


def router_of(config: dict[str, Any]):
    moe = read(config).layers[-1].feed_forward
    assert isinstance(moe, MoEConfig)
    return moe.router


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        pytest.param("DeepSeek-V3", 671.0, 37.5, marks=pytest.mark.full),
        ("DeepSeek-V2-Lite", 15.7, 2.66),
        pytest.param("Kimi-K2", 1026.5, 32.9, marks=pytest.mark.full),
        pytest.param("DeepSeek-V3.2", 671.9, 38.4, marks=pytest.mark.full),
        pytest.param("GLM-5.2", 743.4, 41.3, marks=pytest.mark.full),
    ],
)
def test_parameters_of_released_models(name, total, active, tmp_path):
    """Billions, as the model cards round them; a checkpoint's headers alone are enough for `inspect` to say so."""
    config = RELEASED[name]
    family, specs = FAMILIES[config["model_type"]], abstract_specs(read(config))
    blocks = model_blocks(specs, family, wanted_names(specs, family, "per_expert"))
    shapes = {block.tensor: block.tensor_shape for block in blocks}
    header, end = {}, 0
    for tensor, shape in shapes.items():
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)  # a file of holes
    (tmp_path / "config.json").write_text(json.dumps(config))
    summary = summarize(tmp_path)
    assert (summary.problems, summary.uncovered) == ((), [])
    assert summary.parameters == pytest.approx(total * 1e9, rel=2e-3)
    assert summary.active_parameters == pytest.approx(active * 1e9, rel=5e-3)


def test_kimi_k2_is_the_same_graph(tmp_path):
    shutil.copytree(V3, tmp_path / "kimi")
    (tmp_path / "kimi" / "config.json").write_text(json.dumps({**TINY["deepseek_v3"], "model_type": "kimi_k2"}))
    check_logits(jaxmoe.load(tmp_path / "kimi", mesh=mesh_of(1, 1, 1)), read_expected("deepseek_v3"))


def test_missing_settings_are_the_families_defaults():
    sizes = {key: value for key, value in RELEASED["DeepSeek-V3"].items() if key not in ("n_group", "topk_group")}
    for key in ("q_lora_rank", "routed_scaling_factor", "first_k_dense_replace", "scoring_func", "topk_method"):
        del sizes[key]
    assert read(sizes) == read(RELEASED["DeepSeek-V3"])
    assert attention_of({**sizes, "q_lora_rank": None}).q_rank is None
    older = read({**sizes, "model_type": "deepseek_v2", "norm_topk_prob": False})
    assert (older.moe_layers, older.num_mtp_layers) == (tuple(range(61)), 0)
    assert router_of({**sizes, "model_type": "deepseek_v2", "norm_topk_prob": False}).choice.expert_groups == 1


def test_layers_that_reuse_chosen_positions_are_listed_in_four_ways():
    config = {**TINY["glm_moe_dsa"], "num_hidden_layers": 7, "layer_types": None, "mlp_layer_types": None}
    del config["indexer_types"]
    ways = (
        {"indexer_types": ["full", "full", "full", "shared", "shared", "full", "shared"]},
        {"index_topk_pattern": "FFFSSFS"},
        {"index_topk_pattern": ["full", "full", "full", "shared", "shared", "full", "shared"]},
        {"index_topk_freq": 3, "index_skip_topk_offset": 3},
    )
    for way in ways:
        layers = read({**config, **way}).layers
        assert [layer.attention.indexer.reuses for layer in layers] == [False, False, False, True, True, False, True]
    assert not any(layer.attention.indexer.reuses for layer in read(config).layers)


def test_every_second_layer_can_be_dense():
    config = {**RELEASED["DeepSeek-V2-Lite"], "num_hidden_layers": 6, "moe_layer_freq": 2}
    assert read(config).moe_layers == (2, 4)


def test_no_shared_experts():
    for none in (0, None):
        moe = read({**TINY["deepseek_v2"], "n_shared_experts": none}).layers[-1].feed_forward
        assert isinstance(moe, MoEConfig)
        assert moe.shared is None


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_yarn_scales_the_scores_by_mscale_all_dim_twice(spelling):
    config = RELEASED["DeepSeek-V2-Lite"]
    rope = {**config["rope_scaling"], spelling: "yarn"}
    assert attention_of({**config, "rope_scaling": rope}).scale == pytest.approx(
        192**-0.5 * yarn_mscale(40, 0.707) ** 2
    )
    assert attention_of({**config, "rope_scaling": None}).scale == 192**-0.5
    assert attention_of({**config, "rope_scaling": {**rope, "mscale_all_dim": 0}}).scale == 192**-0.5
    assert (attention_of(config).rope.rotary_dim, attention_of(config).rope.interleaved) == (64, True)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is false in every released deepseek_v2 model"),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "topk_method of deepseek_v2 can be greedy or group_limited_greedy",
        ),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func of deepseek_v2 can be softmax; .* 'sigmoid'"),
        ("deepseek_v2", {"n_group": None}, "needs n_group"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method of deepseek_v3 can be noaux_tc; .* 'greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func of deepseek_v3 can be sigmoid; .* 'softmax'"),
        ("deepseek_v3", {"n_group": 4}, "num_experts=15 is no multiple of num_groups=4"),
        ("deepseek_v3", {"kv_lora_rank": None}, "needs kv_lora_rank"),
        ("deepseek_v32", {"index_topk": None}, "needs index_topk"),
        (
            "deepseek_v32",
            {"q_lora_rank": None},
            r"an indexer's queries are made from the latent .* \(q_lora_rank\) is None",
        ),
        ("deepseek_v32", {"index_head_dim": 4}, "that rotate are some of it: 8 of head_dim=4"),
        ("deepseek_v32", {"rope_interleave": False}, "rope_interleave of deepseek_v32 is true, .* has False"),
        (
            "deepseek_v32",
            {"indexer_rope_interleave": True},
            "indexer_rope_interleave of deepseek_v32 is false, .* has True",
        ),
        (
            "deepseek_v32",
            {"layer_types": ["full_attention"] * 2},
            "layer_types of deepseek_v32 .* has 'full_attention'",
        ),
        ("glm_moe_dsa", {"indexer_rope_interleave": False}, "indexer_rope_interleave of glm_moe_dsa is true"),
        ("glm_moe_dsa", {"indexer_types": ["full"]}, "full or shared for each of the 3 layers .* has \\['full'\\]"),
        ("glm_moe_dsa", {"indexer_types": None, "index_topk_pattern": "FSX"}, "config.json has .*'X'"),
        (
            "glm_moe_dsa",
            {"indexer_types": ["shared", "full", "full"]},
            "the first layer with an indexer has one of its own",
        ),
        ("glm_moe_dsa", {"mlp_layer_types": ["dense", "moe", "sparse"]}, "mlp_layer_types .* has .*'moe'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_config_is_refused_for(family, changes, message):
    with pytest.raises(ValueError, match=message):
        read({**TINY[family], **changes})


def copy_with(directory: Path, more: dict[str, np.ndarray], **changes: Any) -> Path:
    """A copy of the tiny DeepSeek-V3 with more tensors, and other entries in its config.json."""
    directory.mkdir()
    save_file({**load_file(V3 / "model.safetensors"), **more}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**TINY["deepseek_v3"], **changes}))
    return directory


def test_several_layers_of_multi_token_prediction_are_ignored(tmp_path):
    names = [f"model.layers.{layer}.eh_proj.weight" for layer in (2, 3)]
    more = dict.fromkeys(names, np.ones((2, 2), np.float32))
    summary = summarize(copy_with(tmp_path / "two", more, num_nextn_predict_layers=2))
    assert (summary.ignored, summary.problems) == ({"multi-token prediction": names}, ())
    assert summarize(copy_with(tmp_path / "one", more, num_nextn_predict_layers=1)).uncovered == names[1:]
    assert summarize(copy_with(tmp_path / "none", more, num_nextn_predict_layers=0)).uncovered == names


@pytest.mark.parametrize("way", ["load", "convert"])
def test_scales_of_another_shape_are_refused_in_one_sentence(way, tmp_path):
    coded: dict[str, np.ndarray] = {}
    for name, value in load_file(V3 / "model.safetensors").items():
        if "_proj" in name:
            coded |= {name: value.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": np.ones((1, 1), np.float32)}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    directory = copy_with(tmp_path / "fp8", coded, quantization_config=settings)
    message = r"quantization fp8 of config\.json has 2 problems: .*q_b_proj\.weight_scale_inv' has shape \(1, 1\)"
    with pytest.raises(QuantizationError, match=message):
        jaxmoe.load(directory, mesh=mesh_of(1, 1, 1)) if way == "load" else jaxmoe.convert(directory, tmp_path / "out")


def test_plain_weights_beside_a_left_over_format_load(tmp_path):
    directory = copy_with(tmp_path / "plain", {}, quantization_config={"quant_method": "fp8"})
    check_logits(jaxmoe.load(directory, mesh=mesh_of(1, 1, 1)), read_expected("deepseek_v3"))
