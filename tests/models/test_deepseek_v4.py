"""DeepSeek-V4 beside what the goldens compare: its configs, its publisher's names, and experts by a table."""

import dataclasses
import json
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe.checkpoint.inspection.summary import summarize
from jaxmoe.layers import params_by_path
from jaxmoe.models import FAMILIES
from jaxmoe.placement import RoutingTrace
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of

SOURCE = GOLDENS / "deepseek_v4" / "original"
TINY = json.loads((SOURCE / "config.json").read_text())
WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
# As DeepSeek published it, without what says nothing of the model.
FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "head_dim": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "routed_scaling_factor": 1.5,
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "torch_dtype": "bfloat16",
}


def read(config: dict[str, Any]):
    return FAMILIES["deepseek_v4"].read_config(config)


def test_a_published_config_says_the_same_in_older_words(tmp_path):
    config = read(FLASH)
    rates = [layer.attention.compression and layer.attention.compression.rate for layer in config.layers]
    assert rates == [None, None, *[4, 128] * 20, 4]
    assert [layer.experts_by_token for layer in config.layers] == [True] * 3 + [False] * 40
    assert [layer.feed_forward.router.correction_bias for layer in config.layers[2:4]] == [False, True]
    window, sparse, heavy = (config.layers[i].attention for i in (0, 2, 3))
    assert (window.rope.rotary_dim, window.rope.scale, sparse.rope.scale) == (64, 1.0, 1.0)
    assert window.rope.frequencies[1] == pytest.approx(10000 ** (-2 / 64))
    assert heavy.rope == sparse.rope == sparse.compression.indexer.rope
    assert heavy.rope.frequencies[-1] == pytest.approx(160000 ** (-62 / 64) / 16)
    assert sparse.compression.overlap
    assert heavy.compression.indexer is None
    written = {
        **FLASH,
        "layer_types": [WINDOW, WINDOW, *[SPARSE, HEAVY] * 20, SPARSE],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
        "compress_rates": {SPARSE: 4, HEAVY: 128},
        "partial_rotary_factor": 0.125,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
            "compress": {
                **FLASH["rope_scaling"],
                "rope_type": "yarn",
                "rope_theta": 160000.0,
                "partial_rotary_factor": 0.125,
                "attention_factor": 1.0,
            },
        },
    }
    for name in ("compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling"):
        del written[name]
    assert read(written) == config
    (tmp_path / "config.json").write_text(json.dumps(FLASH))
    plan = jaxmoe.plan(tmp_path, ep=8, device="h200", max_length=4096)
    # transformers counts no table of experts, three times 129280 by 6.
    assert plan.parameters == 284_332_240_471 + 3 * 129280 * 6


def test_missing_settings_are_the_families_defaults():
    short = {**FLASH, "num_hidden_layers": 5, "max_position_embeddings": 512}
    for name in ("compress_ratios", "num_hash_layers", "swiglu_limit", "scoring_func", "routed_scaling_factor"):
        del short[name]
    layers = read(short).layers
    assert [layer.attention.compression.rate for layer in layers] == [128, 128, 128, 4, 128]
    assert [layer.experts_by_token for layer in layers] == [True] * 3 + [False] * 2
    assert layers[0].feed_forward == read(FLASH).layers[0].feed_forward


def test_the_same_model_under_the_name_of_its_reference():
    """Without the number that releases differ in it is refused, and with it the same as with all its settings."""
    short = {**FLASH, "model_type": "deepseek_ref"}
    for name in ("rope_theta", "swiglu_limit", "routed_scaling_factor"):
        del short[name]
    family = FAMILIES["deepseek_ref"]
    with pytest.raises(
        ValueError, match=r"1\.5 in DeepSeek-V4-Flash and 2\.5 in DeepSeek-V4-Pro; write that of the model"
    ):
        family.read_config(short)
    expected = dataclasses.replace(read(FLASH), model_type="deepseek_ref")
    assert family.read_config({**short, "routed_scaling_factor": 1.5}) == expected
    assert family.tensors == FAMILIES["deepseek_v4"].tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_shared_experts": 2}, "n_shared_experts of deepseek_v4 is 1 in every released model; .* has 2"),
        ({"norm_topk_prob": False}, "norm_topk_prob of deepseek_v4 is True"),
        ({"topk_method": "greedy"}, "topk_method of deepseek_v4 is 'noaux_tc'"),
        ({"scoring_func": "tanh"}, "scoring_func of deepseek_v4 can be sqrtsoftplus or softmax or sigmoid; .* 'tanh'"),
        ({"layer_types": [WINDOW] * 3 + ["full_attention"]}, "layer_types of deepseek_v4 are .* has 'full_attention'"),
        (
            {"layer_types": None, "compress_ratios": [0, 4, 8, 4]},
            r"has 0, 4 or 128 for each of the 4 layers; .*\[0, 4, 8, 4\]",
        ),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types of deepseek_v4 has hash_moe or moe for each of the 4 layers"),
        ({"o_groups": 7}, "num_heads=16 is no multiple of output_groups=7"),
        ({"compress_rates": {SPARSE: 0}}, "compressed_sparse_attention in config.json is at least 1; it is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_config_is_refused_for(changes, message):
    with pytest.raises(ValueError, match=message):
        read({**TINY, **changes})


def published(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names that DeepSeek gives them."""
    others = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
    renamed = {}
    for name, value in tensors.items():
        short = others.get(name, name.removeprefix("model.")).replace("hc_head.hc_", "hc_head_")
        renamed[short.replace(".attn.norm.", ".attn.kv_norm.")] = value
    return renamed


def test_the_publishers_names_have_no_prefix(tmp_path):
    tensors = published(load_file(SOURCE / "model.safetensors"))
    # Layers behind the model's own.
    tensors["mtp.0.attn.wq_a.weight"] = np.ones((2, 2), np.float32)
    directory = tmp_path / "published"
    directory.mkdir()
    shutil.copy(SOURCE / "config.json", directory)
    save_file(tensors, directory / "model.safetensors")
    summary = summarize(directory)
    assert (summary.problems, summary.uncovered, summary.quantization) == ((), [], None)
    assert summary.ignored == {"multi-token prediction": ["mtp.0.attn.wq_a.weight"]}
    model = jaxmoe.load(directory, mesh=mesh_of(1, 2, 2))
    ours = params_by_path(jaxmoe.load(SOURCE, mesh=mesh_of(1, 2, 2)))
    theirs = params_by_path(model)
    assert theirs.keys() == ours.keys()
    for path, param in theirs.items():
        np.testing.assert_array_equal(param[...], ours[path][...], err_msg=path)
    report = jaxmoe.save(model, tmp_path / "again")
    assert report.form == "per_expert"
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert saved["layers.0.ffn.gate.tid2eid"].dtype == np.int64


@pytest.mark.full
def test_a_table_chooses_the_experts_of_the_first_layer():
    """Choices of a trace come before it, and so does a function of one's own."""
    model = jaxmoe.load(SOURCE, mesh=mesh_of(1, 1, 1))
    tokens = np.array([[5, 9, 5, 70, 9, 5, 5, 70]])
    table = load_file(SOURCE / "model.safetensors")["model.layers.0.ffn.gate.tid2eid"]
    with model.record_routing(token_ids=True) as routing:
        model(tokens)
    chosen = routing.trace().expert_ids
    np.testing.assert_array_equal(chosen[:, 0], table[tokens[0]])
    others = np.roll(chosen, 1, axis=0)
    with (
        model.replay_routing(RoutingTrace.from_expert_ids(others, 11)),
        model.record_routing(token_ids=True) as routing,
    ):
        model(tokens)
    np.testing.assert_array_equal(routing.trace().expert_ids, others)
    changed = jaxmoe.load(SOURCE, mesh=mesh_of(1, 1, 1), router=the_first)
    with changed.record_routing(token_ids=True) as routing:
        changed(tokens)
    assert (routing.trace().expert_ids == np.arange(3)).all()


def the_first(logits, k):
    """The first experts, for every token."""
    ids = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (len(logits), k))
    return ids, jnp.ones(ids.shape, logits.dtype)
