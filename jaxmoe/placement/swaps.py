"""Local search by swaps: more affinity within devices, at no more than a given load on any.

Letters here, beside the common ones of docs/concepts/letters.md: N replicas, D devices.
"""

import numpy as np

_MAX_ROUNDS = 200


def gather_by_swaps(
    device_N: np.ndarray,
    weights_N: np.ndarray,
    experts_N: np.ndarray,
    load_limit: float,
    *,
    pair_affinity_NN: np.ndarray | None = None,
    device_affinity_ND: np.ndarray | None = None,
) -> np.ndarray:
    """Swap replicas between devices while that raises affinity.

    Maximizes Σ pair_affinity[x, y] over pairs on one device + Σ device_affinity[x, device of x]. A swap
    may not lift a device above `load_limit`, nor lift one that is above it already, nor bring two
    replicas of an expert together. Every device keeps its number of replicas.

    Args:
        device_N: int [N], the device of each replica to start from.
        weights_N: [N], the load of each replica.
        experts_N: int [N], the expert it is of.
        load_limit: most load a device may come to.
        pair_affinity_NN: symmetric [N, N], worth of two replicas on one device; the diagonal is not read.
        device_affinity_ND: [N, devices], worth of a replica on a device.

    Returns:
        int64 [N], the device of each replica.

    Source: pairwise interchange after Kernighan and Lin (1970), with all swaps evaluated at once.
    """
    N, D = device_N.size, int(device_N.max()) + 1
    if device_affinity_ND is not None:
        D = device_affinity_ND.shape[1]
    device_N, weights_N = device_N.astype(np.int64), weights_N.astype(np.float32)
    pairs_NN = np.zeros((N, N), np.float32) if pair_affinity_NN is None else pair_affinity_NN.astype(np.float32)
    np.fill_diagonal(pairs_NN, 0)
    fixed_ND = np.float32(0) if device_affinity_ND is None else device_affinity_ND.astype(np.float32)
    items_N = np.arange(N)
    other_expert_NN = experts_N[:, None] != experts_N
    for _ in range(_MAX_ROUNDS):
        on_ND = (device_N[:, None] == np.arange(D)).astype(np.float32)
        worth_ND = pairs_NN @ on_ND + fixed_ND
        load_N = (weights_N @ on_ND)[device_N]
        # Moving x to y's device and y to x's: each gains there and loses here, and the pair stays apart.
        moved_NN = worth_ND[:, device_N] - worth_ND[items_N, device_N][:, None]
        gain_NN = moved_NN + moved_NN.T - 2 * pairs_NN
        after_NN = load_N[:, None] - weights_N[:, None] + weights_N
        fits_NN = after_NN <= np.maximum(load_limit, load_N)[:, None]
        # Whether the device of y holds no replica of x's expert.
        lacks_NN = on_ND @ (on_ND.T @ ~other_expert_NN) == 0
        allowed_NN = fits_NN & lacks_NN.T
        gain_NN[~(allowed_NN & allowed_NN.T)] = 0
        partner_N = gain_NN.argmax(axis=1)
        best_N = gain_NN[items_N, partner_N]
        # Rounding leaves tiny gains that would be swapped to and fro.
        if best_N.max(initial=0) <= 1e-6 * max(1.0, float(worth_ND.max())):
            break
        _swap_disjoint(device_N, best_N, partner_N, D)
    return device_N


def _swap_disjoint(device_N: np.ndarray, best_N: np.ndarray, partner_N: np.ndarray, num_devices: int) -> None:
    """Make the best swaps that have no device in common: only those keep the gains computed for them."""
    taken = np.zeros(num_devices, bool)
    threshold = best_N.max() / 8
    for x in np.argsort(-best_N, kind="stable"):
        y = partner_N[x]
        here, there = device_N[x], device_N[y]
        if best_N[x] <= threshold:
            break
        if not taken[here] and not taken[there]:
            taken[here] = taken[there] = True
            device_N[x], device_N[y] = there, here
