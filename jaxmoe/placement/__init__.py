"""Expert placement: which device holds which expert. NumPy only.

A strategy is one file with a `Strategy` and a line in `STRATEGIES`.
"""

from collections.abc import Sequence

import numpy as np

from jaxmoe.checks import instance_of
from jaxmoe.placement.affinity import AFFINITY
from jaxmoe.placement.base import ExpertPlacement, placements_from_json, placements_to_json
from jaxmoe.placement.eplb import EPLB, EPLB_GLOBAL
from jaxmoe.placement.eplb_uneven import EPLB_UNEVEN
from jaxmoe.placement.explicit import EXPLICIT
from jaxmoe.placement.layer_affinity import LAYER_AFFINITY
from jaxmoe.placement.linear import LINEAR
from jaxmoe.placement.round_robin import ROUND_ROBIN
from jaxmoe.placement.strategy import PlaceExperts, PlacementTask, Strategy
from jaxmoe.placement.trace import RoutingTrace
from jaxmoe.placement.weighted import WEIGHTED

__all__ = [
    "STRATEGIES",
    "ExpertPlacement",
    "PlaceExperts",
    "PlacementTask",
    "RoutingTrace",
    "Strategy",
    "get_strategy",
    "make_placement",
    "make_placements",
    "placements_from_json",
    "placements_to_json",
]

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        LINEAR,
        ROUND_ROBIN,
        EXPLICIT,
        EPLB,
        EPLB_GLOBAL,
        EPLB_UNEVEN,
        AFFINITY,
        LAYER_AFFINITY,
        WEIGHTED,
    )
}


def get_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in STRATEGIES:
        raise ValueError(f"placement strategies are {', '.join(sorted(STRATEGIES))}; got {name!r}")
    return STRATEGIES[name]


def make_placement(
    placement: str | ExpertPlacement,
    num_experts: int,
    ep: int,
    *,
    counts: np.ndarray | None = None,
    num_slots: int | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> ExpertPlacement:
    """Resolve a strategy's name for one layer, or check that a given placement fits.

    Args:
        placement: name in `STRATEGIES`, or a placement.
        num_experts: E.
        ep: devices that share them.
        counts: [E], the experts' loads, for a strategy made from counts.
        num_slots: slots to fill, replicas included.
        num_groups: groups of experts that the router limits tokens to.
        num_nodes: nodes that the devices are on.

    Raises:
        ValueError: the name is unknown or needs more than is given, or the placement is for other
            numbers of experts or devices.
        TypeError: `placement` is neither.

    Example:
        >>> make_placement("eplb", 3, 2, counts=np.array([1, 6, 2]), num_slots=4).slot_to_expert.tolist()
        [1, 2, 1, 0]
    """
    if isinstance(placement, str):
        strategy = get_strategy(placement)
        task = PlacementTask(
            num_experts=num_experts,
            ep=ep,
            counts=counts,
            num_slots=num_slots,
            num_groups=num_groups,
            num_nodes=num_nodes,
        )
        if not strategy.can_place(task):
            raise ValueError(
                f"placement {placement!r} is made from {_SOURCES[strategy.needs]}, which are not known here; make it "
                f"first (ExpertPlacement.from_counts(counts, ep={ep}), or `jaxmoe place` on a routing trace) and pass "
                f"the result"
            )
        return strategy(task)[0]
    if not isinstance(placement, ExpertPlacement):
        raise TypeError(f"a placement is a strategy's name or an ExpertPlacement; got {type(placement).__name__}")
    if (placement.num_experts, placement.ep) != (num_experts, ep):
        raise ValueError(
            f"the placement is for {placement.num_experts} experts on {placement.ep} devices, but the layer has "
            f"{num_experts} experts on {ep} expert-parallel devices; make one for those numbers"
        )
    return placement


_SOURCES = {"counts": "expert counts", "trace": "the expert ids of a routing trace", "map": "lists of experts"}


def make_placements(
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement], experts_per_layer: Sequence[int], ep: int
) -> list[ExpertPlacement]:
    """One placement per MoE layer from a name, a placement for all layers, or one for each.

    Args:
        placement: name, placement for all layers, or one of them for each.
        experts_per_layer: logical experts of each MoE layer, first to last.
        ep: expert-parallel devices.

    Raises:
        ValueError: the sequence has another length than there are MoE layers, or one does not fit.
        TypeError: `placement` is nothing of the kind.
    """
    if isinstance(placement, str | ExpertPlacement):
        placement = [placement] * len(experts_per_layer)
    what = "a strategy's name, a jaxmoe.ExpertPlacement, or a list of one for each MoE layer"
    instance_of("placement", placement, Sequence, what)
    if len(placement) != len(experts_per_layer):
        raise ValueError(
            f"placements are one for all MoE layers or one for each: got {len(placement)} for "
            f"{len(experts_per_layer)} MoE layers"
        )
    return [make_placement(one, count, ep) for one, count in zip(placement, experts_per_layer, strict=True)]
