"""Weights that are quantized as they are loaded are those that `convert` writes, and stay packed."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.kernels.grouped_matmul import dequantize
from jaxmoe.kernels.grouped_matmul.quantize import quantize
from jaxmoe.layers import packings_of, params_by_path
from jaxmoe.quant.encode import TARGETS
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import write_plain
from tests.support.saved import assert_same_parameters

TOKENS = [[1, 2, 3, 4, 5]]
CASES = [
    ("qwen3_moe", "fp8_block"),
    ("mixtral", "int8"),
    ("glm4_moe", "int4_group"),
    ("deepseek_v3", "mxfp4"),
    ("gpt_oss", "mxfp4"),
]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request, tmp_path_factory):
    family, target = request.param
    return write_plain(tmp_path_factory.mktemp("plain") / "source", family), target


@pytest.mark.covering(most=1)
def test_it_is_what_convert_writes(case, tmp_path) -> None:
    source, target = case
    report = jaxmoe.convert(source, tmp_path / "out", quantize=target)
    settings = {"mesh": mesh_of(1, 1, 1), "placement": "round_robin"}
    written, model = jaxmoe.load(tmp_path / "out", **settings), jaxmoe.load(source, **settings, quantize=target)
    assert packings_of(model) == packings_of(written)
    expected = params_by_path(written)
    # The model takes this one apart: here it is as it was, and there it is decoded.
    for path, param in params_by_path(model).items():
        if not path.endswith("w_kv_b"):
            np.testing.assert_array_equal(np.asarray(param[...]), np.asarray(expected[path][...]), err_msg=path)

    found = {(loss.layer, loss.kind): loss for loss in model.load_report.losses}
    assert model.load_report.quantized == target
    assert found.keys() == {(loss.layer, loss.kind) for loss in report.losses}
    for loss in report.losses:
        if loss.kind != "attention" or "w_kv_b" not in " ".join(expected):
            assert found[loss.layer, loss.kind].rms == pytest.approx(loss.rms, rel=1e-5)
            fused = loss.kind == "routed experts" and report.form == "fused"
            assert fused or found[loss.layer, loss.kind].max == pytest.approx(loss.max, rel=1e-5)
            assert fused or found[loss.layer, loss.kind].weights == loss.weights

    # Quantized again it has the same values, of mxfp4 with other exponents where the largest of a group has become less.
    jaxmoe.save(model, tmp_path / "saved", quantize=target)
    assert_same_parameters(
        *[jaxmoe.load(tmp_path / name, **settings, quantized="dequantize") for name in ("saved", "out")]
    )


@pytest.mark.full
def test_devices_hold_the_packed_bytes_and_the_model_computes_with_them(case) -> None:
    source, target = case
    model = jaxmoe.load(source, mesh=mesh_of(2, 2, 2), quantize=target)
    plain = jaxmoe.load(source, mesh=mesh_of(2, 2, 2))
    held: dict[int, int] = {}
    for param in params_by_path(model).values():
        for shard in param.get_value().addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    report = model.load_report
    assert report.bytes_per_device == held
    assert report.bytes_read == report.bytes_needed == plain.load_report.bytes_needed
    assert report.expert_bytes_per_device[0] < 0.4 * plain.load_report.expert_bytes_per_device[0]
    ours, theirs = np.asarray(model(TOKENS)), np.asarray(plain(TOKENS))
    assert 0 < np.abs(ours - theirs).max() < 0.3 * np.abs(theirs).max()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_devices_pack_as_the_encoder_does(target) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(2, 256, 256)) * 2.0 ** rng.integers(-40, 40, (2, 256, 1))).astype(np.float32)
    values[0, :2] = 0
    encoder = TARGETS[target]
    arrays = encoder.encode(values)
    names = {np.dtype(np.uint8): "U8", np.dtype(np.int32): "I32", np.dtype(np.float32): "F32"}
    dtypes = {role: names.get(array.dtype, "F8_E4M3") for role, array in arrays.items()}
    packing = encoder.format.packing(dtypes, values.shape)
    stack = quantize(jnp.asarray(values), format=packing.format, block=packing.units("scale", values.shape))
    np.testing.assert_array_equal(np.asarray(dequantize(stack)), encoder.decode(arrays, values.shape))


def test_what_cannot_be_quantized_is_refused(tmp_path) -> None:
    mesh, source = mesh_of(1, 1, 1), write_plain(tmp_path / "source", "qwen3_moe")
    with pytest.raises(ValueError, match=r"quantize is one of fp8_block, int8, .*; got 'fp4'"):
        jaxmoe.load(source, mesh=mesh, quantize="fp4")
    with pytest.raises(ValueError, match=r"quantize makes packed weights of plain ones, and quantized=\"keep\" asks"):
        jaxmoe.load(source, mesh=mesh, quantize="int8", quantized="keep")
    with pytest.raises(ValueError, match=r"quantize makes packed weights of plain ones, and an adapter asks"):
        jaxmoe.load(source, mesh=mesh, quantize="int8", adapter=tmp_path)
    narrow = write_plain(tmp_path / "narrow", "qwen3_moe", widths={"hidden_size": 64, "moe_intermediate_size": 24})
    with pytest.raises(
        ValueError, match=r"groups of 32 inputs must divide the 24 inputs of a matrix; take fp8_block or int8"
    ):
        jaxmoe.load(narrow, mesh=mesh, quantize="int4_group")
    with pytest.raises(ValueError, match=r"matrices are packed as .*; got 'nvfp4'"):
        quantize(jnp.ones((2, 2)), format="nvfp4", block=(1, 2))
    with pytest.raises(ValueError, match=r"a block of \(3, 2\) must divide matrices of 4 by 4"):
        quantize(jnp.ones((4, 4)), format="int8", block=(3, 2))
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "experts.0." in name)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[0] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"values must be finite to be quantized"):
        jaxmoe.load(source, mesh=mesh, quantize="int8")
