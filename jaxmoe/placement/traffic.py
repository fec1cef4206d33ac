"""A trace sent through placements: the rows each device computes and the token copies it sends.

Letters: W windows, L layers, n devices (ep), and T, K, P of docs/concepts/letters.md.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.nodes import check_nodes
from jaxmoe.placement.replicas import ReplicaContext, get_replica_choice
from jaxmoe.placement.trace import RoutingTrace

WITHIN, BETWEEN = 0, 1
DEDUPLICATIONS = ("none", "device", "node")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Work and messages that a trace makes for the devices.

    Attributes:
        rows: float64 [W, L, n], (token, choice) rows that each device computes.
        active_slots: int64 [W, L, n], slots of each device that received any.
        sent: float64 [W, L, 2, n], token copies each device sends, within its node and between nodes.
        received: float64 [W, L, 2, n], copies each device receives.
        copies: float64 [L, n, n], copies from each device (rows) to each (columns) over all windows;
            the diagonal, tokens that stay at home, crosses no wire.
        distinct_destinations: float64 [L], mean number of different devices that a token's experts are
            on, its own included; None for a trace of counts.
    """

    rows: np.ndarray
    active_slots: np.ndarray
    sent: np.ndarray
    received: np.ndarray
    copies: np.ndarray
    distinct_destinations: np.ndarray | None


def route_trace(
    trace: RoutingTrace,
    placements: Sequence[ExpertPlacement],
    *,
    num_nodes: int = 1,
    replica_choice: str = "modulo",
    deduplicate: str = "device",
    seed: int = 0,
) -> Traffic:
    """Send every token of a trace to its experts' slots and count.

    A window is one step over all devices, its tokens split over them in order. A trace of counts
    alone knows neither tokens nor homes: loads are split evenly over replicas, and every row
    counts as a copy from any device with equal chance, which is an upper bound.

    Args:
        trace: routing trace.
        placements: placement of each layer of the trace, all for the same number of devices n.
        num_nodes: nodes of n / num_nodes devices.
        replica_choice: name in `REPLICA_CHOICES`.
        deduplicate: "device": a token is sent once to each device that has experts for it, jaxmoe's
            dispatch. "node": once to each other node, to the device there with the sender's number, which
            passes it on within the node. "none": once per choice.
        seed: seed of random replica choices.

    Raises:
        ValueError: the placements do not fit the trace or each other, or a name is unknown.
    """
    n = check_placements(placements, trace.num_layers, trace.num_experts)
    get_replica_choice(replica_choice)
    if deduplicate not in DEDUPLICATIONS:
        raise ValueError(f"deduplicate is one of {', '.join(DEDUPLICATIONS)}; got {deduplicate!r}")
    devices_per_node = check_nodes(n, num_nodes)
    W, L = trace.num_windows, trace.num_layers
    rows_WLn, active_WLn = np.zeros((W, L, n)), np.zeros((W, L, n), np.int64)
    sent, received = np.zeros((W, L, 2, n)), np.zeros((W, L, 2, n))
    copies_Lnn, destinations_L = np.zeros((L, n, n)), np.zeros(L)
    remote_nn = ~np.eye(n, dtype=bool)
    node_n = np.arange(n) // devices_per_node
    same_node_nn = node_n[:, None] == node_n
    for window, layer, slot_rows_P, copies_nn, destinations in _windows(
        trace, placements, devices_per_node, replica_choice, deduplicate, seed
    ):
        rows_WLn[window, layer] = slot_rows_P.reshape(n, -1).sum(axis=1)
        active_WLn[window, layer] = np.count_nonzero(slot_rows_P.reshape(n, -1), axis=1)
        for kind, pairs_nn in ((WITHIN, same_node_nn & remote_nn), (BETWEEN, ~same_node_nn)):
            sent[window, layer, kind] = (copies_nn * pairs_nn).sum(axis=1)
            received[window, layer, kind] = (copies_nn * pairs_nn).sum(axis=0)
        copies_Lnn[layer] += copies_nn
        destinations_L[layer] += destinations
    tokens = None if trace.expert_ids is None else trace.expert_ids.shape[0]
    return Traffic(
        rows=rows_WLn,
        active_slots=active_WLn,
        sent=sent,
        received=received,
        copies=copies_Lnn,
        distinct_destinations=None if tokens is None else destinations_L / tokens,
    )


def device_loads(counts: np.ndarray, placements: Sequence[ExpertPlacement]) -> np.ndarray:
    """Split expert loads evenly over replicas and add them up by device.

    Args:
        counts: [..., L, E].
        placements: placement of each layer.

    Returns:
        float64 [..., L, n].

    Raises:
        ValueError: the placements do not fit the counts or each other.

    Example:
        >>> p = ExpertPlacement(num_experts=2, ep=2, slot_to_expert=[0, -1, 1, 0])
        >>> device_loads(np.array([[8, 3]]), [p]).tolist()
        [[4.0, 7.0]]
    """
    counts = np.asarray(counts)
    if counts.ndim < 2:
        raise ValueError(f"counts are of every layer, [..., L, E]; got shape {counts.shape}")
    check_placements(placements, *counts.shape[-2:])
    share_LEn = np.stack([(p.device_replicas / p.replica_counts).T for p in placements])
    return np.einsum("...le,len->...ln", counts, share_LEn)


def check_placements(placements: Sequence[ExpertPlacement], num_layers: int, num_experts: int) -> int:
    """The number of devices that all `placements` are for.

    Raises:
        ValueError: they are not one per layer, for that many experts, on equally many devices.
    """
    sizes = {(placement.num_experts, placement.ep) for placement in placements}
    if len(placements) != num_layers or len(sizes) != 1 or {num_experts} != {experts for experts, _ in sizes}:
        raise ValueError(
            f"{num_layers} layers of {num_experts} experts need {num_layers} placements of {num_experts} experts on "
            f"equally many devices; got {len(placements)}, of (experts, devices) {sorted(sizes)}"
        )
    return sizes.pop()[1]


# One window of one layer: (window, layer, rows of each slot [P], copies [n, n], distinct destinations summed over tokens)
_Window = tuple[int, int, np.ndarray, np.ndarray, float]


def _windows(
    trace: RoutingTrace,
    placements: Sequence[ExpertPlacement],
    devices_per_node: int,
    replica_choice: str,
    deduplicate: str,
    seed: int,
) -> Iterator[_Window]:
    n = placements[0].ep
    if trace.expert_ids is None or trace.window_sizes is None:
        for window, counts_LE in enumerate(trace.counts):
            for layer, (counts_E, placement) in enumerate(zip(counts_LE, placements, strict=True)):
                rows_P = _even_rows(counts_E, placement)
                yield window, layer, rows_P, np.tile(rows_P.reshape(n, -1).sum(axis=1) / n, (n, 1)), 0.0
        return
    choose = get_replica_choice(replica_choice)
    last_load_Ln = np.zeros((trace.num_layers, n))
    stops = np.cumsum(trace.window_sizes)
    for window, (size, stop) in enumerate(zip(trace.window_sizes, stops, strict=True)):
        ids_TLK = trace.expert_ids[stop - size : stop]
        index_T = np.arange(size)
        home_T = index_T * n // max(size, 1)
        turn_T = index_T - np.searchsorted(home_T, home_T)
        for layer, placement in enumerate(placements):
            context = ReplicaContext(
                home=home_T,
                turn=turn_T,
                devices_per_node=devices_per_node,
                last_load=last_load_Ln[layer],
                seed=seed + window * trace.num_layers + layer,
            )
            slots_TK = choose(ids_TLK[:, layer], placement, context)
            rows_P = np.bincount(slots_TK[slots_TK >= 0], minlength=placement.num_slots).astype(np.float64)
            last_load_Ln[layer] = rows_P.reshape(n, -1).sum(axis=1)
            # -1 becomes a device beyond the last.
            device_TK = np.where(slots_TK < 0, n, slots_TK // placement.slots_per_device)
            yield window, layer, rows_P, *_copies(np.sort(device_TK, axis=1), home_T, n, devices_per_node, deduplicate)


def _even_rows(counts_E: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """float64 [P], expert loads split evenly over replicas."""
    expert_P = placement.slot_to_expert
    return np.where(expert_P < 0, 0.0, (counts_E / placement.replica_counts)[expert_P])


def _copies(
    device_TK: np.ndarray, home_T: np.ndarray, n: int, devices_per_node: int, deduplicate: str
) -> tuple[np.ndarray, float]:
    """Copies [n, n] and the number of distinct (token, device) pairs; rows of `device_TK` are sorted."""
    home_TK = np.broadcast_to(home_T[:, None], device_TK.shape)
    chosen_TK = device_TK < n
    first_TK = chosen_TK & _changes(device_TK)
    if deduplicate == "none":
        return _pairs(home_TK, device_TK, chosen_TK, n), float(first_TK.sum())
    if deduplicate == "device":
        return _pairs(home_TK, device_TK, first_TK, n), float(first_TK.sum())
    node_TK, home_node_TK = device_TK // devices_per_node, home_TK // devices_per_node
    away_TK = node_TK != home_node_TK
    entry_TK = node_TK * devices_per_node + home_TK % devices_per_node
    copies_nn = (
        _pairs(home_TK, device_TK, first_TK & ~away_TK, n)
        + _pairs(home_TK, entry_TK, first_TK & away_TK & _changes(node_TK), n)
        + _pairs(entry_TK, device_TK, first_TK & away_TK & (entry_TK != device_TK), n)
    )
    return copies_nn, float(first_TK.sum())


def _changes(sorted_TK: np.ndarray) -> np.ndarray:
    """Tell whether each entry differs from the one before it in its row."""
    changes_TK = np.ones(sorted_TK.shape, bool)
    changes_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return changes_TK


def _pairs(source_TK: np.ndarray, target_TK: np.ndarray, counted_TK: np.ndarray, n: int) -> np.ndarray:
    pairs = source_TK[counted_TK] * n + target_TK[counted_TK]
    return np.bincount(pairs, minlength=n * n).reshape(n, n).astype(np.float64)
