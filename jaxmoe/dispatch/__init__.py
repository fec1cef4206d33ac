"""Dispatch: bringing tokens to the devices of their experts and back.

A backend is one file with a `Dispatch` and a line in `DISPATCHES`.
"""

from jaxmoe.dispatch.all_gather import ALL_GATHER
from jaxmoe.dispatch.all_to_all import ALL_TO_ALL
from jaxmoe.dispatch.base import Buffers, Dispatch, DispatchLayout, DispatchShape, DispatchStats, Experts, RunDispatch
from jaxmoe.dispatch.choose import RATES, DispatchChoice, DispatchCost, choose, dispatch_collectives, dispatch_cost
from jaxmoe.dispatch.collectives import Collective, DispatchBytes, expected_bytes
from jaxmoe.dispatch.phases import PhaseDispatch
from jaxmoe.dispatch.ragged_all_to_all import RAGGED_ALL_TO_ALL
from jaxmoe.dispatch.replicated import REPLICATED
from jaxmoe.dispatch.wire import check_wire_dtype

__all__ = [
    "DISPATCHES",
    "RATES",
    "Buffers",
    "Collective",
    "Dispatch",
    "DispatchBytes",
    "DispatchChoice",
    "DispatchCost",
    "DispatchLayout",
    "DispatchShape",
    "DispatchStats",
    "Experts",
    "PhaseDispatch",
    "RunDispatch",
    "check_wire_dtype",
    "dispatch_collectives",
    "dispatch_cost",
    "expected_bytes",
    "explain_dispatch",
    "get_dispatch",
]

DISPATCHES: dict[str, Dispatch] = {
    backend.name: backend for backend in (REPLICATED, ALL_GATHER, ALL_TO_ALL, RAGGED_ALL_TO_ALL)
}


def get_dispatch(name: str, platform: str, layout: DispatchLayout | None = None, *, processes: int = 1) -> Dispatch:
    """The backend called `name`, to be run on `platform`.

    Args:
        name: key of `DISPATCHES`.
        platform: platform of the mesh's devices.
        layout: layout of the experts; None to ask for the platform alone.
        processes: number of processes that have the devices.

    Raises:
        ValueError: there is none.
        NotImplementedError: it cannot run there.
    """
    if name not in DISPATCHES:
        raise ValueError(f"dispatch backends are auto, {', '.join(DISPATCHES)}; got {name!r}")
    if reason := DISPATCHES[name].reason_not_to(platform, layout, processes):
        raise NotImplementedError(f"dispatch {name!r} cannot run {reason}")
    return DISPATCHES[name]


def explain_dispatch(
    shape: DispatchShape, platform: str, device_kind: str | None = None, *, processes: int = 1
) -> DispatchChoice:
    """Tell what "auto" chooses, and the modeled time of every backend; see `jaxmoe.dispatch.choose`.

    Args:
        shape: sizes of the call.
        platform: platform of the mesh's devices, "gpu" or "cpu".
        device_kind: kind of them, for rates that were measured here; None to go by published ones alone.
        processes: number of processes that have the devices.

    >>> mesh_shape = (("dp", 1), ("tp", 1), ("ep", 8))
    >>> layout = DispatchLayout(mesh_shape=mesh_shape, expert_axes=("ep",), partial_axes=("tp",), num_slots=64)
    >>> explain_dispatch(DispatchShape(tokens=1, choices=8, width=4096, itemsize=2, layout=layout), "gpu").name
    'replicated'
    """
    return choose(list(DISPATCHES.values()), shape, platform, device_kind, processes=processes)
