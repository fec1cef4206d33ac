"""Tables between logical experts and the places they are in, as vLLM and SGLang keep them.

Both describe a placement by what one rank needs: which local slot an expert is in, and, with redundant experts, which
logical expert each physical one is. `ExpertPlacement` describes the whole mesh in one array, and the tables here follow
from it; so they agree with what jaxmoe loads and dispatches. The engines have no padding: every physical expert is one.

Source: vllm/model_executor/layers/fused_moe/expert_map_manager.py and vllm/distributed/eplb/eplb_state.py of vLLM 0.33;
python/sglang/srt/eplb/expert_location.py of SGLang.
"""

import json
from collections.abc import Sequence

import numpy as np

from jaxmoe.placement.base import ExpertPlacement

_MAP = "physical_to_logical_map"


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
    if not 0 <= rank < placement.ep:
        raise ValueError(f"an expert-parallel rank is 0 to ep - 1; got rank {rank} of ep={placement.ep}")
    local = placement.slot_to_expert.reshape(placement.ep, -1)[rank]
    result = np.full(placement.num_experts, -1, np.int32)
    # Backwards, so that the first slot of an expert is the one that stays.
    for slot in reversed(range(local.size)):
        if local[slot] >= 0:
            result[local[slot]] = slot
    return result


def initial_physical_to_logical(num_experts: int, num_redundant_experts: int = 0) -> np.ndarray:
    """Name the logical expert of each physical one before any balancing: each once, then 0, 1, ... again.

    Args:
        num_experts: logical experts E.
        num_redundant_experts: physical experts beyond E; more than E wrap round.

    Returns:
        int32 [E + redundant].

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


def physical_to_logical_map(placements: Sequence[ExpertPlacement]) -> np.ndarray:
    """Name the logical expert of each physical one, layer by layer.

    Args:
        placements: one for each MoE layer, all with as many slots and none of them padding.

    Returns:
        int32 [layers, P]; rank r of ep holds the physical experts r·P/ep to (r+1)·P/ep.

    Raises:
        ValueError: a slot is padding, or the layers differ in slots.

    Example:
        >>> physical_to_logical_map([ExpertPlacement.linear(3, 2, num_slots=4)]).tolist()
        [[0, 1, 2, 0]]
    """
    slots = {placement.num_slots for placement in placements}
    if len(slots) != 1:
        raise ValueError(f"all layers have equally many physical experts; got {sorted(slots)}")
    for layer, placement in enumerate(placements):
        if placement.num_padding:
            raise ValueError(
                f"every physical expert is a logical one: of {placement.num_slots} slots of MoE layer {layer}, "
                f"{placement.num_padding} are padding; place with num_slots={placement.num_slots}, which makes them replicas"
            )
    return np.stack([placement.slot_to_expert for placement in placements])


def expert_location_json(placements: Sequence[ExpertPlacement], moe_layers: Sequence[int], num_layers: int) -> str:
    """Write placements as SGLang's ``--init-expert-location`` reads them.

    SGLang numbers all layers of a model. Those without routed experts have the initial map, which it does not look at.

    Args:
        placements: one for each MoE layer; see `physical_to_logical_map`.
        moe_layers: the index of each of them among all layers, ascending.
        num_layers: all layers of the model.

    Returns:
        A JSON object with ``physical_to_logical_map`` [num_layers, P].

    Raises:
        ValueError: the placements are for another number of MoE layers, or as for `physical_to_logical_map`.

    Example:
        >>> expert_location_json([ExpertPlacement.round_robin(2, 2, num_slots=4)], moe_layers=[1], num_layers=2)
        '{"physical_to_logical_map": [[0, 1, 0, 1], [0, 0, 1, 1]]}'
    """
    if len(placements) != len(moe_layers):
        raise ValueError(f"the model has {len(moe_layers)} MoE layers; got placements of {len(placements)}")
    table_LP = physical_to_logical_map(placements)
    experts, slots = placements[0].num_experts, table_LP.shape[1]
    every_layer = np.tile(initial_physical_to_logical(experts, slots - experts), (num_layers, 1))
    every_layer[list(moe_layers)] = table_LP
    return json.dumps({_MAP: every_layer.tolist()})


def placements_from_expert_location(
    text: str, *, ep: int, num_experts: int, moe_layers: Sequence[int] | None = None
) -> list[ExpertPlacement]:
    """Read placements from a JSON object with a ``physical_to_logical_map``, as SGLang has them.

    Args:
        text: the JSON object.
        ep: expert-parallel ranks, which the object does not name.
        num_experts: logical experts E.
        moe_layers: indices of the rows to take, where the map has one for every layer of the model; None for all rows.

    Raises:
        ValueError: `text` is no such object, the map lacks a layer, or a row is no placement on `ep` ranks.

    Example:
        >>> text = '{"physical_to_logical_map": [[0, 1, 0, 1], [0, 0, 1, 1]]}'
        >>> [p.slot_to_expert.tolist() for p in placements_from_expert_location(text, ep=2, num_experts=2, moe_layers=[1])]
        [[0, 0, 1, 1]]
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"an expert location is a JSON object with {_MAP}: {error}") from error
    rows = fields.get(_MAP) if isinstance(fields, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"an expert location is a JSON object with {_MAP}, a row for each layer; this one is not")
    if moe_layers is not None:
        if max(moe_layers) >= len(rows):
            raise ValueError(f"{_MAP} has a row for each layer; got {len(rows)} rows and MoE layer {max(moe_layers)}")
        rows = [rows[layer] for layer in moe_layers]
    return [ExpertPlacement(num_experts, ep, row) for row in rows]
