"""Tables between logical experts and the places they are in, as vLLM's fused-MoE layer keeps them.

vLLM describes a placement by what one rank needs: which local slot an expert is in, and, with redundant experts, which
logical expert each physical one is. `ExpertPlacement` describes the whole mesh in one array, and the tables here follow
from it; so they agree with what jaxmoe loads and dispatches. vLLM numbers the physical experts that there are; an
`ExpertPlacement` numbers slots, of which some may be padding. The two differ where E does not divide by ep.

Source: vllm/model_executor/layers/fused_moe/expert_map_manager.py and vllm/distributed/eplb/eplb_state.py of vLLM 0.33.
"""

import warnings
from typing import NamedTuple

import numpy as np

from jaxmoe.placement.base import ExpertPlacement

_STRATEGIES = {"linear": ExpertPlacement.linear, "round_robin": ExpertPlacement.round_robin}


class LocalExperts(NamedTuple):
    """What one expert-parallel rank holds.

    Attributes:
        num_local: routed experts on this rank.
        expert_map: int32 [E], the local slot of each expert, -1 where another rank has it; with fused shared experts,
            int32 [E + shared]. None where the rank holds everything.
    """

    num_local: int
    expert_map: np.ndarray | None


class RoutingTables(NamedTuple):
    """Numbers of experts, logical ("global") and by rank ("physical": those of rank 0, then those of rank 1, ...).

    Attributes:
        global_to_physical: int32 [E].
        physical_to_global: int32 [E], its inverse.
        local_to_global: int32 [local], the experts of one rank in the order of its slots.
    """

    global_to_physical: np.ndarray
    physical_to_global: np.ndarray
    local_to_global: np.ndarray


def expert_map(placement: ExpertPlacement, rank: int) -> np.ndarray:
    """Find the local slot of each expert on one rank.

    Args:
        placement: any placement. An expert that a rank holds twice is in the first of its slots.
        rank: 0 to ep - 1.

    Returns:
        int32 [E], -1 for experts that the rank does not hold.

    Raises:
        ValueError: there is no such rank.

    Example:
        >>> expert_map(ExpertPlacement.round_robin(num_experts=5, ep=2), rank=1).tolist()
        [-1, 0, -1, 1, -1]
    """
    local = placement.slot_to_expert.reshape(placement.ep, -1)[_checked_rank(rank, placement.ep)]
    result = np.full(placement.num_experts, -1, np.int32)
    # Backwards, so that the first slot of an expert is the one that stays.
    for slot in reversed(range(local.size)):
        if local[slot] >= 0:
            result[local[slot]] = slot
    return result


def determine_expert_map(
    num_experts: int, ep: int, rank: int, strategy: str = "linear", num_fused_shared_experts: int = 0
) -> LocalExperts:
    """Find what one rank holds of E experts under a strategy.

    With base, remainder = divmod(E, ep) the first `remainder` ranks hold base + 1 experts and the others base.

    Args:
        num_experts: logical experts E.
        ep: expert-parallel ranks.
        rank: 0 to ep - 1.
        strategy: "linear" or "round_robin".
        num_fused_shared_experts: shared experts that every rank computes like routed ones, after its own.

    Returns:
        The number of routed experts and their map. A rank may hold none.

    Raises:
        ValueError: the strategy is unknown, or there is no such rank.

    Example:
        >>> determine_expert_map(9, 2, 1).expert_map.tolist()
        [-1, -1, -1, -1, -1, 0, 1, 2, 3]
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategies with an expert map are {', '.join(sorted(_STRATEGIES))}; got {strategy!r}")
    _checked_rank(rank, ep)
    if ep == 1:
        return LocalExperts(num_experts, None)
    placement = _STRATEGIES[strategy](num_experts, ep)
    count = len(placement.device_experts(rank))
    shared = np.arange(count, count + num_fused_shared_experts, dtype=np.int32)
    return LocalExperts(count, np.concatenate([expert_map(placement, rank), shared]))


def expert_mask(expert_map: np.ndarray) -> np.ndarray:
    """Mark the experts that a rank computes.

    Args:
        expert_map: int32 [E + shared], from `determine_expert_map`.

    Returns:
        int32 [E + shared + 1]: 1 where the rank has a slot. The last entry is 0, for rows that are no token's.

    Example:
        >>> expert_mask(determine_expert_map(5, 2, 1, num_fused_shared_experts=1).expert_map).tolist()
        [0, 0, 0, 1, 1, 1, 0]
    """
    return np.append(expert_map >= 0, False).astype(np.int32)


def determine_expert_placement_strategy(
    requested: str,
    *,
    ep: int,
    num_expert_groups: int | None,
    num_redundant_experts: int = 0,
    load_balancing: bool = False,
    exchange_supports_round_robin: bool = True,
) -> str:
    """Decide between a strategy and linear placement, as vLLM does.

    Round-robin spreads the groups of a grouped router over the ranks. It gains nothing without groups, and
    the numbering of redundant experts, which a load balancer moves, assumes linear placement.

    Args:
        requested: "linear" or "round_robin".
        ep: expert-parallel ranks.
        num_expert_groups: groups of the router; None where it has none.
        num_redundant_experts: replicas beyond one of each expert.
        load_balancing: whether experts are moved while the model runs.
        exchange_supports_round_robin: whether the kernels that exchange tokens can translate expert numbers.

    Returns:
        `requested`, or "linear" with a warning that says why.

    Raises:
        ValueError: the strategy is unknown.
    """
    if requested not in _STRATEGIES:
        raise ValueError(f"strategies with an expert map are {', '.join(sorted(_STRATEGIES))}; got {requested!r}")
    if requested == "linear" or ep == 1:
        return "linear"
    if num_expert_groups is None or num_expert_groups <= 1:
        reason = f"the router has no expert groups (num_expert_groups={num_expert_groups})"
    elif num_redundant_experts:
        reason = f"there are {num_redundant_experts} redundant experts"
    elif load_balancing:
        reason = "a load balancer is to move experts"
    elif not exchange_supports_round_robin:
        reason = "the token exchange cannot translate expert numbers"
    else:
        return requested
    warnings.warn(f"round_robin placement falls back to linear: {reason}", stacklevel=2)
    return "linear"


def round_robin_routing_tables(num_experts: int, ep: int, rank: int) -> RoutingTables:
    """Number experts by rank and slot under round-robin placement, for an exchange that expects linear placement.

    Expert g is on rank g mod ep, in slot g // ep; its physical number counts the experts of all ranks before.

    Args:
        num_experts: logical experts E.
        ep: expert-parallel ranks.
        rank: whose `local_to_global` to make, 0 to ep - 1.

    Returns:
        The tables; the physical numbers leave no gap where E does not divide by ep.

    Raises:
        ValueError: there is no such rank.

    Example:
        >>> round_robin_routing_tables(5, 2, 1).global_to_physical.tolist()
        [0, 3, 1, 4, 2]
    """
    placement = ExpertPlacement.round_robin(num_experts, ep)
    physical_to_global = placement.slot_to_expert[placement.slot_to_expert >= 0]
    global_to_physical = np.empty_like(physical_to_global)
    global_to_physical[physical_to_global] = np.arange(num_experts, dtype=np.int32)
    local_to_global = np.array(placement.device_experts(_checked_rank(rank, ep)), np.int32)
    return RoutingTables(global_to_physical, physical_to_global, local_to_global)


def initial_physical_to_logical(num_experts: int, num_redundant_experts: int = 0) -> np.ndarray:
    """Name the logical expert of each physical one before any balancing: each once, then 0, 1, ... again.

    Args:
        num_experts: logical experts E.
        num_redundant_experts: physical experts beyond E; more than E wrap round.

    Returns:
        int32 [E + redundant]. With any ep that divides its length it is the `slot_to_expert` of a placement.

    Raises:
        ValueError: there is no expert, or less than none redundant.

    Example:
        >>> initial_physical_to_logical(4, 2).tolist()
        [0, 1, 2, 3, 0, 1]
    """
    if num_experts < 1 or num_redundant_experts < 0:
        raise ValueError(
            f"a layer has at least one expert and no less than none redundant; got {num_experts} and "
            f"{num_redundant_experts}"
        )
    return ExpertPlacement.linear(num_experts, 1, num_slots=num_experts + num_redundant_experts).slot_to_expert


def _checked_rank(rank: int, ep: int) -> int:
    if not 0 <= rank < ep:
        raise ValueError(f"an expert-parallel rank is 0 to ep - 1, with ep at least 1; got rank {rank} of ep={ep}")
    return rank
