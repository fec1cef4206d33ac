"""A layer on a mesh whose axes are of type Explicit: inside it is computed as on one of type Auto."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.layers.routed_experts import MoEStats


def apply_on_auto_axes(
    apply: Callable[..., tuple[jax.Array, MoEStats]], layer: nnx.Module, mesh: Mesh, *arrays: jax.Array | None
) -> tuple[jax.Array, MoEStats]:
    """Compute ``apply(layer, *arrays)`` with all axes of the mesh of type Auto inside, whatever their types are outside.

    With axes of type Explicit arrays carry their shardings in their types. What `apply` gives first is laid out like the
    first of the arrays, and its statistics are whole on every device.

    Args:
        apply: function of the layer and the arrays.
        layer: module with arrays on the mesh.
        mesh: mesh of the layer.
        arrays: arrays of the call, the first one never None.

    Raises:
        ValueError: the program is on another mesh, or inside of a `shard_map`.
    """
    context = jax.sharding.get_abstract_mesh()
    explicit = _explicit_axes(mesh, context)
    if not explicit:
        return apply(layer, *arrays)

    def sharded(spec: P) -> Any:
        return spec if not context.empty else NamedSharding(mesh, spec)

    typed = jax.typeof(arrays[0]).sharding
    like_first = sharded(typed.spec if typed.mesh.axis_names == mesh.axis_names else P())
    graphdef, state = nnx.split(layer)
    return jax.sharding.auto_axes(
        lambda state, *arrays: apply(nnx.merge(graphdef, state), *arrays),
        axes=explicit,
        out_sharding=(like_first, MoEStats(*[sharded(P())] * len(MoEStats._fields))),
    )(state, *arrays)


def _explicit_axes(mesh: Mesh, context: AbstractMesh) -> tuple[str, ...]:
    """The axes of type Explicit, as the call sees the mesh."""
    seen = mesh if context.empty else context
    if dict(seen.shape) != dict(mesh.shape) or AxisType.Manual in seen.axis_types:
        raise ValueError(
            f"the layer is on a mesh of {dict(mesh.shape)} and is called with {seen}: make it on the mesh of the "
            "program (mesh=, axis_names=), and call it outside of shard_map, for it is one itself"
        )
    kinds = zip(seen.axis_names, seen.axis_types, strict=True)
    return tuple([axis for axis, kind in kinds if kind == AxisType.Explicit])
