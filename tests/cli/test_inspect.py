"""``jaxmoe inspect``: known families, unknown ones, quantized ones, and no weight is read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxmoe.checkpoint.inspection import holding, summarize
from jaxmoe.checkpoint.inspection.grouping import group_of, quantized_base
from jaxmoe.cli import main
from jaxmoe.models import get_family
from tests.support.goldens import GOLDENS
from tests.support.saved import SOURCES, read_all
from tests.support.writing import write_checkpoint, write_file

DEMO = Path(__file__).resolve().parents[2] / "demo"


def inspect(path, capsys, *options: str) -> dict:
    assert main(["inspect", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_known_families(path, capsys) -> None:
    found = inspect(path, capsys)
    config = get_family(path.parent.name).read_config(json.loads((path / "config.json").read_text()))
    assert (found["known"], found["problems"], found["uncovered"]) == (True, [], [])
    moes = [config.layers[i].feed_forward for i in config.moe_layers]
    assert (found["layers"], found["moe_layers"]) == (len(config.layers), len(moes))
    assert (found["experts"], found["experts_per_token"]) == (moes[0].num_experts, moes[0].num_experts_per_tok)
    assert found["quantization"] is None
    assert found["bytes"] == sum(found["dtypes"].values()) == sum(group["bytes"] for group in found["groups"].values())
    assert found["parameters"] == sum(group["parameters"] or 0 for group in found["groups"].values())
    assert ("ignored by rule" in found["groups"]) == (path.parent.name in ("longcat_flash", "qwen4_exp_text"))
    assert "other" not in found["groups"]
    unused = 0.0
    for moe in moes:
        halves, F, D = (2 if moe.gated else 1), moe.moe_intermediate_size, moe.expert_input_size
        of_one = (halves + 1) * F * D + moe.bias * (halves * F + D)
        # Of zero experts and others, all are chosen as often.
        unused += moe.num_experts * (1 - moe.num_experts_per_tok / moe.num_choices) * of_one
    assert found["active_parameters"] == round(found["parameters"] - unused)


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name == "original"], ids=lambda path: path.parent.name
)
def test_a_config_alone_tells_what_the_checkpoint_does(path, tmp_path, capsys) -> None:
    shutil.copy(path / "config.json", tmp_path)
    found, whole = inspect(tmp_path, capsys), inspect(path, capsys)
    assert (found["weights"], whole["weights"]) == (False, True)
    same = [
        "known",
        "problems",
        "layers",
        "moe_layers",
        "experts",
        "experts_per_token",
        "active_parameters",
        "parameters",
    ]
    assert {name: found[name] for name in same} == {name: whole[name] for name in same}
    parameters = [{group: sizes["parameters"] for group, sizes in each["groups"].items()} for each in (found, whole)]
    assert parameters[0] == {group: count for group, count in parameters[1].items() if group != "ignored by rule"}
    assert found["formats"].keys() == whole["formats"].keys() == parameters[0].keys()
    assert found["bytes"] == sum(size for sizes in found["formats"].values() for size in sizes.values())


def test_a_config_alone_tells_formats_and_an_index_its_size(tmp_path, capsys) -> None:
    config = json.loads((GOLDENS / "deepseek_v3" / "original" / "config.json").read_text())
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    found = inspect(tmp_path, capsys)
    assert (
        found["formats"]["routed experts"].keys() == found["formats"]["attention"].keys() - {"plain"} == {"fp8_block"}
    )
    assert found["formats"]["head"].keys() == {"plain"}
    assert found["bytes"] > 0
    assert main(["inspect", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "formats routed experts: fp8_block; shared experts: fp8_block;" in out
    assert "there are no weights here, config.json alone is read loads yes" in out

    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [inspect(tmp_path, capsys)[name] for name in ("bytes", "files")] == [12345, 2]
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "novel"}}))
    found = inspect(tmp_path, capsys)
    assert ["'novel'" in problem for problem in found["problems"]] == [True]
    assert found["parameters"] > 0


def test_a_config_alone_of_an_unknown_family(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "num_experts": 4, "num_hidden_layers": 3}))
    found = inspect(tmp_path, capsys)
    assert found["problems"] == ["jaxmoe has no family 'novel'"]
    assert (found["layers"], found["experts"], found["parameters"]) == (3, 4, None)
    assert main(["inspect", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "layers 3; it is not known how many have routed experts" in out
    assert "loads no" in out


@pytest.mark.parametrize(
    ("sizes", "tensors"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 1}, {"layers.0.ffn.w1": (4, 8, 6)}),
        ({"num_experts": 4, "num_experts_per_tok": 1}, {"layers.0.mixture.0.up.weight": (8, 6)}),
        (
            {"num_experts": 4, "num_experts_per_tok": 1},
            {"layers.0.experts.0.w1": (8, 6), "layers.1.my_expert_3": (8, 6)},
        ),
        ({"num_experts": 4, "n_routed_experts": 8, "num_experts_per_tok": 1}, {"layers.0.experts.0.w1": (8, 6)}),
    ],
)
def test_active_parameters_are_unknown_where_experts_hide(sizes, tensors, tmp_path, capsys) -> None:
    config = {"model_type": "novel", **sizes}
    found = inspect(make(tmp_path, config, {name: zeros(*shape) for name, shape in tensors.items()}), capsys)
    assert (found["parameters"], found["active_parameters"]) == (sum(map(np.prod, tensors.values())), None)


def test_other_names_are_told_with_their_rule(tmp_path, capsys) -> None:
    source = GOLDENS / "olmoe" / "original"
    tensors = {f"module.{name}": value for name, value in read_all(source).items()}
    found = inspect(make(tmp_path, json.loads((source / "config.json").read_text()), tensors), capsys)
    assert found["renamed"] == {"names begin with 'module.', which is left out": len(tensors)}
    assert found["problems"] == []


def test_both_layouts_of_one_model(capsys) -> None:
    original, fused = (inspect(GOLDENS / "qwen3_moe" / form, capsys) for form in ("original", "fused"))
    assert original["layouts"] == {"per_expert": [0, 1]}
    assert fused["layouts"] == {"fused": [0, 1]}
    assert (original["files"], fused["files"]) == (1, 5)
    assert original["parameters"] == fused["parameters"] == 68032
    assert original["groups"]["routed experts"] == {"tensors": 66, "parameters": 50688, "bytes": 202752}
    assert fused["groups"]["routed experts"] == {"tensors": 4, "parameters": 50688, "bytes": 202752}


def test_a_table_for_people(capsys) -> None:
    assert main(["inspect", str(DEMO)]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[:9])
    assert facts["family"].strip() == "qwen3_moe"
    assert facts["layers"].strip() == "6, 6 of them with routed experts"
    assert facts["parameters"].strip() == "7.2M, 1.78M active per token"
    assert facts["quantization"].strip() == "none"
    assert any("routed experts" in line and "6.19M" in line and "86.0%" in line for line in lines)
    assert not any("not loadable" in line for line in lines)


def make(directory: Path, config: dict | None, tensors: dict[str, np.ndarray]) -> Path:
    write_checkpoint(directory, tensors)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def zeros(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def test_a_plain_checkpoint_asks_no_second_model_what_it_would_hold_packed(monkeypatch) -> None:
    monkeypatch.setattr(holding, "abstract_model", lambda *_, **__: pytest.fail("a model was made"))
    assert summarize(SOURCES[0]).held == ()


def test_a_config_without_its_sizes(tmp_path, capsys) -> None:
    """The family is known; what is wrong is told, and what names tell all the same."""
    found = inspect(make(tmp_path, {"model_type": "qwen3_vl_moe"}, {"lm_head.weight": zeros(3, 4)}), capsys)
    (problem,) = found["problems"]
    assert "the config.json of qwen3_vl_moe has a text_config, with the sizes" in problem
    assert found["groups"]["head"]["parameters"] == 12


def test_absurd_sizes_take_no_memory(tmp_path, capsys) -> None:
    config = json.loads((GOLDENS / "qwen3_moe" / "original" / "config.json").read_text())
    sizes = dict.fromkeys(("num_experts", "num_local_experts"), 10**9)
    found = inspect(make(tmp_path, {**config, **sizes}, {"lm_head.weight": zeros(3, 4)}), capsys)
    assert found["problems"] == [
        "the layers of a decoder have at most 1000000 experts together; config.json: 2000000000"
    ]


def test_an_unknown_family(tmp_path, capsys) -> None:
    """What names, shapes and the usual spellings of sizes tell; exit status 0."""
    text = {"num_hidden_layers": 2, "moe_num_experts": 2, "moe_k": [1, 1], "hidden_size": 4, "intermediate_size": 6}
    tensors = {
        "model.tok_embeddings.weight": zeros(9, 4),
        "model.layers.0.feed_forward.gate_proj.weight": zeros(6, 4),
        "model.layers.1.moe.gate.weight": zeros(2, 4),
        "model.layers.1.moe.experts.gate_up_proj": zeros(2, 4, 12),
        "model.layers.1.moe.experts.down_proj": zeros(2, 6, 4),
        "model.layers.1.moe.shared_experts.up_proj.weight": zeros(6, 4),
        "model.layers.1.attn.q_norm.weight": zeros(4),
        "model.layers.1.attn.Wqkv.weight": zeros(12, 4),
        "visual.patch": zeros(3),
    }
    found = inspect(make(tmp_path, {"model_type": "novel", "text_config": text}, tensors), capsys)
    assert (found["model_type"], found["known"], found["uncovered"]) == ("novel", False, None)
    assert found["problems"] == ["jaxmoe has no family 'novel'"]
    assert (found["layers"], found["moe_layers"], found["experts"], found["experts_per_token"]) == (2, 1, 2, 1)
    assert found["layouts"] == {"fused_transposed": [1]}
    groups = {group: sizes["parameters"] for group, sizes in found["groups"].items()}
    assert groups == {
        "embedding": 36,
        "attention": 48,
        "routed experts": 144,
        "shared experts": 24,
        "router": 8,
        "dense MLP": 24,
        "norms": 4,
        "other": 3,
    }
    assert found["parameters"] == 291
    assert found["active_parameters"] == 291 - 72
    assert main(["inspect", str(tmp_path)]) == 0
    assert "novel (family unknown)" in capsys.readouterr().out


def test_one_file_without_a_config(tmp_path, capsys) -> None:
    file = write_file(tmp_path / "part.safetensors", {"a.weight": zeros(3, 4), "b": zeros(2, dtype=np.uint8)})
    found = inspect(file, capsys)
    assert (found["model_type"], found["parameters"], found["bytes"]) == (None, 14, 50)
    assert found["layers"] is found["experts"] is found["moe_layers"] is None
    assert found["dtypes"] == {"F32": 48, "U8": 2}
    assert main(["inspect", str(file)]) == 0
    assert "not given (family unknown)" in capsys.readouterr().out


def test_problems_of_a_known_family(tmp_path, capsys) -> None:
    shutil.copytree(GOLDENS / "qwen3_moe" / "original", tmp_path / "c")
    make(tmp_path / "c", None, {"model.embed_tokens.weight": zeros(96, 32), "stray": zeros(1)})
    found = inspect(tmp_path / "c", capsys)
    assert found["uncovered"] == ["stray"]
    assert any("must be there as" in problem for problem in found["problems"])
    assert any("'model.embed_tokens.weight' has shape (96, 32)" in problem for problem in found["problems"])
    assert found["parameters"] == 68032  # what the config says
    assert main(["inspect", str(tmp_path / "c")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"not loadable: {tmp_path / 'c'}: the experts of a layer must be there" in text
    assert "more problems" in text
    assert "uncovered stray" in text
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "hidden_size": None}))
    assert inspect(tmp_path / "c", capsys)["problems"] == ["config.json needs hidden_size; it is not there"]


def quantize(name: str, value: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    base, (rows, columns) = name.removesuffix(".weight"), value.shape
    if kind == "fp8":
        return {name: value.astype(ml_dtypes.float8_e4m3fn), f"{base}.weight_scale_inv": zeros(1, 1)}
    return {
        f"{base}.qweight": zeros(columns // 8, rows, dtype=np.int32),
        f"{base}.qzeros": zeros(1, rows // 8, dtype=np.int32),
        f"{base}.scales": zeros(1, rows),
        f"{base}.g_idx": zeros(columns, dtype=np.int32),
    }


@pytest.mark.parametrize("kind", ["fp8", "gptq"])
@pytest.mark.parametrize("known", [True, False])
def test_quantized_experts(known, kind, tmp_path, capsys) -> None:
    source = GOLDENS / "qwen3_moe" / "original"
    tensors: dict[str, np.ndarray] = {}
    for name, value in read_all(source).items():
        tensors |= quantize(name, value, kind) if ".experts." in name else {name: value}
    config = json.loads((source / "config.json").read_text())
    settings = {"quant_method": kind, "bits": 4, "group_size": -1, "modules": ["a"] * 99}
    config |= {"quantization_config": settings, "model_type": "qwen3_moe" if known else "novel"}
    found = inspect(make(tmp_path, config, tensors), capsys)
    assert (found["quantization"]["method"], found["quantization"]["from"]) == (kind, "config.json")
    assert found["layouts"] == {"per_expert": [0, 1]}
    if known:
        assert (found["uncovered"], found["problems"]) == ([], [])
    # Packed values tell nothing of a family that is not known.
    assert found["parameters"] == (68032 if known or kind == "fp8" else None)
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"{kind}, says config.json: bits 4, group_size -1" in capsys.readouterr().out


def test_quantization_that_a_side_file_or_names_tell(tmp_path, capsys) -> None:
    tensors = {"layers.0.proj.weight": zeros(2, 2), "layers.0.proj.weight_scale": zeros(1)}
    assert inspect(make(tmp_path, None, tensors), capsys)["quantization"]["from"] == "names of tensors"
    document = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(document))
    found = inspect(tmp_path, capsys)["quantization"]
    assert (found["method"], found["from"], found["group_size"]) == ("NVFP4", "hf_quant_config.json", 16)
    (tmp_path / "hf_quant_config.json").unlink()
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 128, "zero_point": True}))
    found = inspect(tmp_path, capsys)["quantization"]
    assert (found["method"], found["from"], found["w_bit"]) == ("awq", "quant_config.json", 4)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj.weight", "routed experts"),
        ("model.layers.3.block_sparse_moe.input_linear.weight", "routed experts"),
        ("transformer.blocks.3.ffn.experts.mlp.w1", "routed experts"),
        ("model.layers.3.mlp.shared_expert.gate_proj.weight", "shared experts"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "shared experts"),
        ("model.layers.3.mlp.shared_experts.down_proj.weight", "shared experts"),
        ("model.layers.3.mlp.shared_mlp.up_proj.weight", "shared experts"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.router.layer.weight", "router"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.3.mlp.gate_proj.weight", "dense MLP"),
        ("model.layers.3.input_layernorm.weight", "norms"),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", "norms"),
        ("transformer.blocks.3.norm_attn_norm.norm_1.weight", "norms"),
        ("transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", "attention"),
        ("model.layers.3.self_attn.sinks", "attention"),
        ("model.layers.3.linear_attn.in_proj_qkvz.weight", "attention"),
        ("model.layers.3.mamba.A_log", "attention"),
        ("model.norm.weight", "norms"),
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.vision_tower.patch", "other"),
    ],
)
def test_groups_of_names(name, group) -> None:
    assert group_of(name) == group


def test_parts_of_quantized_tensors() -> None:
    assert quantized_base("a.experts.0.up_proj.weight_packed") == ("a.experts.0.up_proj", True)
    assert quantized_base("a.experts.gate_up_proj_blocks") == ("a.experts.gate_up_proj", True)
    assert quantized_base("a.experts.gate_up_proj_scale_inv") == ("a.experts.gate_up_proj", False)
    assert quantized_base("a.q_proj.weight.quant_state.bitsandbytes__nf4") == ("a.q_proj", False)
    assert quantized_base("a.q_proj.weight") is None


def test_the_mapping_of_experts_for_machines(capsys) -> None:
    found = inspect(GOLDENS / "qwen3_moe" / "original", capsys, "--mapping", "--redundant-experts", "2")
    assert found["redundant_experts"] == 2
    assert len(found["mapping"]) == 66
    of_tensor = {entry["tensor"]: entry for entry in found["mapping"]}
    assert of_tensor["model.layers.1.mlp.experts.1.up_proj.weight"] == {
        "tensor": "model.layers.1.mlp.experts.1.up_proj.weight",
        "dtype": "F32",
        "shape": [24, 32],
        "fills": [
            {"param": "model.layers.1.mlp.experts.w13_weight", "expert": 1, "shard": "w3"},
            {"param": "model.layers.1.mlp.experts.w13_weight", "expert": 12, "shard": "w3"},
        ],
    }
    fused = inspect(GOLDENS / "qwen3_moe" / "fused", capsys, "--mapping")["mapping"]
    assert {entry["tensor"].split(".")[-1]: entry["fills"] for entry in fused if ".layers.0." in entry["tensor"]} == {
        "down_proj": [{"param": "model.layers.0.mlp.experts.w2_weight", "expert": None, "shard": "w2"}],
        "gate_up_proj": [
            {"param": "model.layers.0.mlp.experts.w13_weight", "expert": None, "shard": shard} for shard in ("w1", "w3")
        ],
    }


def test_the_mapping_of_experts_for_people(capsys) -> None:
    assert main(["inspect", str(DEMO), "--mapping"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["tensor", "parameter", "expert", "shard"]
    assert len(lines) == 1 + 6 * 16 * 3
    assert lines[2][1:] == ["model.layers.0.mlp.experts.w13_weight", "0", "w3"]
    assert main(["inspect", str(GOLDENS / "gpt_oss" / "original"), "--mapping"]) == 0
    assert "experts.w13_bias    all     w3\n" in capsys.readouterr().out
    # The names of this family are none of those that vLLM's mapping speaks of.
    assert main(["inspect", str(GOLDENS / "granitemoe" / "original"), "--mapping"]) == 0
    assert "input_linear.weight   vLLM's mapping has no row for it\n" in capsys.readouterr().out


def test_a_mapping_needs_experts(tmp_path, capsys) -> None:
    write_checkpoint(tmp_path, {"model.layers.0.mlp.gate_proj.weight": zeros(2, 2)})
    assert main(["inspect", str(tmp_path), "--mapping"]) == 1
    assert "no tensor of a routed expert" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(DEMO), "--redundant-experts", "2"])
    assert stopped.value.code == 2


@pytest.mark.full
def test_no_weight_is_read_and_no_backend_starts(tmp_path) -> None:
    """What reads tensors is taken away, and JAX never wakes."""
    shutil.copytree(DEMO, tmp_path / "c")
    code = (
        "import os, sys\n"
        "os.preadv = None\n"
        "from jaxmoe.cli import main\n"
        "assert main(['inspect', sys.argv[1], '--json']) == 0\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, env=dict(os.environ), timeout=120)


@pytest.mark.parametrize(("path", "message"), [("nowhere", "no such directory"), (".", "holds no weights at all")])
def test_errors_are_one_line(path, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", path]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("jaxmoe: error: ")
    assert message in line
