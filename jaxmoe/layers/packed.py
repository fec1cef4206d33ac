"""Parameters that stay packed: the matrices of one become several arrays, their numbers and their scales.

The numbers have the name of the parameter, and the other arrays that name with an ending (`PART_ENDINGS`). Each is a
parameter of its own, sharded like the matrices, so that whatever moves, saves or restores parameters moves all of them;
`WeightSpecs` puts them together for the computation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.layers.param import ParamSpec
from jaxmoe.layers.weights import PART_ENDINGS, WeightSpecs
from jaxmoe.quant.packing import OF_MATRICES, Packing


def part_specs(spec: ParamSpec, packing: Packing) -> dict[str, ParamSpec]:
    """Give the specs of the arrays of a parameter [..., N, K] that stays packed, by role.

    Args:
        spec: spec of the parameter as a plain array.
        packing: packed form of it.
    """
    *lead, N, K = spec.shape
    axes = (*spec.sharding.spec, *[None] * (len(spec.shape) - len(spec.sharding.spec)))
    parts = {}
    for role in packing.roles:
        units = packing.units(role, spec.shape)
        shape: tuple[int, ...] = (*lead, N // units[0], K // units[1])
        # An entry for all of a dim is on every device that has some of it.
        over = (
            *axes[:-2],
            *[None if unit == size else axis for axis, unit, size in zip(axes[-2:], units, (N, K), strict=True)],
        )
        rows, groups = spec.rows, spec.source_groups
        if not lead and units[0] == N:
            rows, groups = None, None
        if role in OF_MATRICES:
            shape, over = tuple(lead), over[:-2]
        parts[role] = replace(
            spec,
            path=spec.path + PART_ENDINGS[role],
            shape=shape,
            dtype=packing.dtype(role),
            sharding=NamedSharding(spec.sharding.mesh, PartitionSpec(*over)),
            rows=rows,
            source_groups=groups,
        )
    return parts


def pack_params(module: nnx.Module, specs: Iterable[ParamSpec], packings: Mapping[str, Packing]) -> None:
    """Turn parameters of an abstract module into packed ones, abstract too, for a loader to fill.

    Args:
        module: module whose parameters have no values.
        specs: specs of its parameters.
        packings: packed form of those that are to stay packed, by path.
    """
    for spec in specs:
        if spec.path not in packings:
            continue
        packing = packings[spec.path]
        owner, name = owner_of(module, spec.path)
        param: nnx.Param = getattr(owner, name)
        metadata: dict[str, Any] = {
            key: value for key, value in param.get_metadata().items() if key in ("rows", "filled_by")
        }
        for role, part in part_specs(spec, packing).items():
            value = jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=part.sharding)
            own = metadata | ({"rows": None} if part.rows is None else {})
            setattr(owner, name + PART_ENDINGS[role], type(param)(value, **own, spec=part.sharding.spec))
        attribute, held = _weight_specs(owner)
        setattr(owner, attribute, WeightSpecs.of(owner, {**dict(held.packings), name: packing}))


def packings_of(module: nnx.Module) -> dict[str, Packing]:
    """Give the packed forms of the parameters of a module that are held so, by path."""
    found: dict[str, Packing] = {}
    for path, owner in nnx.iter_modules(module):
        for _, specs in _all_weight_specs(owner):
            found |= {".".join([*map(str, path), name]): packing for name, packing in specs.packings}
    return found


def unpacked_specs(specs: Iterable[ParamSpec], packings: Mapping[str, Packing], dtype: Any) -> list[ParamSpec]:
    """Give the specs of a module's parameters as if none were packed.

    Args:
        specs: specs of all its arrays.
        packings: packed forms by path.
        dtype: dtype of the matrices where they are plain.
    """
    parts = {path + PART_ENDINGS[role] for path, packing in packings.items() for role in packing.roles[1:]}
    plain = []
    for spec in specs:
        if spec.path in packings:
            shape = (*spec.shape[:-1], spec.shape[-1] * packings[spec.path].per_byte)
            plain.append(replace(spec, shape=shape, dtype=jnp.dtype(dtype)))
        elif spec.path not in parts:
            plain.append(spec)
    return plain


def packable_params(module: nnx.Module) -> set[str]:
    """Give the paths of the matrices that a module multiplies with, and nothing else: these may be held packed."""
    return {
        ".".join([*map(str, path), name])
        for path, owner in nnx.iter_modules(module)
        for name in getattr(owner, "packable", ())
        if hasattr(owner, name)
    }


def owner_of(module: nnx.Module, path: str) -> tuple[Any, str]:
    """Find the module that has the parameter at a dotted path, and its name there."""
    *steps, name = path.split(".")
    owner: Any = module
    for step in steps:
        owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
    return owner, name


def _all_weight_specs(owner: nnx.Module) -> list[tuple[str, WeightSpecs]]:
    return [(name, value) for name, value in vars(owner).items() if isinstance(value, WeightSpecs)]


def _weight_specs(owner: nnx.Module) -> tuple[str, WeightSpecs]:
    (found,) = _all_weight_specs(owner)
    return found
