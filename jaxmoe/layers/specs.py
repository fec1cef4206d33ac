"""The parameters of a module by path, and the spec of each, known before it has a value."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from jaxmoe.layers.expert_stack import ExpertStack
from jaxmoe.layers.moe import MoE
from jaxmoe.layers.param import ParamSpec


def params_by_path(module: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of `module` by dotted path, in a stable order."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def param_specs(module: nnx.Module) -> Iterator[ParamSpec]:
    """Give the specs of a module's parameters, abstract or not.

    Raises:
        ValueError: a layer's placement cannot be read here, see `jaxmoe.MoE.placement`.
    """
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        value = param.get_value()
        rows, source_groups = _rows(module, path, param)
        yield ParamSpec(
            path=".".join(map(str, path)),
            shape=tuple(value.shape),
            dtype=np.dtype(value.dtype),
            sharding=value.sharding,
            rows=rows,
            source_groups=source_groups,
            parts=param.get_metadata().get("parts"),
        )


def layer_of_stack(module: nnx.Module, path: tuple[Any, ...]) -> MoE | None:
    """Find the layer whose expert stack the parameter at `path` is; None where it is none."""
    owner = owner_of(module, path)
    return owner if isinstance(owner, MoE) and isinstance(getattr(owner, path[-1]), ExpertStack) else None


def owner_of(module: nnx.Module, path: tuple[Any, ...]) -> Any:
    """Find what holds the Variable at `path`."""
    owner: Any = module
    for key in path[:-1]:
        owner = getattr(owner, key) if isinstance(key, str) and hasattr(owner, key) else owner[key]
    return owner


def _rows(module: nnx.Module, path: tuple[Any, ...], param: nnx.Param) -> tuple[tuple[int, ...] | None, int | None]:
    if layer := layer_of_stack(module, path):
        return tuple(layer.placement.slot_to_expert.tolist()), layer.config.num_experts
    rows = param.get_metadata().get("rows")
    return (None, None) if rows is None else (rows.rows, rows.source_groups)
