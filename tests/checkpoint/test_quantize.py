"""Checkpoints that are quantized on the way out: what is, how it is named, what is lost, and that it loads."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, open_checkpoint
from jaxmoe.checkpoint.formats import decode_checkpoint
from jaxmoe.checkpoint.saving.outputs import OutputTensor
from jaxmoe.checkpoint.saving.quantize import QuantizedOutputs, Quantizing
from jaxmoe.checkpoint.saving.write import divide_into_files, write_files
from jaxmoe.models import find_family
from jaxmoe.quant.encode import STACKED, TARGETS
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import write_plain
from tests.support.saved import assert_same_parameters, assert_same_tensors, read_all

FEW = {"attention", "routed experts"}
ALL = {*FEW, "shared experts", "dense MLP"}
STATES = {"linear_attn.conv1d", "linear_attn.in_proj_ba", "linear_attn.in_proj_qkvz", "linear_attn.out_proj"}
# (family, target, method in config.json, kinds that are quantized, modules that are left beside the head).
CASES = [
    ("qwen3_moe", "fp8_block", "fp8", FEW, {"mlp.gate"}),
    ("deepseek_v3", "int4_group", "compressed-tensors", ALL, {"mlp.gate"}),
    ("mixtral", "int8", "compressed-tensors", FEW, {"block_sparse_moe.gate"}),
    ("glm4_moe", "mxfp4", "compressed-tensors", ALL, {"mlp.gate"}),
    ("qwen3_next", "int4_group", "compressed-tensors", ALL, {"mlp.gate", "mlp.shared_expert_gate", *STATES}),
    ("gpt_oss", "mxfp4", "mxfp4", {"routed experts"}, {"mlp.router", *(f"self_attn.{part}_proj" for part in "qkvo")}),
]


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{target}" for family, target, *_ in CASES])
def made(request, tmp_path_factory):
    family, target, *_ = request.param
    directory = tmp_path_factory.mktemp("quantize")
    source = write_plain(directory / "source", family, ml_dtypes.bfloat16)
    report = jaxmoe.convert(source, directory / "out", quantize=target, max_shard_size="100KB")
    return source, directory / "out", report, request.param


def test_every_weight_is_what_its_encoder_makes_of_it(made) -> None:
    source, out, report, (family, target, *_) = made
    encoder = STACKED.get((family, target), TARGETS[target])
    plain, stored = read_all(source), read_all(out)
    decoded = decode_checkpoint(open_checkpoint(out))
    assert decoded.formats == {encoder.format.describe(): sum(loss.weights for loss in report.losses)}
    quantized = [name for name, tensor in decoded.checkpoint.tensors.items() if hasattr(tensor, "weight")]
    for name in quantized:
        matrices = plain[name].swapaxes(-1, -2) if encoder.format.transposed else plain[name]
        for role, array in {**encoder.encode(matrices), **encoder.extras(matrices.shape)}.items():
            part = next(part for part in encoder.format.parts if part.role == role)
            np.testing.assert_array_equal(stored[part.names(name)[0]].view(np.uint8), array.view(np.uint8))
    # All else is as it was: norms, embeddings, routers and the head, and mixers with a state.
    left = plain.keys() - set(quantized)
    for name in left:
        assert stored[name].tobytes() == plain[name].tobytes(), name
    assert {name for name in plain if "norm" in name or "embed" in name or "lm_head" in name} <= left
    assert not [name for name in left if "experts" in name and not name.endswith("bias")]


def test_config_json_says_what_is_quantized_and_what_is_not(made) -> None:
    source, out, _, (_, _, method, _, left) = made
    config = json.loads((out / "config.json").read_text())
    block = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert block["quant_method"] == method
    ignored = block["ignore" if method == "compressed-tensors" else "modules_to_not_convert"]
    assert {".".join(name.split(".")[-2:]) for name in ignored} == left | {"lm_head"}
    # A reader takes every other matrix for a quantized one.
    stored = {name: array for name, array in read_all(out).items() if array.ndim > 1 and array.dtype.itemsize > 1}
    plain = {name.removesuffix(".weight") for name in stored if name.endswith(".weight")}
    assert set(ignored) == plain - {"model.embed_tokens"}


def test_losses_are_those_of_the_values(made) -> None:
    source, out, report, (family, target, _, kinds, _) = made
    jaxmoe.convert(out, out.parent / "plain", dtype="float32", overwrite=True)
    before, after = read_all(source), read_all(out.parent / "plain")
    assert {loss.kind for loss in report.losses} == kinds
    assert report.quantized == target
    loss = next(loss for loss in report.losses if loss.kind == "routed experts")
    names = [name for name in before if f"layers.{loss.layer}." in name and ".experts." in name and "bias" not in name]
    assert len(names) == loss.weights
    pairs = [(before[name].astype(np.float64), after[name].astype(np.float64)) for name in names]
    squares = sum(((x - y) ** 2).sum() for x, y in pairs) / sum((x**2).sum() for x, _ in pairs)
    assert loss.rms == pytest.approx(np.sqrt(squares), rel=1e-5)
    assert loss.max == pytest.approx(max(abs(x - y).max() / abs(x).max() for x, y in pairs), rel=1e-5)
    assert report.to_dict()["losses"][0].keys() == {"layer", "kind", "weights", "rms", "max"}


def test_it_loads_as_its_values_do(made) -> None:
    models, report = load_both(made), made[2]
    assert_same_parameters(*models)
    assert sum(models[0].load_report.decoded.values()) == sum(loss.weights for loss in report.losses)


@pytest.mark.covering(most=1)
def test_it_computes_what_its_values_do(made) -> None:
    tokens = np.arange(18).reshape(2, 9) * 5 % 97
    logits, expected = (np.asarray(model(tokens)) for model in load_both(made))
    np.testing.assert_array_equal(logits, expected)


def load_both(made):
    _, out, *_ = made
    plain = out.parent / "decoded"
    jaxmoe.convert(out, plain, dtype="float32", overwrite=True)
    settings = {"mesh": mesh_of(2, 2, 2), "placement": "round_robin", "dtype": "float32", "quantized": "dequantize"}
    return [jaxmoe.load(path, **settings) for path in (out, plain)]


def test_save_writes_what_convert_does(tmp_path) -> None:
    source = write_plain(tmp_path / "source", "qwen3_moe")
    model = jaxmoe.load(source, mesh=mesh_of(1, 2, 2), placement="round_robin")
    reports = [
        jaxmoe.save(model, tmp_path / "saved", quantize="int4_group", ignore=["self_attn"]),
        jaxmoe.convert(source, tmp_path / "converted", quantize="int4_group", ignore=["self_attn"]),
    ]
    assert_same_tensors(tmp_path / "saved", tmp_path / "converted")
    for ours, theirs in zip(reports[0].losses, reports[1].losses, strict=True):
        # Sums in another order, as one file has experts in another.
        assert (ours.layer, ours.kind, ours.weights) == (theirs.layer, theirs.kind, theirs.weights)
        assert (ours.rms, ours.max) == pytest.approx((theirs.rms, theirs.max), rel=1e-12)
    assert {loss.kind for loss in reports[0].losses} == {"routed experts"}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "converted")]
    assert configs[0] == configs[1]
    assert "model.layers.0.self_attn.q_proj" in configs[0]["quantization_config"]["ignore"]


def test_one_quantized_checkpoint_becomes_another(tmp_path) -> None:
    source = write_plain(tmp_path / "source", "qwen3_moe")
    jaxmoe.convert(source, tmp_path / "eight", quantize="int8")
    jaxmoe.convert(tmp_path / "eight", tmp_path / "four", quantize="mxfp4", overwrite=True)
    decoded = decode_checkpoint(open_checkpoint(tmp_path / "four"))
    assert list(decoded.formats) == ["mxfp4_pack"]


def test_a_layer_that_is_copied_is_named_as_plain(tmp_path) -> None:
    source = write_plain(tmp_path / "source", "deepseek_v3")
    tensors = read_all(source)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    extra = f"model.layers.{layers}.mlp.experts.0.up_proj"
    save_file({**tensors, f"{extra}.weight": np.ones((32, 64), np.float32)}, source / "model.safetensors")
    report = jaxmoe.convert(source, tmp_path / "out", quantize="int8")
    assert report.carried == 1
    assert extra in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert decode_checkpoint(open_checkpoint(tmp_path / "out")).formats


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "qwen3_moe",
            {"quantize": "int3"},
            "quantize is one of fp8_block, int8, int4_group, int4_group_128, mxfp4, or",
        ),
        ("qwen3_moe", {"ignore": ["lm_head"]}, "ignore names what quantize is to leave plain, and quantize is None"),
        ("qwen3_moe", {"quantize": "int8", "ignore": "self_attn"}, "ignore is a list of names of modules; got 'self_"),
        ("qwen3_moe", {"quantize": "int8", "ignore": ["self_atn"]}, "ignore has 'self_atn', which names no weight"),
        ("qwen3_moe", {"quantize": "int8", "ignore": ["lm_head"]}, "ignore has 'lm_head', which names no weight that"),
        ("qwen3_moe", {"quantize": "int8", "ignore": ["self_attn", "mlp"]}, "needs a weight to quantize; ignore names"),
        (
            "qwen3_moe",
            {"quantize": "int4_group_128"},
            r"128 inputs must divide the 64 inputs of a matrix \('model.layers",
        ),
        ("qwen3_moe", {"quantize": "int8", "form": "fused"}, 'holds all experts of a layer; take form "per_expert"'),
        ("gpt_oss", {"quantize": "int8"}, "take mxfp4, which gpt_oss has a form of its own for, or leave experts out"),
        ("granitemoe", {"quantize": "fp8_block"}, "leave experts out by ignore, for readers know no other form of gra"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(family, options, message, tmp_path) -> None:
    source = write_plain(tmp_path / "source", family)
    with pytest.raises(ValueError, match=message):
        jaxmoe.convert(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_family_of_fused_experts_is_quantized_but_for_these(tmp_path) -> None:
    source = write_plain(tmp_path / "source", "granitemoe")
    report = jaxmoe.convert(source, tmp_path / "out", quantize="int8", ignore=["re:.*block_sparse_moe"])
    assert {loss.kind for loss in report.losses} == {"attention"}
    assert decode_checkpoint(open_checkpoint(tmp_path / "out")).formats


def test_a_value_that_is_not_finite_is_told_with_its_weight(tmp_path) -> None:
    source = write_plain(tmp_path / "source", "qwen3_moe")
    tensors = read_all(source)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name][3, 4] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{name}': values must be finite to be quantized"):
        jaxmoe.convert(source, tmp_path / "out", quantize="int4_group")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_one_weight_is_in_memory_at_a_time(tmp_path) -> None:
    shape = (1024, 2048)
    path = "layers.0.attention.w_q"
    plain = [
        OutputTensor(
            name=f"model.layers.0.{i}.weight",
            dtype_name="F32",
            shape=shape,
            nbytes=4 * 2**21,
            values=lambda: np.ones(shape, "f4"),
            params=(path,),
        )
        for i in range(8)
    ]
    family, _ = find_family({"model_type": "qwen3_moe"})
    quantized = QuantizedOutputs(plain, [], Quantizing.checked("int8", ()), family, "per_expert")
    tracemalloc.start()
    try:
        write_files(tmp_path, divide_into_files(quantized.tensors, 10**7))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The weight, its codes, and tiles of a megabyte.
    assert peak < (4 + 1) * 2**21 + 12 * 2**20
    assert sorted(path.name for path in tmp_path.glob("*.safetensors"))[1] == "model-00002-of-00002.safetensors"
