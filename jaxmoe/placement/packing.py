"""EPLB, DeepSeek's expert parallelism load balancer, on arrays: replicating experts and packing weighted items.

All functions here work on X independent problems at once (layers, or layers times nodes): one NumPy
operation then does a step of all of them, which is what makes a whole model fast.

Letters here, beside the common ones of docs/concepts/letters.md: X problems, N items, M packs.
"""

import numpy as np

from jaxmoe.checks import integer
from jaxmoe.placement.inputs import check_counts
from jaxmoe.placement.nodes import check_nodes


def eplb_slots(
    counts: np.ndarray, ep: int, *, num_slots: int | None = None, num_groups: int = 1, num_nodes: int = 1
) -> np.ndarray:
    """Replicate heavy experts and pack them on devices so that loads are level, every device with equally many slots.

    Hierarchical where `num_groups` is a multiple of `num_nodes`: groups of experts are packed on
    nodes, experts replicated within their node, replicas packed on the node's devices; a token
    limited to few groups then reaches few nodes. Otherwise global, as if there were one group
    and one node. Of equal weights the lower index goes first, which the published code leaves open.

    Args:
        counts: [L, E], the load of each expert in each layer.
        ep: devices, a multiple of `num_nodes`.
        num_slots: slots over all devices, a multiple of `ep`; None for the fewest that hold E experts.
        num_groups: groups of E / num_groups neighboring experts.
        num_nodes: nodes of ep / num_nodes devices.

    Returns:
        int64 [L, num_slots], the expert in each slot, the slots of device 0 first.

    Raises:
        ValueError: the slots or experts do not split evenly, or are fewer than the experts.

    Example:
        >>> eplb_slots(np.array([[1, 6, 2]]), ep=2, num_slots=4).tolist()
        [[1, 2, 1, 0]]

    Source: DeepSeek's EPLB (2025); in DeepSeek-V3 (arXiv 2412.19437), section 3.4.
    """
    weights_LE = check_counts(counts).astype(np.float32)
    assert weights_LE.ndim == 2
    E = weights_LE.shape[1]
    sizes = {"ep": ep, "num_groups": num_groups, "num_nodes": num_nodes}
    ep, num_groups, num_nodes = (integer(name, size, least=1) for name, size in sizes.items())
    num_slots = -(-E // ep) * ep if num_slots is None else integer("num_slots", num_slots)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check(E, ep, num_slots, num_groups, num_nodes)
    return _hierarchical(weights_LE, ep, num_slots, num_groups, num_nodes)


def balanced_packing(weights_XN: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack N items into packs of N / num_packs items each, heaviest first, always into the lightest open pack.

    Args:
        weights_XN: float32 [X, N], the weight of each item.
        num_packs: packs to fill; N is a multiple of it.

    Returns:
        int64 [X, N], the pack of each item, and int64 [X, N], its place within the pack.

    Example:
        >>> pack, place = balanced_packing(np.float32([[4, 1, 3, 2]]), 2)
        >>> pack.tolist(), place.tolist()
        ([[0, 0, 1, 1]], [[0, 1, 0, 1]])

    Source: DeepSeek's EPLB, the balanced packing step.
    """
    X, N = weights_XN.shape
    assert N % num_packs == 0, f"{N} items do not fill {num_packs} packs equally"
    capacity = N // num_packs
    if capacity == 1:
        return np.tile(np.arange(N), (X, 1)), np.zeros((X, N), np.int64)
    order_XN = np.argsort(-weights_XN, axis=1, kind="stable")
    pack_XN, place_XN = np.empty((X, N), np.int64), np.empty((X, N), np.int64)
    # Sums in float32, in the published order: a last-bit difference would change which pack is lightest.
    load_XM, items_XM = np.zeros((X, num_packs), np.float32), np.zeros((X, num_packs), np.int64)
    rows_X = np.arange(X)
    for item_X in order_XN.T:
        pack_X = np.where(items_XM < capacity, load_XM, np.inf).argmin(axis=1)
        pack_XN[rows_X, item_X] = pack_X
        place_XN[rows_X, item_X] = items_XM[rows_X, pack_X]
        load_XM[rows_X, pack_X] += weights_XN[rows_X, item_X]
        items_XM[rows_X, pack_X] += 1
    return pack_XN, place_XN


def replicate_experts(
    weights_XE: np.ndarray, num_slots: int, *, max_replicas: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Give every expert a slot, and each further slot to the expert with the most load per replica.

    Args:
        weights_XE: float32 [X, E], the load of each expert.
        num_slots: slots, at least E.
        max_replicas: slots one expert may have; None for any number.

    Returns:
        int64 [X, num_slots], the expert in each slot, and int64 [X, E], replicas of each expert.

    Example:
        >>> slots, replicas = replicate_experts(np.float32([[1, 6, 2]]), 5)
        >>> slots.tolist(), replicas.tolist()
        ([[0, 1, 2, 1, 1]], [[1, 3, 1]])

    Source: DeepSeek's EPLB, the replication step; `max_replicas` is added here.
    """
    X, E = weights_XE.shape
    assert num_slots >= E, f"{E} experts do not fit {num_slots} slots"
    assert max_replicas is None or num_slots <= E * max_replicas
    experts_XP = np.tile(np.arange(num_slots), (X, 1))
    replicas_XE = np.ones((X, E), np.int64)
    rows_X = np.arange(X)
    for slot in range(E, num_slots):
        share_XE = weights_XE / replicas_XE.astype(np.float32)
        if max_replicas is not None:
            share_XE = np.where(replicas_XE < max_replicas, share_XE, -1)
        expert_X = share_XE.argmax(axis=1)
        experts_XP[:, slot] = expert_X
        replicas_XE[rows_X, expert_X] += 1
    return experts_XP, replicas_XE


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
