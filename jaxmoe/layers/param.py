"""Parameters that know how they lie on the mesh and how a checkpoint fills them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxmoe.layers.expert_stack import ExpertStack, SlotOrder
from jaxmoe.layers.linear import Linear
from jaxmoe.mesh import MODEL_AXES, MeshAxes, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter of a model, before it has a value.

    Attributes:
        path: path in the model, as "layers.3.moe.w_gate_up".
        shape: global shape on the mesh, padding included.
        dtype: dtype of the array on the mesh; a checkpoint's tensor may differ and is cast.
        sharding: sharding over the mesh.
        rows: sources of the groups of dim 0; None where the parameter is the checkpoint's tensor. Otherwise dim 0 is
            ``len(rows)`` equal groups; group i is filled from group ``rows[i]`` of the tensor's dim 0, or with zeros
            where it is -1 (expert slots, repeated key/value heads, vocabulary padding).
        source_groups: number of groups of dim 0 of the checkpoint's tensor; None where `rows` is.
        parts: number of tensors that a checkpoint may have its rows in, one after another; None for one alone.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    rows: tuple[int, ...] | None = None
    source_groups: int | None = None
    parts: int | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of it on a device; every device has as many."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class RowMap:
    """The way that groups of dim 0 are filled from a checkpoint, as long as the parameter lives; see `ParamSpec.rows`.

    It is part of what a compiled program is found again by. Expert stacks have none: a rebalance changes theirs, and
    `jaxmoe.layers.specs` reads it from the placement of their layer.

    Attributes:
        source_groups: number of groups of dim 0 of the checkpoint's tensor.
        copies: number of copies of each, side by side.
        padding: number of groups of zeros after them.
    """

    source_groups: int
    copies: int = 1
    padding: int = 0

    @property
    def rows(self) -> tuple[int, ...]:
        """The source of each group, -1 for zeros."""
        held = [source for source in range(self.source_groups) for _ in range(self.copies)]
        return (*held, *(-1,) * self.padding)


Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialize norm weights."""
    del key
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialize biases."""
    del key
    return jnp.zeros(shape, dtype)


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw from a normal distribution of standard deviation 1/sqrt(fan in); the last dim is the input, as in torch."""
    return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-1])).astype(dtype)


@dataclasses.dataclass(frozen=True)
class ParamFactory:
    """A maker of the parameters of a module: random ones, or abstract ones for a loader to fill.

    Attributes:
        mesh: mesh that they live on.
        dtype: dtype of the weights.
        rngs: random streams; None makes ``jax.ShapeDtypeStruct`` values, which allocate nothing.
        axes: mesh axes that play dp, tp and ep.
        kernels: backend of the products with packed matrices, see `linear`.
    """

    mesh: Mesh
    dtype: Any
    rngs: nnx.Rngs | None
    axes: MeshAxes = MODEL_AXES
    kernels: str = "auto"

    @property
    def linear(self) -> Linear:
        """The product of a layer's activations with its matrices."""
        return Linear(self.mesh, self.kernels)

    def __call__(
        self,
        shape: tuple[int, ...],
        *dims: str | tuple[str, ...] | None,
        init: Init = fan_in_normal,
        dtype: Any = None,
        rows: RowMap | None = None,
        slots: tuple[int, ...] | None = None,
        parts: int | None = None,
    ) -> nnx.Param:
        """Make one parameter of `shape`, sharded over the mesh axes named in `dims`; its metadata has them as `spec`.

        Args:
            shape: global shape, padding included.
            dims: mesh axes that each dim is sharded over.
            init: function that draws the values.
            dtype: dtype of this one; None for that of the weights.
            rows: groups that a checkpoint fills, where it is not filled row by row.
            slots: expert in each slot for now, of an expert stack.
            parts: number of tensors that a checkpoint may have it in, see `ParamSpec`.
        """
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        sharding = named(self.mesh, *dims)
        if self.rngs is None:
            value = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        else:
            # Initialized where it will live: no device ever holds the whole array.
            make = jax.jit(_initial, static_argnums=(1, 2, 3, 4), out_shardings=sharding)
            value = make(self.rngs.params(), shape, dtype, init, rows.rows if rows else slots)
        if slots is None:
            return nnx.Param(value, rows=rows, spec=sharding.spec, parts=parts)
        return ExpertStack(value, rows=rows, spec=sharding.spec, filled_by=SlotOrder(slots))


def _initial(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, init: Init, sources_of: tuple[int, ...] | None
) -> jax.Array:
    """Random values as a checkpoint would fill them: alike in groups that have one source, zeros in padding."""
    if sources_of is None or sources_of == tuple(range(len(sources_of))):
        return init(key, shape, dtype)
    sources = jnp.array(sources_of, jnp.int32)
    group = (shape[0] // len(sources), *shape[1:])
    # A key for each source: taken from an array of all sources, the groups would need all of it on every device.
    values = jax.vmap(lambda source: init(jax.random.fold_in(key, source), group, dtype))(sources)
    return jnp.where((sources >= 0).reshape(-1, *[1] * len(group)), values, 0).reshape(shape)
