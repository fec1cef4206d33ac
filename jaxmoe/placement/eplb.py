"""EPLB: DeepSeek's expert parallelism load balancer, as published."""

import numpy as np

from jaxmoe.checks import whole_number
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.nodes import check_nodes
from jaxmoe.placement.packing import balanced_packing, replicate_experts
from jaxmoe.placement.strategy import PlacementTask, Strategy, check_counts


def eplb(
    counts: np.ndarray, ep: int, *, num_slots: int | None = None, num_groups: int = 1, num_nodes: int = 1
) -> list[ExpertPlacement]:
    """Replicate heavy experts and pack them on devices so that loads are level, every device with equally many slots.

    Hierarchical where `num_groups` is a multiple of `num_nodes`: groups of experts are packed on
    nodes, experts replicated within their node, replicas packed on the node's devices; a token
    limited to few groups then reaches few nodes. Otherwise global, as if there were one group
    and one node. Of equal weights the lower index goes first, which the published code leaves open.

    Args:
        counts: [L, E], the load of each expert in each layer.
        ep: devices, a multiple of `num_nodes`.
        num_slots: slots over all devices, a multiple of `ep`; None for the fewest that hold E experts.
        num_groups: groups of E / num_groups neighbouring experts.
        num_nodes: nodes of ep / num_nodes devices.

    Returns:
        One placement per layer.

    Raises:
        ValueError: the slots or experts do not split evenly, or are fewer than the experts.

    Example:
        >>> eplb(np.array([[1, 6, 2]]), ep=2, num_slots=4)[0].slot_to_expert.tolist()
        [1, 2, 1, 0]

    Source: DeepSeek's EPLB (2025); in DeepSeek-V3 (arXiv 2412.19437), section 3.4.
    """
    weights_LE = check_counts(counts).astype(np.float32)
    assert weights_LE.ndim == 2
    E = weights_LE.shape[1]
    sizes = {"ep": ep, "num_groups": num_groups, "num_nodes": num_nodes}
    ep, num_groups, num_nodes = (whole_number(name, size, least=1) for name, size in sizes.items())
    num_slots = -(-E // ep) * ep if num_slots is None else whole_number("num_slots", num_slots)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check(E, ep, num_slots, num_groups, num_nodes)
    slots_LP = _hierarchical(weights_LE, ep, num_slots, num_groups, num_nodes)
    return [ExpertPlacement(E, ep, slots_P) for slots_P in slots_LP]


def _check(E: int, ep: int, num_slots: int, num_groups: int, num_nodes: int) -> None:
    if num_slots < E:
        raise ValueError(f"every expert needs a slot: num_slots={num_slots} is below num_experts={E}")
    if num_slots % ep:
        raise ValueError(
            f"EPLB gives every device equally many slots: num_slots={num_slots} is no multiple of ep={ep}; "
            f"use {-(-num_slots // ep) * ep}, or the strategy eplb_uneven"
        )
    check_nodes(ep, num_nodes)
    if E % num_groups:
        raise ValueError(f"groups hold equally many experts: num_experts={E} is no multiple of num_groups={num_groups}")


def _hierarchical(weights_LE: np.ndarray, ep: int, num_slots: int, num_groups: int, num_nodes: int) -> np.ndarray:
    """The expert in each slot, [L, P]. Letters: G groups, X = layers times nodes, e and p an expert and slot of a node."""
    (L, E), G = weights_LE.shape, num_groups
    groups_per_node, experts_per_group, experts_per_node = G // num_nodes, E // G, E // num_nodes

    # Groups to nodes. experts_Le lists each node's experts one node after the other.
    group_weights_LG = weights_LE.reshape(L, G, experts_per_group).sum(axis=2)
    node_LG, place_LG = balanced_packing(group_weights_LG, num_nodes)
    group_at_LG = _inverse(node_LG * groups_per_node + place_LG)
    experts_LE = (group_at_LG[:, :, None] * experts_per_group + np.arange(experts_per_group)).reshape(L, E)

    # Replicas within each node.
    weights_Xe = np.take_along_axis(weights_LE, experts_LE, axis=1).reshape(-1, experts_per_node)
    expert_Xp, replicas_Xe = replicate_experts(weights_Xe, num_slots // num_nodes)

    # Slots to the node's devices.
    share_Xe = weights_Xe / replicas_Xe.astype(np.float32)
    device_Xp, place_Xp = balanced_packing(np.take_along_axis(share_Xe, expert_Xp, axis=1), ep // num_nodes)
    slot_at_Xp = _inverse(device_Xp * (num_slots // ep) + place_Xp)
    packed_Xp = np.take_along_axis(expert_Xp, slot_at_Xp, axis=1)

    # A node's e-th expert is the (node · experts_per_node + e)-th of experts_LE.
    first_of_node = np.arange(num_nodes)[:, None] * experts_per_node
    packed_LP = (packed_Xp.reshape(L, num_nodes, -1) + first_of_node).reshape(L, num_slots)
    return np.take_along_axis(experts_LE, packed_LP, axis=1)


def _inverse(places_XN: np.ndarray) -> np.ndarray:
    """For each row, the item at each place, from the place of each item."""
    items_XN = np.empty_like(places_XN)
    np.put_along_axis(items_XN, places_XN, np.arange(places_XN.shape[1])[None], axis=1)
    return items_XN


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    assert task.counts is not None
    return eplb(task.counts, task.ep, num_slots=task.num_slots, num_groups=task.num_groups, num_nodes=task.num_nodes)


def _make_global(task: PlacementTask) -> list[ExpertPlacement]:
    assert task.counts is not None
    return eplb(task.counts, task.ep, num_slots=task.num_slots)


EPLB = Strategy("eplb", "counts", _make)
EPLB_GLOBAL = Strategy("eplb_global", "counts", _make_global)
