"""Dispatch: bringing tokens to the devices of their experts and back.

A backend is one file with a `Dispatch` and a line in `DISPATCHES`.
"""

from jaxmoe.dispatch.all_to_all import ALL_TO_ALL
from jaxmoe.dispatch.base import ApplyExperts, Dispatch, DispatchLayout, DispatchStats
from jaxmoe.dispatch.replicated import REPLICATED

__all__ = ["DISPATCHES", "ApplyExperts", "Dispatch", "DispatchLayout", "DispatchStats", "choose", "get_dispatch"]

DISPATCHES: dict[str, Dispatch] = {backend.name: backend for backend in (REPLICATED, ALL_TO_ALL)}


def get_dispatch(name: str) -> Dispatch:
    """The backend called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in DISPATCHES:
        raise ValueError(f"dispatch backends are auto, {', '.join(DISPATCHES)}; got {name!r}")
    return DISPATCHES[name]


def choose(T: int, K: int, D: int, itemsize: int, layout: DispatchLayout) -> Dispatch:
    """The backend that sends the fewest bytes for T tokens over the expert axes; the first in the table among equals."""
    return min(DISPATCHES.values(), key=lambda backend: backend.wire_bytes(T, K, D, itemsize, layout))
