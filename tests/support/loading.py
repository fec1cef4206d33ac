"""Small models for the loader: tensors, specs, blocks, and the arrays that must come out."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.checkpoint import Block, expert_blocks, whole_tensor_blocks
from jaxmoe.layers.param import ParamSpec
from jaxmoe.models.family import MLP_EXPERTS
from jaxmoe.planning import Plan
from jaxmoe.planning.memory import CACHE

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


@dataclasses.dataclass
class Case:
    """Tensors on disk, what to make of them, and the values that must come out."""

    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    specs: list[ParamSpec] = dataclasses.field(default_factory=list)
    blocks: list[Block] = dataclasses.field(default_factory=list)
    expected: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def expert_params(self) -> set[str]:
        return {spec.path for spec in self.specs if spec.path.endswith(("w_gate_up", "w_down"))}


def spec(mesh: Mesh, path: str, shape, dims=(), dtype=F32, **rows) -> ParamSpec:
    return ParamSpec(
        path=path, shape=tuple(shape), dtype=np.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*dims)), **rows
    )


def random(rng: np.random.Generator, shape, dtype) -> np.ndarray:
    """Values that are no bfloat16, so that a cast that should not happen shows."""
    return rng.standard_normal(shape, np.float32).astype(dtype)


def take_rows(value: np.ndarray, rows, source_groups: int) -> np.ndarray:
    """What `ParamSpec.rows` says, the long way."""
    groups = np.split(value, source_groups)
    return np.concatenate([np.zeros_like(groups[0]) if row < 0 else groups[row] for row in rows])


def add_tensor(case: Case, mesh: Mesh, rng, path, shape, dims=(), dtype=F32, disk_dtype=None, rows=None, groups=None):
    """A parameter that is one tensor of `shape`, or rows of it."""
    value = random(rng, shape, disk_dtype or dtype)
    result = value if rows is None else take_rows(value, rows, groups)
    param = spec(mesh, path, result.shape, dims, dtype, rows=rows, source_groups=groups)
    case.tensors[f"{path}.weight"] = value
    case.specs.append(param)
    case.blocks += whole_tensor_blocks(param, f"{path}.weight")
    case.expected[path] = result.astype(dtype)


def add_experts(
    case: Case, mesh: Mesh, rng, slot_to_expert, num_experts, layout, layer=0, model=8, width=16, dtype=F32,
    disk_dtype=None, axes="ep", tp="tp",
):  # fmt: skip
    """One layer's stacks, on disk in `layout`."""
    gate_up = random(rng, (num_experts, 2 * width, model), disk_dtype or dtype)
    down = random(rng, (num_experts, model, width), disk_dtype or dtype)
    names = MLP_EXPERTS.for_layer(layer)
    if layout == "fused":
        case.tensors |= {names.fused_gate_up: gate_up, names.fused_down: down}
    else:
        for expert in range(num_experts):
            gate_name, up_name, down_name = names.per_expert(expert)
            case.tensors[gate_name] = gate_up[expert, :width]
            case.tensors[up_name] = gate_up[expert, width:]
            case.tensors[down_name] = down[expert]
    slots, rows = len(slot_to_expert), {"rows": tuple(slot_to_expert), "source_groups": num_experts}
    path = f"layers.{layer}.moe"
    up = spec(mesh, f"{path}.w_gate_up", (slots, 2, width, model), (axes, None, tp, None), dtype, **rows)
    dn = spec(mesh, f"{path}.w_down", (slots, model, width), (axes, None, tp), dtype, **rows)
    case.specs += [up, dn]
    case.blocks += expert_blocks(up, dn, names, case.tensors)
    halves = gate_up.reshape(num_experts, 2, width, model)
    case.expected[up.path] = take_rows(halves, slot_to_expert, num_experts).astype(dtype)
    case.expected[dn.path] = take_rows(down, slot_to_expert, num_experts).astype(dtype)


def check_arrays(case: Case, arrays: dict[str, jax.Array]) -> None:
    """Values bit for bit, shardings, dtypes."""
    assert list(arrays) == [spec.path for spec in case.specs]
    for param in case.specs:
        array = arrays[param.path]
        assert array.sharding == param.sharding
        assert array.dtype == param.dtype
        np.testing.assert_array_equal(bits(array), bits(case.expected[param.path]), err_msg=param.path)


def bits(array) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


PATHS = {"direct": {"staging": False}, "staging": {"staging": True, "staging_bytes": 32 * 1024, "threads": 3}}


def planned_weights(plan: Plan) -> list[float]:
    """Bytes of weights alone that a plan has on each device."""
    return [held - cache for held, cache in zip(plan.held_per_device.values(), plan.parts[CACHE], strict=True)]
