"""Qwen4-Exp beside what the goldens compare: its configs, and how many parameters it has."""

import json

import pytest

import jaxmoe
from jaxmoe.config import GatedDeltaNetConfig, PooledBlockAttentionConfig
from jaxmoe.models import FAMILIES
from tests.support.goldens import GOLDENS
from tests.support.published import QWEN4_EXP

SAVED = json.loads((GOLDENS / "qwen4_exp_text" / "original" / "config.json").read_text())


def read(config):
    return FAMILIES["qwen4_exp_text"].read_config(config)


def test_released_files_call_attention_with_an_indexer_full():
    kinds = ["linear_attention", "full_attention", "full_attention"]
    assert read(SAVED | {"layer_types": kinds}) == read(SAVED)
    usual = read(SAVED | {"layer_types": None, "num_hidden_layers": 8, "output_gate_type": None}).layers
    assert [type(layer.attention) for layer in usual] == [*[GatedDeltaNetConfig] * 3, PooledBlockAttentionConfig] * 2
    assert (read(SAVED).layers[0].attention.gate, usual[0].attention.gate) == ("sigmoid", "silu")


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        pytest.param({}, 67_366_196_352, marks=pytest.mark.full),
        ({"ple_layer_ids": [1, 3], "eos_token_id": 0}, 149_329_106_048),
    ],
    ids=["no n-grams", "n-grams"],
)
def test_parameters_are_as_many_as_in_transformers(changes, parameters, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN4_EXP | changes))
    plan = jaxmoe.plan(tmp_path, ep=8, device="h200", max_length=4096)
    assert plan.parameters == parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ple_layer_ids": [0]}, r"are layers, counted from 1 to 3; config.json has \[0\]"),
        ({"eos_token_id": None}, "n-grams end at eos_token_id, .*; config.json has None"),
        ({"ple_embed_dim": 10}, "split evenly over 4 heads .* a width of 10"),
        ({"ngram_size": 1}, "two tokens or more; got ngram_size=1"),
        ({"ngram_vocab_size_base": 2**28}, r"less than 2\^31 rows, and a head less than 2\^28; got 268435456 rows"),
        ({"indexer_kv_heads": 2}, "known with indexer_kv_heads=1 alone; config.json gives 2"),
        ({"indexer_budget": 7}, "fill blocks of indexer_compress_ratio=3; config.json has indexer_budget=7"),
        ({"indexer_head_dim": None}, "config.json needs indexer_head_dim; it is not there"),
        ({"output_gate_type": "gelu"}, "are silu or sigmoid; config.json has 'gelu'"),
        ({"layer_types": ["mamba"] * 3}, "layer_types of qwen4_exp_text are .* has 'mamba'"),
        ({"hc_count": 0}, "streams"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_config_is_refused_for(changes, message):
    with pytest.raises(ValueError, match=message):
        read(SAVED | changes)
