"""The (dp, tp, ep) device mesh: axis names, construction, simulated devices.

``dp`` replicates the model over groups of sequences, ``tp`` splits heads, vocabulary
and expert width, ``ep`` splits the experts. Attention is data-parallel over ``ep`` as
well, so the batch dim of activations is sharded over ``("dp", "ep")``.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.checks import instance_of, integer

DP, TP, EP = "dp", "tp", "ep"
AXES = (DP, TP, EP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """The axes of a mesh that play the parts of dp, tp and ep: each of them one axis, several, or none.

    >>> MeshAxes(dp=("data", "fsdp"), tp=("model",), ep=("expert",)).names(EP, TP)
    ('expert', 'model')
    """

    dp: tuple[str, ...] = (DP,)
    tp: tuple[str, ...] = (TP,)
    ep: tuple[str, ...] = (EP,)

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, names: Mapping[str, str | Sequence[str]] | None = None) -> "MeshAxes":
        """Read which axes of `mesh` play which part.

        Args:
            mesh: mesh with any axes.
            names: axis or axes of each part; a part that is left out is played by the axis of its own name, or
                by none.

        Raises:
            ValueError: a name is no axis of the mesh, there twice, or there is no axis for the experts.
        """
        given: dict[str, Any] = dict(names or {})
        if unknown := [part for part in given if part not in AXES]:
            raise ValueError(f"axis_names says which axes play dp, tp and ep; got {unknown[0]!r}")
        parts: dict[str, tuple[str, ...]] = {}
        for part in AXES:
            axes = given.get(part, part if part in mesh.axis_names else ())
            parts[part] = (axes,) if isinstance(axes, str) else tuple(axes)
        used = [axis for axes in parts.values() for axis in axes]
        wrong = [axis for axis in used if axis not in mesh.axis_names or used.count(axis) > 1]
        if wrong or not parts[EP]:
            raise ValueError(
                f"the axes of the mesh are {', '.join(map(str, mesh.axis_names))}, each plays one part at most, and ep "
                f'needs one; got {parts}: say which with axis_names, as in axis_names={{"ep": "expert"}}'
            )
        return cls(**parts)

    def names(self, *parts: str) -> tuple[str, ...]:
        """The axes that play these parts, in this order."""
        return tuple(axis for part in parts for axis in getattr(self, part))

    @property
    def all(self) -> tuple[str, ...]:
        """The axes of every part."""
        return self.names(*AXES)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes of every part, the batch's first.

        A device's tokens are then a slice of those that its attention worked on.
        """
        return self.names(DP, EP, TP)


# Those of `make_mesh`, and of every whole model.
MODEL_AXES = MeshAxes()


def auto_mesh(mesh: Any) -> Any:
    """A mesh of the same devices and axes, all of them of type Auto."""
    auto = (AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == auto:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return mesh.update(axis_types=auto)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=auto)


def make_mesh(dp: int = 1, tp: int = 1, ep: int = 1, *, devices: list[jax.Device] | None = None) -> Mesh:
    """Make the mesh every jaxmoe model lives on.

    Args:
        dp: number of replicas of the model, each serving its own sequences.
        tp: number of devices that share each head group, vocabulary slice and expert width.
        ep: number of devices that share the experts.
        devices: devices to use; by default all of ``jax.devices()``.

    Returns:
        A ``jax.sharding.Mesh`` of shape (dp, tp, ep) with axes ``("dp", "tp", "ep")``.

    Raises:
        ValueError: a size is below 1, or dp·tp·ep is not the number of devices.

    Example:
        >>> make_mesh(ep=jax.device_count()).axis_names
        ('dp', 'tp', 'ep')
    """
    sizes = {axis: integer(axis, size, least=1) for axis, size in ((DP, dp), (TP, tp), (EP, ep))}
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(sizes.values())
    if needed != len(devices):
        raise ValueError(
            f"a mesh uses every device exactly once: dp={dp} x tp={tp} x ep={ep} is {needed} devices, but there "
            f"are {len(devices)} ({devices[0].platform}); change the sizes, pass devices= (a list of {needed}), "
            f"or simulate {needed} CPU devices with jaxmoe.simulate_devices({needed}) (--simulate {needed})"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Read ``"dp=1,tp=2,ep=4"`` into ``{"dp": 1, "tp": 2, "ep": 4}``; axes left out are 1.

    Raises:
        ValueError: an unknown or repeated axis, or a size that is not an integer of at least 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"a mesh is written dp=1,tp=2,ep=4, each axis at most once and at least 1; got {text!r}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def write_mesh(sizes: Mapping[str, int]) -> str:
    """Write the sizes of a mesh as `parse_mesh` reads them.

    >>> write_mesh({"dp": 1, "tp": 2, "ep": 4})
    'dp=1,tp=2,ep=4'
    """
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def check_mesh(mesh: Any) -> None:
    """Refuse a mesh that a whole model cannot live on.

    Raises:
        TypeError: it is no mesh.
        ValueError: its axes are not dp, tp and ep, in this order, all of type Auto.
    """
    instance_of("mesh", mesh, (Mesh, AbstractMesh), "a mesh, from jaxmoe.make_mesh")
    if mesh.axis_names != AXES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        axes = ", ".join(f"{name} ({kind.name})" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise ValueError(
            f"a model lives on a mesh with the axes dp, tp and ep, all of type Auto; got {axes}; make one of the same "
            "devices: jaxmoe.make_mesh(dp=..., tp=..., ep=..., devices=list(mesh.devices.flat))"
        )


def simulate_devices(count: int) -> None:
    """Make JAX offer `count` simulated CPU devices in this process; call it before anything uses a device.

    XLA's CPU client has as many threads as the machine has cores, and a collective keeps one of them until every device
    has come to it. On a machine with fewer cores than devices they can all be kept while a device still needs one, and
    after 40 seconds XLA ends the process. So the client gets two threads a device at least, unless the environment variable
    ``PJRT_NPROC`` says how many.

    Raises:
        ValueError: `count` is below 1.
        RuntimeError: a JAX backend is already running with another number of devices.
    """
    count = integer("count", count, least=1)
    # Not asked of the cores: the process may be kept to a few of them.
    os.environ.setdefault("PJRT_NPROC", str(max(2 * count, os.cpu_count() or 1)))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        started = jax.local_device_count()
    except RuntimeError as error:
        # Raised by jax once a backend runs; fine where that backend already has these devices.
        if jax.default_backend() == "cpu" and jax.local_device_count() == count:
            return
        raise RuntimeError(
            f"devices are simulated before JAX starts: {jax.local_device_count()} {jax.default_backend()} devices are "
            f"already running; call simulate_devices({count}) first thing in the program"
        ) from error
    if started != count:
        raise RuntimeError(
            f"asked for {count} simulated devices but JAX offers {started}; "
            f"unset xla_force_host_platform_device_count in XLA_FLAGS, or make it {count}"
        )


def axes_size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    """Number of devices along `axes` of `mesh`; 1 for no axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def batch_axes(mesh: Mesh, batch_size: int, axes: MeshAxes = MODEL_AXES) -> tuple[str, ...]:
    """Mesh axes that a batch dim of `batch_size` rows is sharded over.

    The choice leaves each device the fewest rows, and among those adds the fewest padding
    rows: eight sequences on (2, 2, 2) use ``("dp", "ep")``, two use ``("dp",)``, one is
    computed alike on all of them.
    """
    choices = ((), axes.dp, axes.ep, axes.dp + axes.ep)

    def rows_then_padding(chosen: tuple[str, ...]) -> tuple[int, int]:
        size = axes_size(mesh, chosen)
        rows = -(-batch_size // size)
        return rows, rows * size

    return min(choices, key=rows_then_padding)


def padded_batch(mesh: Mesh, batch_size: int, axes: MeshAxes = MODEL_AXES) -> int:
    """The smallest number of rows from `batch_size` up that `batch_axes` splits evenly."""
    size = axes_size(mesh, batch_axes(mesh, batch_size, axes))
    return -(-batch_size // size) * size


def named(mesh: Mesh, *dims: str | tuple[str, ...] | None) -> NamedSharding:
    """``NamedSharding`` over `mesh`, one entry per array dim."""
    return NamedSharding(mesh, PartitionSpec(*dims))


def put(value: np.ndarray | np.generic, sharding: NamedSharding) -> Any:
    """Place a host array that every process holds alike; each places the parts of its own devices.

    On a mesh of devices that are not there (an abstract one, or a topology to compile for) it is abstract as well.
    """
    if isinstance(sharding.mesh, AbstractMesh) or not is_present(sharding.mesh.devices.flat[0]):
        return jax.ShapeDtypeStruct(np.shape(value), value.dtype, sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    # device_put would compare the values between processes, a collective each time.
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def is_present(device: jax.Device) -> bool:
    """Whether a program can run on the device; those of a topology can only be compiled for."""
    try:
        return device in jax.devices(device.platform)
    except RuntimeError:  # There is no such platform here.
        return False


def bytes_left(device: jax.Device) -> int | None:
    """Bytes that a device can still give to arrays; None where it does not tell, as CPU devices do not."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
