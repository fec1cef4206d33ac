"""Parameters whose dim 0 is the physical slots of a layer, and the placement that each was filled by."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx


class SlotOrder:
    """The placement that an expert stack was filled by, noted beside its values.

    All of them compare equal, so that no program is compiled again and no state looks like another for its sake.

    Attributes:
        slots: expert in each slot; None where it is not known.
    """

    def __init__(self, slots: tuple[int, ...] | None):
        self.slots = slots

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlotOrder)

    def __hash__(self) -> int:
        return hash(SlotOrder)

    def __repr__(self) -> str:
        return "SlotOrder(unknown)" if self.slots is None else f"SlotOrder({len(self.slots)} slots)"


UNKNOWN = SlotOrder(None)


class _NamedByPlacement(nnx.Param):
    """A parameter whose value has a name that says by which placement it lies, wherever names of a tree are written down.

    Orbax saves a state by the names of its leaves, and gives its values back to leaves of the same names. So it refuses to
    put stacks that lie by one placement into a state that lies by another, though their shapes are the same.
    """

    def __init_subclass__(cls) -> None:
        # In place of Flax's registration of a kind of Variable, which has one name for all values.
        jax.tree_util.register_pytree_with_keys(
            cls,
            flatten_with_keys=_flatten_with_keys,
            unflatten_func=partial(_unflatten, cls),
            flatten_func=_flatten,
        )


def _flatten(stack: Any) -> tuple[tuple[Any], tuple[tuple[str, Any], ...]]:
    return (stack._raw_value,), tuple(sorted(stack._var_metadata.items()))


def _unflatten(kind: Any, metadata: tuple[tuple[str, Any], ...], children: Iterable[Any]) -> Any:
    (value,) = children
    return kind._new(value, dict(metadata))


def _flatten_with_keys(stack: Any) -> tuple[tuple[tuple[Any, Any]], tuple[tuple[str, Any], ...]]:
    (value,), metadata = _flatten(stack)
    return ((jax.tree_util.GetAttrKey(_name_of_value(slot_order(stack).slots)), value),), metadata


@lru_cache
def _name_of_value(slots: tuple[int, ...] | None) -> str:
    """The name of the value of a stack: Flax's own where slots are the experts in order, which most layers have."""
    if slots is None or slots == tuple(range(len(slots))):
        return "value"
    return f"value_in_slots_{hashlib.sha256(repr(slots).encode()).hexdigest()[:12]}"


class ExpertStack(_NamedByPlacement):
    """A parameter [P, ...] whose dim 0 is the physical slots, and which notes the placement that it was filled by.

    Flax copies the note along with the values: `nnx.update(layer, nnx.state(other, nnx.Param))` brings it too, and
    `check_filled_by` sees where the layer's own placement is another. Raw arrays bring none. Inside a trace the note is
    unknown, because one compiled program serves layers of every placement, and what comes out of it keeps the note of
    the layer that it is put into.
    """

    @classmethod
    def _new(cls, value: Any, metadata: dict[str, Any]) -> nnx.Variable[Any]:
        # Every way of Flax to make a Variable from a value and metadata comes here, those of jit's arguments too.
        if "filled_by" in metadata and any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
            metadata = {**metadata, "filled_by": UNKNOWN}
        return super()._new(value, metadata)

    def update_from_state(self, variable_state: nnx.Variable[Any]) -> None:
        """Take over another Variable's value, and its note where it has one."""
        own, arriving = slot_order(self), slot_order(variable_state)
        super().update_from_state(variable_state)
        self.note_slots((own if arriving.slots is None else arriving).slots)

    def note_slots(self, slots: tuple[int, ...] | None) -> None:
        """Note that the stack holds these experts, slot by slot."""
        self._var_metadata["filled_by"] = SlotOrder(slots)


def slot_order(variable: nnx.Variable[Any]) -> SlotOrder:
    """The note of a stack, or of a Variable that has been made from one."""
    order: SlotOrder = variable.get_metadata().get("filled_by", UNKNOWN)
    return order


def check_filled_by(path: str, stack: ExpertStack, table: Any) -> None:
    """Refuse a stack that was filled by another placement than its layer has.

    Args:
        path: name of the stack, for the message.
        stack: expert stack of the layer.
        table: int32 [P], the layer's `slot_to_expert`. Where it has no values, or is of several layers at once, nothing
            can be said.

    Raises:
        ValueError: the two differ.
    """
    filled_by = slot_order(stack).slots
    if filled_by is None or not isinstance(table, jax.Array) or isinstance(table, jax.core.Tracer) or table.ndim != 1:
        return
    if filled_by != (placed := tuple(np.asarray(table).tolist())):
        slot = next((i for i, (a, b) in enumerate(zip(filled_by, placed, strict=False)) if a != b), 0)
        raise ValueError(
            f"expert stacks lie by the layer's placement: {path} was filled by another one ({len(filled_by)} slots, slot "
            f"{slot} holds expert {filled_by[slot]}; the layer has {len(placed)} slots and {placed[slot]} there); give the "
            "layer a whole state, placement tables too, and not nnx.Param alone, or use jaxmoe.load_logical_state"
        )
