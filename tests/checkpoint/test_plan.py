"""The plan refuses whatever does not fit, all of it at once, before a weight byte is read."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.checkpoint import Block, CheckpointError, IgnoreRule, make_load_plan, open_checkpoint, whole_tensor_blocks
from tests.support.loading import BF16, F32, Case, add_experts, add_tensor, spec
from tests.support.meshes import mesh_of
from tests.support.writing import write_checkpoint


@pytest.fixture
def case() -> Case:
    case, mesh, rng = Case(), mesh_of(2, 2, 2), np.random.default_rng(0)
    add_tensor(case, mesh, rng, "a", (4, 6), ("tp", None))
    add_tensor(case, mesh, rng, "b", (8,))
    add_experts(case, mesh, rng, range(12), 12, "per_expert")
    return case


def plan(case: Case, directory, **options):
    return make_load_plan(
        open_checkpoint(write_checkpoint(directory, case.tensors)), case.specs, case.blocks, **options
    )


def refused(case: Case, directory, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(case, directory, **options)
    message = str(caught.value)
    assert message.startswith(f"the load plan of {directory} has ")
    return message


def test_a_plan_reads_no_weights(case, tmp_path, monkeypatch):
    monkeypatch.delattr("os.preadv")
    made = plan(case, tmp_path, expert_params=case.expert_params)
    assert made.bytes_needed == sum(tensor.nbytes for tensor in case.tensors.values())
    assert sum(read.nbytes for read in made.reads) == made.bytes_needed
    # Six of twelve experts on each ep rank, half of F on each tp rank, 3·D·F elements an expert.
    assert set(made.expert_bytes_per_device.values()) == {6 * 3 * 8 * 16 // 2 * 4}
    assert set(made.bytes_per_device.values()) == {6 * 3 * 8 * 16 // 2 * 4 + 2 * 6 * 4 + 8 * 4}


def test_missing_tensor(case, tmp_path):
    del case.tensors["b.weight"]
    assert "1 problem: tensor 'b.weight' is missing: b needs it with shape (8,)" in refused(case, tmp_path)


def test_wrong_shape(case, tmp_path):
    case.tensors["b.weight"] = np.zeros(9, np.float32)
    assert "'b.weight' has shape (9,); b needs (8,); does config.json" in refused(case, tmp_path)


def test_swapped_dims_are_recognized(case, tmp_path):
    case.tensors["a.weight"] = case.tensors["a.weight"].T
    assert "its last two dims are swapped" in refused(case, tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, ml_dtypes.float8_e4m3fn])
def test_wrong_dtype(case, dtype, tmp_path):
    case.tensors["b.weight"] = np.zeros(8, dtype)
    assert "and b is float32: only BF16, F16, F32 and F64 are cast" in refused(case, tmp_path)


def test_64_bits_are_refused_before_jax_drops_half_of_them(case, tmp_path):
    case.specs[1] = dataclasses.replace(case.specs[1], dtype=np.dtype(np.float64))
    assert "b is to be float64" in refused(case, tmp_path)


def test_tensor_left_over(case, tmp_path):
    case.tensors["extra.inv_freq"] = np.zeros((3, 2), np.float32)
    assert "'extra.inv_freq' (3, 2) fills no parameter and no rule ignores it" in refused(case, tmp_path)
    rules = [
        IgnoreRule(name="rotary tables", pattern=r".*\.inv_freq"),
        IgnoreRule(name="never reached", pattern=r".*freq"),
        IgnoreRule(name="used tensors are not ignored", pattern=r".*\.weight"),
    ]
    assert plan(case, tmp_path, ignore=rules).ignored == {"rotary tables": ("extra.inv_freq",)}
    assert "fills no parameter" in refused(case, tmp_path, ignore=[IgnoreRule(name="part", pattern="freq|extra")])


def test_part_of_a_tensor_left_over(case, tmp_path):
    case.specs[1] = dataclasses.replace(case.specs[1], shape=(4,), rows=(0, 3), source_groups=4)
    case.blocks = [block for block in case.blocks if block.param != "b"]
    case.blocks += whole_tensor_blocks(case.specs[1], "b.weight")
    assert "[2:6] of tensor 'b.weight' (8,) fills no parameter" in refused(case, tmp_path)


def test_parameter_filled_twice_and_not_at_all(case, tmp_path):
    first, *rest = case.blocks
    half = dataclasses.replace(first, shape=(2, 6))
    case.blocks = [half, half, *rest]
    message = refused(case, tmp_path)
    assert "3 problems" in message
    assert "[2:4, 0:6] of a (4, 6) is filled by nothing" in message
    assert "[0:2, 0:6] of a (4, 6) is filled 2 times, by ['a.weight', 'a.weight']" in message
    assert "[2:4, 0:6] of tensor 'a.weight' (4, 6) fills no parameter" in message


def test_blocks_outside(case, tmp_path):
    first, *rest = case.blocks
    case.blocks = [dataclasses.replace(first, param_start=(1, 0), tensor_start=(2, 0)), *rest]
    message = refused(case, tmp_path)
    assert "a needs [2:6, 0:6] of tensor 'a.weight' (4, 6), outside of it" in message
    assert "a (4, 6) is to be filled at [1:5, 0:6], outside of it" in message


def test_block_of_no_parameter(case, tmp_path):
    case.blocks.append(Block(param="ghost", param_start=(0,), shape=(1,), tensor="b.weight"))
    assert "tensor 'b.weight' is to fill 'ghost', which the model does not have" in refused(case, tmp_path)


def test_uneven_sharding(case, tmp_path):
    mesh = mesh_of(1, 8, 1)
    case.specs[0] = dataclasses.replace(case.specs[0], sharding=NamedSharding(mesh, PartitionSpec("tp")))
    message = refused(case, tmp_path)
    assert "a (4, 6) does not divide over the mesh axes of " in message
    assert "{'dp': 1, 'tp': 8, 'ep': 1}" in message


def test_all_problems_are_counted_and_the_first_are_listed(case, tmp_path):
    for expert in range(12):
        del case.tensors[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"]
    message = refused(case, tmp_path)
    assert "has 12 problems" in message
    assert message.count("tensor '") == 4
    assert message.endswith("; and 8 more")


def test_an_unplaced_expert_is_noticed(tmp_path):
    case = Case()
    add_experts(case, mesh_of(2, 2, 2), np.random.default_rng(0), range(10), 11, "fused")
    assert "[10:11, 0:32, 0:8] of tensor 'model.layers.0.mlp.experts.gate_up_proj'" in refused(case, tmp_path)


def test_dims_of_size_one_may_differ(tmp_path):
    mesh, case = mesh_of(2, 2, 2), Case(tensors={"gate": np.zeros((1, 8), F32), "row": np.zeros((4,), F32)})
    infos = open_checkpoint(write_checkpoint(tmp_path, case.tensors)).tensors
    for path, shape in {"gate": (8,), "row": (4, 1)}.items():
        case.specs.append(spec(mesh, path, shape))
        case.blocks += whole_tensor_blocks(case.specs[-1], path, infos[path])
    assert plan(case, tmp_path).bytes_needed == 48


def test_runs_of_rows_become_one_block_each():
    rows = (0, 1, 2, -1, -1, 0, 2, 1, -1)
    param = spec(mesh_of(2, 2, 2), "w", (18, 3), rows=rows, source_groups=3)
    blocks = whole_tensor_blocks(param, "t")
    starts = [(b.param_start[0], b.shape[0], b.tensor_start[0] if b.tensor else None) for b in blocks]
    assert starts == [(0, 6, 0), (6, 4, None), (10, 2, 0), (12, 2, 4), (14, 2, 2), (16, 2, None)]


def test_plans_of_all_processes_share_the_checks_and_split_the_shards(case, tmp_path):
    whole = plan(case, tmp_path)
    parts = [plan(case, tmp_path, local_devices=[device]) for device in jax.devices()]
    for part, device in zip(parts, jax.devices(), strict=True):
        assert part.bytes_per_device == {device.id: whole.bytes_per_device[device.id]}
    assert plan(case, tmp_path, local_devices=[]).bytes_needed == 0


def test_bfloat16_counts_its_own_bytes(tmp_path):
    case = Case()
    add_tensor(case, mesh_of(2, 2, 2), np.random.default_rng(0), "w", (4, 4), (), F32, BF16)
    made = plan(case, tmp_path)
    assert made.bytes_needed == 32
    assert set(made.bytes_per_device.values()) == {64}
