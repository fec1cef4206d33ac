"""The choice of a dispatch backend from static shapes, by modeled time."""

import dataclasses
import math

from jaxmoe.dispatch.base import Dispatch, DispatchShape
from jaxmoe.dispatch.collectives import Collective
from jaxmoe.dispatch.rates import measured_rates
from jaxmoe.hardware import GPUS, SIMULATED_CPU, Device

# The kind of device that stands for each JAX platform where the devices themselves are not asked.
RATES: dict[str, Device] = {"gpu": GPUS["h100"], "cpu": SIMULATED_CPU}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchCost:
    """Bytes that a device moves in one call; its own experts' work is the same with every backend and left out.

    Attributes:
        wire_bytes: bytes sent to other devices.
        memory_bytes: bytes copied from place to place in its own memory.
        collectives: number of collectives.
    """

    wire_bytes: float
    memory_bytes: float
    collectives: int

    def seconds(self, device: Device) -> float:
        """Model the time on a kind of device, all of whose messages stay within the node."""
        wire = device.links.seconds(self.wire_bytes, messages=self.collectives)
        return wire + self.memory_bytes / device.memory_bandwidth


def dispatch_cost(backend: Dispatch, shape: DispatchShape) -> DispatchCost:
    """Count one round of a backend with even routing, and the way of the tokens from attention to it and back."""
    real = [each for each in dispatch_collectives(backend, shape) if each.devices > 1]
    return DispatchCost(
        wire_bytes=sum(each.wire_bytes for each in real),
        memory_bytes=backend.memory_bytes(shape),
        collectives=len(real),
    )


def dispatch_collectives(backend: Dispatch, shape: DispatchShape) -> tuple[Collective, ...]:
    """List the collectives of one round with even routing, and those by which tokens come from attention and go back."""
    return backend.collectives(shape) + _boundary(backend, shape)


def _boundary(backend: Dispatch, shape: DispatchShape) -> tuple[Collective, ...]:
    """List what is gathered before and after: attention's tokens are split over dp and ep and the same on all of tp."""
    layout = shape.layout
    token_axes = backend.token_axes(layout)
    before = tuple(axis for axis in layout.axes.dp + layout.axes.ep if axis not in token_axes)
    after = tuple(axis for axis in layout.axes.tp if axis in token_axes)
    found = []
    for axes, split_over in ((before, token_axes), (after, layout.axes.dp + layout.axes.ep)):
        size = shape.tokens_per_device(split_over) * shape.width * shape.itemsize
        found.append(Collective(op="all-gather", axes=axes, devices=layout.size(axes), bytes=size, payload=1.0))
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchChoice:
    """The choice that "auto" made, and the reasons for it.

    Attributes:
        name: name of the backend.
        tokens: tokens T of all devices together.
        platform: key of `RATES` whose device was used.
        measured: flag that the rates are those that were measured on such devices here.
        seconds: modeled time of each backend that was compared; `name` has the least.
        left_out: reason for each of the other backends why it was not compared.
    """

    name: str
    tokens: int
    platform: str
    seconds: dict[str, float]
    left_out: dict[str, str]
    measured: bool = False

    def __str__(self) -> str:
        order = sorted(self.seconds, key=lambda name: (self.seconds[name], name != self.name))
        times = ", ".join(f"{name} {self.seconds[name] * 1e6:.0f} µs" for name in order)
        reasons = "".join(f"; {name} left out: {reason}" for name, reason in self.left_out.items())
        rates = ", by rates measured here" if self.measured else ""
        return f"{self.name} for {self.tokens} tokens, by time modeled for {self.platform}{rates}: {times}{reasons}"


def choose(
    backends: list[Dispatch],
    shape: DispatchShape,
    platform: str,
    device_kind: str | None = None,
    *,
    processes: int = 1,
) -> DispatchChoice:
    """Choose the backend with the least modeled time; the first among equals.

    Args:
        backends: backends to compare.
        shape: sizes of the call.
        platform: platform of the devices.
        device_kind: kind of them, whose rates count where they were measured here (`rates`); None for those of `RATES`.
        processes: number of processes that have the devices.
    """
    rates_of = "cpu" if platform == "cpu" else "gpu"
    devices = math.prod(size for _, size in shape.layout.mesh_shape)
    measured = None if device_kind is None else measured_rates(device_kind, devices, RATES[rates_of])
    device = measured or RATES[rates_of]
    seconds, left_out = {}, {}
    for backend in backends:
        if reason := backend.cannot_run.get(platform) or backend.breaks(shape.layout, processes):
            left_out[backend.name] = reason
        elif not backend.auto:
            left_out[backend.name] = "used only where it is named"
        else:
            seconds[backend.name] = dispatch_cost(backend, shape).seconds(device)
    name = min(seconds, key=lambda name: seconds[name])
    return DispatchChoice(
        name=name,
        tokens=shape.tokens,
        platform=rates_of,
        seconds=seconds,
        left_out=left_out,
        measured=measured is not None,
    )
