"""The choice of a dispatch backend from static shapes, by modelled time."""

import dataclasses

from jaxmoe.dispatch.base import Dispatch, DispatchLayout
from jaxmoe.dispatch.collectives import Collective
from jaxmoe.hardware import GPUS, SIMULATED_CPU, Device

# The kind of device that stands for each JAX platform where the devices themselves are not asked.
RATES: dict[str, Device] = {"gpu": GPUS["h100"], "cpu": SIMULATED_CPU}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchCost:
    """What a device moves in one call; its own experts' work is the same with every backend and left out.

    Attributes:
        wire_bytes: sent to other devices.
        memory_bytes: copied from place to place in its own memory.
        collectives: operations in which devices meet.
    """

    wire_bytes: float
    memory_bytes: float
    collectives: int

    def seconds(self, device: Device) -> float:
        """Model the time on a kind of device, all of whose messages stay within the node."""
        wire = device.links.seconds(self.wire_bytes, messages=self.collectives)
        return wire + self.memory_bytes / device.memory_bandwidth


def dispatch_cost(backend: Dispatch, T: int, K: int, D: int, itemsize: int, layout: DispatchLayout) -> DispatchCost:
    """One round of a backend with even routing, and the way of the tokens from attention to it and back."""
    every = backend.collectives(T, K, D, itemsize, layout) + _boundary(backend, T, D, itemsize, layout)
    met = [each for each in every if each.devices > 1]
    return DispatchCost(
        wire_bytes=sum(each.wire_bytes for each in met),
        memory_bytes=backend.memory_bytes(T, K, D, itemsize, layout),
        collectives=len(met),
    )


def _boundary(backend: Dispatch, T: int, D: int, itemsize: int, layout: DispatchLayout) -> tuple[Collective, ...]:
    """Attention's tokens are split over dp and ep and the same on all of tp: what must be gathered before and after."""
    token_axes = backend.token_axes(layout)
    before = tuple(axis for axis in layout.axes.dp + layout.axes.ep if axis not in token_axes)
    after = tuple(axis for axis in layout.axes.tp if axis in token_axes)
    found = []
    for axes, split_over in ((before, token_axes), (after, layout.axes.dp + layout.axes.ep)):
        rows = layout.tokens_per_device(T, split_over)
        found.append(
            Collective(op="all-gather", axes=axes, devices=layout.size(axes), bytes=rows * D * itemsize, payload=1.0)
        )
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchChoice:
    """What "auto" chose, and why.

    Attributes:
        name: the backend.
        tokens: T, of all devices together.
        platform: the device of `RATES` that was used.
        seconds: modelled time of each backend that was compared; `name` has the least.
        left_out: the other backends, and why they were not compared.
    """

    name: str
    tokens: int
    platform: str
    seconds: dict[str, float]
    left_out: dict[str, str]

    def __str__(self) -> str:
        order = sorted(self.seconds, key=lambda name: (self.seconds[name], name != self.name))
        times = ", ".join(f"{name} {self.seconds[name] * 1e6:.0f} µs" for name in order)
        reasons = "".join(f"; {name} left out: {reason}" for name, reason in self.left_out.items())
        return f"{self.name} for {self.tokens} tokens, by time modelled for {self.platform}: {times}{reasons}"


def choose(
    backends: list[Dispatch], T: int, K: int, D: int, itemsize: int, layout: DispatchLayout, platform: str
) -> DispatchChoice:
    """The backend with the least modelled time for T tokens of all devices together; the first among equals."""
    rates_of = "cpu" if platform == "cpu" else "gpu"
    seconds, left_out = {}, {}
    for backend in backends:
        if reason := backend.cannot_run.get(platform):
            left_out[backend.name] = reason
        elif backend.by_name:
            left_out[backend.name] = "used only where it is named"
        else:
            seconds[backend.name] = dispatch_cost(backend, T, K, D, itemsize, layout).seconds(RATES[rates_of])
    name = min(seconds, key=lambda name: seconds[name])
    return DispatchChoice(name=name, tokens=T, platform=rates_of, seconds=seconds, left_out=left_out)
