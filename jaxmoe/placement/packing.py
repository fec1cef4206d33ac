"""Replicating experts and packing weighted items into equal packs, the two steps of EPLB.

Both work on X independent problems at once (layers, or layers times nodes): one NumPy
operation then does a step of all of them, which is what makes a whole model fast.
"""

import numpy as np


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
