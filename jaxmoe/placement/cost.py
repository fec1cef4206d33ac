"""A model of the time an MoE step takes, to compare placements by: `CostModel`."""

import dataclasses

import numpy as np

from jaxmoe.checks import real_number
from jaxmoe.hardware import GPU, GPUS
from jaxmoe.placement.traffic import BETWEEN, WITHIN, Traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """The time that a row, a copy and an expert take on one kind of device.

    One layer of one step takes
        max over devices of max(rows · flops_per_row / flops, active_slots · expert_bytes / memory_bandwidth)
      + 2 · (latency + max over devices of (copies within · token_bytes / within + copies between · token_bytes / between))
    where a device's copies are the larger of those it sends and receives, and the 2 is for the way
    there and back. Experts are thus bound by arithmetic or by reading their weights; devices wait
    for the slowest one; nothing overlaps. Layers add up. Absolute times are rough; the ratio of two
    placements is what it is for.

    Attributes:
        token_bytes: bytes of one token's activations on the wire (D · bytes per number).
        expert_bytes: bytes of one expert's weights.
        flops_per_row: arithmetic of one expert on one token (6·D·F, 4·D·F without a gate).
        device: every device's arithmetic (`flops`), memory and links, at full speed; an H100 by default.

    Raises:
        ValueError: a number is not finite and at least 0.
    """

    token_bytes: float
    expert_bytes: float
    flops_per_row: float
    device: GPU = GPUS["h100"]

    def __post_init__(self) -> None:
        for name in ("token_bytes", "expert_bytes", "flops_per_row"):
            real_number(name, getattr(self, name), least=0)

    @classmethod
    def for_sizes(
        cls,
        *,
        hidden_size: int,
        moe_intermediate_size: int,
        gated: bool = True,
        weight_bytes: float = 2,
        activation_bytes: float = 2,
        device: GPU = GPUS["h100"],
    ) -> "CostModel":
        """The model for experts of three matrices [F, D], two without a gate.

        Args:
            hidden_size: D.
            moe_intermediate_size: F.
            gated: flag that experts have a gate.
            weight_bytes: bytes per weight.
            activation_bytes: bytes per activation on the wire.
            device: the kind of every device, such as `jaxmoe.hardware.GPUS["b200"]`.

        Example:
            >>> CostModel.for_sizes(hidden_size=7168, moe_intermediate_size=2048, weight_bytes=1).expert_bytes
            44040192
        """
        weights = (3 if gated else 2) * hidden_size * moe_intermediate_size
        return cls(
            token_bytes=hidden_size * activation_bytes,
            expert_bytes=weights * weight_bytes,
            flops_per_row=2 * weights,
            device=device,
        )

    def layer_seconds(self, traffic: Traffic, device_speeds: np.ndarray | None = None) -> np.ndarray:
        """Seconds of each layer of each window, [W, L].

        Args:
            traffic: result of `route_trace`.
            device_speeds: [n], relative speed of each device at computing experts; None for equal ones.
        """
        arithmetic = traffic.rows * self.flops_per_row / self.device.flops
        reading = traffic.active_slots * self.expert_bytes / self.device.memory_bandwidth
        experts = np.maximum(arithmetic, reading)
        if device_speeds is not None:
            experts = experts / device_speeds
        copies = np.maximum(traffic.sent, traffic.received) * self.token_bytes
        exchange = self.device.links.seconds(copies[:, :, WITHIN], copies[:, :, BETWEEN])
        return experts.max(axis=-1) + 2 * exchange.max(axis=-1)
