"""Parameters that know how they lie on the mesh and how a checkpoint fills them."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxmoe.layers.host_data import HostData
from jaxmoe.mesh import MODEL_AXES, MeshAxes, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter of a model, before it has a value.

    Attributes:
        path: where it is in the model, "layers.3.moe.w_gate_up".
        shape: global shape on the mesh, padding included.
        dtype: what the array on the mesh has; a checkpoint's tensor may differ and is cast.
        sharding: over the mesh.
        rows: None where the parameter is the checkpoint's tensor. Otherwise dim 0 is ``len(rows)``
            equal groups; group i is filled from group ``rows[i]`` of the tensor's dim 0, or with
            zeros where it is -1 (expert slots, repeated key/value heads, vocabulary padding).
        source_groups: groups that dim 0 of the checkpoint's tensor has; None where `rows` is.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    rows: tuple[int, ...] | None = None
    source_groups: int | None = None


@dataclasses.dataclass(frozen=True)
class RowMap:
    """How groups of dim 0 are filled from a checkpoint; see `ParamSpec.rows`."""

    rows: tuple[int, ...]
    source_groups: int

    @classmethod
    def padded(cls, size: int, padded_size: int) -> "RowMap | None":
        """`size` rows followed by zeros up to `padded_size`; None where there is nothing to pad."""
        if size == padded_size:
            return None
        return cls((*range(size), *(-1,) * (padded_size - size)), size)


Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialiser of norm weights."""
    del key
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialiser of biases."""
    del key
    return jnp.zeros(shape, dtype)


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal with standard deviation 1/sqrt(fan in); the last dim is the input, as in torch."""
    return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-1])).astype(dtype)


@dataclasses.dataclass(frozen=True)
class ParamFactory:
    """Makes the parameters of a module: random ones, or abstract ones for a loader to fill.

    Attributes:
        mesh: where they live.
        dtype: of the weights.
        rngs: random streams; None makes ``jax.ShapeDtypeStruct`` values, which allocate nothing.
        axes: the mesh axes that play dp, tp and ep.
    """

    mesh: Mesh
    dtype: Any
    rngs: nnx.Rngs | None
    axes: MeshAxes = MODEL_AXES

    def __call__(
        self,
        shape: tuple[int, ...],
        *dims: str | tuple[str, ...] | None,
        init: Init = fan_in_normal,
        dtype: Any = None,
        rows: RowMap | None = None,
    ) -> nnx.Param:
        """Make one parameter of `shape`, sharded over the mesh axes named in `dims`."""
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        sharding = named(self.mesh, *dims)
        if self.rngs is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), rows=HostData(rows))
        # Initialised where it will live: no device ever holds the whole array.
        make = jax.jit(_initial, static_argnums=(1, 2, 3, 4), out_shardings=sharding)
        value = make(self.rngs.params(), shape, dtype, init, rows)
        return nnx.Param(value, rows=HostData(rows))


def _initial(key: jax.Array, shape: tuple[int, ...], dtype: Any, init: Init, rows: RowMap | None) -> jax.Array:
    """Random values as a checkpoint would fill them: alike in groups that have one source, zeros in padding."""
    if rows is None or rows.rows == tuple(range(rows.source_groups)):
        return init(key, shape, dtype)
    sources = jnp.array(rows.rows, jnp.int32)
    group = (shape[0] // len(sources), *shape[1:])
    # A key for each source: taken from an array of all sources, the groups would need all of it on every device.
    values = jax.vmap(lambda source: init(jax.random.fold_in(key, source), group, dtype))(sources)
    return jnp.where((sources >= 0).reshape(-1, *[1] * len(group)), values, 0).reshape(shape)


def row_map(param: nnx.Param) -> RowMap | None:
    """How the parameter's rows are filled from a checkpoint; None where it is the checkpoint's tensor."""
    return param.get_metadata()["rows"].value


def set_row_map(param: nnx.Param, rows: RowMap) -> None:
    """Note that the parameter's rows were changed; programs compiled for it stay valid."""
    param.set_metadata("rows", HostData(rows))


def params_by_path(module: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of `module` by dotted path, in a stable order."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def param_specs(module: nnx.Module) -> Iterator[ParamSpec]:
    """The specs of a module's parameters, abstract or not."""
    for path, param in params_by_path(module).items():
        value, rows = param.get_value(), row_map(param)
        yield ParamSpec(
            path=path,
            shape=tuple(value.shape),
            dtype=np.dtype(value.dtype),
            sharding=value.sharding,
            rows=rows.rows if rows else None,
            source_groups=rows.source_groups if rows else None,
        )
