"""`evaluate`: the costs of a placement on a trace, in one record."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.placement import balance
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.coactivation import transitions
from jaxmoe.placement.cost import CostModel
from jaxmoe.placement.inputs import check_device_speeds
from jaxmoe.placement.migration import migration_bytes
from jaxmoe.placement.trace import RoutingTrace
from jaxmoe.placement.traffic import BETWEEN, WITHIN, route_trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementMetrics:
    """A placement of all layers, judged on a trace. A step is one window; bytes are sums over devices and layers.

    Attributes:
        vllm_balancedness: Σ mean / Σ max of device loads; 1 is level.
        sglang_balancedness: mean of mean / max; 1 is level.
        tensorrt_llm_imbalance: mean of (max - mean) / mean; 0 is level.
        layer_max_over_mean: float64 [L], the busiest device's load over the whole trace, as a multiple of the mean.
        distinct_destinations: mean number of devices that a token's experts are on, its own included; None for a
            trace of counts.
        layer_crossings: part of (choice, next layer's choice) pairs that lie on different devices; None for
            a trace of counts or a single layer.
        within_node_bytes: bytes sent per step between devices of a node, there and back.
        between_node_bytes: bytes sent per step between nodes, there and back.
        extra_memory_bytes: bytes of slots beyond one per expert, replicas and padding, over all devices.
        migration_bytes: bytes to copy from another placement, by "same_device", "same_node", "other_node"; None without it.
        step_seconds: time of a step that the cost model predicts, mean over steps.
    """

    vllm_balancedness: float
    sglang_balancedness: float
    tensorrt_llm_imbalance: float
    layer_max_over_mean: np.ndarray
    distinct_destinations: float | None
    layer_crossings: float | None
    within_node_bytes: float
    between_node_bytes: float
    extra_memory_bytes: int
    migration_bytes: dict[str, int] | None
    step_seconds: float

    @property
    def max_over_mean(self) -> float:
        """The mean of `layer_max_over_mean`."""
        return float(self.layer_max_over_mean.mean())

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        fields = dataclasses.asdict(self)
        fields["layer_max_over_mean"] = self.layer_max_over_mean.tolist()
        return fields


def evaluate(
    placements: Sequence[ExpertPlacement],
    trace: RoutingTrace,
    cost: CostModel,
    *,
    num_nodes: int = 1,
    replica_choice: str = "modulo",
    deduplicate: str = "device",
    before: Sequence[ExpertPlacement] | None = None,
    device_speeds: Sequence[float] | None = None,
    seed: int = 0,
) -> PlacementMetrics:
    """Judge placements by running a trace through them.

    Args:
        placements: placement of each layer of the trace.
        trace: routing trace, best not the part that the placements were made on.
        cost: prices of rows, copies and experts.
        num_nodes: nodes that the devices are on.
        replica_choice: name in `REPLICA_CHOICES`.
        deduplicate: way in which tokens are sent, see `route_trace`.
        before: placements to migrate from.
        device_speeds: [n], relative speed of each device; None for equal ones.
        seed: seed of random replica choices.

    Raises:
        ValueError: the placements do not fit the trace or each other, or a name is unknown.

    Example:
        >>> trace = RoutingTrace.from_expert_ids(np.array([[[0, 1]], [[0, 2]]]), num_experts=4)
        >>> cost = CostModel.for_sizes(hidden_size=8, moe_intermediate_size=16)
        >>> evaluate([ExpertPlacement.linear(4, ep=2)], trace, cost).distinct_destinations
        1.5
    """
    traffic = route_trace(
        trace,
        placements,
        num_nodes=num_nodes,
        replica_choice=replica_choice,
        deduplicate=deduplicate,
        seed=seed,
    )
    speeds = None if device_speeds is None else check_device_speeds(device_speeds)
    # A device twice as fast is as busy with twice the rows.
    loads = traffic.rows if speeds is None else traffic.rows / speeds
    copies_2 = traffic.sent.sum(axis=(0, 1, 3)) / trace.num_windows
    extra_slots = sum(placement.num_slots - placement.num_experts for placement in placements)
    destinations = traffic.distinct_destinations
    return PlacementMetrics(
        vllm_balancedness=balance.vllm_balancedness(loads),
        sglang_balancedness=balance.sglang_balancedness(loads),
        tensorrt_llm_imbalance=balance.tensorrt_llm_imbalance(loads),
        layer_max_over_mean=balance.max_over_mean(loads.mean(axis=0)),
        distinct_destinations=None if destinations is None else float(destinations.mean()),
        layer_crossings=layer_crossings(placements, trace),
        within_node_bytes=float(2 * copies_2[WITHIN] * cost.token_bytes),
        between_node_bytes=float(2 * copies_2[BETWEEN] * cost.token_bytes),
        extra_memory_bytes=int(extra_slots * cost.expert_bytes),
        migration_bytes=None
        if before is None
        else migration_bytes(before, placements, int(cost.expert_bytes), num_nodes=num_nodes),
        step_seconds=float(cost.layer_seconds(traffic, speeds).sum(axis=1).mean()),
    )


def layer_crossings(placements: Sequence[ExpertPlacement], trace: RoutingTrace) -> float | None:
    """The part of (choice in a layer, choice in the next) pairs on different devices; loads split evenly over replicas.

    None for a trace of counts or a single layer.
    """
    if trace.expert_ids is None or trace.num_layers < 2:
        return None
    pairs, together = 0, 0.0
    for layer in range(trace.num_layers - 1):
        follow_EE = transitions(trace.expert_ids[:, layer], trace.expert_ids[:, layer + 1], trace.num_experts)
        share_nE, next_nE = (p.device_replicas / p.replica_counts for p in placements[layer : layer + 2])
        pairs += int(follow_EE.sum())
        together += float(((share_nE @ follow_EE) * next_nE).sum())
    return 1 - together / pairs if pairs else None


def expected_destinations(num_experts: int, experts_per_token: int, ep: int) -> float:
    """Distinct devices of a token under uniform routing and no replicas: n·(1 - C(E - E/n, K) / C(E, K)).

    Where E does not divide by n, the sum over devices of their own terms.

    Example:
        >>> round(expected_destinations(256, 8, 32), 2)
        7.27
    """
    sizes = [len(block) for block in np.array_split(np.arange(num_experts), ep)]
    all_ways = math.comb(num_experts, experts_per_token)
    return sum(1 - math.comb(num_experts - size, experts_per_token) / all_ways for size in sizes)
