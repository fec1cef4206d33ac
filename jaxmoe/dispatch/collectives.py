"""Bytes that a dispatch moves, from shapes alone.

Each backend lists the collectives of one round; everything that is said about its traffic, from the bytes a user asks
for to the modeled time that "auto" compares, is computed from that list.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

# As XLA writes them.
CollectiveOp = Literal["all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce"]

# Bytes that a device sends to others, over (g - 1) / g of the bytes of the operand or result, whichever is larger:
# each of g devices has its own share already. An all-reduce is a reduce-scatter and an all-gather.
_TIMES = {"all-to-all": 1, "ragged-all-to-all": 1, "all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of the devices along some mesh axes.

    Attributes:
        op: name that XLA gives it.
        axes: mesh axes that it runs along, in the order in which devices are numbered.
        devices: number g of devices that take part.
        bytes: bytes of its operand or its result on one device, whichever is larger.
        payload: share of `bytes` that are activations of tokens with even routing; the rest is padding.
            None for metadata: slots, weights, sizes.
    """

    op: CollectiveOp
    axes: tuple[str, ...]
    devices: int
    bytes: int
    payload: float | None = 1.0

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends to others. A ragged exchange sends no padding."""
        sent = self.bytes if self.op != "ragged-all-to-all" or self.payload is None else self.bytes * self.payload
        return _TIMES[self.op] * sent * (self.devices - 1) / self.devices


class DispatchBytes(NamedTuple):
    """Bytes that one device sends to others in one round, with even routing.

    Attributes:
        payload: activations of tokens, there and back.
        metadata: slots, weights and sizes.
        padding: unused places of buffers, whose sizes are fixed at compile time.
    """

    payload: float
    metadata: float
    padding: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def expected_bytes(collectives: tuple[Collective, ...]) -> DispatchBytes:
    """Add up what a backend's collectives send."""
    payload = metadata = padding = 0.0
    for each in collectives:
        if each.payload is None:
            metadata += each.wire_bytes
        elif each.op == "ragged-all-to-all":
            payload += each.wire_bytes
        else:
            payload += each.wire_bytes * each.payload
            padding += each.wire_bytes * (1 - each.payload)
    return DispatchBytes(payload, metadata, padding)


def reached(K: int, num_slots: int, slots_per_device: int) -> float:
    """The probability that a token with K experts, drawn evenly, has one of them on a given device.

    1 - C(P - p, K) / C(P, K).
    """
    return 1 - math.comb(num_slots - slots_per_device, K) / math.comb(num_slots, K)


def distinct_destinations(K: int, num_slots: int, num_devices: int) -> float:
    """Dst, the expected number of devices that hold an expert of a token: n · (1 - C(P - P/n, K) / C(P, K))."""
    return num_devices * reached(K, num_slots, num_slots // num_devices)
