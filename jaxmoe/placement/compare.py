"""Strategies side by side: made on one half of a trace, judged on the other."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.placement import STRATEGIES, get_strategy
from jaxmoe.placement.balance import max_over_mean
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.cost import CostModel
from jaxmoe.placement.metrics import PlacementMetrics, evaluate
from jaxmoe.placement.strategy import PlacementTask
from jaxmoe.placement.trace import RoutingTrace

# Column of the table: heading, how a metric is shown, and whether the smallest or largest is best.
_COLUMNS: dict[str, tuple[str, str, str]] = {
    "step_seconds": ("step ms", "{:.3f}", "min"),
    "max_over_mean": ("max/mean", "{:.3f}", "min"),
    "vllm_balancedness": ("vLLM", "{:.3f}", "max"),
    "sglang_balancedness": ("SGLang", "{:.3f}", "max"),
    "tensorrt_llm_imbalance": ("TRT-LLM", "{:.3f}", "min"),
    "distinct_destinations": ("dest/token", "{:.2f}", "min"),
    "layer_crossings": ("crossings", "{:.3f}", "min"),
    "within_node_bytes": ("in-node MB", "{:.1f}", "min"),
    "between_node_bytes": ("node-node MB", "{:.1f}", "min"),
    "extra_memory_bytes": ("extra GB", "{:.2f}", "min"),
    "migration_bytes": ("migrate GB", "{:.2f}", "min"),
}
_SCALE = {
    "step_seconds": 1e3,
    "within_node_bytes": 1e-6,
    "between_node_bytes": 1e-6,
    "extra_memory_bytes": 1e-9,
    "migration_bytes": 1e-9,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Strategies judged on one trace.

    Attributes:
        placements: strategy name to one placement per layer.
        metrics: strategy name to its figures on the half of the trace that was held out.
        seconds: strategy name to the time it took to place all layers.
        skipped: strategy name to why it is not among them.
        replica_bound: strategy name to the lowest `max_over_mean` that any replica choice can reach, by linear
            program; empty where that was not asked for.
    """

    placements: Mapping[str, list[ExpertPlacement]]
    metrics: Mapping[str, PlacementMetrics]
    seconds: Mapping[str, float]
    skipped: Mapping[str, str]
    replica_bound: Mapping[str, float]

    def best(self, by: str = "step_seconds") -> str:
        """The strategy with the best value of a metric; of equal ones the first.

        Raises:
            ValueError: there is no such metric, or the trace does not give it.
        """
        if by not in _COLUMNS:
            raise ValueError(f"strategies are ranked by {', '.join(_COLUMNS)}; got {by!r}")
        values = {name: _number(metrics, by) for name, metrics in self.metrics.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if not known:
            raise ValueError(
                f"this comparison has no {by}: it needs a trace with token-level ids, or a placement before"
            )
        return (min if _COLUMNS[by][2] == "min" else max)(known, key=lambda name: known[name])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the placements, as JSON has it."""
        return {
            "strategies": {
                name: metrics.to_dict()
                | {"seconds_to_place": self.seconds[name]}
                | ({"replica_bound": self.replica_bound[name]} if name in self.replica_bound else {})
                for name, metrics in self.metrics.items()
            },
            "skipped": dict(self.skipped),
        }

    def to_table(self) -> str:
        """A plain-text table, one strategy a line; metrics that no strategy has are left out."""
        shown = [name for name in _COLUMNS if any(_number(one, name) is not None for one in self.metrics.values())]
        headings = ["strategy", *(_COLUMNS[name][0] for name in shown)]
        headings += ["bound"] if self.replica_bound else []
        rows = [headings]
        for strategy, metrics in self.metrics.items():
            cells = [strategy]
            for name in shown:
                value = _number(metrics, name)
                cells.append("-" if value is None else _COLUMNS[name][1].format(value * _SCALE.get(name, 1)))
            if self.replica_bound:
                cells.append(f"{self.replica_bound[strategy]:.3f}")
            rows.append(cells)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)


def compare(
    trace: RoutingTrace,
    ep: int,
    cost: CostModel,
    *,
    strategies: Sequence[str] | None = None,
    num_slots: int | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
    replica_choice: str = "modulo",
    deduplicate: str = "device",
    before: Sequence[ExpertPlacement] | None = None,
    given: Mapping[str, Sequence[ExpertPlacement]] | None = None,
    device_slots: Sequence[int] | None = None,
    device_speeds: Sequence[float] | None = None,
    bound: bool = False,
    seed: int = 0,
) -> Comparison:
    """Place a model by several strategies and judge each on routing it has not seen.

    Args:
        trace: routing trace, whose first half makes the placements and whose second half judges them.
        ep: devices.
        cost: prices of rows, copies and experts.
        strategies: names in `STRATEGIES`; None for all that the trace suffices for.
        num_slots: slots to fill, replicas included.
        num_groups: groups of experts that the router limits tokens to.
        num_nodes: nodes that the devices are on.
        replica_choice: name in `REPLICA_CHOICES`.
        deduplicate: way in which tokens are sent, see `route_trace`.
        before: placements that the devices hold now, for the bytes to migrate.
        given: placements made elsewhere, by name, judged along with the strategies'.
        device_slots: [ep], slots that each device has room for; for the strategy "weighted".
        device_speeds: [ep], relative speed of each device.
        bound: flag that the linear program of replica choice is solved too (needs SciPy).
        seed: seed of random replica choices.

    Raises:
        ValueError: a name is unknown, no strategy can place, or the trace cannot be halved.

    Example:
        >>> from jaxmoe.placement.synthetic import synthetic_trace
        >>> cost = CostModel.for_sizes(hidden_size=64, moe_intermediate_size=32)
        >>> trace = synthetic_trace(num_experts=16, experts_per_token=2, drift=0)
        >>> compare(trace, 4, cost, strategies=["linear", "eplb"]).best("vllm_balancedness")
        'eplb'
    """
    past, future = trace.halves()
    task = PlacementTask.from_trace(
        past,
        ep,
        num_slots=num_slots,
        num_groups=num_groups,
        num_nodes=num_nodes,
        device_slots=device_slots,
        device_speeds=device_speeds,
    )
    placements: dict[str, list[ExpertPlacement]] = {name: list(layers) for name, layers in (given or {}).items()}
    seconds: dict[str, float] = dict.fromkeys(placements, 0.0)
    skipped: dict[str, str] = {}
    # An explicit map is no rule that could be tried.
    rules = [name for name, strategy in STRATEGIES.items() if strategy.needs != "map"]
    for strategy in map(get_strategy, rules if strategies is None else strategies):
        start = time.perf_counter()
        try:
            made = strategy(task)
        except ValueError as error:
            # Asked for by name, a strategy that cannot place is an error; tried with the rest, it is a line.
            if strategies is not None:
                raise
            skipped[strategy.name] = str(error)
            continue
        twin = next((name for name in placements if placements[name] == made), None)
        if twin is not None and strategies is None:
            skipped[strategy.name] = f"places as {twin} does"
            continue
        placements[strategy.name] = made
        seconds[strategy.name] = time.perf_counter() - start
    if not placements:
        raise ValueError(f"no strategy could place this trace: {skipped}")
    metrics = {
        name: evaluate(
            layers,
            future,
            cost,
            num_nodes=num_nodes,
            replica_choice=replica_choice,
            deduplicate=deduplicate,
            before=before,
            device_speeds=device_speeds,
            seed=seed,
        )
        for name, layers in placements.items()
    }
    speeds = None if device_speeds is None else np.asarray(device_speeds, np.float64)
    bounds = {name: _replica_bound(layers, future, speeds) for name, layers in placements.items()} if bound else {}
    return Comparison(placements=placements, metrics=metrics, seconds=seconds, skipped=skipped, replica_bound=bounds)


def _replica_bound(
    placements: Sequence[ExpertPlacement], trace: RoutingTrace, device_speeds: np.ndarray | None
) -> float:
    """Mean over layers of the least max/mean load / speed that a split of the whole trace's counts can reach."""
    from jaxmoe.placement.optimum import optimal_split

    speeds = np.ones(placements[0].ep) if device_speeds is None else device_speeds
    loads_Ln = np.stack(
        [
            optimal_split(counts_E, placement, device_speeds=speeds).slot_load.reshape(placement.ep, -1).sum(axis=1)
            for counts_E, placement in zip(trace.total_counts, placements, strict=True)
        ]
    )
    return float(max_over_mean(loads_Ln / speeds).mean())


def _number(metrics: PlacementMetrics, name: str) -> float | None:
    value = getattr(metrics, name)
    return float(sum(value.values()) - value["same_device"]) if isinstance(value, dict) else value
