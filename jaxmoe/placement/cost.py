"""A model of the time an MoE step takes, to compare placements by: `CostModel`."""

import dataclasses

import numpy as np

from jaxmoe.placement.traffic import BETWEEN, WITHIN, Traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a row, a copy and an expert cost.

    One layer of one step takes
        max over devices of max(rows · flops_per_row / flops, active_slots · expert_bytes / memory)
      + 2 · (latency + max over devices of (copies within · token_bytes / within + copies between · token_bytes / between))
    where a device's copies are the larger of those it sends and receives, and the 2 is for the way
    there and back. Experts are thus bound by arithmetic or by reading their weights; devices wait
    for the slowest one; nothing overlaps. Layers add up. Absolute times are rough; the ratio of two
    placements is what it is for.

    Attributes:
        token_bytes: of one token's activations on the wire (D · bytes per number).
        expert_bytes: of one expert's weights.
        flops_per_row: arithmetic of one expert on one token (6·D·F, 4·D·F without a gate).
        flops: of a device, per second.
        memory: bytes per second that a device reads weights at.
        within: bytes per second a device sends, or receives, within a node.
        between: bytes per second between nodes.
        latency: seconds of one exchange of nothing.

    Source: peaks of NVIDIA's H100 SXM data sheet (989 TFLOP/s bf16, 3.35 TB/s HBM, NVLink 450 GB/s each way) and
    400 Gb/s InfiniBand per GPU, at full speed.
    """

    token_bytes: float
    expert_bytes: float
    flops_per_row: float
    flops: float = 989e12
    memory: float = 3.35e12
    within: float = 450e9
    between: float = 50e9
    latency: float = 10e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (np.isfinite(value) and value >= 0) or (value == 0 and field.name in _SPEEDS):
                raise ValueError(f"{field.name} is a finite number, at least 0, and above 0 for a speed; got {value!r}")

    @classmethod
    def for_sizes(
        cls,
        *,
        hidden_size: int,
        moe_intermediate_size: int,
        gated: bool = True,
        weight_bytes: float = 2,
        activation_bytes: float = 2,
    ) -> "CostModel":
        """The model for experts of three matrices [F, D], two without a gate, on H100s.

        Args:
            hidden_size: D.
            moe_intermediate_size: F.
            gated: whether experts have a gate.
            weight_bytes: bytes per weight.
            activation_bytes: bytes per activation on the wire.

        Example:
            >>> CostModel.for_sizes(hidden_size=7168, moe_intermediate_size=2048, weight_bytes=1).expert_bytes
            44040192
        """
        weights = (3 if gated else 2) * hidden_size * moe_intermediate_size
        return cls(
            token_bytes=hidden_size * activation_bytes, expert_bytes=weights * weight_bytes, flops_per_row=2 * weights
        )

    def layer_seconds(self, traffic: Traffic, device_speeds: np.ndarray | None = None) -> np.ndarray:
        """Seconds of each layer of each window, [W, L].

        Args:
            traffic: from `route_trace`.
            device_speeds: [n], relative speed of each device at computing experts; None for equal ones.
        """
        arithmetic = traffic.rows * self.flops_per_row / self.flops
        reading = traffic.active_slots * self.expert_bytes / self.memory
        experts = np.maximum(arithmetic, reading)
        if device_speeds is not None:
            experts = experts / device_speeds
        copies = np.maximum(traffic.sent, traffic.received) * self.token_bytes
        wire = copies[:, :, WITHIN] / self.within + copies[:, :, BETWEEN] / self.between
        return experts.max(axis=-1) + 2 * (self.latency + wire.max(axis=-1))


_SPEEDS = ("flops", "memory", "within", "between")
