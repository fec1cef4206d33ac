"""`ExpertPlacement`: the map from the physical slots of each device to logical experts."""

import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from jaxmoe.checks import check_positive, flag, integer
from jaxmoe.placement.packing import eplb_slots

_FORMAT = "jaxmoe.expert_placement"


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """The map from the physical slots of one MoE layer to its logical experts.

    Device r of `ep` owns the slots r·P/ep to (r+1)·P/ep. A slot holds one logical expert,
    which may be in several slots (replicas), or nothing (-1, padding).

    Attributes:
        num_experts: logical experts E.
        ep: devices that share them.
        slot_to_expert: int32 [P], the logical expert in each slot, -1 for padding.

    Raises:
        ValueError: P is not a multiple of `ep`, an id is no integer or outside -1..E-1, or an expert has no slot.

    Example:
        >>> ExpertPlacement.linear(num_experts=3, ep=2).slot_to_expert.tolist()
        [0, 1, 2, -1]
    """

    num_experts: int
    ep: int
    slot_to_expert: np.ndarray

    def __post_init__(self) -> None:
        slots = _integers("slot_to_expert", self.slot_to_expert)
        slots.setflags(write=False)
        object.__setattr__(self, "slot_to_expert", slots)
        check_positive(self, "num_experts", "ep")
        if slots.ndim != 1 or slots.size == 0 or slots.size % self.ep:
            raise ValueError(
                f"every device owns the same number of slots: slot_to_expert has shape {slots.shape}, which does not "
                f"split over ep={self.ep}; pad it with -1"
            )
        outside = slots[(slots < -1) | (slots >= self.num_experts)]
        if outside.size:
            raise ValueError(f"a slot holds an expert 0..{self.num_experts - 1} or -1 (padding); got {outside[0]}")
        missing = np.flatnonzero(self.replica_counts == 0)
        if missing.size:
            raise ValueError(
                f"every expert needs a slot: {missing.size} of {self.num_experts} have none, the first is {missing[0]}"
            )

    @classmethod
    def linear(
        cls, num_experts: int, ep: int, *, num_slots: int | None = None, allow_padding: bool = True
    ) -> "ExpertPlacement":
        """Give each device a contiguous block of experts, the remainder to the lowest devices.

        Ten experts on four devices are {0, 1, 2}, {3, 4, 5}, {6, 7}, {8, 9}.

        Args:
            num_experts: logical experts E.
            ep: devices.
            num_slots: slots to fill; those beyond E hold replicas of expert 0, 1, 2 and on, modulo E.
            allow_padding: whether slots may stay empty.

        Raises:
            ValueError: slots would be padding and `allow_padding` is False, there are fewer slots than experts, or no
                device.

        Source: vLLM, determine_expert_map and build_initial_global_physical_to_logical_map.
        """
        ep = integer("ep", ep, least=1)
        blocks = np.array_split(_initial_experts(num_experts, num_slots), ep)
        return cls.from_device_experts(num_experts, blocks, allow_padding=allow_padding)

    @classmethod
    def round_robin(
        cls, num_experts: int, ep: int, *, num_slots: int | None = None, allow_padding: bool = True
    ) -> "ExpertPlacement":
        """Put expert e on device e mod ep, which spreads groups of related neighbors.

        Ten experts on four devices are {0, 4, 8}, {1, 5, 9}, {2, 6}, {3, 7}. Slots beyond E are dealt on in the same way.
        Arguments and errors are those of `linear`.

        Source: vLLM, determine_expert_map.
        """
        experts, ep = _initial_experts(num_experts, num_slots), integer("ep", ep, least=1)
        dealt = [experts[device::ep] for device in range(ep)]
        return cls.from_device_experts(num_experts, dealt, allow_padding=allow_padding)

    @classmethod
    def from_counts(
        cls, counts: np.ndarray, *, ep: int, num_slots: int | None = None, num_groups: int = 1, num_nodes: int = 1
    ) -> "ExpertPlacement | list[ExpertPlacement]":
        """Level the devices' loads by EPLB as published: replicate heavy experts, pack replicas.

        Args:
            counts: number of times that each expert was chosen: [E] for one layer, [layers, E] for several.
            ep: devices.
            num_slots: slots over all devices, a multiple of `ep`; None for the fewest that hold E experts.
            num_groups: groups of experts that the router limits tokens to.
            num_nodes: nodes that the devices are on; hierarchical where it divides `num_groups`, else global.

        Returns:
            One placement for counts [E]; a list with one for each layer for counts [layers, E].

        Raises:
            ValueError: the slots, groups or nodes do not split evenly, or counts are no loads.

        Example:
            >>> ExpertPlacement.from_counts(np.array([1, 6, 2]), ep=2, num_slots=4).slot_to_expert.tolist()
            [1, 2, 1, 0]
        """
        layers = np.atleast_2d(counts)
        slots_LP = eplb_slots(layers, ep, num_slots=num_slots, num_groups=num_groups, num_nodes=num_nodes)
        placements = [cls(layers.shape[1], ep, slots_P) for slots_P in slots_LP]
        return placements[0] if np.ndim(counts) == 1 else placements

    @classmethod
    def from_device_experts(
        cls, num_experts: int, device_experts: Sequence[Sequence[int] | np.ndarray], *, allow_padding: bool = True
    ) -> "ExpertPlacement":
        """Build a placement from the experts of each device, padding the shorter lists.

        Raises:
            ValueError: a number is no integer, or the lists differ in length and `allow_padding` is False.
        """
        device_experts = [_integers("the experts of a device", experts) for experts in device_experts]
        ep = len(device_experts)
        per_device = max(1, *(len(experts) for experts in device_experts)) if ep else 1
        padding = ep * per_device - sum(len(experts) for experts in device_experts)
        if padding and not flag("allow_padding", allow_padding):
            raise ValueError(
                f"num_experts ({num_experts}) does not fill {ep} expert-parallel devices evenly: "
                f"{padding} slots would be padding (pass allow_padding=True to accept them)"
            )
        slots = np.full((ep, per_device), -1, np.int32)
        for device, experts in enumerate(device_experts):
            slots[device, : len(experts)] = experts
        return cls(num_experts, ep, slots.reshape(-1))

    @property
    def num_slots(self) -> int:
        """Physical slots P over the whole mesh, padding included."""
        return self.slot_to_expert.size

    @property
    def slots_per_device(self) -> int:
        """Physical slots p of one device, padding included."""
        return self.num_slots // self.ep

    @property
    def num_padding(self) -> int:
        """Slots that hold nothing."""
        return int(np.count_nonzero(self.slot_to_expert < 0))

    @cached_property
    def replica_counts(self) -> np.ndarray:
        """int32 [E], the number of slots that hold each expert."""
        held = self.slot_to_expert[self.slot_to_expert >= 0]
        return np.bincount(held, minlength=self.num_experts).astype(np.int32)

    @cached_property
    def expert_to_slots(self) -> np.ndarray:
        """int32 [E, max replicas], the slots of each expert in rising order, padded with -1."""
        table = np.full((self.num_experts, self.replica_counts.max()), -1, np.int32)
        filled = np.zeros(self.num_experts, np.int32)
        for slot, expert in enumerate(self.slot_to_expert):
            if expert >= 0:
                table[expert, filled[expert]] = slot
                filled[expert] += 1
        return table

    @cached_property
    def device_replicas(self) -> np.ndarray:
        """int64 [ep, E], how many slots of each device hold each expert."""
        slots = np.flatnonzero(self.slot_to_expert >= 0)
        table = np.zeros((self.ep, self.num_experts), np.int64)
        np.add.at(table, (slots // self.slots_per_device, self.slot_to_expert[slots]), 1)
        return table

    @cached_property
    def slot_uses(self) -> dict[str, np.ndarray]:
        """Slots of each device that hold an expert, one more replica of it, or nothing.

        Of an expert's slots the first counts as the expert and the others as replicas.

        Returns:
            "experts", "replicas" and "padding", each int64 [ep].

        Example:
            >>> p = ExpertPlacement(num_experts=2, ep=2, slot_to_expert=[0, -1, 1, 0])
            >>> {use: slots.tolist() for use, slots in p.slot_uses.items()}
            {'experts': [1, 1], 'replicas': [0, 1], 'padding': [1, 0]}
        """
        slots = self.slot_to_expert
        first = np.zeros(slots.size, bool)
        first[self.expert_to_slots[:, 0]] = True
        uses = {"experts": first, "replicas": (slots >= 0) & ~first, "padding": slots < 0}
        return {use: chosen.reshape(self.ep, -1).sum(axis=1) for use, chosen in uses.items()}

    def device_experts(self, device: int) -> list[int]:
        """The logical experts that device `device` (0..ep-1) holds, in slot order."""
        p = self.slots_per_device
        return [int(e) for e in self.slot_to_expert[device * p : (device + 1) * p] if e >= 0]

    def to_json(self) -> str:
        """The placement as a JSON object; `from_json` reads it back."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": 1,
                "num_experts": self.num_experts,
                "ep": self.ep,
                "slot_to_expert": self.slot_to_expert.tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "ExpertPlacement":
        """Read what `to_json` wrote.

        Raises:
            ValueError: `text` is no JSON, no placement, or of a version this jaxmoe does not know.
        """
        return cls._from_dict(_parse(text))

    @classmethod
    def _from_dict(cls, fields: Any) -> "ExpertPlacement":
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            raise ValueError(f'a placement file is a JSON object with "format": "{_FORMAT}"; this one is not')
        if fields.get("version") != 1:
            raise ValueError(
                f"placement files of version 1 are known here; got {fields.get('version')!r}; upgrade jaxmoe"
            )
        if not all(type(fields.get(name)) is int for name in ("num_experts", "ep")) or "slot_to_expert" not in fields:
            got = ", ".join(f"{name} {fields.get(name)!r:.40}" for name in ("num_experts", "ep", "slot_to_expert"))
            raise ValueError(f"a placement file has num_experts, ep and slot_to_expert, all integers; got {got}")
        return cls(fields["num_experts"], fields["ep"], fields["slot_to_expert"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertPlacement):
            return NotImplemented
        same_sizes = (self.num_experts, self.ep) == (other.num_experts, other.ep)
        return same_sizes and np.array_equal(self.slot_to_expert, other.slot_to_expert)

    def __hash__(self) -> int:
        return hash((self.num_experts, self.ep, self.slot_to_expert.tobytes()))


def placements_to_json(placements: Sequence[ExpertPlacement]) -> str:
    """A JSON array with one placement per MoE layer; `placements_from_json` reads it back."""
    # A layer a line: a file of 60 layers can then be read, and compared with another, by eye.
    return "[\n" + ",\n".join(placement.to_json() for placement in placements) + "\n]\n"


def placements_from_json(text: str) -> ExpertPlacement | list[ExpertPlacement]:
    """Read one placement, or a JSON array with one per MoE layer."""
    fields = _parse(text)
    if isinstance(fields, list):
        return [ExpertPlacement._from_dict(layer) for layer in fields]
    return ExpertPlacement._from_dict(fields)


def _initial_experts(num_experts: int, num_slots: int | None) -> np.ndarray:
    """int32 [num_slots], the experts in order and then replicas modulo E; one slot an expert by default."""
    num_experts = integer("num_experts", num_experts, least=1)
    if num_slots is not None and integer("num_slots", num_slots) < num_experts:
        raise ValueError(f"every expert needs a slot: num_slots={num_slots} is below num_experts={num_experts}")
    return np.arange(num_slots or num_experts, dtype=np.int32) % num_experts


def _integers(name: str, values: Any) -> np.ndarray:
    """An int32 copy, refused where a number would be rounded or wrapped round."""
    try:
        given = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is a list of integers: {error}") from error
    limits = np.iinfo(np.int32)
    if given.size and (given.dtype.kind not in "iu" or given.min() < limits.min or given.max() > limits.max):
        raise ValueError(f"{name} is a list of integers, each an expert; got {given.dtype} {given.tolist()!r:.80}")
    return given.astype(np.int32)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        name = "" if text.lstrip().startswith(("{", "[")) else "; give the text that is in the file, and not its name"
        raise ValueError(f"a placement file is JSON, as ExpertPlacement.to_json writes it: {error}{name}") from error
