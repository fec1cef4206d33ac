"""The choice of a dispatch backend from static shapes, by modelled time."""

import dataclasses

from jaxmoe.dispatch.base import Dispatch, DispatchCost, DispatchLayout


@dataclasses.dataclass(frozen=True)
class DeviceRates:
    """What moving data costs on a kind of device.

    Attributes:
        link: bytes per second that a device sends to others.
        memory: bytes per second that it reads or writes of its own memory.
        latency: seconds that a collective takes whatever it moves.
    """

    link: float
    memory: float
    latency: float

    def seconds(self, cost: DispatchCost) -> float:
        """Modelled time of a cost."""
        return cost.wire_bytes / self.link + cost.memory_bytes / self.memory + cost.collectives * self.latency


# By JAX platform. GPU: an H100's NVLink (one direction) and HBM by datasheet, latency of a small NCCL collective.
# CPU: simulated devices share one memory; a collective is a rendezvous of threads.
RATES = {
    "gpu": DeviceRates(link=450e9, memory=3.35e12, latency=10e-6),
    "cpu": DeviceRates(link=8e9, memory=8e9, latency=60e-6),
}


def choose(
    backends: list[Dispatch], T: int, K: int, D: int, itemsize: int, layout: DispatchLayout, platform: str
) -> Dispatch:
    """The backend with the least modelled time for T tokens over the expert axes; the first among equals."""
    rates = RATES["cpu" if platform == "cpu" else "gpu"]
    return min(backends, key=lambda backend: rates.seconds(backend.cost(T, K, D, itemsize, layout)))
