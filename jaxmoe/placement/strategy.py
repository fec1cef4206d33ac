"""The contract of a placement strategy: its task, the function that it is, and its entry in `STRATEGIES`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from jaxmoe.checks import integer
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.inputs import check_counts, check_device_slots, check_device_speeds
from jaxmoe.placement.nodes import check_nodes
from jaxmoe.placement.trace import RoutingTrace

_MISSING = {
    "counts": "expert counts (counts= or trace=)",
    "trace": "a routing trace with token-level expert ids (trace=)",
    "map": "the experts of each device (device_experts=)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementTask:
    """A placement problem: numbers of experts and devices, and what is known of both.

    Attributes:
        num_experts: logical experts E of every layer.
        ep: devices that share them.
        num_layers: MoE layers L; taken from `counts` where those are given.
        num_slots: slots to fill, replicas included; None for one per expert (some strategies
            round up to equal shares, see theirs).
        num_groups: groups of experts that the router limits tokens to; 1 for none.
        num_nodes: nodes of ep / num_nodes devices with a fast network inside.
        counts: [L, E], expected load of every expert; taken from `trace` where that is given.
        trace: token-level choices, for strategies that look at which experts fire together.
        device_slots: [ep], slots that each device's memory has room for; None for equal shares.
        device_speeds: [ep], relative speed of each device; None for equal ones.
        device_experts: the explicit map, a list of experts for each device.

    Raises:
        ValueError: a size is below 1, the counts or the device lists are of other sizes, or a device has less than no
            slots or no speed.
    """

    num_experts: int
    ep: int
    num_layers: int = 1
    num_slots: int | None = None
    num_groups: int = 1
    num_nodes: int = 1
    counts: np.ndarray | None = None
    trace: RoutingTrace | None = None
    device_slots: Sequence[int] | None = None
    device_speeds: Sequence[float] | None = None
    device_experts: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "ep", "num_layers", "num_groups", "num_nodes"):
            object.__setattr__(self, name, integer(name, getattr(self, name), least=1))
        if self.num_slots is not None:
            object.__setattr__(self, "num_slots", integer("num_slots", self.num_slots))
        check_nodes(self.ep, self.num_nodes)
        counts = self.counts
        if counts is None and self.trace is not None:
            counts = self.trace.total_counts
        if counts is not None:
            counts = check_counts(counts)
            counts = counts[None] if counts.ndim == 1 else counts
            if counts.shape[1] != self.num_experts:
                raise ValueError(f"counts are of {self.num_experts} experts; got {counts.shape[1]}")
            if self.trace is not None and len(counts) != self.trace.num_layers:
                raise ValueError(
                    f"counts and trace are of the same layers; got {len(counts)} and {self.trace.num_layers}"
                )
            object.__setattr__(self, "counts", counts)
            object.__setattr__(self, "num_layers", len(counts))
        for name in ("device_slots", "device_speeds", "device_experts"):
            values = getattr(self, name)
            if values is not None and len(values) != self.ep:
                raise ValueError(f"{name} has one entry for each of {self.ep} devices; got {len(values)}")
        if self.device_slots is not None:
            check_device_slots(self.device_slots)
        if self.device_speeds is not None:
            check_device_speeds(self.device_speeds)

    @property
    def expert_ids(self) -> np.ndarray | None:
        """int32 [T, L, K], the trace's token-level choices; None where there are none."""
        return None if self.trace is None else self.trace.expert_ids

    @classmethod
    def from_trace(cls, trace: RoutingTrace, ep: int, **fields: Any) -> "PlacementTask":
        """The task of placing a trace's experts on `ep` devices."""
        return cls(num_experts=trace.num_experts, ep=ep, trace=trace, **fields)


class PlaceExperts(Protocol):
    """Place the experts of every layer; the body of a strategy.

    These rules hold:

    * Every expert of every layer has a slot, on one of the task's devices.
    * Where `task.num_slots` is given, as many slots hold an expert, replicas included, and all others are padding; a
      strategy that needs equal shares says in its docstring that it rounds up.
    * Equal tasks give equal placements: what is drawn is drawn from a fixed seed.
    """

    def __call__(self, task: PlacementTask, /) -> list[ExpertPlacement]:
        """Make the placements.

        Args:
            task: problem, with what `Strategy.needs` names among the rest.

        Returns:
            One placement for each of `task.num_layers` layers, of `task.num_experts` experts on `task.ep` devices.

        Raises:
            ValueError: numbers of the task do not fit together, such as fewer slots than experts.
        """


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way to place experts: an entry of `STRATEGIES`, called with a task.

    Attributes:
        name: key in `STRATEGIES`.
        needs: part of the task that must be given beyond sizes: "nothing", "counts", "trace" (token-level) or
            "map" (an explicit one). A task without it is refused before `make` is called.
        make: body of the strategy.

    Example:
        >>> def first_device_idles(task):
        ...     blocks = np.array_split(np.arange(task.num_experts), task.ep - 1)
        ...     return [ExpertPlacement.from_device_experts(task.num_experts, [[], *blocks])] * task.num_layers
        >>> Strategy("idle", "nothing", first_device_idles)(PlacementTask(num_experts=4, ep=3))[0].slot_to_expert.tolist()
        [-1, -1, 0, 1, 2, 3]
    """

    name: str
    needs: Literal["nothing", "counts", "trace", "map"]
    make: PlaceExperts

    def can_place(self, task: PlacementTask) -> bool:
        """Tell whether `task` holds what this strategy needs."""
        if self.needs == "counts":
            return task.counts is not None
        if self.needs == "trace":
            return task.expert_ids is not None
        if self.needs == "map":
            return task.device_experts is not None
        return True

    def __call__(self, task: PlacementTask) -> list[ExpertPlacement]:
        """Make one placement per layer, see `PlaceExperts`.

        Raises:
            ValueError: the task lacks what the strategy needs, or its numbers do not fit.
        """
        if not self.can_place(task):
            raise ValueError(f"placement {self.name!r} is made from {_MISSING[self.needs]}, and none was given")
        return self.make(task)
