"""The factors of adapters in a module: made beside their matrices, grown, and written adapter by adapter.

A matrix ``w_q`` has factors ``w_q_lora_a`` and ``w_q_lora_b`` in the same module, each with a dim for the L adapters that
there is room for. They are no parameters: what trains, saves or restores those does not see them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxmoe.layers.embedding import VocabTable
from jaxmoe.layers.in_place import update_slice
from jaxmoe.layers.low_rank import FACTOR_ENDINGS, factor_partitions
from jaxmoe.layers.packed import owner_of, packable_params
from jaxmoe.layers.param import ParamSpec
from jaxmoe.mesh import put


class Factor(nnx.Variable):
    """Factors A or B of all adapters of one matrix, or of one stack of matrices."""


def adaptable_params(module: nnx.Module) -> set[str]:
    """Give the paths of the matrices that may have adapters beside them: those of products inside of layers."""
    return {path for path in packable_params(module) if not isinstance(owner_of(module, path)[0], VocabTable)}


def factor_specs(spec: ParamSpec, adapters: int, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """Give the specs of the factors A and B of one parameter.

    A is [L, r, K] and B [N, L, r]; of a stack [P, ..., K] they are [P, L, r, K] and [P, L, ..., r]. They lie on the mesh
    like the parameter, and dim 0 is filled by the same groups as its own.

    Args:
        spec: spec of the parameter as a plain array.
        adapters: L.
        rank: r.
    """
    *outs, K = spec.shape
    stack = len(outs) > 1
    shapes = (
        ((outs[0], adapters, rank, K), (outs[0], adapters, *outs[1:], rank))
        if stack
        else ((adapters, rank, K), (outs[0], adapters, rank))
    )
    made = []
    partitions = factor_partitions(spec.sharding.spec, len(spec.shape))
    for ending, shape, partition in zip(FACTOR_ENDINGS, shapes, partitions, strict=True):
        filled: dict[str, Any] = {} if stack or ending == FACTOR_ENDINGS[1] else {"rows": None, "source_groups": None}
        sharding = NamedSharding(spec.sharding.mesh, partition)
        made.append(replace(spec, path=spec.path + ending, shape=shape, sharding=sharding, **filled))
    return made[0], made[1]


def held_factors(module: nnx.Module) -> dict[str, Factor]:
    """Give the factors that a module holds, by path."""
    return {".".join(map(str, path)): factor for path, factor in nnx.to_flat_state(nnx.state(module, Factor))}


def held_ranks(module: nnx.Module) -> dict[str, int]:
    """Give the rank that there is room for, by path of the parameter."""
    factors, (_, ending) = held_factors(module), FACTOR_ENDINGS
    return {
        path.removesuffix(ending): factor.get_value().shape[-1]
        for path, factor in factors.items()
        if path.endswith(ending)
    }


def hold_factor(module: nnx.Module, path: str, value: jax.Array) -> None:
    """Let a module hold an array as the factor of that path."""
    owner, name = owner_of(module, path)
    if hasattr(owner, name):
        getattr(owner, name).set_value(value)
    else:
        setattr(owner, name, Factor(value))


def make_room(module: nnx.Module, specs: Mapping[str, ParamSpec], ranks: Mapping[str, int], adapters: int) -> None:
    """Let a module hold factors of so many adapters; those that it holds stay, and new places are zeros.

    Args:
        module: module on the mesh.
        specs: specs of its parameters as plain arrays, by path; factors get their dtype.
        ranks: rank by path, no less than what is held.
        adapters: L, no less than what is held.
    """
    held = held_factors(module)
    for path, rank in ranks.items():
        for spec in factor_specs(specs[path], adapters, rank):
            if spec.path not in held:
                hold_factor(module, spec.path, jnp.zeros(spec.shape, spec.dtype, device=spec.sharding))
            elif (old := held[spec.path].get_value()).shape != spec.shape:
                hold_factor(module, spec.path, _padded(old, spec.shape, spec.sharding))


def write_adapter(
    module: nnx.Module, specs: Mapping[str, ParamSpec], values: Mapping[str, tuple[np.ndarray, np.ndarray]], index: int
) -> None:
    """Write one adapter's factors to its place in all that the module holds; zeros where it has none.

    Args:
        module: module with room for them.
        specs: specs of its parameters as plain arrays, by path.
        values: A and B by path of the parameter, of the shapes of `factor_specs` without the dim of adapters.
        index: number of the adapter.
    """
    for path, rank in held_ranks(module).items():
        owner, name = owner_of(module, path)
        given = values.get(path, (None, None))
        for spec, ending, value in zip(factor_specs(specs[path], 1, rank), FACTOR_ENDINGS, given, strict=True):
            # A of one matrix has the adapters first; of a stack slots come before them, and in B of one matrix outputs.
            dim = int(len(specs[path].shape) > 2 or ending == FACTOR_ENDINGS[1])
            one = np.zeros(spec.shape, spec.dtype) if value is None else np.expand_dims(value, dim).astype(spec.dtype)
            place = [index if at == dim else 0 for at in range(one.ndim)]
            factor: Factor = getattr(owner, name + ending)
            factor.set_value(_written(factor.get_value(), put(one, spec.sharding), jnp.array(place, jnp.int32)))


@partial(jax.jit, static_argnums=(1, 2))
def _padded(old: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    widths = [(0, size - had) for size, had in zip(shape, old.shape, strict=True)]
    return jax.lax.with_sharding_constraint(jnp.pad(old, widths), sharding)


@jax.jit
def _written(factor: jax.Array, one: jax.Array, place: jax.Array) -> jax.Array:
    """The factor with one adapter's part in its place; another module may hold the old one, so it is a copy."""
    return update_slice(factor, one, tuple([place[dim] for dim in range(factor.ndim)]))
