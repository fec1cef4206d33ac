"""Dispatch: bringing tokens to the devices of their experts and back.

A backend is one file with a `Dispatch` and a line in `DISPATCHES`.
"""

from jaxmoe.dispatch.all_to_all import ALL_TO_ALL
from jaxmoe.dispatch.base import ApplyExperts, Dispatch, DispatchCost, DispatchLayout, DispatchStats
from jaxmoe.dispatch.choose import choose
from jaxmoe.dispatch.replicated import REPLICATED

__all__ = [
    "DISPATCHES",
    "ApplyExperts",
    "Dispatch",
    "DispatchCost",
    "DispatchLayout",
    "DispatchStats",
    "choose_dispatch",
    "get_dispatch",
]

DISPATCHES: dict[str, Dispatch] = {backend.name: backend for backend in (REPLICATED, ALL_TO_ALL)}


def get_dispatch(name: str) -> Dispatch:
    """The backend called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in DISPATCHES:
        raise ValueError(f"dispatch backends are auto, {', '.join(DISPATCHES)}; got {name!r}")
    return DISPATCHES[name]


def choose_dispatch(T: int, K: int, D: int, itemsize: int, layout: DispatchLayout, platform: str) -> Dispatch:
    """The backend with the least modelled time; see `jaxmoe.dispatch.choose`.

    Args:
        T: tokens over all of the layout's `expert_axes`.
        K: experts per token.
        D: model width.
        itemsize: bytes of an activation.
        layout: how experts lie on the mesh.
        platform: "gpu" or "cpu", what the mesh is made of.
    """
    return choose(list(DISPATCHES.values()), T, K, D, itemsize, layout, platform)
